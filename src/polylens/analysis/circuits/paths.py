"""Which heads an edge passes, what arrives at an MLP, and what two nodes do together in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.analysis.circuits.replacement import Replacement
from polylens.brief import Brief
from polylens.hosts.frozen import linear


@dataclass(frozen=True, eq=False, repr=False)
class Written(Brief):
    """A vector that is written at a layer (-1: the embedding) and a position.

    Attributes:
        vector: [d_out], in front of the norm behind an MLP, if there is one.
    """

    layer: int
    position: int
    vector: Tensor


def first_heads(
    replacement: Replacement,
    starts: dict[int, tuple[Tensor, Tensor]],
    edges: Sequence[tuple[int, Written]],
) -> Tensor:
    """[edges, layers, heads]: what of each (row, source) passes this head as its first.

    What is left of an edge comes by the residual stream alone. Rows are those of
    `Replacement.direct`.
    """
    layers = replacement.layers
    attentions = [layer.block.attention for layer in layers]
    n_heads = max((len(a.pattern) for a in attentions if a is not None), default=0)
    like = replacement.frozen.embedding
    found = like.new_zeros(len(edges), len(layers), n_heads)
    if not edges:
        return found
    rows = torch.tensor([row for row, _ in edges], device=like.device)
    below = torch.tensor([source.layer for _, source in edges], device=like.device)
    at = torch.tensor([source.position for _, source in edges], device=like.device)
    vectors = torch.stack([behind(replacement, source) for _, source in edges])

    def attended(n: int, some: slice, covectors: Tensor) -> None:
        attention = attentions[n]
        passing = ((rows >= some.start) & (rows < some.stop) & (below < n)).nonzero()[:, 0]
        if attention is None or not len(passing):
            return
        read = attention.values(vectors[passing], at[passing])[:, attention.group]
        for row in rows[passing].unique().tolist():
            here = (rows[passing] == row).nonzero()[:, 0]
            by_head = attention.by_head(covectors[row - some.start])[:, at[passing[here]]]
            parts = torch.einsum("ehd,hed->eh", read[here], by_head)
            found[passing[here], n, : parts.shape[1]] = parts

    replacement.direct(starts, lambda *_: None, attended)
    return found


def arriving(replacement: Replacement, sources: Sequence[Written], n: int, t: int) -> Tensor:
    """[sources, d_in]: what of each the MLP of layer n reads at position t, directly."""
    stream = replacement.frozen.embedding
    x = stream.new_zeros(len(sources), *stream.shape)

    def enter(number: int) -> None:
        for i, source in enumerate(sources):
            if source.layer == number:
                x[i, source.position] += behind(replacement, source)

    enter(-1)
    for number in range(n + 1):
        block = replacement.layers[number].block
        moved = 0.0 if block.attention is None else block.attention.linear(x)
        if number == n:
            return linear(block.before, x if block.parallel else x + moved)[:, t]
        x += moved
        enter(number)
    raise AssertionError("no such layer")


def behind(replacement: Replacement, source: Written) -> Tensor:
    """What of it is in the residual stream."""
    if source.layer < 0:
        return source.vector
    norm = replacement.layers[source.layer].block.behind
    at = torch.tensor(source.position, device=source.vector.device)
    return linear(norm, source.vector, at)
