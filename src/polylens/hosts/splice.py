"""Torch hooks between a block's in-projection and its out-projection, and its hook points."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from polylens.errors import AttachmentError
from polylens.hosts.base import Emitter, Tap
from polylens.hosts.dataflow import Block

Function = Callable[[Tensor, Tensor], Tensor | None]


class Splice:
    """Calls function(x, y) in every forward pass of a block; a returned tensor replaces y.

    x is what the in-projection reads, y what `end` returns; both are [batch, pos, d] even
    where the model flattens them. Only bound methods are registered, so a deep copy of the
    model carries an independent, working copy.

    Args:
        end: the module whose output is y.
        first: see y before other hooks change it.
    """

    def __init__(
        self, block: Block, end: nn.Module, function: Function, first: bool = False
    ) -> None:
        self.function = function
        self._x: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._handles: list[Any] = []
        start = block.source.module
        self._held = _holders(block.owner, (start, block.out.module))
        try:
            if block.flat and block.owner is not block.out.module:
                self._add(block.owner.register_forward_pre_hook(self._note_shape, with_kwargs=True))
            self._add(start.register_forward_pre_hook(self._grab, with_kwargs=True))
            self._add(end.register_forward_hook(self._at_end, prepend=first))
        except BaseException:
            self.remove()
            raise

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

    def _require_in_place(self) -> None:
        for parent, name, module in self._held:
            now = parent._modules.get(name)
            if now is not module:
                raise AttachmentError(
                    f"{name} of a {type(parent).__name__} was replaced by a {type(now).__name__} "
                    "(by an adapter, or another library?) after polylens attached to it; detach "
                    "polylens first, or undo the other change"
                )

    def _grab(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._require_in_place()
        self._x = args[0] if args else next(iter(kwargs.values()))

    def _at_end(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        x, self._x = self._x, None
        if x is None:
            self._require_in_place()
            return None
        if x.device != y.device:
            x = x.to(y.device)
        shape = self._shape
        if x.dim() != 2 or len(shape) != 2 or x.shape[0] != shape[0] * shape[1]:
            return self.function(x, y)
        new = self.function(x.reshape(*shape, -1), y.reshape(*shape, -1))
        return None if new is None else new.reshape(y.shape)


def _holders(
    owner: nn.Module, wanted: tuple[nn.Module, ...]
) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of each wanted module inside of owner."""
    return [
        (parent, name, module)
        for parent in owner.modules()
        for name, module in parent._modules.items()
        if module is not None and any(module is w for w in wanted)
    ]


class PolyPoint(nn.Module):
    """Passes a value through, for hooks to read or edit; has no parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return self.name

    @property
    def listened(self) -> bool:
        return bool(
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        )


class Taps:
    """hosts.base.Tap over hook points."""

    def __init__(self, points: dict[str, PolyPoint]) -> None:
        self.points = points

    def wants(self, name: str) -> bool:
        return self.points[name].listened

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self.points[name](value)


class Installed:
    """The function of a splice that runs an emitter."""

    def __init__(self, emitter: Emitter, taps: Tap) -> None:
        self.emitter, self.taps = emitter, taps

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        out = self.emitter(x, y, self.taps)
        return None if out is y else out


def require_free(owner: nn.Module, path: str, layer: int) -> None:
    """AttachmentError if hook points of any lens are on the module already."""
    for name, module in owner.named_children():
        if isinstance(module, PolyPoint):
            raise AttachmentError(
                f"layer {layer} ({path}) has {name} already: this model, or the one it was "
                "copied from, has a lens; detach that one first"
            )
