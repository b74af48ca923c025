"""Where a polynomial stops: beyond what was seen, and in tails where the activation is flat."""

import math

import torch
from torch import Tensor

from polylens.activations import Activation
from polylens.preactivation import blocks
from polylens.weights import GLUWeights, MLPWeights

# False for polynomials everywhere, True for the range that was seen, or the share of a neuron's
# preactivations that may be clipped where its activation is flat.
Clip = bool | float
# Float32 numbers in one block of sorted preactivations.
BLOCK = 1 << 24


class PreactivationRange:
    """Lowest and highest y of every neuron over the inputs so far.

    Args:
        weights: the layer.
        tails: [2, d_mlp], ends that lie further inside, as of `flat_tails`.
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
def flat_tails(weights: MLPWeights | GLUWeights, x: Tensor, share: float) -> Tensor:
    """[2, d_mlp] float64: `share` of the y of inputs x [n, d_in] lie beyond either end.

    Only where the activation approaches a constant, as SiLU and GELU do below: there, what a
    polynomial has to spend on far y is lost in between, and a constant is nearly right. Infinite
    on the other side, where the activation grows.

    Cost: one product with the inputs, sorted.
    """
    ends = x.new_tensor([[-math.inf], [math.inf]], dtype=torch.float64, device=weights.device)
    ends = ends.repeat(1, weights.d_mlp)
    flat = _flat(weights.act)
    if not len(x) or not any(flat):
        return ends
    y = torch.cat([y for y, _, _ in blocks(weights, x, None)], dim=1)
    k = int(share * y.shape[1])
    step = max(1, BLOCK // y.shape[1])
    for i in range(0, len(y), step):
        ordered = y[i : i + step].sort(dim=1).values
        if flat[0]:
            ends[0, i : i + step] = ordered[:, k].double()
        if flat[1]:
            ends[1, i : i + step] = ordered[:, -1 - k].double()
    return ends


def _flat(act: Activation) -> tuple[bool, bool]:
    """Whether the activation approaches a constant far below, and far above."""
    return not any(act.left[1:]), not any(act.right[1:])
