"""Hermite coefficients of one-dimensional functions under a Gaussian.

Everywhere in polylens He_k is the probabilists' Hermite polynomial (He_2(t) = t^2 - 1), and

    c_k(m, s) = E[f(m + s xi) He_k(xi)],    xi ~ N(0, 1),

without the 1/k!, which is written where it is used. All functions are elementwise over any
number of neurons, in float64, on the device of their arguments.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from polylens.devices import per_block

SQRT_2PI = math.sqrt(2 * math.pi)
# Beyond 11 standard deviations phi(xi) He_9(xi) is below 1e-17 of any function that grows
# like a power of xi, so the quadrature stops there.
CUTOFF = 11.0
NODES = 64
# Degree of interpolation around a narrow Gaussian; the last coefficients say how large rounding
# is, of a function that is resolved at most this share of its largest value.
LOCAL, LAST, RESOLVED = 40, 8, 3e-14
# A function that is so much larger elsewhere in the window has too few digits at the Gaussian.
CONTRAST = 1e3
# Neurons whose nodes are in memory at a time: a core's cache on a CPU, plenty of work on a GPU.
CHUNK = 4096, 1 << 16


def phi(u: Tensor) -> Tensor:
    """Standard normal density."""
    return torch.exp(-0.5 * u * u) / SQRT_2PI


def cdf(u: Tensor) -> Tensor:
    """Standard normal distribution function, accurate in its lower tail too."""
    # torch.special.ndtr is 1 + erf there: a third of the value is lost at -8.25, all of it at -9
    return torch.erfc(u * -math.sqrt(0.5)) / 2


def hermite_polynomials(t: Tensor, degree: int) -> list[Tensor]:
    """He_0(t), ..., He_degree(t) by the recurrence He_{k+1} = t He_k - k He_{k-1}."""
    values = [torch.ones_like(t), t]
    for k in range(1, degree):
        values.append(t * values[k] - k * values[k - 1])
    return values[: degree + 1]


@lru_cache
def hermite_to_monomial(degree: int) -> tuple[tuple[float, ...], ...]:
    """Rows k: the coefficients of He_k in 1, t, ..., t^degree (integers, exact in float64)."""
    rows = [[0.0] * (degree + 1) for _ in range(degree + 1)]
    rows[0][0] = 1.0
    if degree:
        rows[1][1] = 1.0
    for k in range(1, degree):
        for j in range(degree + 1):
            rows[k + 1][j] = (rows[k][j - 1] if j else 0.0) - k * rows[k - 1][j]
    return tuple(map(tuple, rows))


def evaluate_powers(coefficients: Sequence[float], y: Tensor) -> Tensor:
    """sum_p coefficients[p] y^p, by Horner's rule."""
    value = torch.zeros_like(y)
    for a in reversed(coefficients):
        value = value * y + a
    return value


def shifted_difference(left: Sequence[float], right: Sequence[float], split: float) -> list[float]:
    """Coefficients of right(y) - left(y) in powers of (y - split)."""
    size = max(len(left), len(right))
    difference = [
        (right[p] if p < len(right) else 0.0) - (left[p] if p < len(left) else 0.0)
        for p in range(size)
    ]
    return [
        sum(difference[q] * math.comb(q, p) * split ** (q - p) for q in range(p, size))
        for p in range(size)
    ]


def monomial_coefficients(
    powers: Sequence[float] | Tensor, m: Tensor, s: Tensor, degree: int
) -> Tensor:
    """Coefficients [degree + 1, ...] of the polynomial sum_p powers[p] y^p.

    By Stein's lemma c_k = s^k E[f^(k)(y)], and the derivative of a monomial is a monomial.
    """
    moments = [torch.ones_like(m), m]
    for p in range(2, len(powers)):
        moments.append(m * moments[-1] + (p - 1) * s * s * moments[-2])
    out = torch.zeros(degree + 1, *m.shape, dtype=m.dtype, device=m.device)
    for p, a in enumerate(powers):
        for k in range(min(p, degree) + 1):
            out[k] += a * float(math.perm(p, k)) * s**k * moments[p - k]
    return out


def ramp_coefficients(power: int, m: Tensor, s: Tensor, knot: float, degree: int) -> Tensor:
    """Coefficients [degree + 1, ...] of the ramp (y - knot)_+^power.

    With u = (knot - m) / s they are power! s^power I_{power - k}(u), where I_0 is the upper
    tail probability, I_j its j-fold integral, and I_{-1-i} = He_i(u) phi(u) its derivatives
    (the repeated integrals of erfc, DLMF 7.18, in the probabilists' scaling).
    """
    u = (knot - m) / s
    density = phi(u)
    tail = cdf(-u)
    integrals = {-1: density, 0: tail}
    for j in range(1, power + 1):
        integrals[j] = (integrals[j - 2] - u * integrals[j - 1]) / j
    for i, he in enumerate(hermite_polynomials(u, max(degree - power - 1, 0))):
        # where: 0 * inf at a knot infinitely many standard deviations away
        integrals[-1 - i] = torch.where(density > 0, he * density, 0.0)
    scale = math.factorial(power) * s**power
    return torch.stack([scale * integrals[power - k] for k in range(degree + 1)])


def hermite_change_of_variable(mu: Tensor, sigma: Tensor, degree: int) -> Tensor:
    """A [degree + 1, degree + 1, ...] with He_k(mu + sigma tau) = sum_j A[k, j] He_j(tau).

    A[k, j] = C(k, j) sigma^j h_{k-j}, where h_m = E[He_m(mu + sigma xi)] obeys
    h_{m+1} = mu h_m + m (sigma^2 - 1) h_{m-1}.
    """
    h = [torch.ones_like(mu), mu]
    for m in range(1, degree):
        h.append(mu * h[m] + m * (sigma * sigma - 1) * h[m - 1])
    A = mu.new_zeros(degree + 1, degree + 1, *mu.shape)
    for k in range(degree + 1):
        for j in range(k + 1):
            A[k, j] = math.comb(k, j) * sigma**j * h[k - j]
    return A


def times_linear(c: Tensor, mean: Tensor, a: Tensor) -> Tensor:
    """Coefficients of g(t) (mean + a t) from those of g, one fewer of them.

    e_k = mean c_k + a (c_{k+1} + k c_{k-1}).
    """
    e = mean * c[:-1] + a * c[1:]
    for k in range(1, len(e)):
        e[k] += a * k * c[k - 1]
    return e


def factorials(n: int, like: Tensor) -> Tensor:
    """0!, ..., (n - 1)! as a float64 column [n, 1] on the device of `like`."""
    values = [math.factorial(k) for k in range(n)]
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


@lru_cache
def _gauss_legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(nodes)


def quadrature_coefficients(
    f: Callable[[Tensor], Tensor],
    m: Tensor,
    s: Tensor,
    lower: float,
    upper: float,
    degree: int,
    nodes: int = NODES,
) -> Tensor:
    """Coefficients [degree + 1, n] of f restricted to lower <= y <= upper, by Gauss-Legendre.

    The interval is cut to the part within 11 standard deviations of the mean, or, in the tail, to
    where the density is e^-60.5 of the largest in it, neuron by neuron, so the same nodes serve
    a Gaussian much narrower and one much wider than f's own features. f must be smooth inside
    the interval. Cost: nodes * (degree + cost of f) per neuron,
    memory bounded by chunks.
    """
    x, w = _gauss_legendre(nodes)
    x = torch.as_tensor(x, dtype=m.dtype, device=m.device)
    w = torch.as_tensor(w / SQRT_2PI, dtype=m.dtype, device=m.device)
    out = torch.empty(degree + 1, m.numel(), dtype=m.dtype, device=m.device)
    step = per_block(m.device, *CHUNK)
    for i in range(0, m.numel(), step):
        mi, si = m[i : i + step, None], s[i : i + step, None]
        lo, hi = (lower - mi) / si, (upper - mi) / si
        # of an interval in the tail, as far as the density falls by as much as to CUTOFF
        far = (hi.clamp(max=0).square() + CUTOFF**2).sqrt().neg_()
        hi = torch.minimum(hi, (lo.clamp(min=0).square() + CUTOFF**2).sqrt())
        lo = torch.maximum(lo, far)
        half = (hi - lo) / 2
        xi = torch.addcmul(lo, half, 1 + x)
        value = f(torch.addcmul(mi, si, xi))
        value = value.mul_(torch.square(xi).mul_(-0.5).exp_()).mul_(half * w)
        before = value
        for k in range(degree + 1):
            torch.sum(value, 1, out=out[k, i : i + step])
            # weight * He_{k+1}
            value, before = (xi * value).sub_(before, alpha=k), value
    return out


@lru_cache
def _chebyshev() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, values at them -> Chebyshev coefficients, and these -> coefficients of powers."""
    angle = math.pi * (np.arange(LOCAL + 1) + 0.5) / (LOCAL + 1)
    analysis = np.cos(np.arange(LOCAL + 1)[:, None] * angle) * (2 / (LOCAL + 1))
    analysis[0] /= 2
    powers = np.zeros((LOCAL + 1, LOCAL + 1))
    for k in range(LOCAL + 1):
        powers[: k + 1, k] = np.polynomial.chebyshev.cheb2poly([0] * k + [1])
    return np.cos(angle), analysis, powers


def local_coefficients(
    f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor, centre: Tensor, half: Tensor, degree: int
) -> tuple[Tensor, Tensor]:
    """Coefficients [degree + 1, n] of f under Gaussians much narrower than its features.

    c_k is s^k E[f^(k)(m + s xi)], of which quadrature leaves an error of 1e-16 |f|: nothing of
    c_2 / s^2 at s = 1e-8. Here the derivatives are those of the Chebyshev interpolant of f on
    centre - half ... centre + half, so that c_k / s^k is as accurate at any s.

    Args:
        centre, half: [n], a window around m in which f is analytic and which is wide beside s.

    Returns:
        The coefficients, and [n] where the interpolant is f to rounding.
    """
    nodes, analysis, powers = (torch.as_tensor(a).to(m) for a in _chebyshev())
    values = f(centre + half * nodes[:, None])
    chebyshev = analysis @ values
    size = values.abs().amax(0)
    rounding = chebyshev[-LAST:].abs().amax(0)
    # none behind the last one that is more than rounding
    behind = chebyshev.abs().flip(0).cummax(0).values.flip(0) <= 2 * rounding
    own = powers @ torch.where(behind, 0.0, chebyshev)
    at, scale, exact = (m - centre) / half, s / half, f(m)
    out = monomial_coefficients(own, at, scale, degree)
    value, slope = torch.zeros_like(m), torch.zeros_like(m)
    for a in own.flip(0):
        value, slope = value * at + a, slope * at + value
    out[0] += exact - value
    good = rounding <= RESOLVED * size  # which NaN is not
    return out, good & (size <= CONTRAST * (exact.abs() + slope.abs()))
