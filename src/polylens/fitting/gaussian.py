"""The closed-form least-squares polynomial of an MLP or GLU under Gaussian inputs."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from polylens.errors import InvalidInputError
from polylens.fitting.estimator import Estimator
from polylens.inputs.gaussian import Gaussian, Moments
from polylens.normal_forms.preactivation import preactivation_moments
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.ends import PreactivationRange
from polylens.polynomials.factored import Polynomial
from polylens.ranks import Merge


class GaussianEstimator(Estimator):
    """Under the Gaussian with the mean and covariance of the inputs, in closed form."""

    name = "Gaussian"
    default_tails: ClassVar[Mapping[str, float | None]] = {"true": None, "replaced": 0.0}

    def __init__(
        self, weights: MLPWeights | GLUWeights, degree: int, tails: float | None = None
    ) -> None:
        super().__init__(weights, degree, tails)
        self._moments = Moments()
        self._range = None if tails is None else PreactivationRange(weights)

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self.count += len(x)
        self._moments.update(x, sample_weights)
        if self._range is not None:
            self._range.update(x)

    def merge(self, by: Merge) -> None:
        self.count = by.total(self.count)
        self._moments.merge(by)
        if self._range is not None:
            self._range.merge(by)

    def solve(self) -> Polynomial:
        fitted = fit_gaussian(self.weights, self._moments.gaussian("the inputs"), self.degree)
        ends = None if self._range is None else self._range.ends
        return fitted if ends is None else fitted.with_ends(ends)

    @classmethod
    def kept_bytes(cls, weights: MLPWeights | GLUWeights, degree: int) -> int:
        return 8 * weights.d_in**2

    @classmethod
    def check_tails(cls, tails: float | None) -> None:
        super().check_tails(tails)
        if tails:
            raise InvalidInputError(
                f"tails={tails!r} is for fits to the inputs themselves, which know of it; under "
                "a Gaussian there is a closed form without: give None or 0.0, or "
                'estimator="samples"'
            )


@torch.no_grad()
def fit_gaussian(weights: MLPWeights | GLUWeights, inputs: Gaussian, degree: int) -> Polynomial:
    r"""The optimum over all polynomials of degree <= n in x (Belrose & Rigg 2025).

    With y = x W + b the activated preactivation, m and s its mean and standard deviation under
    the inputs, t = (y - m) / s and c_k = E[act(m + s xi) He_k(xi)]:

        MLP   f_n = sum_{k<=n} (c_k / k!) He_k(t) W_out + b_out
        GLU   f_n = (sum_{k<=n} (e_k / k!) He_k(t) + r sum_{k<n} (c_k / k!) He_k(t)) W_out + b_out

    where z is the linear branch, a = Cov(y, z) / s, r = z - E[z] - a t is independent of t and
    e_k = E[z] c_k + a (c_{k+1} + k c_{k-1}).

    Cost: one product cov @ W in float64, O(d_in^2 d_mlp), on the weights' device; memory
    O(d_in * 4096) beyond the covariance. Nothing of size d_out d_in^2 is formed.
    """
    moments = preactivation_moments(inputs.to(weights.device), weights)
    m, s, z_mean, a, _ = moments
    if isinstance(weights, GLUWeights):
        c = weights.act.hermite_coefficients(m, s, degree + 1)
        tables = _glu_tables(c, z_mean, a, degree)
    else:
        c = weights.act.hermite_coefficients(m, s, degree)
        tables = _mlp_table(c, degree), None
    return Polynomial(weights, m, s, *tables, inputs=inputs)


def _mlp_table(c: Tensor, n: int) -> Tensor:
    P = c.new_zeros(n + 1, n + 1, c.shape[1])
    for k in range(n + 1):
        P[k:, k] = c[k] / math.factorial(k)
    return P


def _glu_tables(c: Tensor, z_mean: Tensor, a: Tensor, n: int) -> tuple[Tensor, Tensor]:
    P = c.new_zeros(n + 1, n + 1, c.shape[1])
    Q = c.new_zeros(n + 1, n, c.shape[1])
    # Substituting r = z - E[z] - a t, everything below He_{n-1} cancels out of P.
    for k in range(n + 1):
        if k:
            P[k, k - 1] = a * c[k] / math.factorial(k - 1)
            Q[k:, k - 1] = c[k - 1] / math.factorial(k - 1)
        P[k, k] = (z_mean * c[k] + a * c[k + 1]) / math.factorial(k)
    return P, Q
