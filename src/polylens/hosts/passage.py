"""What the hosts share: torch hooks that see a site's x and y, and its hook points."""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polylens.checks import Layer
from polylens.devices import per_block
from polylens.errors import AttachmentError
from polylens.hosts.base import (
    Arrival,
    Emitter,
    Function,
    Observer,
    Tap,
    Unpadded,
    like_nested,
    without_padding,
)
from polylens.hosts.recording import half

# Preactivations from which on an activation costs more than a stand-in for them.
DEAR = 1 << 14, 1 << 22
Step = Callable[[Arrival], Tensor | None]  # None leaves y as it is
Join = Callable[[Layer, Step, bool], Any]  # what comes back has remove()


@dataclass(frozen=True)
class Interior:
    """Where a site's neurons flow: out-projection(h), h = act(y) or act(y) * z.

    Attributes:
        y: (module, part): its output, or the half of it that is meant, is y.
        z: the same for z, or None for an MLP.
        h: the module whose first argument is h, which flows from there to the out-projection.
        modules: those whose hooks tell what the true layer computes.
        plain: what lies between is a library's own code, where only h depends on y and z, and
            nothing looks at their values.
    """

    y: tuple[nn.Module, int]
    z: tuple[nn.Module, int] | None
    h: nn.Module
    modules: tuple[nn.Module, ...]
    plain: bool = False

    def points(self) -> dict[str, nn.Module]:
        """The modules by what flows there: y, h, and z of a GLU."""
        return {"y": self.y[0], "h": self.h} | ({} if self.z is None else {"z": self.z[0]})


class _Now(threading.local):
    """What is known of the pass that goes on, in each thread for itself.

    Attributes:
        x: the input that was seen, until the output is.
        inside: what was seen inside by name, and which version of it; None where a stand-in
            without values flows on.
        done: whether the neurons were replaced, so that nothing is left to do to the output.
        shape: (batch, pos) of the pass.
    """

    def __init__(self) -> None:  # in each thread
        self.x: Tensor | None = None
        self.inside: dict[str, tuple[Tensor, int | None]] | None = None
        self.done = False
        self.shape: tuple[int, ...] = ()


class Passage:
    """Calls a function in every forward pass of a site; a returned tensor replaces y.

    x and y are [batch, pos, d] even where the host flattens them. Only bound methods are
    registered, so a deep copy of the model carries an independent, working copy. A host's own
    passage registers its hooks in `_register`; nothing stays registered if that raises.

    With an interior, an `Emitting` may replace h from y and z, and then nothing is left to be
    done to the output. This is for speed and shows nowhere: it needs that nobody but this passage
    has a hook inside, and no autograd, since the host's out-projection would now differentiate
    the polynomial. In a plain interior tensors without values (torch's "meta") flow from y and z
    to h, so that the true h costs nothing.
    """

    def __init__(self, function: Step, interior: Interior | None = None) -> None:
        self.function = function
        self._interior = interior if isinstance(function, Emitting) else None
        self._now = _Now()
        self._handles: list[Any] = []
        try:
            self._register()
            interior = self._interior
            if interior is not None:
                self._add(interior.y[0].register_forward_hook(self._see_y))
                if interior.z is not None:
                    self._add(interior.z[0].register_forward_hook(self._see_z))
                self._add(interior.h.register_forward_pre_hook(self._at_neurons))
        except BaseException:
            self.remove()
            raise

    def _register(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        # Handles belong to the hooks of the original; a copy's hooks came with its modules.
        return {**self.__dict__, "_handles": [], "_now": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _now=_Now())

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def _forget(self) -> None:
        now = self._now
        now.x, now.inside, now.done = None, None, False

    def _add(self, handle: Any) -> None:
        self._handles.append(handle)

    def _note_shape(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._now.shape = batch_shape(args, kwargs) or self._now.shape

    def _let_go(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._forget()

    def _call(self, x: Tensor, y: Tensor) -> Tensor | None:
        if self._now.done:
            self._now.done = False
            return None
        if y.is_nested:
            return self._call_without_padding(x, y)
        return self._shaped(self._arrive, x, y)

    def _call_without_padding(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What torch's own transformer makes of sequences with a padding mask."""
        sizes = [len(each) for each in y.unbind()]
        places = Unpadded(torch.tensor(sizes))
        new = self.function(Arrival(without_padding(x), without_padding(y), places))
        return None if new is None else like_nested(new, y)

    def _arrive(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.function(Arrival(x, y))

    def _shaped(self, function: Callable[..., Tensor | None], *values: Tensor) -> Tensor | None:
        shape, last = self._now.shape, values[-1]
        if last.dim() != 2 or len(shape) != 2 or len(last) != shape[0] * shape[1]:
            return function(*values)
        new = function(*(value.reshape(*shape, -1) for value in values))
        return None if new is None else new.reshape(last.shape)

    def _see_y(self, module: nn.Module, args: tuple, out: Any) -> Tensor | None:
        return self._see("y", out)

    def _see_z(self, module: nn.Module, args: tuple, out: Any) -> Tensor | None:
        return self._see("z", out)

    def _see(self, name: str, out: Any) -> Tensor | None:
        """Remember y or z; what flows on in its place."""
        function, now, interior = self.function, self._now, self._interior
        if torch.compiler.is_compiling():  # which leaves out what nobody reads, without our help
            return None
        if torch.is_grad_enabled() or not function.replacing or out.is_nested:
            return None
        inside = now.inside or {}
        assert interior is not None
        if name == "z" and "y" in inside and interior.z[0] is interior.y[0]:  # type: ignore
            out = inside["y"][0]  # both halves come from one module, whose output may stand in
        dear = out.numel() >= per_block(out.device, *DEAR)
        if dear and interior.plain and self._alone() and function.takes(out):
            now.inside = {**inside, name: (out, None)}
            return torch.empty_like(out, device="meta")
        if not out.is_inference():  # which do not tell whether an activation worked in place
            now.inside = {**inside, name: (out, out._version)}
        return None

    def _at_neurons(self, module: nn.Module, args: tuple) -> tuple | None:
        now = self._now
        seen, now.inside, now.done = now.inside, None, False
        if not seen or not args or not self._alone():
            return None
        interior, h = self._interior, args[0]
        assert interior is not None
        sources = {"y": interior.y} if interior.z is None else {"y": interior.y, "z": interior.z}
        values = []
        for name, (_, part) in sources.items():
            value, version = seen.get(name, (None, 0))
            if value is None or (version is not None and value._version != version):
                return None
            values.append(half(value, part))
        if any(v.shape != h.shape for v in values):
            return None
        new = self._shaped(self.function.neurons, *values, h)
        if new is None:
            return None
        now.done = True
        return (new, *args[1:])

    def _alone(self) -> bool:
        """Whether all hooks inside are this passage's own."""
        every: Any = torch.nn.modules.module
        if every._global_forward_hooks or every._global_forward_pre_hooks:
            return False
        return all(
            getattr(hook, "__self__", None) is self
            for module in self._interior.modules  # type: ignore
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )


def plainly(interior: Interior, owner: nn.Module, projections: Collection[nn.Module]) -> Interior:
    """The interior of an MLP that consists of these projections and what lies between.

    It is plain where the forward passes are a library's own, and what lies between has no
    parameters, with which a tensor without values could not be computed. Hooks anywhere in it
    then tell what the true layer computes.
    """
    known = {m for projection in projections for m in projection.modules()}
    inside = [m for m in owner.modules() if not isinstance(m, PolyPoint)]
    plain = {*projections} <= {*inside} and all(
        type(m).__module__.split(".")[0] in ("torch", "transformers", "transformer_lens")
        and "forward" not in vars(m)
        and (m in known or not (m._parameters or m._buffers))
        for m in inside
    )
    if not plain:
        return interior
    modules = {*interior.modules, *inside[1:]}
    return replace(interior, modules=tuple(modules), plain=True)


def batch_shape(args: tuple, kwargs: dict) -> tuple[int, ...]:
    """(batch, pos) of the first argument [batch, pos, d] of a call; () where there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 3 and not value.is_nested:
            return tuple(value.shape[:2])
    return ()


@contextmanager
def observing(join: Join, observers: Mapping[Layer, Observer]) -> Iterator[None]:
    """`Host.observe`: observers see the true y, and what they return does not replace it."""
    with ExitStack() as stack:
        for layer, observer in observers.items():
            stack.callback(join(layer, partial(_watch, observer), True).remove)
        yield


@contextmanager
def substituting(join: Join, functions: Mapping[Layer, Function]) -> Iterator[None]:
    """`Host.substitute`: functions see the true y and have the last word on what flows on."""
    true: dict[Layer, Tensor] = {}
    with ExitStack() as stack:
        for layer, function in functions.items():
            stack.callback(join(layer, partial(_keep, true, layer), True).remove)
            stack.callback(join(layer, partial(_put, true, layer, function), False).remove)
        yield


@contextmanager
def editing(join: Join, functions: Mapping[Layer, Function]) -> Iterator[None]:
    """`Host.edit`: functions see what flows, and have the last word on it."""
    with ExitStack() as stack:
        for layer, function in functions.items():
            stack.callback(join(layer, partial(_edit, function), False).remove)
        yield


def _edit(function: Function, arrival: Arrival) -> Tensor:
    return function(arrival)


def _keep(true: dict[Layer, Tensor], layer: Layer, arrival: Arrival) -> None:
    true[layer] = arrival.y


def _put(true: dict[Layer, Tensor], layer: Layer, function: Function, arrival: Arrival) -> Tensor:
    return function(replace(arrival, y=true.pop(layer, arrival.y)))


@dataclass
class Emitting:
    """The function of a passage that runs an emitter."""

    emitter: Emitter
    taps: Tap

    def __call__(self, arrival: Arrival) -> Tensor | None:
        out = self.emitter(arrival, self.taps)
        return None if out is arrival.y else out

    @property
    def replacing(self) -> bool:
        return self.emitter.replacing is not None

    def takes(self, value: Tensor) -> bool:
        """Whether `neurons` of such values will be there."""
        return not self.taps.listening() and self.emitter.takes(value)

    def neurons(self, *values: Tensor) -> Tensor | None:
        """`Emitter.neurons` of (y,) or (y, z); None where somebody listens at a point."""
        *own, h = values
        if not h.is_meta and not all(self.takes(value) for value in values):
            return None
        return self.emitter.neurons(*own)


def _watch(observer: Observer, arrival: Arrival) -> None:
    observer(arrival)


class PolyPoint(nn.Module):
    """Passes a value through, for hooks to read or edit; has no parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return self.name


class Taps:
    """hosts.base.Tap over hook points of any kind."""

    def __init__(self, points: Mapping[str, nn.Module]) -> None:
        self.points = points

    def wants(self, name: str) -> bool:
        point = self.points[name]
        return bool(
            point._forward_hooks
            or point._forward_pre_hooks
            or point._backward_hooks
            or point._backward_pre_hooks
        )

    def listening(self) -> bool:
        return any(self.wants(name) for name in self.points)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self.points[name](value)


def require_free(model: nn.Module) -> None:
    """AttachmentError if hook points of any lens are on the model already."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2].startswith("hook_poly_") or isinstance(module, PolyPoint):
            raise AttachmentError(
                f"this model has {path} already: it, or the one it was copied from, has a lens; "
                "detach that one first"
            )
