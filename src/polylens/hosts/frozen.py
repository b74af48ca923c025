"""A transformer at one prompt with attention patterns and norm scales held at their values.

What is left but for the MLPs is an affine map of the residual stream, which is here with its
transpose. Everything is in float64, [..., pos, d_model] in and out, whatever the model's dtype.
"""

# Matrices are upper case.
# pyright: reportConstantRedefinition=false

from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from torch import Tensor

from polylens.brief import Brief


@dataclass(frozen=True, eq=False, repr=False)
class FrozenNorm(Brief):
    """x -> (x - mean(x)) / scale * weight + bias with the scales [pos, 1] of a prompt.

    Attributes:
        centred: whether the mean is taken off (LayerNorm).
        weight, bias: [d_model] or None.
        scale: [pos, 1].
    """

    centred: bool
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor

    def linear(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Without the bias; at: [...] positions of x [..., d_model] where it has no such axis."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = x / (self.scale if at is None else self.scale[at])
        return x if self.weight is None else x * self.weight

    def adjoint(self, g: Tensor) -> Tensor:
        """The transpose of `linear`."""
        g = (g if self.weight is None else g * self.weight) / self.scale
        return g - g.mean(-1, keepdim=True) if self.centred else g

    def rescaled(self, x: Tensor, now: Tensor) -> "FrozenNorm":
        """With the scales that it has for a stream `now` [..., pos, d_model] in place of x.

        A scale is the root of a mean square and a small number, which is not needed.
        """
        square = self.scale.square() - self._square(x) + self._square(now)
        return replace(self, scale=square.clamp(min=torch.finfo(now.dtype).tiny).sqrt())

    def _square(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x.square().mean(-1, keepdim=True)


def linear(norm: FrozenNorm | None, x: Tensor, at: Tensor | None = None) -> Tensor:
    return x if norm is None else norm.linear(x, at)


def adjoint(norm: FrozenNorm | None, g: Tensor) -> Tensor:
    return g if norm is None else norm.adjoint(g)


def following(norm: FrozenNorm | None, x: Tensor, now: Tensor) -> FrozenNorm | None:
    return None if norm is None else norm.rescaled(x, now)


def biased(norm: FrozenNorm | None, x: Tensor) -> Tensor:
    """All that the norm makes of x."""
    return linear(norm, x) if norm is None or norm.bias is None else norm.linear(x) + norm.bias


@dataclass(frozen=True, eq=False, repr=False)
class FrozenAttention(Brief):
    """What an attention layer writes: sum over heads of pattern (norm(x) W_V + b_V) W_O, and b_O.

    Attributes:
        pattern: [heads, query, key].
        group: [heads], which of the value heads each head reads.
        W_V, b_V: [value heads, d_model, d_head], [value heads, d_head] or None; the model's own.
        W_O, b_O: [heads, d_head, d_model], [d_model] or None.
        before, behind: norms between the residual stream and the layer, or None.
    """

    pattern: Tensor
    group: Tensor
    W_V: Tensor
    b_V: Tensor | None
    W_O: Tensor
    b_O: Tensor | None
    before: FrozenNorm | None
    behind: FrozenNorm | None

    def values(self, x: Tensor, at: Tensor) -> Tensor:
        """[n, value heads, d_head]: what heads read of parts x [n, d_model] at positions [n]."""
        x = linear(self.before, x, at)
        return einsum(x, self.W_V.double(), "n model, value model head -> n value head")

    def linear(self, x: Tensor) -> Tensor:
        """Without the biases."""
        x = linear(self.before, x)
        v = einsum(x, self.W_V.double(), "... key model, value model head -> ... value key head")
        return linear(self.behind, self._read_out(v))

    def written(self, x: Tensor) -> Tensor:
        """All that is written for a stream x, in front of the norm behind the layer."""
        x = biased(self.before, x)
        v = einsum(x, self.W_V.double(), "... key model, value model head -> ... value key head")
        v = v if self.b_V is None else v + self.b_V.double()[:, None]
        out = self._read_out(v)
        return out if self.b_O is None else out + self.b_O.double()

    def bias(self) -> Tensor:
        """[pos, d_model]: what enters the stream without any input."""
        nothing = self.pattern.new_zeros(self.pattern.shape[-1], self.W_V.shape[1])
        return biased(self.behind, self.written(nothing))

    def adjoint(self, g: Tensor) -> Tensor:
        """The transpose of `linear`."""
        by_head = self.by_head(g)
        shape = (*by_head.shape[:-3], len(self.W_V), *by_head.shape[-2:])
        by_value = by_head.new_zeros(shape).index_add(-3, self.group, by_head)
        W_V = self.W_V.double()
        out = einsum(by_value, W_V, "... value key head, value model head -> ... key model")
        return adjoint(self.before, out)

    def by_head(self, g: Tensor) -> Tensor:
        """[..., heads, key, d_head]: what g [..., query, d_model] is of what each head reads."""
        g = adjoint(self.behind, g)
        z = einsum(g, self.W_O.double(), "... query model, h head model -> ... h query head")
        return einsum(self.pattern, z, "h query key, ... h query head -> ... h key head")

    def _read_out(self, v: Tensor) -> Tensor:
        z = self.pattern @ v.index_select(-3, self.group)
        return einsum(z, self.W_O.double(), "... h query head, h head model -> ... query model")


@dataclass(frozen=True, eq=False, repr=False)
class FrozenBlock(Brief):
    """stream -> stream + attention(stream) + MLP(norm(stream [+ attention])).

    Attributes:
        attention: None where a block has none.
        parallel: whether the MLP reads the stream that the attention does.
        before, behind: norms around the MLP, or None.
        written: [pos, d_model] what the true MLP wrote, in front of the norm behind it.
        read: whether what it reads is known; else all of `written` is the block's own affair.
    """

    attention: FrozenAttention | None
    parallel: bool
    before: FrozenNorm | None
    behind: FrozenNorm | None
    written: Tensor
    read: bool

    def attend(self, x: Tensor) -> Tensor:
        """[pos, d_model] what the attention writes for a stream x, biases included."""
        if self.attention is None:
            return torch.zeros_like(x)
        return biased(self.attention.behind, self.attention.written(x))

    def attended(self, g: Tensor) -> Tensor:
        """g [..., pos, d_model] of the stream behind the attention as one of that in front."""
        return g if self.attention is None else g + self.attention.adjoint(g)


@dataclass(frozen=True, eq=False, repr=False)
class FrozenModel(Brief):
    """A transformer at one prompt.

    Attributes:
        tokens: [pos].
        embedding: [pos, d_model] the stream that enters the first block.
        blocks: in order.
        final: norm in front of the unembedding, or None.
        W_U, b_U: [d_model, d_vocab], [d_vocab] or None; the model's own.
        logits: [pos, d_vocab] of the model itself.
        capped: whether its logits are another function of what the unembedding writes.
        rounding: largest difference of the stream behind a block, or of what its MLP reads,
            recomputed, from the model's own, relative to its size at the position.
    """

    tokens: Tensor
    embedding: Tensor
    blocks: tuple[FrozenBlock, ...]
    final: FrozenNorm | None
    W_U: Tensor
    b_U: Tensor | None
    logits: Tensor
    capped: bool
    rounding: float = 0.0

    def mlp_inputs(self) -> list[Tensor]:
        """[pos, d_in] by block: what its MLP reads of the recomputed stream."""
        found, x = [], self.embedding
        for block in self.blocks:
            attended = x + block.attend(x)
            found.append(biased(block.before, x if block.parallel else attended))
            x = attended + biased(block.behind, block.written)
        return found

    def streams(self) -> list[Tensor]:
        """[pos, d_model] in front of every block and behind the last, recomputed."""
        found = [self.embedding]
        for block in self.blocks:
            x = found[-1]
            found.append(x + block.attend(x) + biased(block.behind, block.written))
        return found

    def tokens_of(self, weights: Tensor, position: int) -> tuple[Tensor, float]:
        """(direction [d_model], constant): logits @ weights [d_vocab] at a position, of the stream
        behind the last block."""
        g = self.embedding.new_zeros(self.embedding.shape)
        some = weights.nonzero()[:, 0]
        read = self.W_U[:, some].double() @ weights[some]
        g[position] = read
        constant = 0.0 if self.b_U is None else float(self.b_U.double() @ weights)
        if self.final is not None and self.final.bias is not None:
            constant += float(self.final.bias @ read)
        return adjoint(self.final, g)[position], constant


def heads(t: Tensor, n: int) -> Tensor:
    """[..., n, d_head] of [..., n * d_head]."""
    return rearrange(t, "... (n head) -> ... n head", n=n)
