"""R2, wherever polylens measures one: the streamed sums behind it, and the one rule."""

from math import isfinite

import torch
from torch import Tensor

from polylens.devices import numbers
from polylens.errors import InvalidInputError
from polylens.ranks import Ranks

# A variance below this share of the squared mean is the rounding of a constant.
CONSTANT = 1e-24
# A constant is reproduced if the squared error is below this share of its square: the rounding
# of bfloat16.
REPRODUCED = 1e-5


def is_constant(variance: Tensor | float, mean_square: Tensor | float) -> bool:
    """Whether an output's variance is no more than the rounding of its mean."""
    return float(variance) <= CONSTANT * float(mean_square)


def share_explained(mse: Tensor, variance: Tensor | float, mean_square: Tensor | float) -> Tensor:
    """R2 = 1 - mse / variance, wherever polylens reports one.

    Of a constant output it is 1 in the degrees that reproduce it and 0 in the others, as in
    scikit-learn.
    """
    if is_constant(variance, mean_square):
        return (mse <= REPRODUCED * float(mean_square)).to(mse.dtype)
    return 1 - mse / variance


class ResidualSums:
    """Streamed float64 squares of one layer, about the first batch's mean: nothing cancels.

    Attributes:
        n: rows seen so far; weight: the sum of their weights.
    """

    n = 0
    weight: Tensor | float = 0.0

    def update(
        self,
        y: Tensor,
        predictions: Tensor | list[Tensor],
        sample_weights: Tensor | None = None,
    ) -> None:
        """Add outputs y [n, d] and predictions [degree + 1, n, d], weighted by [n] or equally."""
        if len(y) == 0:
            return
        y = y.double()
        if self.n == 0:
            self._shift = y.mean(0)
            self._total = torch.zeros_like(self._shift)
            self._square = self._total.new_zeros(())
            self._residual = self._total.new_zeros(len(predictions))
        self.n += len(y)
        centred = y - self._shift
        errors = (y - p.double() for p in predictions)
        if sample_weights is None:
            self.weight = self.weight + len(y)
            self._total += centred.sum(0)
            self._square += centred.square().sum()
            self._residual += torch.stack([error.square().sum() for error in errors])
        else:
            w = sample_weights.double()
            self.weight = self.weight + w.sum()
            self._total += w @ centred
            self._square += w @ centred.square().sum(1)
            self._residual += torch.stack([w @ error.square().sum(1) for error in errors])

    def merge(self, ranks: Ranks) -> None:
        """Become the sums over what all ranks saw, on the CPU."""
        seen = [found for found in ranks.gathered(vars(self)) if found.get("n")]
        if not seen:
            return
        vars(self).update(seen[0])
        for other in seen[1:]:
            by, weight, total = other["_shift"] - self._shift, other["weight"], other["_total"]
            self._square += other["_square"] + by @ (2 * total + weight * by)
            self._total += total + weight * by
            self._residual += other["_residual"]
            self.n += other["n"]
            self.weight = self.weight + weight

    def centred(self, y: Tensor) -> Tensor:
        """Outputs y [n, d_out] about the first batch's mean, in float64."""
        return y.double() - self._shift

    def last_without(self, centred: Tensor, squares: Tensor) -> float | None:
        """R2 of the last prediction over all rows but some; None if fewer than two are left.

        Args:
            centred: [n, d_out] of these rows; squares: [n] their squared errors.
        """
        left = self.n - len(centred)
        if left < 2:
            return None
        total, residual = self._total - centred.sum(0), self._residual[-1] - squares.sum()
        mean = total / left
        variance = (self._square - centred.square().sum()) / left - mean.square().sum()
        square = (self._shift + mean).square().sum()
        return float(share_explained(residual / left, variance, square))

    @property
    def mean(self) -> Tensor:
        """[d_out] mean of y."""
        return self._shift + self._total / self.weight

    @property
    def variance(self) -> float:
        """Of y, summed over directions."""
        return float(self._measured()[0])

    @property
    def constant(self) -> bool:
        """Whether y does not vary."""
        variance, square, _ = self._measured()
        return is_constant(variance, square)

    def shares(self) -> Tensor:
        """[degree + 1] R2 of every degree, by `share_explained`."""
        variance, square, mse = self._measured()
        return share_explained(mse, variance, square).to(self._residual.device)

    def r2(self, where: str) -> tuple[float, ...] | None:
        """R2 of every degree; None with fewer than two rows.

        Raises:
            InvalidInputError: outputs or polynomials that are not finite (`where` is the layer).
        """
        if self.n < 2:
            return None
        variance, square, mse = self._measured()
        bad = [f"degree {k}" for k, v in enumerate(numbers(mse)) if not isfinite(v)]
        if not isfinite(variance) or bad:
            what = f"its polynomials of {', '.join(bad)}" if isfinite(variance) else "its outputs"
            raise InvalidInputError(
                f"{where}: {what} are not finite on these inputs, so R2 would be NaN; use a wider "
                "dtype, and check the model's activations on them"
            )
        return tuple(numbers(share_explained(mse, variance, square)))

    def last_r2(self) -> float | None:
        """R2 of the last degree; None with fewer than two rows, -inf of what is not finite."""
        if self.n < 2:
            return None
        variance, square, mse = self._measured()
        finite = isfinite(variance) and isfinite(mse[-1])
        return float(share_explained(mse, variance, square)[-1]) if finite else float("-inf")

    def _measured(self) -> tuple[Tensor, Tensor, Tensor]:
        """Variance and mean square of y, summed over directions, and the mean squared error of
        every degree: on the CPU, for which a GPU is waited for once."""
        variance = self._square / self.weight - (self._total / self.weight).square().sum()
        square, mse = self.mean.square().sum(), self._residual / self.weight
        found = torch.cat([variance[None], square[None], mse]).cpu()
        return found[0], found[1], found[2:]
