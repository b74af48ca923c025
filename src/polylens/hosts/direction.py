"""What a model's layers see: whether also what stands behind a position, and whether anything."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from torch import Tensor

from polylens.checks import Expert, Layer
from polylens.hosts.base import TOLERANCE, Arrival, Host, relative_error
from polylens.hosts.batch import Batch


def sees_behind(
    batch: Batch,
    name: str,
    outputs: Callable[[Batch], Iterable[Tensor]],
    rounding: float = 0.0,
) -> bool:
    """Whether what is computed at positions of a stream depends on a token behind them.

    Two forward passes over its longest sequence, which differ in the last token.

    Args:
        outputs: of a batch of one row, tensors [1, pos, d], perhaps without padding; of other
            shapes they tell nothing.
        rounding: `Host.rounding` of the model.
    """
    stream = batch.streams.get(name)
    if stream is None or stream.ids is None:
        return False
    longest = stream.there.sum(1).argmax()
    row = batch.rows(longest[None])
    there = row.streams[name].there[0].nonzero().flatten()
    if len(there) < 2:
        return False
    last = int(there[-1])
    ids = stream.ids[longest][None].clone()
    ids[0, last] += -1 if ids[0, last] > 0 else 1
    with torch.no_grad():
        here, then = (list(outputs(each)) for each in (row, row.with_ids(name, ids)))
    # what is computed at padding may depend on anything
    before = {len(there): torch.arange(len(there) - 1), ids.shape[1]: there[:-1]}
    return any(
        relative_error(b[:, some], a[:, some]) > max(TOLERANCE[a.dtype], rounding)
        for a, b in zip(here, then, strict=True)
        if a.dim() == 3 and (some := before.get(a.shape[1])) is not None
    )


def both_ways(host: Host, batch: Batch, layers: Iterable[Layer]) -> set[str]:
    """The streams of a batch that these layers read both ways, as encoders do.

    Of those a start is a position like others; language models park attention on theirs. What
    was found is kept by the host.
    """
    streams: dict[str, list[Layer]] = {}
    for layer in layers:
        if not isinstance(layer, Expert):
            streams.setdefault(host.stream(layer), []).append(layer)
    for name, members in streams.items():
        kind = name, frozenset(batch.kwargs)
        if kind not in host.both_ways:
            seen = sees_behind(batch, name, partial(_arriving, host, members), host.rounding)
            host.both_ways[kind] = seen
    return {name for name in streams if host.both_ways[name, frozenset(batch.kwargs)]}


def uses(host: Host, batch: Batch, layers: Collection[Layer]) -> Counter[Layer]:
    """How often the first row of a batch passes through these layers; one forward pass."""
    found = Counter[Layer]()
    with torch.no_grad(), host.observe({n: partial(_note, found, n) for n in layers}):
        host.run(batch.rows(slice(0, 1)))
    return found


def _note(found: Counter[Layer], layer: Layer, arrival: Arrival) -> None:
    found[layer] += 1


def _arriving(host: Host, layers: Iterable[Layer], batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def see(arrival: Arrival) -> None:
        x = arrival.x.detach()
        found.append(x.clone() if arrival.places is None else x[None].clone())

    with host.observe({layer: see for layer in layers}):
        host.run(batch)
    return found
