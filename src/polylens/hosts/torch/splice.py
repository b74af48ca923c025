"""Passages between a block's in-projection and its out-projection, by torch hooks."""

from torch import Tensor, nn

from polylens.errors import AttachmentError
from polylens.hosts.passage import Interior, Passage, PolyPoint, Step, plainly
from polylens.hosts.torch.dataflow import Block


class Splice(Passage):
    """A passage through a block: x is what the in-projection reads, y what `end` returns.

    Args:
        model: what the block is in; where x has no batch axis, the shape is that of what flows
            into the innermost module around the block that has both axes.
        end: the module whose output is y.
        first: see y before other hooks change it.
    """

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        end: nn.Module,
        function: Step,
        first: bool = False,
    ) -> None:
        self._around = around(model, block.path) if block.flat else []
        self._block, self._end, self._first = block, end, first
        parts = (block.source, block.linear, block.out)
        modules = tuple(part.module for part in parts if part is not None)
        self._held = _holders(block.owner, modules)
        super().__init__(function, self._find_interior())

    def _register(self) -> None:
        block = self._block
        for module in self._around:
            self._add(module.register_forward_pre_hook(self._note_shape, with_kwargs=True))
        self._add(block.source.module.register_forward_pre_hook(self._grab, with_kwargs=True))
        self._add(self._end.register_forward_hook(self._at_end, prepend=self._first))
        # an exception in between may end the pass before x is used
        self._add(block.owner.register_forward_hook(self._let_go, always_call=True))

    def _find_interior(self) -> Interior:
        block, out = self._block, self._block.out.module
        y = block.source.module, block.source.part
        z = None if block.linear is None else (block.linear.module, block.linear.part)
        projections = {y[0], out, *(() if z is None else (z[0],))}
        modules = set(projections)
        if self._end is not out:
            modules.update(m for m in self._end.modules() if not isinstance(m, PolyPoint))
        return plainly(Interior(y, z, out, tuple(modules)), block.owner, projections)

    def _require_in_place(self) -> None:
        for parent, name, module in self._held:
            now = parent._modules.get(name)
            if now is not module:
                raise AttachmentError(
                    f"{name} of a {type(parent).__name__} was replaced by a {type(now).__name__} "
                    "(by an adapter, or another library?) after polylens attached to it; detach "
                    "polylens first, or undo the other change"
                )

    def _grab(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        self._require_in_place()  # what took the place may have got the hooks, without keywords
        self._now.x = args[0] if args else next(iter((kwargs or {}).values()))

    def _at_end(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        x, self._now.x = self._now.x, None
        if x is None:
            self._require_in_place()
            return None
        if x.device != y.device:
            x = x.to(y.device)
        return self._call(x, y)


def around(model: nn.Module, path: str) -> list[nn.Module]:
    """The model, and every module on the way to the one at this path, which is the last."""
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]


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
