"""What the hosts share: torch hooks that see a site's x and y, and its hook points."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from polylens.errors import AttachmentError
from polylens.hosts.base import Emitter, Tap

Function = Callable[[Tensor, Tensor], Tensor | None]
Join = Callable[[int, Function, bool], "Passage"]


class Passage:
    """Calls function(x, y) in every forward pass of a site; a returned tensor replaces y.

    x and y are [batch, pos, d] even where the host flattens them. Only bound methods are
    registered, so a deep copy of the model carries an independent, working copy. A host's own
    passage registers its hooks in `_register`; nothing stays registered if that raises.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self._x: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._handles: list[Any] = []
        try:
            self._register()
        except BaseException:
            self.remove()
            raise

    def _register(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        # Handles belong to the hooks of the original; a copy's hooks came with its modules.
        return {**self.__dict__, "_handles": [], "_x": None}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._x = [], None

    def _add(self, handle: Any) -> None:
        self._handles.append(handle)

    def _note_shape(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 3:
                self._shape = tuple(value.shape[:2])
                return

    def _let_go(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._x = None

    def _call(self, x: Tensor, y: Tensor) -> Tensor | None:
        shape = self._shape
        if x.dim() != 2 or len(shape) != 2 or x.shape[0] != shape[0] * shape[1]:
            return self.function(x, y)
        new = self.function(x.reshape(*shape, -1), y.reshape(*shape, -1))
        return None if new is None else new.reshape(y.shape)


@contextmanager
def observing(join: Join, observers: Mapping[int, Function]) -> Iterator[None]:
    """`Host.observe`: observers see the true y, and what they return does not replace it."""
    with ExitStack() as stack:
        for layer, observer in observers.items():
            stack.callback(join(layer, partial(_watch, observer), True).remove)
        yield


@contextmanager
def substituting(join: Join, functions: Mapping[int, Function]) -> Iterator[None]:
    """`Host.substitute`: functions see the true y and have the last word on what flows on."""
    true: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer, function in functions.items():
            see = partial(lambda layer, x, y: true.update({layer: y}), layer)
            put = partial(lambda layer, f, x, y: f(x, true.pop(layer, y)), layer, function)
            stack.callback(join(layer, see, True).remove)
            stack.callback(join(layer, put, False).remove)
        yield


def emitting(emitter: Emitter, taps: Tap) -> Function:
    """The function of a passage that runs an emitter."""
    return partial(_emit, emitter, taps)


def _watch(observer: Callable[[Tensor, Tensor], object], x: Tensor, y: Tensor) -> None:
    observer(x, y)


def _emit(emitter: Emitter, taps: Tap, x: Tensor, y: Tensor) -> Tensor | None:
    out = emitter(x, y, taps)
    return None if out is y else out


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
