"""A polynomial per neuron of sums over players, split among the players, for every degree.

The game is v(S) = sum_i P_i(y_i) + z_i Q_i(y_i), where y_i and z_i are the sums of what the players
in S contribute to neuron i. Two ways to split v(all) - v(none):

    Shapley value of a:       int_0^1           E[v(T + a) - v(T)] dp
    Shapley-Taylor of a, b:   int_0^1 2 (1 - p) E[v(T + a + b) - v(T + a) - v(T + b) + v(T)] dp

where every other player is in T with probability p: 2^n sets, and yet a closed form. With y_T a
random sum over all players, E[e^(s y_T)] = prod_j (1 - p + p e^(s y_j)), so its cumulants are
kappa_r(p) times the power sum over the players of y_j^r. Leaving a out and taking its difference is

    (e^(s y_a) - 1) / (1 - p + p e^(s y_a)) = sum_{r >= 1} gamma_r(p) (s y_a)^r / r!

times that, with kappa_1 = p, gamma_r = dkappa_r / dp, kappa_{r + 1} = p (1 - p) gamma_r. So both
are polynomials in y_a (and y_b) whose coefficients per neuron are E[v^(k)(y_T)] / k! times numbers:
matrix products. The integrals are of polynomials in p, for which Gauss-Legendre quadrature is
exact. What is linear in z comes from s y + t z in place of s y, to first order in t.

Sources: Owen 1972, "Multilinear extensions of games"; Dhamdhere, Agarwal & Sundararajan 2020, "The
Shapley Taylor interaction index".
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from numpy.polynomial import Polynomial as InP
from numpy.polynomial.legendre import leggauss
from torch import Tensor

# Elements of one block of players by neurons: a block has about twice as many powers as degrees.
BLOCK = 1 << 18


def shapley_values(
    y: Tensor, P: Tensor, z: Tensor | None = None, Q: Tensor | None = None
) -> Tensor:
    """[n] float64: what each player adds, averaged over all orders in which they may come.

    They sum to v(all) - v(none).

    Args:
        y: [n, neurons] what each player contributes.
        P: [rows, neurons] coefficients of 1, y, y^2, ..., times the weight with which each neuron
            is read out. What is there without players belongs to them (`expanded_about`).
        z, Q: the same of the linear branch of a GLU and of its factor.

    Cost: O(neurons n degree), and O(neurons degree^3) for coefficients.
    """
    values = y.new_zeros(len(y), dtype=torch.float64)
    for part in _blocks(y, P, z, Q):
        by_y, by_z = part.P.new_zeros(2, part.degree + 1, part.P.shape[1])
        for draw in part.draws():
            for r in range(part.degree + 1):
                by_y[r] += draw.weight * draw.gamma[r] * draw.of_y[r]
                by_z[r] += draw.weight * draw.gamma[r + 1] * draw.of_z[r]
        for power, a, b in zip(part.powers, by_y, by_z, strict=True):
            values += power @ a
            if part.z is not None:
                values += (part.z * power) @ b
    return values


def taylor_interactions(
    y: Tensor, P: Tensor, z: Tensor | None = None, Q: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(linear [n], pairs [n, n]) float64: Shapley-Taylor interactions of order 2.

    What a player does alone, v({a}) - v(none), is linear[a], its terms of degree 1, plus
    pairs[a, a], those of higher degree. What two do together is pairs[a, b] + pairs[b, a], equal
    halves; of a product of k different players each two of them have an equal share. At degree 2
    pairs[a, b] is P_2 y_a y_b. All of them sum to v(all) - v(none), and linear[a] with row a of the
    pairs to the Shapley value of a.

    Args: as of `shapley_values`.

    Cost: at most degree - 1 matrix products O(neurons n^2), O(neurons n degree^2) to prepare them.
    """
    n = len(y)
    linear, alone = y.new_zeros(2, n, dtype=torch.float64)
    half = y.new_zeros(n, n, dtype=torch.float64)
    for part in _blocks(y, P, z, Q):
        for k in range(1, len(part.P)):
            (linear if k == 1 else alone).add_(part.powers[k] @ part.P[k])
        if part.z is not None:
            for k in range(len(part.Q)):
                (linear if k == 0 else alone).add_((part.z * part.powers[k]) @ part.Q[k])
        draws = list(part.draws())
        for t in range(1, part.degree):
            half.addmm_(part.beside(t, draws), part.powers[t].T)
    pairs = (half + half.T) / 2
    return linear, pairs.diagonal_scatter(alone)


class _Draw(NamedTuple):
    """Every player takes part with probability p.

    Attributes:
        weight: of this p in the quadrature.
        gamma: gamma_0 = 0, gamma_1, ... of the module's text.
        of_y, of_z: [neurons] by k: E[d^k v / dy^k] / k!, of_z of what z is multiplied by.
    """

    weight: float
    p: float
    gamma: list[float]
    of_y: list[Tensor]
    of_z: list[Tensor]


class _Block:
    """Some neurons: powers of what the players contribute, and random sums of them."""

    def __init__(self, y: Tensor, P: Tensor, z: Tensor | None, Q: Tensor) -> None:
        self.P, self.Q, self.z = P, Q, z
        self.degree = max(len(P) - 1, len(Q))
        self.powers = [torch.ones_like(y)]
        for _ in range(self.degree):
            self.powers.append(self.powers[-1] * y)

    def draws(self) -> Iterator[_Draw]:
        """Those of all nodes of the quadrature."""
        sums = [power.sum(0) for power in self.powers]
        z_sums = [] if self.z is None else [(self.z * power).sum(0) for power in self.powers]
        for node, weight in zip(*leggauss(max(1, math.ceil(self.degree / 2))), strict=True):
            p = (1 + float(node)) / 2
            gamma = _gamma(p, self.degree + 2)
            kappa = [0.0, p, *(p * (1 - p) * g for g in gamma[1:])]
            moments, z_moments = [torch.ones_like(sums[0])], []
            for k in range(self.degree + 1):
                # by a cumulant that takes r of k others with it
                led = [math.comb(k, r) * kappa[r + 1] * moments[k - r] for r in range(k + 1)]
                if k < self.degree:
                    moments.append(_dot(led, sums[1 : k + 2]))
                if z_sums:
                    z_moments.append(_dot(led, z_sums[: k + 1]))
            counts = range(self.degree + 1)
            of_z = [_derivative(self.Q, moments, k) for k in counts]
            of_y = [_derivative(self.P, moments, k) for k in counts]
            if self.z is not None:
                of_y = [a + _derivative(self.Q, z_moments, k) for k, a in enumerate(of_y)]
            yield _Draw(float(weight) / 2, p, gamma, of_y, of_z)

    def beside(self, t: int, draws: list[_Draw]) -> Tensor:
        """[n, neurons] whose product with the t-th powers and its transpose are the indices' part.

        Of two powers of y the lower is here; of z and y that with z.
        """
        beside = torch.zeros_like(self.powers[0])
        for r in range(self.degree + 1 - t):
            split = math.comb(r + t, r)
            factors = [2 * (1 - d.p) * d.weight * split * d.gamma[t] for d in draws]
            if 1 <= r <= t:
                share = 0.5 if r == t else 1.0
                c = _dot(
                    [share * f * d.gamma[r] for f, d in zip(factors, draws, strict=True)],
                    [d.of_y[r + t] for d in draws],
                )
                beside += c * self.powers[r]
            if self.z is not None:
                c = _dot(
                    [f * d.gamma[r + 1] for f, d in zip(factors, draws, strict=True)],
                    [d.of_z[r + t] for d in draws],
                )
                beside += c * self.z * self.powers[r]
        return beside


def _gamma(p: float, count: int) -> list[float]:
    """gamma_0 = 0, gamma_1 = 1, gamma_{r + 1} = d/dp (p (1 - p) gamma_r), at p."""
    variance, gamma, found = InP([0.0, 1.0, -1.0]), InP([1.0]), [0.0]
    while len(found) < count:
        found.append(float(gamma(p)))
        gamma = (variance * gamma).deriv()
    return found


def _dot(a: Sequence[float | Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y for x, y in zip(a, b, strict=True)), torch.zeros_like(b[0]))


def _derivative(coefficients: Tensor, moments: list[Tensor], k: int) -> Tensor:
    """E[(d/dy)^k sum_j coefficients_j y^j] / k!."""
    value = torch.zeros_like(moments[0])
    for j in range(k, len(coefficients)):
        value += math.comb(j, k) * coefficients[j] * moments[j - k]
    return value


def _blocks(y: Tensor, P: Tensor, z: Tensor | None, Q: Tensor | None) -> Iterator[_Block]:
    step = max(1, BLOCK // max(1, len(y)))
    Q = P.new_zeros(0, P.shape[1]) if Q is None else Q
    for i in range(0, P.shape[1], step):
        some = slice(i, i + step)
        own = None if z is None else z[:, some].double()
        yield _Block(y[:, some].double(), P[:, some].double(), own, Q[:, some].double())
