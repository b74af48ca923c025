"""Passages between two hook points of a TransformerLens model, or through one module."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polylens.errors import AttachmentError
from polylens.hosts.passage import Interior, Passage, Step, plainly


@dataclass(frozen=True)
class Wiring:
    """Where a site's x and y flow in the host.

    Attributes:
        block: the transformer block, whose input has the [batch, pos, d_model] shape.
        entry: runs before x appears; its pre-hook starts a new pass.
        x_point: x is its output; None where x is the first argument of `entry`.
        y_point: y is its first argument (x_point given) or its output.
        owner, y_name: y_point must still be owner.<y_name>, else it was spliced out.
        interior: where the neurons can be seen and replaced, or None.
    """

    block: nn.Module
    entry: nn.Module
    x_point: nn.Module | None
    y_point: nn.Module
    owner: nn.Module
    y_name: str
    interior: Interior | None = None


def interior_of(mlp: Any) -> Interior | None:
    """The hook points at which an MLP component should show its neurons."""
    gate, first, last = (getattr(mlp, name, None) for name in ("gate", "in", "out"))
    if hasattr(first, "hook_out") and hasattr(last, "hook_in"):
        parts: list[Any] = [part for part in (gate, first) if hasattr(part, "hook_out")]
        *y_z, h = *(part.hook_out for part in parts), last.hook_in  # type: ignore
        modules = {m for part in (*parts, last) for m in part.modules()}  # type: ignore
        modules.add(mlp.hook_out)
        projections = [*parts, last]
    else:
        names = ("hook_pre", "hook_pre_linear", "hook_post")
        *y_z, h = (p for name in names if (p := getattr(mlp, name, None)) is not None)
        modules = {mlp, *y_z, h}
        projections = (
            [mlp] if len(y_z) == 1 else []
        )  # of a gated one b_in, a parameter, is added to h
    if not y_z:
        return None
    z = (y_z[1], 0) if len(y_z) > 1 else None
    return plainly(Interior((y_z[0], 0), z, h, tuple(modules)), mlp, projections)


class Junction(Passage):
    """A passage along a wiring.

    Args:
        first: see y before other junctions change it.
    """

    def __init__(self, wiring: Wiring, function: Step, first: bool = False) -> None:
        self.wiring = wiring
        self._first = first
        self._grab_id: int | None = None
        super().__init__(function, wiring.interior)

    def _register(self) -> None:
        wiring, first = self.wiring, self._first
        self._add(wiring.block.register_forward_pre_hook(self._note_shape, with_kwargs=True))
        if wiring.x_point is None:
            self._add(wiring.y_point.register_forward_hook(self._at_module, prepend=first))
        else:
            self._add(wiring.entry.register_forward_pre_hook(self._start))
            grab = wiring.x_point.register_forward_hook(self._grab)
            self._grab_id = grab.id
            self._add(grab)
            self._add(wiring.y_point.register_forward_pre_hook(self._at_point, prepend=first))
        # an exception in a later hook may end the pass before x is used
        self._add(wiring.block.register_forward_hook(self._let_go, always_call=True))

    def _start(self, module: nn.Module, args: tuple) -> None:
        self._now.x = None
        owner = self.wiring.owner
        if getattr(owner, self.wiring.y_name, None) is not self.wiring.y_point:
            raise AttachmentError(
                f"{getattr(self.wiring.y_point, 'name', self.wiring.y_name)} was replaced by "
                "another object (spliced by another library?) after polylens attached to it; "
                "detach polylens first, or undo the other splice"
            )
        hooks: Any = self.wiring.x_point._forward_hooks if self.wiring.x_point is not None else {}
        if self._grab_id in hooks and next(reversed(hooks)) != self._grab_id:
            hooks.move_to_end(self._grab_id)  # so that edits by user hooks are seen

    def _grab(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self._now.x = out

    def _at_point(self, module: nn.Module, args: tuple) -> tuple | None:
        x, self._now.x = self._now.x, None
        if x is None:
            return None
        y = self._call(x, args[0])
        return None if y is None else (y, *args[1:])

    def _at_module(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        return self._call(args[0], out)
