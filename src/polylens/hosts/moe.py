"""Mixtures of experts: each expert of a stack as a GLU, on the tokens that are routed to it."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polylens.activations.activation import Activation
from polylens.activations.recognition import activation
from polylens.checks import Expert
from polylens.errors import AttachmentError, PolylensError, UnsupportedModel
from polylens.hosts.base import TOLERANCE, Arrival, MLPSite, Places, relative_error
from polylens.hosts.passage import Step
from polylens.hosts.quiet import quiet
from polylens.hosts.recording import half, position, stacked
from polylens.normal_forms.weights import GLUWeights

_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")


@dataclass(frozen=True)
class ExpertSite(MLPSite):
    """One expert, verified to be a GLU.

    The block's number in `layer` is that of the stack in order of execution if several stacks
    are in one block. `path` is that of the module that holds the stack, with the expert's number
    in brackets.

    Attributes:
        stack: the whole stack.
    """

    layer: Expert
    stack: "Stack" = field(repr=False, kw_only=True)

    def add_owner(self, undo: ExitStack) -> nn.Module:
        """A new module `expert_<number>` in the stack, for hook points; `undo` takes it out."""
        owner, name = nn.Module(), f"expert_{self.layer.expert}"
        self.stack.module.add_module(name, owner)
        undo.callback(self.stack.module._modules.pop, name, None)
        return owner


@dataclass(frozen=True, eq=False)
class Stack:
    """A module with all experts' matrices in two parameters.

    Attributes:
        path, module: where it is.
        up, down: names of the parameters [E, 2 d_mlp, d] and [E, d, d_mlp], or, if not
            `out_first`, [E, d, 2 d_mlp] and [E, d_mlp, d]; the first half is activated.
        act: the activation.
        out_first: whether the second axis is that of the outputs.
    """

    path: str
    module: nn.Module
    up: str
    down: str
    act: Activation
    out_first: bool

    @property
    def n_experts(self) -> int:
        return len(getattr(self.module, self.up))

    def parameters(self) -> dict[str, Tensor]:
        """The module's own two, by name."""
        return {name: getattr(self.module, name) for name in (self.up, self.down)}

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """An expert's matrices by role, views in x @ W orientation."""
        up = getattr(self.module, self.up).detach()[expert]
        down = getattr(self.module, self.down).detach()[expert]
        up, down = (up.T, down.T) if self.out_first else (up, down)
        return {"W_gate": half(up, 1), "W_in": half(up, 2), "W_out": down}

    def weights(self, expert: int) -> GLUWeights:
        """The validated normal form over `tensors`."""
        return GLUWeights(act=self.act, **self.tensors(expert))

    def outputs(self, expert: int, x: Tensor) -> Tensor:
        """The expert's true output, before it is weighted; differentiable in x only."""
        t = self.tensors(expert)
        return (self.act(x @ t["W_gate"]) * (x @ t["W_in"])) @ t["W_out"]


@dataclass(frozen=True)
class Routing:
    """One call of a stack: x [n, d], and the experts [n, k] with their weights [n, k]."""

    x: Tensor
    chosen: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(rows of x that the expert gets, the weight of its output for each)."""
        rows, slots = (self.chosen == expert).nonzero(as_tuple=True)
        return rows, self.weights[rows, slots]


def find_experts(
    model: nn.Module,
    run: Callable[[], object],
    named: Iterable[tuple[str, nn.Module]] | None = None,
) -> tuple[list[ExpertSite], dict[str, str]]:
    """Every expert of every stack that one run passes through, verified on what was routed.

    A stack is a module with two three-dimensional parameters that is called with hidden states,
    the experts of each token and their weights (Mixtral, Qwen-MoE, OLMoE, DeepSeek). The router
    and shared experts are not part of it.

    Args:
        model: any module with loaded weights.
        run: one small forward pass.
        named: modules of it that may be stacks, by path; all of them by default.

    Returns:
        Sites in order of execution, and for each refused stack (by path) the reason.
    """
    named = model.named_modules() if named is None else named
    stacks = [(path, m) for path, m in named if len(stacked(m)) >= 2]
    if not stacks:
        return [], {}
    calls: dict[str, tuple[nn.Module, Routing | None, Any]] = {}

    def keep(path: str, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if path not in calls:
            calls[path] = (module, _routing(args, kwargs), out)

    with ExitStack() as hooks, quiet(model):
        for path, module in stacks:
            handle = module.register_forward_hook(partial(keep, path), with_kwargs=True)
            hooks.callback(handle.remove)
        run()
    sites: list[ExpertSite] = []
    refused: dict[str, str] = {}
    layers = [position(path) for path in calls]
    one_each = None not in layers and len(set(layers)) == len(layers)
    for order, (path, (module, routing, out)) in enumerate(calls.items()):
        try:
            stack, error = _verified(path, module, routing, out)
        except PolylensError as problem:
            refused[path] = f"{path} ({type(module).__name__}): {problem}"
            continue
        place = layers[order]
        layer = place[1] if one_each and place is not None else order
        sites += [_site(stack, layer, expert, error) for expert in range(stack.n_experts)]
    return sites, refused


def in_order(site: MLPSite) -> tuple[int, int]:
    """What sorts sites as they are executed: a layer's experts after its shared ones."""
    layer = site.layer
    return (layer.layer, layer.expert) if isinstance(layer, Expert) else (layer, -1)


def no_norm(site: ExpertSite) -> UnsupportedModel:
    return UnsupportedModel(
        f"{site.path} sees the inputs that its router sends there, about which the norm says "
        "nothing; give tokens"
    )


class ExpertPassage:
    """Runs functions at experts of one stack in every forward pass of the model.

    A function gets the Arrival of the inputs that are routed to its expert. What it returns goes
    on in place of y, to the next function and into the stack's output; None leaves y as it is.
    What the other experts add, and the router, stay as they are.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.functions: dict[int, list[Step]] = {}
        self._handles: list[Any] = []

    def __getstate__(self) -> dict:
        # the hooks of a copy came with its modules
        return {**self.__dict__, "_handles": []}

    def add(self, expert: int, function: Step, first: bool) -> "Member":
        """Put a function at the end of an expert's functions, or in front of them."""
        if not self._handles:
            handle = self.stack.module.register_forward_hook(self._at_stack, with_kwargs=True)
            self._handles.append(handle)
        functions = self.functions.setdefault(expert, [])
        functions.insert(0 if first else len(functions), function)
        return Member(self, expert, function)

    def drop(self, expert: int, function: Step) -> None:
        kept = [f for f in self.functions[expert] if f is not function]
        self.functions[expert] = kept
        if not any(self.functions.values()):
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _at_stack(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        routing = _routing(args, kwargs)
        if routing is None:
            raise AttachmentError(
                f"{self.stack.path} is called in another way than when it was found"
            )
        changed = None
        for expert, functions in self.functions.items():
            rows, weights = routing.of(expert)
            if not functions or not len(rows):
                continue
            x, places = routing.x[rows], Places(rows)
            true = y = self.stack.outputs(expert, x)
            for function in functions:
                new = function(Arrival(x, y, places))
                y = y if new is None else new
            if y is not true:
                change = ((y - true) * weights[:, None].to(y.dtype)).to(out.dtype)
                flat = out.reshape(len(routing.x), -1) if changed is None else changed
                changed = flat.index_add(0, rows, change)
        return None if changed is None else changed.reshape(out.shape)


class ExpertPassages(dict[nn.Module, ExpertPassage]):
    """The passage of each stack."""

    def join(self, site: ExpertSite, function: Step, first: bool) -> "Member":
        """Put a function at an expert; see `ExpertPassage.add`."""
        passage = self.setdefault(site.stack.module, ExpertPassage(site.stack))
        return passage.add(site.layer.expert, function, first)


@dataclass(frozen=True)
class Member:
    """A function in a passage; `remove` takes it out."""

    passage: ExpertPassage
    expert: int
    function: Step

    def remove(self) -> None:
        self.passage.drop(self.expert, self.function)


def _routing(args: tuple, kwargs: dict) -> Routing | None:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    chosen = [t for t in tensors if not t.is_floating_point() and t.dim() == 2]
    if len(chosen) != 1 or not tensors[0].is_floating_point():
        return None
    weights = [t for t in tensors[1:] if t.is_floating_point() and t.shape == chosen[0].shape]
    x = tensors[0].reshape(-1, tensors[0].shape[-1])
    if len(weights) != 1 or len(x) != len(chosen[0]):
        return None
    return Routing(x, chosen[0], weights[0])


def _verified(
    path: str, module: nn.Module, routing: Routing | None, out: Any
) -> tuple[Stack, float]:
    if hasattr(module, "limit") and hasattr(module, "alpha"):
        raise UnsupportedModel(
            "a clamped, shifted and interleaved gate (GPT-OSS) has no normal form"
        )
    if routing is None or not isinstance(out, Tensor):
        raise UnsupportedModel("it is not called with hidden states, experts and their weights")
    if any(p.dim() < 3 for p in module.parameters(recurse=False)):
        raise UnsupportedModel("experts with biases are not supported")
    functions: list[Any] = [getattr(module, name, None) for name in _ACTIVATIONS]
    source: Any = next((f for f in functions if callable(f)), None)
    if source is None:
        raise UnsupportedModel("it has no activation to be read")
    act, best = activation(source), float("inf")
    names = list(stacked(module))
    dtype = getattr(module, names[0]).dtype
    for up, down in ((a, b) for a in names for b in names if a != b):
        for out_first in (True, False):
            stack = Stack(path, module, up, down, act, out_first)
            if not _fits(stack, routing.x.shape[-1]):
                continue
            error = _error(stack, routing, out)
            if error <= TOLERANCE.get(dtype, 1e-4):
                return stack, error
            best = min(best, error)
    raise UnsupportedModel(
        f"its experts are no GLUs with {act.name}: recomputed outputs differ by {best:.2g} of "
        "the largest"
    )


def _fits(stack: Stack, d: int) -> bool:
    shapes = {name: tuple(t.shape) for name, t in stack.tensors(0).items()}
    d_mlp = shapes["W_out"][0]
    return shapes == {"W_gate": (d, d_mlp), "W_in": (d, d_mlp), "W_out": (d_mlp, d)}


def _error(stack: Stack, routing: Routing, out: Tensor) -> float:
    total = torch.zeros(routing.x.shape, dtype=torch.float64, device=routing.x.device)
    with torch.no_grad():
        for expert in range(stack.n_experts):
            rows, weights = routing.of(expert)
            y = stack.outputs(expert, routing.x[rows]).double() * weights[:, None].double()
            total.index_add_(0, rows, y)
    return relative_error(total, out.detach().reshape(total.shape))


def _site(stack: Stack, layer: int, expert: int, error: float) -> ExpertSite:
    tensors = stack.tensors(expert)
    return ExpertSite(
        layer=Expert(layer, expert),
        path=f"{stack.path}[{expert}]",
        kind="glu",
        activation=stack.act,
        d_in=tensors["W_in"].shape[0],
        d_mlp=tensors["W_in"].shape[1],
        d_out=tensors["W_out"].shape[1],
        error=error,
        parameters=stack.parameters,
        weights=partial(stack.weights, expert),
        stack=stack,
    )
