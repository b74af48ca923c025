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

# Rows of covectors that attention takes at a time.
ROWS = 128


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
        visit: Callable[[int, Tensor], None],
        attended: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Covectors of the target and of what MLPs read, back through attention and norms alone.

        Row 0 is the target; then those of `starts`, layer by layer from above.

        Args:
            starts: by layer (positions [n], covectors [n, d_in] of what its MLP reads there).
            visit: called with (layer, [rows so far, pos, d_out]), covectors of what it writes.
            attended: called with (layer, [rows so far, pos, d_model]), those of the stream behind
                the attention of the layer.

        Returns:
            [rows, pos, d_model] of the embeddings, and [rows] what biases amount to.
        """
        rows = 1 + sum(len(positions) for positions, _ in starts.values())
        g = self.frozen.embedding.new_zeros(rows, *self.frozen.embedding.shape)
        g[0], bias, n = self.top, g.new_zeros(rows), 1
        bias[0] = self.target.constant
        for number in reversed(range(len(self.layers))):
            layer = self.layers[number]
            block = layer.block
            u = adjoint(block.behind, g[:n])
            visit(number, u)
            bias[:n] += _written_bias(layer, g[:n], u)
            positions, covectors = starts.get(number, (None, None))
            before = n
            if positions is not None and covectors is not None:
                own = g.new_zeros(len(positions), *layer.read.shape)
                own[torch.arange(len(positions)), positions] = covectors
                n += len(positions)
                bias[before:n] += _read_bias(layer, own)
                g[before:n] = adjoint(block.before, own)
            moved = slice(0, before if block.parallel else n)
            if attended is not None:
                attended(number, g[moved])
            bias[moved] += _attention_bias(block, g[moved])
            for some in torch.arange(moved.stop).split(ROWS):
                g[some] = block.attended(g[some])
        return g, bias


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
