"""The model at a prompt as a polynomial of its embeddings, and what flows back in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polylens.analysis.circuits.target import Target
from polylens.brief import Brief
from polylens.hosts.frozen import FrozenBlock, FrozenModel, adjoint
from polylens.polynomials.base import Approximation
from polylens.polynomials.shares import Shares

# Rows of covectors are taken back together while they have so many positions in all.
POSITIONS = 4096


@dataclass(frozen=True, eq=False, repr=False)
class Layer(Brief):
    """The MLP of one block at the prompt.

    Attributes:
        block: what is around it.
        read: [pos, d_in] what it reads.
        polynomial: of the lens, and its shares at these inputs; None where the lens has none.
        constant: [pos, d_out] what the polynomial writes without any input.
        error: [pos, d_out] what the true MLP writes beyond the polynomial; all of it where the
            lens has none.
    """

    block: FrozenBlock
    read: Tensor
    polynomial: Approximation | None
    shares: Shares | None
    constant: Tensor
    error: Tensor

    @property
    def written(self) -> Tensor:
        """[pos, d_out] what the polynomial makes of its input, without the constant."""
        return self.block.written - self.error - self.constant


@dataclass(frozen=True, eq=False, repr=False)
class Flow(Brief):
    """What flows back from the target through one MLP, by all paths.

    Attributes:
        u: [pos, d_out] of what it writes.
        r: [pos, d_in] of what its polynomial reads, zero where there is none.
    """

    u: Tensor
    r: Tensor


@dataclass(frozen=True, repr=False)
class Replacement(Brief):
    """Frozen attention and norms, polynomials as MLPs, errors that make up for the difference.

    Attributes:
        frozen: the model at the prompt.
        layers: below the target, in order.
        target: what is traced.
    """

    frozen: FrozenModel
    layers: tuple[Layer, ...]
    target: Target

    @classmethod
    def of(cls, lens: Any, frozen: FrozenModel, target: Target) -> "Replacement":
        found: list[Layer] = []
        for n, (block, x) in enumerate(zip(frozen.blocks, frozen.mlp_inputs(), strict=True)):
            if n >= target.layer:
                break
            if n in lens.layers and block.read:
                shares = lens[n].shares(x)
                error = block.written - shares.value()
                found.append(Layer(block, x, lens[n], shares, shares.constant, error))
            else:
                none = torch.zeros_like(block.written)
                found.append(Layer(block, x, None, None, none, block.written))
        return cls(frozen, tuple(found), target)

    @property
    def top(self) -> Tensor:
        """[pos, d_model] the target as a covector of the stream in front of its layer."""
        top = torch.zeros_like(self.frozen.embedding)
        top[self.target.position] = self.target.direction
        return top

    def flows(self) -> tuple[list[Flow], Tensor, float]:
        """What flows back through every MLP; (by layer, of the embeddings, target of biases)."""
        g, bias, found = self.top, self.target.constant, list[Flow]()
        for layer in reversed(self.layers):
            block = layer.block
            u = adjoint(block.behind, g)
            r = torch.zeros_like(layer.read) if layer.shares is None else layer.shares.adjoint(u)
            found.append(Flow(u, r))
            bias += float(_written_bias(layer, g, u) + _read_bias(layer, r))
            own = adjoint(block.before, r) if layer.shares is not None else torch.zeros_like(g)
            behind = g if block.parallel else g + own
            bias += float(_attention_bias(block, behind))
            g = block.attended(behind) + (own if block.parallel else 0.0)
        return found[::-1], g, bias

    def direct(
        self,
        starts: Mapping[int, tuple[Tensor, Tensor]],
        visit: Callable[[int, slice, Tensor], None],
        attended: Callable[[int, slice, Tensor], None] | None = None,
    ) -> Tensor:
        """Covectors of the target and of what MLPs read, back through attention and norms alone.

        Row 0 is the target; then those of `starts`, layer by layer from above. Some at a time go
        all the way, so that memory does not grow with their number.

        Args:
            starts: by layer (positions [n], covectors [n, d_in] of what its MLP reads there).
            visit: called with (layer, rows, [rows, pos, d_out]), covectors of what it writes; of
                layer -1, of the embeddings.
            attended: called with (layer, rows, [rows, pos, d_model]), those of the stream behind
                the attention of the layer.

        Returns:
            [rows] what biases amount to.
        """
        order = [(n, i) for n in sorted(starts, reverse=True) for i in range(len(starts[n][0]))]
        step = max(1, POSITIONS // len(self.frozen.tokens))
        biases = self.frozen.embedding.new_zeros(1 + len(order))
        for first in range(0, len(biases), step):
            some = slice(first, min(first + step, len(biases)))
            own: dict[int, list[int]] = {}
            for n, i in order[max(first - 1, 0) : some.stop - 1]:
                own.setdefault(n, []).append(i)
            begun = {n: (starts[n][0][i], starts[n][1][i]) for n, i in own.items()}
            biases[some] = self._back(some, begun, visit, attended)
        return biases

    def _back(
        self,
        rows: slice,
        starts: Mapping[int, tuple[Tensor, Tensor]],
        visit: Callable[[int, slice, Tensor], None],
        attended: Callable[[int, slice, Tensor], None] | None,
    ) -> Tensor:
        """Some rows of `direct`."""
        like = self.frozen.embedding
        g = like.new_empty(rows.stop - rows.start, *like.shape)
        bias, n = g.new_zeros(len(g)), 0
        if rows.start == 0:
            g[0], bias[0], n = self.top, self.target.constant, 1
        for number in reversed(range(len(self.layers))):
            layer = self.layers[number]
            block, before = layer.block, n
            if before:
                u = adjoint(block.behind, g[:before])
                visit(number, slice(rows.start, rows.start + before), u)
                bias[:before] += _written_bias(layer, g[:before], u)
            if number in starts:
                positions, covectors = starts[number]
                n += len(positions)
                own = g.new_zeros(len(positions), *layer.read.shape)
                own[torch.arange(len(positions)), positions] = covectors
                bias[before:n] += _read_bias(layer, own)
                g[before:n] = adjoint(block.before, own)
            moved = before if block.parallel else n
            if not moved:
                continue
            if attended is not None:
                attended(number, slice(rows.start, rows.start + moved), g[:moved])
            bias[:moved] += _attention_bias(block, g[:moved])
            g[:moved] = block.attended(g[:moved])
        visit(-1, rows, g)
        return bias


def values(covectors: Tensor, written: Tensor) -> Tensor:
    """[..., pos]: what is written [pos, d] along covectors [..., pos, d]."""
    return torch.linalg.vecdot(covectors, written)


def stacked(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """[n, d] of n vectors [d], also of none."""
    return torch.stack(list(parts)) if parts else like.new_zeros(0, like.shape[-1])


def _written_bias(layer: Layer, g: Tensor, u: Tensor) -> Tensor:
    total = values(u, layer.constant).sum(-1)
    norm = layer.block.behind
    if norm is None or norm.bias is None:
        return total
    return total + (g @ norm.bias).sum(-1)


def _read_bias(layer: Layer, r: Tensor) -> Tensor:
    norm = layer.block.before
    if norm is None or norm.bias is None:
        return r.new_zeros(r.shape[:-2])
    return (r @ norm.bias).sum(-1)


def _attention_bias(block: FrozenBlock, g: Tensor) -> Tensor:
    if block.attention is None:
        return g.new_zeros(g.shape[:-2])
    return values(g, block.attention.bias()).sum(-1)
