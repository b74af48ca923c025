"""Layers of an nnsight model whose weights are elsewhere: found here, fitted and measured there."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polylens.errors import PolylensError
from polylens.hosts.nnsight.remote_fit import Figures, RemoteFit
from polylens.hosts.recording import is_projection, position
from polylens.hosts.torch.dataflow import Block, find_blocks

# What is sent by its source.
_SENT = ("hosts.nnsight.remote_fit", "fitting.neuron_gram", "fitting.nested")
# An argument of a component that is run alone.
_ROWS = 2, 4


def register() -> None:
    """Let nnsight send the code of a fit by its source."""
    import nnsight

    for name in _SENT:
        nnsight.register(f"polylens.{name}")


@dataclass(frozen=True)
class Maps:
    """The linear maps of an MLP or GLU, by their paths.

    Attributes:
        read: those that read its input, in the order in which they run; out: its last one.
        y, z: which of `read`, and which part of its output, is activated, or the linear branch.
    """

    read: tuple[str, ...]
    out: str
    y: tuple[int, int]
    z: tuple[int, int] | None

    def within(self, path: str) -> "Maps":
        read = tuple(f"{path}.{name}" for name in self.read)
        return Maps(read, f"{path}.{self.out}", self.y, self.z)


def find_maps(model: nn.Module) -> tuple[dict[int, Maps], list[str]]:
    """The MLPs and GLUs by layer, and the names of what was run and is none.

    By data flow, as everywhere, but of components alone: a copy of each kind gets random weights,
    one at a time, so that the model needs none.
    """
    known: dict[Any, Maps | None] = {}
    found: dict[int, Maps] = {}
    modules = dict(model.named_modules())
    for path in sorted(modules, key=lambda path: path.count("."), reverse=True):
        module, place = modules[path], position(path)
        if place is None or place[1] in found or not _may_be_one(module):
            continue
        kind = type(module), tuple((name, p.shape) for name, p in module.named_parameters())
        if kind not in known:
            known[kind] = _maps_of(module)
        maps = known[kind]
        if maps is not None:
            found[place[1]] = maps.within(path)
    tried = [kind.__name__ for (kind, _), maps in known.items() if maps is None]
    return dict(sorted(found.items())), tried


def _may_be_one(module: nn.Module) -> bool:
    if type(module).forward is nn.Module.forward:  # a list of others
        return False
    parts = list(module.modules())
    maps = sum(is_projection(part) for part in parts)
    return maps > 1 and not any(isinstance(part, nn.Embedding) for part in parts)


def _maps_of(module: nn.Module) -> Maps | None:
    """Those of a component, of its one block; None where it has none, or needs other inputs."""
    twin = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    random = torch.Generator().manual_seed(0)
    for tensor in (*twin.parameters(), *twin.buffers()):
        scale = max(tensor.shape, default=1) ** -0.5
        tensor.data = torch.randn(tensor.shape, generator=random) * scale
    width = _width(next(part for part in twin.modules() if is_projection(part)))
    x = torch.randn(*_ROWS, width, generator=random)
    try:
        with torch.no_grad():
            blocks, _ = find_blocks(twin, partial(twin, x))
    except (PolylensError, RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None
    return _read(twin, blocks[0], x) if len(blocks) == 1 else None


def _width(projection: nn.Module) -> int:
    """How many inputs a linear map has; of [in, out] matrices those are the rows."""
    return getattr(projection, "in_features", None) or len(projection.weight)  # type: ignore


def _read(twin: nn.Module, block: Block, x: Tensor) -> Maps:
    order: list[nn.Module] = []
    branches = [each for each in (block.source, block.linear) if each is not None]
    with ExitStack() as stack, torch.no_grad():
        for module in {each.module for each in branches}:
            hook = module.register_forward_hook(lambda module, args, out: order.append(module))
            stack.callback(hook.remove)
        twin(x)
    paths = {module: path for path, module in twin.named_modules()}
    places = [(order.index(each.module), each.part) for each in branches]
    y, z = places if len(places) > 1 else (places[0], None)
    return Maps(tuple(paths[each] for each in order), paths[block.out.module], y, z)


def fit_and_measure(
    model: Any,
    maps: Sequence[Maps],
    degree: int,
    fitting: Sequence[tuple[Tensor, Tensor]],
    measuring: Sequence[tuple[Tensor, Tensor]],
    remote: bool | str,
) -> tuple[list[Figures], int]:
    """`RemoteFit.figures` of every layer, and about how many bytes were sent, in one request.

    The fits stay where the model is. What is sent is code and token ids, whatever the size of the
    model; what comes back are numbers.

    Args:
        fitting, measuring: batches of token ids [batch, pos], and which of them count.
    """
    import nnsight
    from nnsight.intervention.serialization import dumps

    register()
    fits = [RemoteFit(degree, each.y, each.z) for each in maps]
    layers = [([model.get(name) for name in m.read], model.get(m.out)) for m in maps]
    size = len(dumps((model, fits, layers, fitting, measuring)))
    with torch.no_grad(), model.session(remote=remote):
        for tokens, counted in fitting:
            with model.trace(tokens):
                for fit, (read, out) in zip(fits, layers, strict=True):
                    outputs = [each.output for each in read]
                    fit.add(outputs, out.input, counted)
        for fit in fits:
            fit.solve()
        for tokens, counted in measuring:
            with model.trace(tokens):
                for fit, (read, out) in zip(fits, layers, strict=True):
                    outputs = [each.output for each in read]
                    fit.see(outputs, out.input, counted, out)
        found = nnsight.save([fit.figures() for fit in fits])
    return found, size
