"""What every `hosts.base.Host` must do, as tests to inherit.

A subclass sets `tokens` and defines `make_model()`.
"""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from polylens.errors import AttachmentError
from polylens.hosts import host_for

POINTS = ("in", "out")


class Watching:
    """Passes x and y through its points; y itself flows on."""

    point_names = POINTS

    def __call__(self, x: Tensor, y: Tensor, tap: Any) -> Tensor:
        for name, value in (("in", x), ("out", y)):
            if tap.wants(name):
                tap(name, value)
        return y


class Replacing:
    """0.5 x goes through its points and flows on instead of y."""

    point_names = POINTS

    def __call__(self, x: Tensor, y: Tensor, tap: Any) -> Tensor:
        return tap("out", 0.5 * tap("in", x))


def snapshot(model: Any) -> tuple:
    """Modules, hooks, hook names in order, and state: all that an undo must bring back."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = dict(model.named_modules())
    return (
        {name: id(m) for name, m in modules.items()},
        {name: [len(getattr(m, h)) for h in hooks] for name, m in modules.items()},
        [(name, id(point)) for name, point in model.hook_dict.items()],
        list(model.state_dict()),
        {name: id(p) for name, p in model.named_parameters()},
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in their dtype, relative to the largest entry."""
    tolerance = 4e-2 if actual.dtype == torch.bfloat16 else 1e-4
    error = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max()
    assert error <= tolerance * scale, f"differ by {error / scale:.2g} of the largest"


class HostContract:
    tokens: ClassVar[Tensor]

    def make_model(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def host(self):
        model = self.make_model()
        with torch.no_grad():
            model.run_with_cache(self.tokens)  # bridges wire hooks of their own lazily
        return host_for(model)

    def logits(self, host: Any) -> Tensor:
        with torch.no_grad():
            return host.logits(self.tokens)

    def install(self, host: Any, emitter: Any) -> list:
        return [host.install(site, emitter) for site in host.sites()[0]]

    def undo(self, undos: list) -> None:
        for undo in reversed(undos):
            undo()

    def test_sites_are_verified_and_leave_no_trace(self, host):
        host.model.train()
        before, rng = snapshot(host.model), torch.get_rng_state()
        sites, refused = host.sites()
        assert [site.layer for site in sites] == [0, 1]
        assert refused == {}
        for site in sites:
            assert site.error <= (4e-2 if site.weights().dtype == torch.bfloat16 else 1e-4)
        assert snapshot(host.model) == before
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(m.training for m in host.model.modules() if hasattr(m, "hook_in"))

    def test_observers_see_the_normal_form_also_under_substitution(self, host):
        sites, _ = host.sites()
        seen: dict[int, tuple] = {}
        observers = {s.layer: lambda x, y, n=s.layer: seen.update({n: (x, y)}) for s in sites}
        zeros = {s.layer: lambda x, y: torch.zeros_like(y) for s in sites}
        for outer, inner in (("observe", "substitute"), ("substitute", "observe")):
            functions = {"observe": observers, "substitute": zeros}
            undos = self.install(host, Replacing())
            with getattr(host, outer)(functions[outer]), getattr(host, inner)(functions[inner]):
                self.logits(host)
            self.undo(undos)
            for site in sites:
                x, y = seen[site.layer]
                assert x.shape[:2] == y.shape[:2] == self.tokens.shape
                assert_close(y, site.weights()(x))

    def test_an_observer_cannot_change_what_flows_on(self, host):
        reference = self.logits(host)
        with host.observe({0: lambda x, y: torch.zeros_like(y)}):
            assert torch.equal(self.logits(host), reference)

    def test_a_substitute_gets_the_true_output_and_has_the_last_word(self, host):
        reference = self.logits(host)
        undos = self.install(host, Replacing())
        with host.substitute({0: lambda x, y: y, 1: lambda x, y: y}):
            assert torch.equal(self.logits(host), reference)
        assert not torch.equal(self.logits(host), reference)
        self.undo(undos)
        with host.substitute({0: lambda x, y: torch.zeros_like(y)}):
            assert not torch.equal(self.logits(host), reference)
        assert torch.equal(self.logits(host), reference)

    def test_watching_changes_nothing_and_undo_is_exact(self, host):
        before, reference = snapshot(host.model), self.logits(host)
        undos = self.install(host, Watching())
        assert list(host.model.state_dict()) == before[3]
        with torch.no_grad():
            logits, cache = host.model.run_with_cache(self.tokens)
        assert torch.equal(logits, reference)
        for site in host.sites()[0]:
            x, y = (cache[f"poly_{name}", site.layer, "mlp"] for name in POINTS)
            assert_close(y, site.weights()(x))
        with pytest.raises(AttachmentError, match="hook_poly_in"):
            host.install(host.sites()[0][0], Watching())
        self.undo(undos)
        assert snapshot(host.model) == before
        assert torch.equal(self.logits(host), reference)

    def test_replacing_flows_on_and_its_hooks_are_effective(self, host):
        reference = self.logits(host)
        undos = self.install(host, Replacing())
        replaced = self.logits(host)
        assert not torch.equal(replaced, reference)

        def zero(value, hook):
            return torch.zeros_like(value)

        for name in ("mlp.hook_poly_in", "mlp.hook_poly_out", "hook_mlp_out"):
            with torch.no_grad():
                edited = host.model.run_with_hooks(
                    self.tokens, fwd_hooks=[(f"blocks.0.{name}", zero)]
                )
            assert not torch.equal(edited, replaced), name
        self.undo(undos)

    def test_undo_is_exact_after_an_exception_at_every_hook_point(self, host):
        before, reference = snapshot(host.model), self.logits(host)
        undos = self.install(host, Replacing())

        def fail(value, hook):
            raise KeyError("injected")

        failed = 0
        for name in host.model.hook_dict:
            try:
                with torch.no_grad():
                    host.model.run_with_hooks(self.tokens, fwd_hooks=[(name, fail)])
            except KeyError:
                failed += 1
            except ValueError as error:
                if "Cannot add hook" not in str(error):  # a point that is switched off
                    raise
            host.model.reset_hooks()
            kept = [
                name
                for name, m in host.model.named_modules()
                for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
                if getattr(getattr(hook, "__self__", None), "_x", None) is not None
            ]
            assert kept == [], name
        assert failed > 8
        self.undo(undos)
        assert snapshot(host.model) == before
        assert torch.equal(self.logits(host), reference)

    def test_gradients_flow_through_a_replacement(self, host):
        undos = self.install(host, Replacing())
        grads = []

        def grab(value, hook):
            value = value.detach().requires_grad_(True)
            value.register_hook(grads.append)
            return value

        with host.model.hooks(fwd_hooks=[("blocks.1.mlp.hook_poly_in", grab)]):
            host.model(self.tokens).square().mean().backward()
        self.undo(undos)
        assert torch.isfinite(grads[0]).all()
        assert grads[0].abs().max() > 0

    def test_a_deep_copy_is_independent(self, host):
        undos = self.install(host, Replacing())
        replaced = self.logits(host)
        twin = host_for(copy.deepcopy(host.model))
        self.undo(undos)
        with torch.no_grad():
            for parameter in host.model.parameters():
                parameter.zero_()
        assert_close(self.logits(twin), replaced)

    def test_padding_on_the_right_is_ignored(self, host):
        mask = torch.ones_like(self.tokens)
        mask[:, -3:] = 0
        other = self.tokens.clone()
        other[:, -3:] = 1
        with torch.no_grad():
            a, b = host.logits(self.tokens, mask), host.logits(other, mask)
        assert_close(a[:, :-3], b[:, :-3])


def test_snapshot_notices_each_kind_of_leftover():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.hook_dict = {"a": self.layer, "b": self.layer}

    model = Model()
    before = snapshot(model)
    assert snapshot(model) == before
    handle = model.layer.register_forward_hook(lambda *args: None)
    assert snapshot(model) != before
    handle.remove()
    model.hook_dict = dict(reversed(model.hook_dict.items()))
    assert snapshot(model) != before
    model.hook_dict = dict(reversed(model.hook_dict.items()))
    assert snapshot(model) == before
    model.add_module("extra", torch.nn.Identity())
    assert snapshot(model) != before


def test_assert_close_fails_on_what_is_not():
    x = torch.linspace(-1, 1, 9)
    assert_close(x, x + 1e-6)
    with pytest.raises(AssertionError, match="differ by"):
        assert_close(x, x + 1e-3)
