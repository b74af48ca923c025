"""A copy of a model without anything of polylens, and where its layers compute their neurons."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from polylens.errors import AttachmentError
from polylens.hosts.passage import Passage, PolyPoint
from polylens.hosts.torch.dataflow import Block

Part = tuple[str, int]  # name of a child, and which half of its output is meant (0: all)


@dataclass(frozen=True)
class GLUPlace:
    """Where a GLU is, and by which names it holds its parts."""

    path: str
    gate: Part
    linear: Part
    act: str
    out: str


@dataclass(frozen=True)
class Place:
    """Where an MLP applies its activation.

    Attributes:
        act: dotted path of the activation module.
        glu: of a GLU, the module around it.
    """

    act: str
    glu: GLUPlace | None


def place_of(model: nn.Module, block: Block) -> Place:
    """The modules of a block that another activation would have to take the place of.

    Raises:
        AttachmentError: a function in place of a module, or modules that others use too.
    """
    if block.act is None:
        raise _refusal(block, "its activation is a function call, not a module to be replaced")
    found = [
        (path, parent, name)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is block.act
    ]
    if len(found) != 1:
        raise _refusal(block, f"its activation module is in use at {len(found)} places")
    path, parent, name = found[0]
    act = f"{path}.{name}" if path else name
    if block.linear is None:
        return Place(act, None)
    names = {child: name for name, child in block.owner._modules.items()}
    parts = (block.source.module, block.linear.module, block.out.module)
    if parent is not block.owner or not all(part in names for part in parts):
        raise _refusal(block, "the projections of its GLU are not side by side in one module")
    gate, linear, out = (names[part] for part in parts)
    glu = GLUPlace(path, (gate, block.source.part), (linear, block.linear.part), name, out)
    return Place(act, glu)


def require_apart(model: nn.Module, blocks: Iterable[Block]) -> None:
    """AttachmentError where layers share an activation, or accelerate moves values between them."""
    seen: dict[nn.Module, Block] = {}
    for block in blocks:
        if block.act is not None and seen.setdefault(block.act, block) is not block:
            raise _refusal(block, f"layer {seen[block.act].layer} uses the same activation module")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise AttachmentError(
            "this model is spread over devices by accelerate, which a copy cannot follow; load it "
            "without device_map, attach and export"
        )


def _refusal(block: Block, reason: str) -> AttachmentError:
    return AttachmentError(
        f"layer {block.layer} ({block.path}) cannot be exported: {reason}; export the other "
        "layers with layers=, or use lens.replaced()"
    )


def clean_copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with the model, without hook points and passages."""
    memo: dict[int, object] = {}
    points = []
    for path, module in model.named_modules():
        if not isinstance(module, PolyPoint):
            children = module._modules.items()
            points += [(path, name) for name, child in children if isinstance(child, PolyPoint)]
        else:
            memo[id(module)] = None  # nor are the polynomials in the passages copied
        for hooks, _ in _registries(module):
            owners = (getattr(hook, "__self__", None) for hook in hooks.values())
            memo |= {id(owner): _GONE for owner in owners if isinstance(owner, Passage)}
    clean = copy.deepcopy(model, memo)
    for path, name in points:
        del clean.get_submodule(path)._modules[name]
    for module in clean.modules():
        for hooks, flags in _registries(module):
            for key in [k for k, h in hooks.items() if getattr(h, "__self__", None) is _GONE]:
                for registry in (hooks, *flags):
                    registry.pop(key, None)
    return clean


_GONE = object()


def _registries(module: nn.Module) -> tuple[tuple[dict, tuple[dict, ...]], ...]:
    """Hooks by key, and what is noted about them under the same keys."""
    after = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    before = (module._forward_pre_hooks_with_kwargs,)
    return (module._forward_hooks, after), (module._forward_pre_hooks, before)
