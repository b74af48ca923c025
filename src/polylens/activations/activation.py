"""What an activation is, and its Hermite coefficients.

An activation is described by what makes its coefficients exact: two polynomials that it
approaches on either side of a split point (their coefficients are closed form), and the edges
of panels on which what is left is smooth (quadrature). Piecewise polynomials need no more than
that; erf-GELU has an elementary closed form of its own.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from polylens.activations.hermite import (
    CUTOFF,
    evaluate_powers,
    local_coefficients,
    monomial_coefficients,
    quadrature_coefficients,
    ramp_coefficients,
    shifted_difference,
)
from polylens.checks import floating
from polylens.errors import InvalidInputError

MAX_DEGREE = 12
# A Gaussian is narrow in a window so many times as wide: the window holds all of it.
NARROW = 16


@dataclass(frozen=True)
class Activation:
    """An elementwise function with accurate Hermite coefficients.

    Attributes:
        name: as in Hugging Face's and TransformerLens' tables.
        fn: the function, in torch operations, accurate in float64.
        left, right: ascending coefficients of the polynomials that fn approaches (or equals)
            far below and far above `split`.
        split: where the two polynomials meet.
        edges: increasing panel edges; fn minus its asymptote is smooth inside each panel and
            negligible outside them all. Empty if fn equals the asymptotes.
        kinks: points where fn itself is not analytic.
        width: scale of fn's features; Gaussians narrower than a quarter of it need no
            asymptotes, and lose digits by them where fn is small.
        closed_form: (m, s, degree) -> coefficients, where one is known.
        accuracy: relative error of the coefficients that was measured; of a registered
            activation by refining its panels, of a built-in one against 50-digit quadrature.
        family: (constructor's name, its arguments ...) of a parametrised one, see
            `polylens.activations.table.FAMILIES`.
    """

    name: str
    fn: Callable[[Tensor], Tensor]
    left: tuple[float, ...] = ()
    right: tuple[float, ...] = ()
    split: float = 0.0
    edges: tuple[float, ...] = ()
    kinks: tuple[float, ...] = ()
    width: float = 1.0
    closed_form: Callable[[Tensor, Tensor, int], Tensor] | None = None
    accuracy: float = 1e-10
    family: tuple[str | float, ...] = ()

    def __call__(self, y: Tensor) -> Tensor:
        return self.fn(y)

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"

    def hermite_coefficients(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        """c_k = E[fn(m + s xi) He_k(xi)] for k = 0 ... degree, xi ~ N(0, 1).

        Args:
            m, s: mean and standard deviation per neuron, any common shape; s may be 0.
            degree: highest k, at most 12 (beyond, float64 no longer holds k!-sized terms).

        Returns:
            float64 [degree + 1, *m.shape] on the device of m.

        Raises:
            InvalidInputError: negative or non-finite s, non-finite m, degree out of range.
        """
        if type(degree) is not int or not 0 <= degree <= MAX_DEGREE + 1:
            raise InvalidInputError(
                f"degree {degree!r} is outside 0 ... {MAX_DEGREE}: He_k(t) and k! of a higher "
                "degree cancel more digits than float64 has"
            )
        m, s = floating("m", m).double(), floating("s", s).double()
        try:
            shape = (m + s).shape
        except RuntimeError as error:
            shapes = f"m {list(m.shape)} and s {list(s.shape)}"
            raise InvalidInputError(f"{shapes} do not fit") from error
        if not (torch.isfinite(m) & torch.isfinite(s) & (s >= 0)).all():
            raise InvalidInputError(
                "preactivation means must be finite and standard deviations finite and >= 0; "
                f"got {int((~torch.isfinite(m)).sum())} non-finite means and "
                f"{int((~torch.isfinite(s) | (s < 0)).sum())} bad standard deviations"
            )
        m, s = m.expand(shape).reshape(-1), s.expand(shape).reshape(-1)
        constant = s == 0
        coefficients = self._coefficients(m, torch.where(constant, 1.0, s), degree)
        if constant.any():
            coefficients[:, constant] = 0.0
            coefficients[0, constant] = self.fn(m[constant])
        return coefficients.reshape(degree + 1, *shape)

    def _coefficients(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        if self.closed_form is not None:
            return self.closed_form(m, s, degree)
        if not self.edges:
            return self._about_asymptotes(m, s, degree)
        narrow = s <= self.width / 4
        if not narrow.any():
            return self._about_asymptotes(m, s, degree)
        out = torch.empty(degree + 1, len(m), dtype=m.dtype, device=m.device)
        out[:, narrow] = self._direct(m[narrow], s[narrow], degree)
        out[:, ~narrow] = self._about_asymptotes(m[~narrow], s[~narrow], degree)
        return out

    def _direct(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        """Of narrow Gaussians, from derivatives where no kink is within their reach."""
        kinks = m.new_tensor(self.kinks)
        above = torch.searchsorted(kinks, m)
        lower = torch.cat([m.new_tensor([-math.inf]), kinks])[above]
        upper = torch.cat([kinks, m.new_tensor([math.inf])])[above]
        half = ((upper - lower) / 2).clamp(max=self.width)
        near = (s <= half / NARROW) & (torch.minimum(m - lower, upper - m) >= CUTOFF * s)
        if not near.any():
            return self._by_quadrature(m, s, degree)
        centre = torch.maximum(torch.minimum(m, upper - half), lower + half)
        own, good = local_coefficients(self.fn, m[near], s[near], centre[near], half[near], degree)
        near[near.clone()] = good
        out = torch.empty(degree + 1, len(m), dtype=m.dtype, device=m.device)
        out[:, near] = own[:, good]
        if not near.all():
            out[:, ~near] = self._by_quadrature(m[~near], s[~near], degree)
        return out

    def _by_quadrature(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        edges = (-math.inf, *self.kinks, math.inf)
        panels = [
            quadrature_coefficients(self.fn, m, s, lower, upper, degree)
            for lower, upper in itertools.pairwise(edges)
        ]
        return torch.stack(panels).sum(0)

    def _about_asymptotes(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        out = monomial_coefficients(self.left, m, s, degree)
        for power, jump in enumerate(shifted_difference(self.left, self.right, self.split)):
            if jump:
                out += jump * ramp_coefficients(power, m, s, self.split, degree)
        for lower, upper in itertools.pairwise(self.edges):
            side = self.left if upper <= self.split else self.right
            remainder = partial(_remainder, self.fn, side)
            out += quadrature_coefficients(remainder, m, s, lower, upper, degree)
        return out


def _remainder(fn: Callable[[Tensor], Tensor], side: tuple[float, ...], y: Tensor) -> Tensor:
    return fn(y) - evaluate_powers(side, y)
