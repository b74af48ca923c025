"""Where a polynomial stops: beyond what was seen, and in tails where the activation is flat."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polylens.activations import Activation
from polylens.preactivation import blocks
from polylens.weights import GLUWeights, MLPWeights

# False for polynomials everywhere, True for the range that was seen, or the share of a layer's
# preactivations that may also be clipped where the activation is flat.
Clip = bool | float
# Float32 numbers in one block of sorted preactivations.
BLOCK = 1 << 24


class PreactivationRange:
    """Lowest and highest y of every neuron over the inputs so far.

    Args:
        weights: the layer.
        tails: [2, d_mlp], ends that lie further inside, as of `best_tails`.
    """

    def __init__(self, weights: MLPWeights | GLUWeights, tails: Tensor | None = None) -> None:
        self.weights, self.tails = weights, tails
        self._seen: Tensor | None = None

    @property
    def ends(self) -> Tensor | None:
        """[2, d_mlp] in float64; None before the first input."""
        if self._seen is None or self.tails is None:
            return self._seen
        low, high = self.tails
        return torch.stack([self._seen[0].maximum(low), self._seen[1].minimum(high)])

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add inputs x [n, d_in] of the layer."""
        for y, _, _ in blocks(self.weights, x, None):
            self.add(y)

    def add(self, y: Tensor) -> None:
        """Add preactivations [d_mlp, n]."""
        if not y.shape[1]:
            return
        low, high = (end.double() for end in torch.aminmax(y, dim=1))
        if self._seen is not None:
            low, high = low.minimum(self._seen[0]), high.maximum(self._seen[1])
        self._seen = torch.stack([low, high])


@torch.no_grad()
def tail_ends(weights: MLPWeights | GLUWeights, x: Tensor, shares: Sequence[float]) -> Tensor:
    """[shares, 2, d_mlp] float64: that share of the y of inputs x [n, d_in] lies beyond either end.

    Infinite where the activation grows, and for a share of zero.

    Cost: one product with the inputs, sorted.
    """
    ends = x.new_tensor([-math.inf, math.inf], dtype=torch.float64, device=weights.device)
    ends = ends[:, None].repeat(len(shares), 1, weights.d_mlp)
    below, above = flat_sides(weights.act)
    if not len(x) or not (below or above):
        return ends
    y = torch.cat([y for y, _, _ in blocks(weights, x, None)], dim=1)
    step = max(1, BLOCK // y.shape[1])
    for i in range(0, len(y), step):
        ordered = y[i : i + step].sort(dim=1).values.double()
        for own, share in zip(ends[..., i : i + step], shares, strict=True):
            k = int(share * y.shape[1])
            if below and k:
                own[0] = ordered[:, k]
            if above and k:
                own[1] = ordered[:, -1 - k]
    return ends


def flat_sides(act: Activation) -> tuple[bool, bool]:
    """Whether the activation approaches a constant far below, and far above."""
    return not any(act.left[1:]), not any(act.right[1:])
