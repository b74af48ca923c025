"""Mixtures of experts: each expert of a stack as a GLU, on the tokens that are routed to it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polylens.activations import Activation, activation
from polylens.errors import AttachmentError, PolylensError, UnsupportedModel
from polylens.hosts.base import TOLERANCE, MLPSite
from polylens.hosts.recording import half, quiet
from polylens.weights import GLUWeights

_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertSite(MLPSite):
    """One expert, verified to be a GLU.

    `layer` is the number of the block (or of the stack, in order of execution) and `path` that
    of the module that holds the stack, with the expert's number in brackets.

    Attributes:
        expert: its number in the stack.
        stack: the whole stack.
    """

    expert: int
    stack: "Stack"


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
    model: nn.Module, run: Callable[[], object]
) -> tuple[list[ExpertSite], dict[str, str]]:
    """Every expert of every stack that one run passes through, verified on what was routed.

    A stack is a module with two three-dimensional parameters that is called with hidden states,
    the experts of each token and their weights (Mixtral, Qwen-MoE, OLMoE, DeepSeek). The router
    and shared experts are not part of it.

    Args:
        model: any module with loaded weights.
        run: one small forward pass.

    Returns:
        Sites in order of execution, and for each refused stack (by path) the reason.
    """
    calls: dict[str, tuple[nn.Module, Routing | None, Any]] = {}

    def keep(path: str, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if path not in calls:
            calls[path] = (module, _routing(args, kwargs), out)

    with ExitStack() as hooks, quiet(model):
        for path, module in model.named_modules():
            if len(_stacked(module)) >= 2:
                hook = partial(keep, path)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
        run()
    sites: list[ExpertSite] = []
    refused: dict[str, str] = {}
    for order, (path, (module, routing, out)) in enumerate(calls.items()):
        try:
            stack, error = _verified(path, module, routing, out)
        except PolylensError as problem:
            refused[path] = f"{path} ({type(module).__name__}): {problem}"
            continue
        numbers = [int(name) for name in path.split(".") if name.isdigit()]
        layer = numbers[0] if numbers else order
        sites += [_site(stack, layer, expert, error) for expert in range(stack.n_experts)]
    return sites, refused


@contextmanager
def observe_experts(
    sites: Iterable[ExpertSite], observer: Callable[[ExpertSite, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within the context, observer(site, x, y, rows) sees what each expert does.

    x [n, d_in] are the inputs routed to the expert, y [n, d_out] its outputs before they are
    weighted, rows [n] their places among the batch * pos inputs of the layer. Experts without
    inputs are not called.
    """

    def look(members: list[ExpertSite], routing: Routing, out: Tensor) -> None:
        for site in members:
            rows, _ = routing.of(site.expert)
            if len(rows):
                x = routing.x[rows]
                observer(site, x, site.stack.outputs(site.expert, x), rows)

    with _hooked(sites, look):
        yield


@contextmanager
def substitute_experts(functions: Mapping[ExpertSite, Function]) -> Iterator[None]:
    """Within the context an expert's output is functions[site](x, y), weighted as before.

    What the other experts add, and the router, stay as they are.
    """

    def change(members: list[ExpertSite], routing: Routing, out: Tensor) -> Tensor:
        total = out.clone()
        flat = total.reshape(-1, total.shape[-1])
        for site in members:
            rows, weights = routing.of(site.expert)
            if len(rows):
                x = routing.x[rows]
                y = site.stack.outputs(site.expert, x)
                change = (functions[site](x, y) - y) * weights[:, None].to(y.dtype)
                flat = flat.index_add(0, rows, change.to(flat.dtype))
        return flat.reshape(out.shape)

    with _hooked(functions, change):
        yield


@contextmanager
def _hooked(
    sites: Iterable[ExpertSite],
    function: Callable[[list[ExpertSite], Routing, Tensor], Tensor | None],
) -> Iterator[None]:
    by_stack: dict[nn.Module, list[ExpertSite]] = {}
    for site in sites:
        by_stack.setdefault(site.stack.module, []).append(site)

    def hook(
        members: list[ExpertSite], module: nn.Module, args: tuple, kwargs: dict, out: Tensor
    ) -> Tensor | None:
        routing = _routing(args, kwargs)
        if routing is None:
            raise AttachmentError(
                f"{members[0].stack.path} is called in another way than when it was found"
            )
        return function(members, routing, out)

    with ExitStack() as stack:
        for module, members in by_stack.items():
            handle = module.register_forward_hook(partial(hook, members), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}


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
    names = list(_stacked(module))
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
    true = out.detach().reshape(total.shape).double()
    return float((total - true).abs().max() / true.abs().max().clamp(min=1e-30))


def _site(stack: Stack, layer: int, expert: int, error: float) -> ExpertSite:
    tensors = stack.tensors(expert)
    return ExpertSite(
        layer=layer,
        path=f"{stack.path}[{expert}]",
        kind="glu",
        activation=stack.act,
        d_in=tensors["W_in"].shape[0],
        d_mlp=tensors["W_in"].shape[1],
        d_out=tensors["W_out"].shape[1],
        error=error,
        tensors=partial(stack.tensors, expert),
        weights=partial(stack.weights, expert),
        expert=expert,
        stack=stack,
    )
