"""What flows through a model's linear maps and activations in one forward pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from polylens.errors import UnsupportedModel
from polylens.hosts import quantised
from polylens.hosts.base import TOLERANCE, like_nested, relative_error, without_padding
from polylens.hosts.offloaded import is_offloaded, parameter
from polylens.hosts.quiet import quiet

_NOT_ACTIVATIONS = (
    "dropout",
    "droppath",
    "identity",
    "norm",
    "embedding",
    "rotary",
    "flatten",
    "point",
)


@dataclass(frozen=True, eq=False)
class Projection:
    """A module that computes x @ W + b, or the half of its output columns that is meant.

    Attributes:
        module: with a matrix `weight` and perhaps a vector `bias`.
        out_first: the matrix is [out, in] (Linear), not [in, out] (Conv1D).
        part: 0 for all output columns, 1 and 2 for the first and second half.
    """

    module: nn.Module
    out_first: bool
    part: int = 0

    def weight(self, *, as_it_is: bool = False) -> Tensor:
        """[d_in, d_out], a view of the module's own matrix.

        Args:
            as_it_is: without values where it is offloaded; by default these are fetched.
        """
        weight = self._own("weight", as_it_is)
        return half(weight.T if self.out_first else weight, self.part)

    def bias(self, *, as_it_is: bool = False) -> Tensor | None:
        """[d_out] or None."""
        if not isinstance(getattr(self.module, "bias", None), Tensor):
            return None
        return half(self._own("bias", as_it_is), self.part)

    @property
    def resident(self) -> bool:
        """Whether `weight` is there, to be viewed; else it is made at every call."""
        return not is_offloaded(self.module)

    def parameter(self, name: str) -> dict[str, Tensor]:
        """What holds the module's own `weight` or `bias`, of all its columns; {} for no bias."""
        value: Any = getattr(self.module, name, None)
        return {"": value} if isinstance(value, Tensor) else {}

    def _own(self, name: str, as_it_is: bool) -> Tensor:
        value: Any = getattr(self.module, name)
        return value.detach() if as_it_is else parameter(self.module, name)


@dataclass(frozen=True, eq=False)
class Dequantised(Projection):
    """A module that keeps its matrix packed; what it stands for is made at every reading.

    Attributes:
        like: [d_in, d_out] on torch's "meta" device, in the dtype of its outputs.
        rounds: whether it rounds its inputs to 8 bits as well.
    """

    like: Tensor = field(default_factory=lambda: torch.empty(0, 0, device="meta"))
    rounds: bool = False

    def weight(self, *, as_it_is: bool = False) -> Tensor:
        """[d_in, d_out] of its own."""
        if as_it_is:
            return half(self.like, self.part)
        d_in, d_out = self.like.shape
        whole = quantised.dequantised(self.module, d_in, d_out, self.like.dtype)
        return half(whole, self.part)

    @property
    def resident(self) -> bool:
        return False

    def parameter(self, name: str) -> dict[str, Tensor]:
        if name == "bias":
            return super().parameter(name)
        return {f".{inner}": t for inner, t in quantised.packed(self.module).items()}

    def _own(self, name: str, as_it_is: bool) -> Tensor:
        return super()._own(name, as_it_is).to(self.like.dtype)


@dataclass(eq=False)
class Call:
    """One call of a module: x [..., d_in] -> y [..., d_out], as they were then."""

    order: int
    path: str
    module: nn.Module
    x: Tensor
    y: Tensor

    @property
    def rows(self) -> Tensor:
        """x as [rows, d_in]."""
        return self.x.reshape(-1, self.x.shape[-1])


@dataclass
class Recording:
    """Calls by kind, each in order of execution."""

    projections: list[Call]
    activations: list[Call]
    containers: list[Call]


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The three-dimensional parameters of its own: stacks of experts' matrices."""
    return {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}


def spread(n: int, count: int) -> Tensor:
    """At most count indices from 0 to n - 1, evenly spread; the same in any default dtype."""
    count = min(count, n)
    return torch.arange(count) * (n - 1) // max(count - 1, 1)


def half(t: Tensor, part: int) -> Tensor:
    """All of the last axis, or its first or second half, as a view."""
    if part == 0:
        return t
    width = t.shape[-1] // 2
    return t[..., (part - 1) * width : part * width]


def record(model: nn.Module, run: Callable[[], object]) -> Recording:
    """Calls of every linear map, activation and container in one run.

    Temporary hooks only; training flags, hooks and the RNG are as before, also when run raises.
    """
    recording = Recording([], [], [])
    linear: set[nn.Module] = set()
    counter = iter(range(1 << 62))
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if module in linear:
                continue
            if is_projection(module):
                linear.update(module.modules())
                calls = recording.projections
            elif _may_activate(module):
                calls = recording.activations
            elif any(True for _ in module.children()):
                calls = recording.containers
            else:
                continue
            for handle in _watch(module, path, calls, counter):
                stack.callback(handle.remove)
        with quiet(model):
            run()
    return recording


def _watch(module: nn.Module, path: str, calls: list[Call], counter: Iterator[int]) -> list:
    # x is copied before the module runs: activations may work in place
    pending: list[Tensor | None] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or not x.is_floating_point():
            pending.append(None)
        else:
            pending.append(without_padding(x).detach().clone())

    def after(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        x = pending.pop() if pending else None
        if x is not None and isinstance(out, Tensor) and x.dim() and out.dim():
            y = without_padding(out).detach().clone()
            calls.append(Call(next(counter), path, module, x, y))

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


@contextmanager
def probing(
    outputs: dict[nn.Module, list[tuple[int, Tensor]]], seen: dict[nn.Module, Tensor]
) -> Iterator[None]:
    """Within the context, parts of these modules' outputs are overwritten with given values,
    and the first input of each module in `seen` is put there."""

    def overwrite(changes: list[tuple[int, Tensor]], module: nn.Module, args: tuple, out: Tensor):
        flat = without_padding(out).clone()
        for part, values in changes:
            target = half(flat, part)
            target.copy_(_filled(values, target))
        return flat if not out.is_nested else like_nested(flat, out)

    def keep(module: nn.Module, args: tuple) -> None:
        if not seen[module].numel() and args:
            seen[module] = without_padding(args[0]).detach().clone()

    with ExitStack() as stack:
        for module, changes in outputs.items():
            hook = partial(overwrite, changes)
            stack.callback(module.register_forward_hook(hook).remove)
        for module in seen:
            stack.callback(module.register_forward_pre_hook(keep).remove)
        yield


def _filled(values: Tensor, like: Tensor) -> Tensor:
    """The values over and over, in the shape of `like`; thinned evenly if there is no room."""
    n = like.numel()
    if n < len(values):
        values = values[spread(len(values), n)]
    repeated = values.repeat(-(-n // len(values)))[:n]
    return repeated.reshape(like.shape).to(like)


def is_projection(module: nn.Module) -> bool:
    """Whether the module stands for a linear map, readable or not (quantised, adapted)."""
    name = type(module).__name__.lower()
    if isinstance(module, nn.Linear) or (name.startswith("conv1d") and hasattr(module, "nf")):
        return True
    leaf = not any(True for _ in module.children())
    weight = getattr(module, "weight", None)
    if leaf and isinstance(weight, nn.Parameter) and weight.dim() == 2:
        return not isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.Bilinear)
    return hasattr(module, "in_features") and hasattr(module, "out_features") and "linear" in name


def _may_activate(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    leaf = not any(True for _ in module.children())
    scalars = all(p.numel() <= 1 for p in module.parameters())
    return leaf and scalars and not any(word in name for word in _NOT_ACTIVATIONS)


def read_projection(call: Call) -> Projection:
    """How the called module's matrix is laid out, found by recomputing the call.

    Raises:
        UnsupportedModel: sharded or adapted weights, quantised ones that cannot be read, or not a
            linear map at all.
    """
    module, label = call.module, f"{call.path} ({type(call.module).__name__})"
    weight: Any = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    plain = isinstance(weight, Tensor) and not any(
        is_traceable_wrapper_subclass(t) for t in (weight, bias) if t is not None
    )
    if not plain or weight.dim() != 2 or weight.dtype not in TOLERANCE:
        if quantised.is_packed(module):
            return _read_packed(call, label)
        raise UnsupportedModel(
            f"{label} has no plain floating-point matrix: quantised, sharded or wrapped by an "
            "adapter; dequantise it, or merge the adapter, first"
        )
    own = {id(weight), id(bias)}
    named = module.named_parameters()
    more = [n for n, p in named if id(p) not in own and not n.startswith("parametrizations.")]
    if more:
        raise UnsupportedModel(
            f"{label} has {', '.join(more[:3])} beside its matrix, which change what it computes "
            "when they are trained; merge the adapter first"
        )
    if type(module) is nn.Linear:
        return Projection(module, out_first=True)
    x, y = call.rows.to(weight.dtype), call.y.reshape(-1, call.y.shape[-1])
    tolerance = TOLERANCE[weight.dtype] * float(y.abs().max().clamp(min=1e-30))
    for out_first in (True, False):
        found = Projection(module, out_first)
        matrix, offset = found.weight(), found.bias()
        if tuple(matrix.shape) == (x.shape[-1], y.shape[-1]):
            out = x @ matrix if offset is None else x @ matrix + offset
            if float((out - y).abs().max()) <= tolerance:
                return found
    raise UnsupportedModel(
        f"{label} does not compute x @ W + b with its own matrix: quantised or wrapped by an "
        "adapter; dequantise it, or merge the adapter, first"
    )


def _read_packed(call: Call, label: str) -> Dequantised:
    """Of a module that keeps its matrix packed.

    Raises:
        UnsupportedModel: it computes something else with the matrix that it dequantises to.
    """
    x, y = call.rows, call.y.reshape(-1, call.y.shape[-1])
    some = spread(len(x), 8).to(x.device)
    x, y = x[some], y[some]
    like = torch.empty(x.shape[-1], y.shape[-1], dtype=y.dtype, device="meta")
    found, name = Dequantised(call.module, False, like=like), quantised.format_of(call.module)
    advice = "load the model dequantised (model.dequantize()) and attach to that"
    try:
        matrix, offset = found.weight(), found.bias()
    except Exception as error:  # of whatever library it is
        raise UnsupportedModel(
            f"{label} is quantised ({name}) and cannot be dequantised here "
            f"({type(error).__name__}: {error}); {advice}"
        ) from error
    if matrix.shape != like.shape:
        raise UnsupportedModel(
            f"{label} is quantised ({name}): its matrix is {tuple(matrix.shape)}, where it maps "
            f"{like.shape[0]} inputs to {like.shape[1]} outputs; {advice}"
        )
    out = x.to(like.dtype) @ matrix
    error = relative_error(out if offset is None else out + offset, y)
    if error <= TOLERANCE[like.dtype]:
        return found
    if quantised.rounds_its_inputs(x, y, matrix, offset) <= 1:
        return replace(found, rounds=True)
    raise UnsupportedModel(
        f"{label} is quantised ({name}), and its outputs are {error:.2g} of the largest from those "
        "of the matrix that it dequantises to, more than inputs rounded to 8 bits explain; "
        + advice
    )


def position(path: str) -> tuple[str, int] | None:
    """(what is repeated, which of it): the part of a path before its first number, and that."""
    names = path.split(".")
    for i, name in enumerate(names):
        if name.isdigit():
            return ".".join(names[:i]), int(name)
    return None


def common_path(*paths: str) -> str:
    """The longest dotted path that all of these are inside of."""
    split = [path.split(".") for path in paths]
    shared: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    if any(len(names) == len(shared) for names in split):
        shared = shared[:-1]
    return ".".join(shared)


def within(path: str, place: str) -> bool:
    return not place or path == place or path.startswith(place + ".")
