"""HookedTransformer (TransformerLens 3.9) and TransformerBridge (3.9 and 4)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from polylens.activations.activation import Activation
from polylens.activations.recognition import activation
from polylens.checks import Expert, Layer
from polylens.errors import InvalidInputError, PolylensError, UnsupportedModel
from polylens.hosts.base import (
    TOLERANCE,
    Arrival,
    Emitter,
    Function,
    Host,
    MLPSite,
    Norm,
    Observer,
    Weights,
    openings,
    relative_error,
    written,
)
from polylens.hosts.batch import (
    TOKENS,
    UNSCORED,
    Batch,
    Inputs,
    accepted,
    batch_of,
    plain,
    require_taken,
)
from polylens.hosts.moe import ExpertPassages, ExpertSite, Member, find_experts, in_order, no_norm
from polylens.hosts.norms import Call, matching_norm, norm_behind, norm_read
from polylens.hosts.passage import Emitting, Step, Taps, editing, observing, substituting
from polylens.hosts.quiet import quiet
from polylens.hosts.recording import stacked
from polylens.hosts.transformer_lens.junction import Junction, Wiring, interior_of
from polylens.normal_forms.weights import ROLES, GLUWeights, MLPWeights

_ACTIVATIONS = ("act", "act_fn", "activation_fn", "activation", "gelu_impl", "intermediate_act_fn")
_WRAPPED = "_original_component"
_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")
_SAMPLING: dict[str, Any] = dict(do_sample=True, temperature=1.0, stop_at_eos=False)
_SAMPLING |= dict(prepend_bos=False, return_type="tokens", verbose=False)


class TransformerLensHost(Host):
    """Both of TransformerLens' model classes."""

    def __init__(self, model: Any) -> None:
        self.is_bridge = hasattr(model, "_hook_registry")
        super().__init__(model, "TransformerBridge" if self.is_bridge else "HookedTransformer")
        self._wirings: dict[Layer, Wiring] = {}
        self._experts: dict[Layer, ExpertSite] = {}
        self._passages = ExpertPassages()

    @property
    def model_name(self) -> str:
        return str(getattr(self.model.cfg, "model_name", None) or super().model_name)

    @property
    def tokenizer(self) -> Any | None:
        return getattr(self.model, "tokenizer", None)

    @property
    def d_vocab(self) -> int | None:
        return getattr(self.model.cfg, "d_vocab", None)

    @property
    def n_positions(self) -> int | None:
        learned = getattr(self.model.cfg, "positional_embedding_type", None) == "standard"
        return self.model.cfg.n_ctx if learned else None

    @property
    def reads_tokens(self) -> bool:
        return True

    @property
    def embedding(self) -> Tensor:
        return self.model.W_E

    @property
    def unembedding(self) -> Tensor:
        return self.model.W_U

    def _given(self, inputs: Inputs, attention_mask: Tensor | None) -> Batch:
        if isinstance(inputs, Mapping):
            kwargs = plain(inputs)
            tokens = kwargs.pop(TOKENS, None)
            if not isinstance(tokens, Tensor):
                raise InvalidInputError(
                    f"a {self.name} reads {TOKENS}, got {', '.join(map(str, inputs)) or 'nothing'}"
                )
        else:
            tokens, kwargs = inputs, {}
        scored = {
            "labels": kwargs.pop("labels", None),
            "unscored": kwargs.pop(UNSCORED, None),
        }
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        # a bridge passes on what it does not take itself
        inner = self.model.original_model if self.is_bridge else self.module
        require_taken(inner, {n: v for n, v in kwargs.items() if n not in accepted(self.module)})
        return batch_of((tokens,), kwargs, **scored)

    def forward(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> Tensor:
        return self._forward(self.given(inputs, attention_mask), "logits")

    def logits(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> Tensor:
        return self._forward(self.given(inputs, attention_mask), "logits")

    def run(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> None:
        self._forward(self.given(inputs, attention_mask), None)

    def _forward(self, batch: Batch, return_type: str | None) -> Any:
        batch = batch.to(self.device)
        return self.model(*batch.args, return_type=return_type, **batch.kwargs)

    def sample_tokens(self, n_seq: int, seq_len: int, seed: int) -> Tensor:
        with quiet(self.module, seed):
            seq_len = min(seq_len, getattr(self.model.cfg, "n_ctx", None) or seq_len)
            bos = getattr(self.tokenizer, "bos_token_id", None)
            starts = openings(n_seq, bos, self.model.cfg.d_vocab, self.device)
            return written(starts, seq_len, self._continue, self.name)

    def _continue(self, tokens: Tensor, n_new: int) -> Tensor:
        if self.is_bridge:
            return self.model.generate(tokens, max_new_tokens=n_new, **_SAMPLING)
        # HookedTransformer.generate (3.9) shifts positions twice when it uses its cache
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, len(tokens))
        unseen = tokens
        for _ in range(n_new):
            # without a mask it wants a tokenizer that knows the padding
            mask = torch.ones_like(unseen)
            logits = self.model(unseen, past_kv_cache=cache, attention_mask=mask)
            unseen = torch.multinomial(logits[:, -1].float().softmax(-1), 1)
            tokens = torch.cat([tokens, unseen], dim=1)
        return tokens

    def sites(self) -> tuple[list[MLPSite], dict[Layer, str]]:
        found: dict[int, tuple[str, nn.Module]] = {}
        stacks: dict[str, nn.Module] = {}
        refused: dict[Layer, str] = {}
        blocks = getattr(self.model, "blocks", None)
        if blocks is None:
            raise UnsupportedModel(f"{self.name} has no single stack of blocks (encoder-decoder?)")
        for layer, block in enumerate(blocks):
            mlp, path = getattr(block, "mlp", None), f"blocks.{layer}.mlp"
            if mlp is None:
                refused[layer] = f"layer {layer}: block has no MLP"
            elif any(p.is_meta for p in block.parameters()):
                refused[layer] = f"layer {layer}: weights are on the meta device; load them first"
            elif routed := _stacks(path, mlp):
                stacks |= routed
                if shared := _shared(path, mlp):
                    found[layer] = shared
            else:
                found[layer] = path, mlp
        wirings = {n: self._candidate_wirings(blocks[n], mlp) for n, (_, mlp) in found.items()}
        captured = self._capture(wirings) if found else {}
        sites: list[MLPSite] = []
        for layer, (path, mlp) in found.items():
            try:
                site, self._wirings[layer] = self._verified(
                    layer, path, mlp, wirings[layer], captured[layer]
                )
                sites.append(site)
            except PolylensError as error:
                refused[layer] = f"layer {layer} ({path}): {error}"
        experts, problems = find_experts(self.module, self._probe, stacks.items())
        self._experts = {site.layer: site for site in experts}
        for path, problem in problems.items():
            layer = int(path.split(".")[1])
            refused.setdefault(layer, f"layer {layer}: {problem}")
        return sorted([*sites, *experts], key=in_order), refused

    def _candidate_wirings(self, block: nn.Module, mlp: Any) -> list[Wiring]:
        inside = interior_of(mlp)
        if not self.is_bridge:
            return [Wiring(block, mlp, None, mlp, block, "mlp", inside)]
        found = []
        if getattr(mlp, "name", None) is not None:
            found.append(Wiring(block, mlp, mlp.hook_in, mlp.hook_out, mlp, "hook_out", inside))
        first: Any = getattr(mlp, "in", None)
        last: Any = getattr(mlp, "out", None)
        if hasattr(first, "hook_in") and hasattr(last, "hook_out"):
            # Containerless MLPs, and containers that add the residual inside. A container may
            # fire `in.hook_in` before it calls `in`, so the pass starts at the container.
            entry = mlp if found else first
            points = first.hook_in, last.hook_out
            found.append(Wiring(block, entry, *points, last, "hook_out", inside))
        return found

    def _capture(self, candidates: dict[int, list[Wiring]]) -> dict[int, dict[Any, Any]]:
        """From one tiny forward pass: (x, y) at every candidate wiring, and y, z, h inside."""
        captured: dict[int, dict[Any, Any]] = {layer: {} for layer in candidates}

        def keep(layer: int, i: int, arrival: Arrival) -> None:
            captured[layer][i] = (arrival.x.detach().clone(), arrival.y.detach().clone())

        def look(layer: int, name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
            captured[layer][name] = out.detach().clone()

        with ExitStack() as stack:
            for layer, wirings in candidates.items():
                for i, wiring in enumerate(wirings):
                    stack.callback(Junction(wiring, partial(keep, layer, i), first=True).remove)
                interior = wirings[0].interior if wirings else None
                for name, module in {} if interior is None else interior.points().items():
                    hook = partial(look, layer, name)
                    stack.callback(module.register_forward_hook(hook).remove)
            self._probe()
        return captured

    def _probe(self, return_type: str | None = None) -> None:
        """A tiny forward pass that leaves no trace."""
        tokens = (torch.arange(16).reshape(2, 8) * 37 + 11) % self.model.cfg.d_vocab
        with quiet(self.module, seed=0):
            try:
                self._forward(self.given(tokens), return_type)
            except PolylensError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise UnsupportedModel(
                    f"{self.name} does not run on token ids alone ({error}), and polylens verifies "
                    "what it reads by one tiny forward pass"
                ) from error

    def _verified(
        self,
        layer: int,
        path: str,
        mlp: nn.Module,
        wirings: list[Wiring],
        captured: dict[Any, Any],
    ) -> tuple[MLPSite, Wiring]:
        reader = Reader(mlp, self._activation(mlp), gated_bias_after=not self.is_bridge)
        weights = reader.weights()
        errors = [_relative_error(weights, captured.get(i)) for i in range(len(wirings))]
        best = min(errors, default=inf)
        if best == inf:
            raise UnsupportedModel("no hook point carries its input and output")
        tolerance = TOLERANCE.get(weights.dtype, 1e-4)
        if not best <= tolerance:
            raise UnsupportedModel(
                f"not the normal form {type(weights).__name__} with {reader.act.name}: recomputed "
                f"outputs differ by {best:.2g} of the largest (tolerance {tolerance:.0e})"
            )
        site = MLPSite(
            layer=layer,
            path=path,
            kind="glu" if isinstance(weights, GLUWeights) else "mlp",
            activation=reader.act,
            d_in=weights.d_in,
            d_mlp=weights.d_mlp,
            d_out=weights.d_out,
            error=best,
            parameters=reader.parameters,
            weights=reader.weights,
        )
        chosen = errors.index(best)
        if not _shows_neurons(weights, captured[chosen][0], captured):
            return site, replace(wirings[chosen], interior=None)
        return site, wirings[chosen]

    def _activation(self, mlp: Any) -> Activation:
        original = getattr(mlp, "original_component", None)
        places = (mlp, original, getattr(original, "intermediate", None))
        for place, name in product(places, _ACTIVATIONS):
            candidate: Any = getattr(place, name, None)
            if callable(candidate):
                return activation(candidate)  # type: ignore[arg-type]
        return activation(str(self.model.cfg.act_fn))

    def observe(self, observers: Mapping[Layer, Observer]) -> AbstractContextManager[None]:
        return observing(self._join, observers)

    def substitute(self, functions: Mapping[Layer, Function]) -> AbstractContextManager[None]:
        return substituting(self._join, functions)

    def edit(self, functions: Mapping[Layer, Function]) -> AbstractContextManager[None]:
        return editing(self._join, functions)

    def _join(self, layer: Layer, function: Step, first: bool) -> Junction | Member:
        if isinstance(layer, Expert):
            if layer not in self._experts:
                self.sites()
            return self._passages.join(self._experts[layer], function, first)
        return Junction(self._wiring(layer), function, first)

    def _wiring(self, layer: Layer) -> Wiring:
        if layer not in self._wirings and layer in (refused := self.sites()[1]):
            raise UnsupportedModel(refused[layer])
        return self._wirings[layer]

    def install(self, site: MLPSite, emitter: Emitter) -> Callable[[], None]:
        from transformer_lens.hook_points import HookPoint

        points = {name: HookPoint() for name in emitter.point_names}
        undo = ExitStack()
        try:
            if isinstance(site, ExpertSite):
                owner, path = site.add_owner(undo), f"{site.stack.path}.expert_{site.layer.expert}"
            else:
                owner, path = self.module.get_submodule(site.path), site.path
            for name, point in points.items():
                self._add_point(owner, path, f"hook_poly_{name}", point, undo)
            self._points[site.layer] = points
            undo.callback(self._points.pop, site.layer, None)
            undo.callback(self._join(site.layer, Emitting(emitter, Taps(points)), False).remove)
        except BaseException:
            undo.close()
            raise
        return undo.close

    def _add_point(
        self, owner: nn.Module, path: str, name: str, point: nn.Module, undo: ExitStack
    ) -> None:
        full = f"{path}.{name}"
        point.name = full  # type: ignore[assignment]
        owner.add_module(name, point)
        undo.callback(owner._modules.pop, name, None)
        for registry in self._registries():
            registry[full] = point
        undo.callback(self._forget, full)

    def _forget(self, full: str) -> None:
        for registry in self._registries():
            registry.pop(full, None)
        if self.is_bridge:
            self.model._block_alias_cache = None

    def _registries(self) -> list[dict[str, nn.Module]]:
        # looked up anew every time: weight processing and setup() make new dictionaries
        if self.is_bridge:
            return [self.model._hook_registry]
        return [self.model.mod_dict, self.model.hook_dict]

    def norm(self, site: MLPSite) -> Norm:
        if isinstance(site, ExpertSite):
            raise no_norm(site)
        inputs: list[Tensor] = []
        with self.observe({site.layer: lambda arrival: inputs.append(arrival.x.detach().clone())}):
            calls = self._norm_calls([site.layer])
        return norm_read(site, calls[site.layer], inputs[0])

    def norms_behind(self, layers: Iterable[Layer], part: str) -> dict[Layer, Norm]:
        layers = [layer for layer in layers if not isinstance(layer, Expert)]
        outputs: dict[Layer, Tensor] = {}

        def keep(layer: Layer, module: nn.Module, args: tuple, out: Any) -> None:
            outputs[layer] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        with ExitStack() as hooks:
            for layer in layers:
                module = getattr(self.model.blocks[layer], part)
                hooks.callback(module.register_forward_hook(partial(keep, layer)).remove)
            calls = self._norm_calls(layers)
        # a block may call the parts of its MLP instead, and none that does has a norm behind it
        found = {layer: norm_behind(calls[layer], y) for layer, y in outputs.items()}
        return {layer: norm for layer, norm in found.items() if norm is not None}

    def _norm_calls(self, layers: Sequence[Layer]) -> dict[Layer, list[Call]]:
        """What the normalisations of blocks read and return in one tiny forward pass."""
        calls: dict[Layer, list[Call]] = {layer: [] for layer in layers}

        def keep(layer: Layer, module: nn.Module, args: tuple, out: Tensor) -> None:
            calls[layer].append((module, args[0].detach().clone(), out.detach().clone()))

        with ExitStack() as hooks:
            for layer in layers:
                norms = (getattr(self.model.blocks[layer], name, None) for name in _NORMS)
                for module in filter(None, norms):
                    hooks.callback(module.register_forward_hook(partial(keep, layer)).remove)
            self._probe()
        return calls

    def final_norm(self) -> Norm:
        calls: list[Call] = []

        def keep(module: nn.Module, args: tuple, out: Tensor) -> None:
            calls.append((module, args[0], out))

        last = getattr(self.model, "ln_final", None)
        if isinstance(last, nn.Module):
            hook = last.register_forward_hook(keep)
            try:
                self._probe("logits")
            finally:
                hook.remove()
        norm = matching_norm(*calls[0]) if calls else None
        if norm is None:
            raise UnsupportedModel(
                f"{self.name}: there is no LayerNorm or RMSNorm in front of the unembedding"
            )
        return norm


class Reader:
    """Reads an MLP component's weights by role; a bound method of it survives deepcopy.

    gated_bias_after: HookedTransformer adds a gated MLP's b_in after the product, which is
    b_in @ W_out in the output.
    """

    def __init__(self, mlp: nn.Module, act: Activation, gated_bias_after: bool) -> None:
        self.mlp = mlp
        self.act = act
        self.gated_bias_after = gated_bias_after

    def parameters(self) -> dict[str, Tensor]:
        """All that the component has: of a bridge, weights by role are made of them."""
        return dict(self.mlp.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for role in ROLES:
            try:
                tensor = getattr(self.mlp, role, None)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                raise UnsupportedModel(f"{role} cannot be read: {error}") from error
            if isinstance(tensor, Tensor):
                found[role] = tensor.detach()
        return found

    def weights(self) -> Weights:
        tensors = self.tensors()
        if not {"W_in", "W_out"} <= tensors.keys():
            raise UnsupportedModel(
                f"{type(self.mlp).__name__} has no matrices W_in and W_out (mixture of experts: "
                "attach to the Hugging Face model itself; or a quantised or custom MLP)"
            )
        if "W_gate" not in tensors:
            tensors.pop("b_gate", None)
            return MLPWeights(act=self.act, **tensors)
        if self.gated_bias_after and "b_in" in tensors:
            W_out, b_in = tensors["W_out"], tensors.pop("b_in")
            if b_in.any():
                b_out = tensors.get("b_out", torch.zeros_like(W_out[0])).double()
                tensors["b_out"] = (b_out + b_in.double() @ W_out.double()).to(W_out.dtype)
        return GLUWeights(act=self.act, **tensors)


def _stacks(path: str, mlp: nn.Module) -> dict[str, nn.Module]:
    """The stacks of experts in an MLP component, by TransformerLens' name of each."""
    named = ((_named(path, name), m) for name, m in mlp.named_modules())
    return {name: m for name, m in named if len(stacked(m)) >= 2}


def _shared(path: str, mlp: nn.Module) -> tuple[str, nn.Module] | None:
    """The shared experts of a mixture's component: the one in it with matrices by role."""
    found = [(_named(path, name), m) for name, m in mlp.named_modules() if _has_matrices(m)]
    return found[0] if len(found) == 1 else None


def _has_matrices(part: nn.Module) -> bool:
    W_in, W_out = (getattr(part, role, None) for role in ("W_in", "W_out"))
    return isinstance(W_in, Tensor) and isinstance(W_out, Tensor) and W_in.dim() == W_out.dim() == 2


def _named(path: str, name: str) -> str:
    """What TransformerLens calls a part of a component, which wraps the model's own."""
    return ".".join([path, *(part for part in name.split(".") if part not in ("", _WRAPPED))])


def _relative_error(weights: Weights, pair: tuple[Tensor, Tensor] | None) -> float:
    """max |normal form - y| / max |y| on a few rows."""
    if pair is None or pair[0].shape[-1] != weights.d_in:
        return inf
    x, y = (_some_rows(t) for t in pair)
    with torch.no_grad():
        return relative_error(weights(x.to(weights.dtype)), y)


def _shows_neurons(weights: Weights, x: Tensor, seen: dict[Any, Any]) -> bool:
    """Whether y, z (of a GLU only) and h were seen, and are these weights'; on a few rows."""
    with torch.no_grad():
        expected = weights.neurons(_some_rows(x).to(weights.dtype))
    got = {name: _some_rows(seen[name]) for name in "yzh" if name in seen}
    if {k: t.shape for k, t in got.items()} != {k: t.shape for k, t in expected.items()}:
        return False
    tolerance = TOLERANCE.get(weights.dtype, 1e-4)
    return all(relative_error(got[name], value) <= tolerance for name, value in expected.items())


def _some_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])[::4]
