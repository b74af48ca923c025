"""Where a polynomial ends, and the asymptotes of the activation take over."""

import math

import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.errors import InvalidInputError
from polylens.normal_forms.preactivation import blocks
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.evaluation import Ends, Growth


def require_tails(tails: float | None) -> None:
    """InvalidInputError unless tails is None, 0.0 or a share below 0.5."""
    if tails is not None and not (isinstance(tails, float) and 0 <= tails < 0.5):
        raise InvalidInputError(
            f"tails={tails!r}: give None (polynomials everywhere), 0.0 (ends at the lowest and "
            "highest preactivation seen), or the share of preactivations, below 0.5, that may "
            "lie beyond the ends and follow the activation's asymptotes"
        )


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
        # aminmax along rows takes ten times as long on CPUs
        low, high = y.amin(1).double(), y.amax(1).double()
        if self._seen is not None:
            low, high = low.minimum(self._seen[0]), high.maximum(self._seen[1])
        self._seen = torch.stack([low, high])


def ends_of(act: Activation, y_range: Tensor, asymptotes: bool = True) -> Ends:
    """What lies beyond a range [2, ...] of y: the polynomials that act approaches there.

    They begin at the split between the two where that is further out; up to it nothing is gained.
    """
    low, high = y_range
    if not asymptotes:
        return Ends(low, high, None, None)
    below = _growth(act.left, low.clamp(max=act.split))
    return Ends(low, high, below, _growth(act.right, high.clamp(min=act.split)))


def _growth(powers: tuple[float, ...], start: Tensor) -> Growth | None:
    """sum_p powers[p] (y^p - start^p) in powers of y - start."""
    rates = []
    for j in range(1, len(powers)):
        rate = torch.zeros_like(start)
        for p in range(j, len(powers)):
            if powers[p]:
                rate += math.comb(p, j) * powers[p] * start ** (p - j)
        rates.append(torch.where(start.isfinite(), rate, 0.0))
    return Growth(start, tuple(rates)) if any(powers[1:]) else None
