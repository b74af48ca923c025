"""What every host must do with an attached lens, as tests to inherit.

A subclass defines the fixture `specimen` (of class scope, parametrised over its models, each with
layers 0 and 1 and weights that are not zero) and overrides what its framework does differently.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import polylens
from polylens.errors import AttachmentError, InvalidInputError, UnsupportedModel
from polylens.hosts import host_for
from polylens.hosts.base import TOLERANCE, relative_error
from polylens.installed.installation import Installation
from tests.hf_models import D_VOCAB

TOKENS = torch.randint(3, D_VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))
DEGREE = 3
POINTS = ("in", "out", "error", *(f"degree_{k}" for k in range(DEGREE + 1)))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def inputs_of(model: Any, tokens: Tensor = TOKENS, mask: Tensor | None = None) -> Any:
    """What the model is run on: of an encoder with a decoder both read the tokens."""
    config = getattr(host_for(model).module, "config", None)
    given = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    if getattr(config, "is_encoder_decoder", False):
        return {**given, "decoder_input_ids": tokens}
    return tokens if mask is None else given


def attach(model: Any, **options: Any) -> polylens.Lens:
    options = {"degree": DEGREE, **options}
    return polylens.attach(model, inputs_of(model), progress=False, **options)


def logits(model: Any, tokens: Tensor = TOKENS, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return host_for(model).logits(inputs_of(model, tokens, mask))


def ways(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, logits [pos, d_vocab] of the first text) for every way in which it may be read."""
    text, n = TOKENS[:1], TOKENS.shape[1]
    pad, kept = torch.zeros(1, 5, dtype=torch.long), torch.ones_like(text)
    mask = torch.cat([pad, kept], 1)
    yield "alone", logits(model, text)[0]
    yield "in a batch", logits(model)[0]
    yield "padded on the right", logits(model, torch.cat([text, pad], 1), mask.flip(1))[0, :n]
    yield "padded on the left", logits(model, torch.cat([pad, text], 1), mask)[0, 5:]
    module = host_for(model).module
    if type(module).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel"):  # take such a mask
        among = torch.full((2 * n, 2 * n), torch.finfo(module.dtype).min).triu(1)
        among[n:, :n] = torch.finfo(module.dtype).min
        given = {
            "input_ids": torch.cat([TOKENS[1:2], text], 1),
            "attention_mask": among[None, None].to(module.dtype),
            "position_ids": torch.arange(n).repeat(2)[None],
        }
        given = {name: each.to(module.device) for name, each in given.items()}
        with torch.no_grad():
            yield "packed", module(**given).logits[0, n:]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tokens: logits(model, tokens), [*TOKENS.split(1)] * 4))
    sys.setswitchinterval(interval)
    for i, out in enumerate(found[:: len(TOKENS)]):
        yield f"beside other threads, {i}", out[0]


def in_parts(model: Any, sizes: list[int]) -> Tensor | None:
    """Logits [pos, d_vocab] of the first text in parts, with a cache; None if there is none."""
    module, text, name = host_for(model).module, TOKENS[:1], "input_ids"
    if not module.can_generate():
        return None
    text = text.to(module.device)
    given, found = {"use_cache": True}, []
    if module.config.is_encoder_decoder:
        given["encoder_outputs"], name = module.get_encoder()(text), "decoder_input_ids"
    for part in text.split(sizes, 1):
        out = module(**{name: part}, **given)
        given["past_key_values"] = out.past_key_values
        found.append(out.logits[0])
    return torch.cat(found)


def loss(module: Any) -> Tensor:
    text = TOKENS[:1].to(module.device)
    given = inputs_of(module, text)
    given = given if isinstance(given, dict) else {"input_ids": given}
    return module(**given, labels=text, use_cache=False).loss


def gradient(module: Any) -> Tensor:
    """That of one text's loss by the embedding, through checkpoints where there are some."""
    module.zero_grad()
    loss(module).backward()
    found = module.get_input_embeddings().weight.grad.clone()
    module.zero_grad()
    return found


def tables(lens) -> dict:
    """Copies of all that the polynomials of a lens consist of."""
    return {n: {k: t.clone() for k, t in lens[n].state_dict().items()} for n in lens}


def assert_same_bits(mine: dict, theirs: dict) -> None:
    """Of two `tables`."""
    assert mine.keys() == theirs.keys()
    for layer, state in mine.items():
        assert state.keys() == theirs[layer].keys()
        assert all(torch.equal(t, theirs[layer][name]) for name, t in state.items()), layer


def module_snapshot(module: nn.Module) -> tuple:
    """Modules, hooks, training flags, state and parameters: all that must come back."""
    return (
        [(name, id(m), m.training) for name, m in module.named_modules()],
        [[list(getattr(m, hooks)) for hooks in HOOKS] for m in module.modules()],
        list(module.state_dict()),
        [(name, id(p)) for name, p in module.named_parameters()],
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in their dtype, relative to the largest entry."""
    tolerance = 4e-2 if actual.dtype == torch.bfloat16 else 1e-4
    error = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max()
    assert error <= tolerance * scale, f"differ by {error / scale:.2g} of the largest"


def assert_checkpoints(module: Any, lens: polylens.Lens) -> None:
    """What flowed in a checkpoint flows when it runs again, also after the context was left."""
    true = gradient(module)
    with lens.replaced():
        replaced = gradient(module)
    assert (replaced - true).norm() > 1e-3 * true.norm()
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    for reentrant in (True, False):
        module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        module.enable_input_require_grads()
        first = loss(module)
        with lens.replaced():
            second = loss(module)
        with lens.replaced(degree=1):
            second.backward()
            assert_close(module.get_input_embeddings().weight.grad, replaced)
            module.zero_grad()
            first.backward()
        assert_close(module.get_input_embeddings().weight.grad, true)
        module.zero_grad()
        with lens.replaced(), torch.no_grad():
            loss(module)


class Specimen:
    """A model that tests share: what one of them leaves changed is made anew for the next."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self._make = make
        self._model: Any = None
        self._as_made: Any = None

    def bare(self) -> Any:
        """The model as it was made, without a lens."""
        if self._model is not None and (lens := polylens.attached(self._model)):
            lens.detach()
        if self._model is None or self._state() != self._as_made:
            self._model = self._make()
            self._as_made = self._state()
        return self._model

    def attached(self) -> tuple[Any, polylens.Lens]:
        """The model, with a lens that the tests before this one may have used too."""
        lens = None if self._model is None else polylens.attached(self._model)
        if lens is None or lens.degree != DEGREE:
            lens = attach(self.bare())
        return self._model, lens

    def _state(self) -> Any:
        module = host_for(self._model).module
        tensors = [*module.parameters(), *module.buffers()]
        return module_snapshot(module), [(t.dtype, t.data_ptr(), t._version) for t in tensors]


class NoMoreHooks(Exception):
    pass


class HostContract:
    @pytest.fixture
    def model(self, specimen):
        return specimen.bare()

    @pytest.fixture
    def attached(self, specimen):
        return specimen.attached()

    def snapshot(self, model: Any) -> tuple:
        return module_snapshot(host_for(model).module)

    def point(self, lens: polylens.Lens, layer: int, name: str) -> nn.Module:
        path = lens.sites[layer].path.replace("[", ".expert_").removesuffix("]")
        return lens.host.module.get_submodule(f"{path}.hook_poly_{name}")

    def generate(self, model: Any) -> Tensor:
        """Five tokens after the first sequence; skips if the model cannot."""
        module = host_for(model).module
        if not module.can_generate():
            pytest.skip("an encoder")
        options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        return module.generate(TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), **options)

    def readings(self, model: Any) -> dict[str, Tensor]:
        """`ways`, and in parts with a cache."""
        found = dict(ways(model))
        with torch.no_grad():
            for sizes in ([5, 7], [1] * TOKENS.shape[1], [11, 1]):
                out = self.in_parts(model, sizes)
                if out is not None:
                    found[f"in {len(sizes)} parts, the first of {sizes[0]}"] = out
        return found

    def in_parts(self, model: Any, sizes: list[int]) -> Tensor | None:
        return in_parts(model, sizes)

    @contextmanager
    def hooked(self, lens: polylens.Lens, names: tuple[str, ...], hook: Any):
        """Within the context hook(layer, name, value) runs at points of all layers."""
        with ExitStack() as stack:
            for layer in lens.layers:
                for name in names:
                    handle = self.point(lens, layer, name).register_forward_hook(
                        lambda m, args, out, layer=layer, name=name: hook(layer, name, out)
                    )
                    stack.callback(handle.remove)
            yield

    def record(self, lens: polylens.Lens, tokens: Tensor = TOKENS) -> dict[tuple, Tensor]:
        """{(layer, name): value} of one pass, the true output as name "true"."""
        values: dict[tuple, Tensor] = {}

        def keep(layer: int, name: str, value: Tensor) -> None:
            values[layer, name] = value

        def observer(layer: int):
            return lambda a: keep(layer, "true", a.y)

        observers = {layer: observer(layer) for layer in lens.layers}
        with self.hooked(lens, POINTS, keep), lens.host.observe(observers), torch.no_grad():
            lens.host.logits(inputs_of(lens.host.model, tokens))
        return values

    def test_degrees_and_error_add_up_to_the_true_output(self, attached):
        _, lens = attached
        values = self.record(lens)
        for layer in lens.layers:
            out, error, true = (values[layer, name] for name in ("out", "error", "true"))
            assert isinstance(layer, polylens.Expert) or out.shape[:2] == TOKENS.shape
            assert_close(sum(values[layer, f"degree_{k}"] for k in range(DEGREE + 1)), out)
            assert_close(out + error, true)
            assert_close(out, lens[layer](values[layer, "in"]))
            assert bool(error.any())

    def test_replaced_flows_on_nests_and_comes_back(self, attached):
        model, lens = attached
        reference = logits(model)
        with lens.replaced():
            all_layers = logits(model)
            with lens.replaced(layers=0, degree=1):
                assert not torch.equal(logits(model), all_layers)
            assert torch.equal(logits(model), all_layers)
        with lens.replaced(layers=[0]):
            one = logits(model)
        assert torch.equal(logits(model), reference)
        assert not torch.equal(all_layers, reference)
        assert not torch.equal(one, reference)

    def test_an_edit_changes_what_flows(self, attached):
        model, lens = attached
        seen = []
        with torch.no_grad():
            n = lens.layers[-1]
            for flow, function in ((lens.suspended, lens[n].weights), (lens.replaced, lens[n])):
                with flow():
                    reference = logits(model)
                    with lens.host.edit({n: lambda arrival: seen.append(arrival) or arrival.y}):
                        assert_close(logits(model), reference)
                    assert_close(seen[-1].y, function(seen[-1].x))
                    with lens.host.edit({n: lambda arrival: 2 * arrival.y}):
                        assert not torch.equal(logits(model), reference)
                    assert torch.equal(logits(model), reference)

    def test_contexts_may_be_left_in_any_order(self, attached):
        model, lens = attached
        reference = logits(model)
        with lens.replaced(degree=1):
            lower = logits(model)
        outer, inner = lens.replaced(degree=1), lens.replaced()
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        assert not torch.equal(logits(model), lower)
        inner.__exit__(None, None, None)
        assert torch.equal(logits(model), reference)
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(AttachmentError, match=r"neither copied nor pickled.*save"):
                copied(lens)

    def test_edits_at_a_point_flow_on_while_replaced(self, attached):
        model, lens = attached
        reference = logits(model)
        with lens.replaced():
            unedited = logits(model)
        for name in ("in", "out", "degree_1"):
            with self.hooked(lens, (name,), lambda layer, name, value: torch.zeros_like(value)):
                assert torch.equal(logits(model), reference)
                with lens.replaced():
                    assert not torch.equal(logits(model), unedited), name

    def test_gradients_flow_through_a_replacement(self, attached):
        _, lens = attached
        values: dict[int, Tensor] = {}
        with (
            lens.replaced(),
            self.hooked(lens, ("out",), lambda layer, name, value: values.update({layer: value})),
        ):
            out = lens.host.logits(inputs_of(lens.host.model))
            gradients = torch.autograd.grad(out.square().mean(), list(values.values()))
        assert all(bool(torch.isfinite(g).all() and g.any()) for g in gradients)

    def test_observers_see_the_normal_form_also_under_substitution(self, attached):
        model, lens = attached
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def observer(layer):
            return lambda a: seen.update({layer: (a.x, a.y)})

        contexts = {
            "observe": {layer: observer(layer) for layer in lens},
            "substitute": {layer: lambda a: torch.zeros_like(a.y) for layer in lens},
        }
        for outer, inner in (tuple(contexts), tuple(contexts)[::-1]):
            host = lens.host
            with (
                lens.replaced(),
                getattr(host, outer)(contexts[outer]),
                getattr(host, inner)(contexts[inner]),
            ):
                logits(model)
            for layer, (x, y) in seen.items():
                assert x.shape[:-1] == y.shape[:-1]
                assert isinstance(layer, polylens.Expert) or x.shape[:2] == TOKENS.shape
                assert_close(y, lens.sites[layer].weights()(x))
            assert seen.keys() == set(lens)
            seen.clear()

    def test_a_substitute_gets_the_true_output_and_has_the_last_word(self, attached):
        model, lens = attached
        reference = logits(model)
        with lens.replaced():
            with lens.host.substitute({layer: lambda a: a.y for layer in lens}):
                assert torch.equal(logits(model), reference)
            with lens.host.substitute({layer: lambda a: 0 * a.y for layer in lens}):
                zeroed = logits(model)
            assert not torch.equal(logits(model), zeroed)
        assert not torch.equal(zeroed, reference)
        assert torch.equal(logits(model), reference)

    def test_one_pass_with_a_cache_of_what_flows_through_the_points(self, attached):
        model, lens = attached
        reference = logits(model)
        before = self.snapshot(model)
        with torch.no_grad():
            out, cache = lens.run_with_cache(inputs_of(lens.host.model))
        assert torch.equal(out, reference)
        assert self.snapshot(model) == before
        assert set(cache) == {(name, layer) for name in POINTS for layer in lens.layers}
        values = self.record(lens)
        assert all(torch.equal(cache[name, n], values[n, name]) for name, n in cache)
        with lens.replaced(), torch.no_grad():
            out, cache = lens.run_with_cache(
                inputs_of(lens.host.model), layers=lens.layers[-1], names=["out"]
            )
            assert_close(out, lens.host.logits(inputs_of(lens.host.model)))
        assert set(cache) == {("out", lens.layers[-1])}
        for options in ({"layers": 9}, {"names": ["inn"]}):
            with pytest.raises(InvalidInputError, match=r"no layer 9|no hook point 'inn'"):
                lens.run_with_cache(inputs_of(lens.host.model), **options)
        lens.detach()
        with pytest.raises(AttachmentError, match="detached"):
            lens.run_with_cache(inputs_of(lens.host.model))

    def test_a_replaced_or_exported_model_is_a_function_of_its_text(self, attached):
        """In all ways in which the true model is one."""
        model, lens = attached
        true = self.readings(model)
        tolerance = TOLERANCE[true["alone"].dtype]
        of_text = {w for w, out in true.items() if relative_error(out, true["alone"]) < tolerance}
        assert of_text >= {"in a batch", "padded on the right", "beside other threads, 0"}

        def require(found, expected):
            off = {way: relative_error(found[way], expected) for way in of_text}
            assert {way: error for way, error in off.items() if not error < tolerance} == {}

        with lens.replaced():
            found = self.readings(model)
        require(found, found["alone"])
        assert not torch.equal(found["alone"], true["alone"])
        try:
            exported = lens.export()
        except AttachmentError:
            return
        require(self.readings(exported), found["alone"])

    @pytest.mark.more
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_checkpoints_compute_again_what_they_computed(self, model):
        module = host_for(model).module
        if not isinstance(module, PreTrainedModel) or not module.supports_gradient_checkpointing:
            pytest.skip("no checkpoints")
        with attach(model) as lens:
            assert_checkpoints(module, lens)

    def test_sites_are_verified_and_leave_no_trace(self, model):
        host = host_for(model)
        host.module.train()
        before, rng = self.snapshot(model), torch.get_rng_state()
        sites, refused = host.sites()
        assert refused == {}
        for site in sites:
            assert site.error <= (4e-2 if site.weights().dtype == torch.bfloat16 else 1e-4)
        assert self.snapshot(model) == before
        assert torch.equal(torch.get_rng_state(), rng)

    def test_attached_changes_nothing_and_detach_restores_everything(self, model):
        before, reference = self.snapshot(model), logits(model)
        lens = attach(model)
        assert lens.refused == {}
        assert torch.equal(logits(model), reference)
        self.record(lens)
        assert torch.equal(logits(model), reference)
        assert list(lens.host.module.state_dict()) == before[2]
        assert [name for name, _ in lens.host.module.named_parameters()] == [
            name for name, _ in before[3]
        ]
        lens.detach()
        assert self.snapshot(model) == before
        assert torch.equal(logits(model), reference)

    def test_an_exception_at_any_module_leaves_nothing(self, model):
        before, reference = self.snapshot(model), logits(model)
        lens = attach(model)

        def fail(*args):
            raise KeyError("injected")

        failed = 0
        modules = list(lens.host.module.named_modules())
        for name, module in modules[:: 1 + len(modules) // 50]:
            handle = module.register_forward_hook(fail)
            try:
                with lens.replaced():
                    logits(model)
            except KeyError:
                failed += 1
            handle.remove()
            passages = {
                hook.__self__
                for m in lens.host.module.modules()
                for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
                if hasattr(hook, "__self__")
            }
            now = [vars(p)["_now"] for p in passages if "_now" in vars(p)]
            assert now or not any(isinstance(n, int) for n in lens)  # a stack keeps nothing
            assert all(n.x is None and n.inside is None and not n.done for n in now), name
        assert failed > 8
        assert torch.equal(logits(model), reference)
        lens.detach()
        assert self.snapshot(model) == before
        with pytest.raises(KeyError, match="injected"), attach(model):
            fail()
        assert self.snapshot(model) == before

    def test_a_failure_at_any_step_of_attaching_leaves_nothing(self, model, monkeypatch):
        before, left, installing = self.snapshot(model), 0, False
        install = type(host_for(model)).install

        def noted(self, site, emitter):
            nonlocal installing
            installing = True
            return install(self, site, emitter)

        def limited(register):
            def wrapper(module, *args, **kwargs):
                nonlocal left
                if installing and left == 0:
                    raise NoMoreHooks
                left -= installing
                return register(module, *args, **kwargs)

            return wrapper

        monkeypatch.setattr(type(host_for(model)), "install", noted)
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            monkeypatch.setattr(nn.Module, name, limited(getattr(nn.Module, name)))
        with pytest.raises(NoMoreHooks):
            attach(model, degree=1)
        assert self.snapshot(model) == before
        left = 10**9
        lens = attach(model, degree=1)
        lens.detach()
        polynomials = {layer: lens[layer] for layer in lens}
        for steps in count():
            left = steps
            try:
                again = Installation(lens.host, lens.sites, polynomials, {}, "", True)
            except NoMoreHooks:
                assert self.snapshot(model) == before
                assert polylens.attached(model) is None
            else:
                again.detach()
                break
        assert self.snapshot(model) == before
        assert steps >= max(1, 2 * sum(isinstance(n, int) for n in lens))

    def test_generation_is_replaced_at_every_step(self, model):
        plain = self.generate(model)
        lengths: list[int] = []

        def note(layer, name, out):
            if isinstance(layer, polylens.Expert):
                lengths.append(len(out))
            elif layer == lens.layers[-1]:  # where there is an encoder, it runs but once
                lengths.append(out.shape[1])

        with attach(model) as lens:
            assert torch.equal(self.generate(model), plain)
            with lens.replaced(), self.hooked(lens, ("out",), note):
                assert self.generate(model).shape == plain.shape
        assert lengths.count(1) >= 4

    def test_a_deep_copy_is_independent(self, model):
        true = logits(model)
        lens = attach(model)
        with lens.replaced():
            twin = copy.deepcopy(lens.host.module)
        with pytest.raises(AttachmentError, match="already"):
            attach(twin)
        lens.detach()
        assert_close(logits(twin), true)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(logits(model), true)

    def test_an_observer_cannot_change_what_flows_on(self, model):
        reference, host = logits(model), host_for(model)
        first = host.sites()[0][0].layer
        with host.observe({first: lambda a: torch.zeros_like(a.y)}):
            assert torch.equal(logits(model), reference)

    def test_padding_on_the_right_is_ignored(self, model):
        mask, other = torch.ones_like(TOKENS), TOKENS.clone()
        mask[:, -3:] = 0
        other[:, -3:] = 5
        a, b = logits(model, TOKENS, mask), logits(model, other, mask)
        assert_close(a[:, :-3], b[:, :-3])

    def test_a_second_lens_takes_the_place_of_the_first(self, model):
        module = host_for(model).module
        with attach(model) as first:
            if module is not model:
                with pytest.raises(AttachmentError, match="already"):
                    attach(module)
            with pytest.warns(UserWarning, match="takes its place"):
                second = attach(model)
            assert (first.is_attached, second.is_attached) == (False, True)
        second.detach()
        attach(model).detach()

    def test_weights_that_are_not_loaded_are_refused_by_name(self, model):
        host_for(model).module.to("meta")
        before = self.snapshot(model)
        with pytest.raises(UnsupportedModel, match="meta device"):
            attach(model)
        assert self.snapshot(model) == before


def test_the_snapshot_notices_each_kind_of_leftover():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = module_snapshot(model)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model[0], register)(lambda *args: None)
        assert module_snapshot(model) != before
        handle.remove()
    assert module_snapshot(model) == before
    model[0].training = False
    assert module_snapshot(model) != before
    model[0].training = True
    weight, model[0].weight = model[0].weight, nn.Parameter(model[0].weight.detach())
    assert module_snapshot(model) != before
    model[0].weight = weight
    assert module_snapshot(model) == before
    model.add_module("extra", nn.Identity())
    assert module_snapshot(model) != before


def test_assert_close_fails_on_what_is_not():
    x = torch.linspace(-1, 1, 9)
    assert_close(x, x + 1e-6)
    with pytest.raises(AssertionError, match="differ by"):
        assert_close(x, x + 1e-3)
