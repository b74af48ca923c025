"""Where a neuron's polynomial ends, and the asymptote of the activation takes over."""

# Matrices and tables of coefficients are upper case.
# pyright: reportConstantRedefinition=false

import math

import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.activations.hermite import evaluate_powers
from polylens.errors import InvalidInputError
from polylens.normal_forms.preactivation import blocks
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.evaluation import Rows, clamped, gained
from polylens.polynomials.monomials import expanded_about
from polylens.ranks import Merge


class Ends:
    """Beyond an end c of y a polynomial is P(c) + z (Q(c) + A(y) - A(c)), of an MLP without the z.

    A is the polynomial that the activation approaches on that side. It is followed from the split
    between the two asymptotes on where that is further out than c; up to it nothing is gained.
    Where both are the same, as of the identity, there is no split.

    Args:
        act: the activation.
        at: [2, ...] lowest and highest y, infinite where there is no end.
        asymptotes: False for the value at the end everywhere beyond it.
    """

    def __init__(self, act: Activation, at: Tensor, asymptotes: bool = True) -> None:
        self.act, self.at, self.asymptotes = act, at, asymptotes

    def tables(
        self, mean: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Rows]:
        """Those of `polylens.polynomials.evaluation`, in v = y - mean."""

        def moved(value: Tensor) -> Tensor:
            value = value if mean is None else value - mean
            return value.to(dtype or value.dtype)

        low, high = self.at
        found: dict[str, Rows] = {"clip": (moved(low), moved(high))}
        if self.asymptotes:
            low, high = _on_their_sides(self.act, low, high)
            for name, powers, start in (
                ("below", self.act.left, low),
                ("above", self.act.right, high),
            ):
                if any(powers[1:]):
                    rates = (rate.to(dtype or rate.dtype) for rate in _rates(powers, start))
                    found[name] = (moved(start), *rates)
        return found

    def of(self, neurons: slice | Tensor, y: Tensor) -> "Ends":
        """Those of some neurons, for y [neurons, n] in its dtype."""
        return Ends(self.act, self.at[:, neurons, None].to(y), self.asymptotes)

    def piece(
        self,
        v: Tensor,
        mean: Tensor,
        P: Tensor,
        Q: Tensor | None = None,
        gain: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The ordinary polynomial P(v) + z Q(v) that holds where the neurons of one input lie.

        Args:
            v: [..., neurons] y - mean of the input.
            mean: [neurons].
            P, Q: [powers, ..., neurons] coefficients between the ends; Q None of an MLP.
            gain: what the gain beyond ends is multiplied by.

        Returns:
            P and Q, of as many powers as an asymptote needs, and which neurons are beyond.
        """
        tables = self.tables(mean, v.dtype)
        c = clamped(v, tables)
        beyond = c != v
        P = _constant_where(beyond, P, c)
        Q = None if Q is None else _constant_where(beyond, Q, c)
        for name, outside in (("below", torch.lt), ("above", torch.gt)):
            if name not in tables:
                continue
            start, *rates = tables[name]
            there = outside(v, start)
            # about the start, which may be infinite where nothing is beyond it
            about = torch.stack([torch.zeros_like(v), *(rate.expand_as(v) for rate in rates)])
            gained = expanded_about(about, -torch.where(there, start, 0.0))
            gained = gain * torch.where(there, gained, 0.0)
            if Q is None:
                P = _sum(P, gained)
            else:
                Q = _sum(Q, gained)
        return P, Q, beyond

    def clamp(self, y: Tensor) -> Tensor:
        """y where a polynomial is evaluated."""
        return clamped(y, self.tables())

    def gained(self, y: Tensor) -> Tensor | None:
        """A(y) - A(c) beyond the ends, zero between them; None where it is zero everywhere."""
        return gained(y, self.tables())


def asymptotes(act: Activation, y: Tensor) -> list[Tensor]:
    """What act approaches on either side, constant on the other side of the split."""
    left, right = _on_their_sides(act, y, y)
    return [evaluate_powers(act.left, left), evaluate_powers(act.right, right)]


def _on_their_sides(act: Activation, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """low no further up, and high no further down, than the split of two asymptotes."""
    if act.left == act.right:
        return low, high
    return low.clamp(max=act.split), high.clamp(min=act.split)


def require_tails(tails: float | None) -> None:
    """InvalidInputError unless tails is None, 0.0 or a share below 0.5."""
    if tails is not None and not (type(tails) in (float, int) and 0 <= tails < 0.5):
        raise InvalidInputError(
            f"tails={tails!r}: give None (polynomials everywhere), 0.0 (ends at the lowest and "
            "highest preactivation seen), or the share of preactivations, below 0.5, that may "
            "lie beyond the ends and follow the activation's asymptotes"
        )


class PreactivationRange:
    """Lowest and highest y of every neuron over the inputs so far.

    Args:
        weights: the layer.
        inner: [2, d_mlp] or of each degree [degree + 1, 2, d_mlp], ends that lie further inside,
            as of `best_tails`.

    Attributes:
        seen: [2, d_mlp] in float64; None before the first input.
    """

    def __init__(self, weights: MLPWeights | GLUWeights, inner: Tensor | None = None) -> None:
        self.weights, self.inner = weights, inner
        self.seen: Tensor | None = None

    @property
    def ends(self) -> Tensor | None:
        """As `inner`, or `seen` without it; None before the first input."""
        if self.seen is None or self.inner is None:
            return self.seen
        low, high = self.inner.unbind(-2)
        return torch.stack([self.seen[0].maximum(low), self.seen[1].minimum(high)], -2)

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
        if self.seen is not None:
            low, high = low.minimum(self.seen[0]), high.maximum(self.seen[1])
        self.seen = torch.stack([low, high])

    def merge(self, by: Merge) -> None:
        """Let the range become what `by` makes of it."""
        if self.seen is not None:
            low, high = self.seen
            self.seen = torch.stack([by.lowest(low), by.highest(high)])


def _constant_where(there: Tensor, powers: Tensor, v: Tensor) -> Tensor:
    """Polynomials [powers, ..., neurons], and the constant that is their value at v for some."""
    value = torch.zeros_like(powers)
    for row in reversed(powers):
        value[0] = value[0] * v + row
    return torch.where(there, value, powers)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two polynomials [powers, ..., neurons]."""
    total = a.new_zeros(max(len(a), len(b)), *a.shape[1:])
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def _rates(powers: tuple[float, ...], start: Tensor) -> list[Tensor]:
    """sum_p powers[p] (y^p - start^p) in powers of y - start; zero where start is infinite."""
    rates: list[Tensor] = []
    for j in range(1, len(powers)):
        rate = torch.zeros_like(start)
        for p in range(j, len(powers)):
            if powers[p]:
                rate += math.comb(p, j) * powers[p] * start ** (p - j)
        rates.append(torch.where(start.isfinite(), rate, 0.0))
    return rates
