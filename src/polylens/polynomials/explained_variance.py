"""Explained variance in closed form, under Gaussian and mixture inputs.

Neurons under a Gaussian are sums of Hermite parts: the part of degree k of
act(y_i) z_i is (e_k / k!) He_k(t_i) + r_i (c_{k-1} / (k-1)!) He_{k-1}(t_i), and by Mehler's formula

    E[part_k(i) part_k(j)] = e_ki e_kj rho^k / k!
        + (e_ki c_(k-1)j alpha + c_(k-1)i e_kj beta) rho^(k-1) / (k-1)!
        + c_(k-1)i c_(k-1)j (sigma rho^(k-1) + (k-1) alpha beta rho^(k-2)) / (k-1)!

with rho = corr(t_i, t_j), alpha = Cov(t_i, r_j), beta = Cov(r_i, t_j), sigma = Cov(r_i, r_j); for
an MLP r = 0 and e = c. Parts of different degree are uncorrelated. Pairs of neurons are visited
in blocks, so no d_mlp x d_mlp matrix is held.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from polylens.activations.activation import MAX_DEGREE, Activation
from polylens.activations.hermite import (
    factorials,
    hermite_change_of_variable,
    quadrature_coefficients,
    times_linear,
)
from polylens.brief import Brief
from polylens.errors import InvalidInputError
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.residuals import is_constant, share_explained
from polylens.normal_forms.correlations import pairs
from polylens.normal_forms.preactivation import Preactivations, preactivation_moments
from polylens.normal_forms.weights import GLUWeights, MLPWeights, check_weights

# Panels on which GELU, whose coefficients need none, is smooth.
GELU_PANELS = (-12.0, -3.0, 3.0, 12.0)
# Neurons that are integrated at a time.
STEP = 4096
# Hermite polynomials He_k of the fit, in those of a component, He_j.
_IN_BASIS = "degree k neuron, k j neuron -> degree j neuron"
# The weights and components of a mixture, on the layer's device.
Components = list[tuple[float, Gaussian]]


@dataclass(frozen=True, eq=False, repr=False)
class ExplainedVariance(Brief):
    """Variance of a layer's output, summed over output directions, and how it is explained.

    Attributes:
        per_degree: [degree + 1] float64, the variance that each degree adds; 0 at degree 0.
        total: the layer's variance; the exact value lies within total_error of it.
        total_error: rigorous bound from the terms beyond the summed series, 0 where it is exact.
        r2: [degree + 1] cumulative share explained. Of a constant output it is 1: degree 0
            reproduces it.
    """

    per_degree: Tensor
    total: float
    total_error: float
    r2: Tensor

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest r2 [degree + 1] that total_error allows."""
        explained = self.per_degree.cumsum(0)
        if self.total <= 0:
            return self.r2, self.r2
        upper = (explained / max(self.total - self.total_error, self.total * 1e-300)).clamp(max=1)
        return explained / (self.total + self.total_error), upper


@torch.no_grad()
def explained_variance(
    weights: MLPWeights | GLUWeights, gaussian: Gaussian, degree: int
) -> ExplainedVariance:
    """Variance explained by the optimum of every degree up to `degree`, in closed form.

    The total is the exact variance of each neuron plus, for pairs, the series up to degree 12;
    what the series leaves out of a pair is at most ||M||^13 sqrt(tail_i tail_j) by
    Cauchy-Schwarz, where M is the cross-correlation of (t, r) of the two neurons and tail_i the
    exact variance of neuron i beyond degree 12. Summed, that is `total_error`. ReLU without
    means is exact (arc-cosine kernel), and so is an activation that is a polynomial.

    Cost: O(d_mlp^2 (d_in + d_out + 12)) in float64, in blocks of 1024 x 1024 pairs.

    Raises:
        InvalidInputError: degree outside 0 ... 12, another number of features, no Gaussian.

    >>> import torch, polylens
    >>> layer = polylens.MLPWeights(torch.eye(3), torch.ones(3, 1), "relu")
    >>> result = polylens.explained_variance(layer, polylens.Gaussian.standard(3), degree=2)
    >>> [round(float(share), 3) for share in result.per_degree / result.total]
    [0.0, 0.733, 0.233]
    """
    check_weights(weights)
    _require_gaussian(gaussian, weights.d_in)
    if type(degree) is not int or not 0 <= degree <= MAX_DEGREE:
        raise InvalidInputError(f"degree must be an integer in 0 ... {MAX_DEGREE}, got {degree!r}")
    gaussian = gaussian.to(weights.device)
    moments = preactivation_moments(gaussian, weights, linear_variance=True)
    series = _series(weights, moments)
    mean = series.e[0] @ weights.W_out.double()
    if weights.b_out is not None:
        mean = mean + weights.b_out.double()
    parts, tail, error = _sum_over_pairs(
        weights, gaussian, moments, series.e[None], series.c[None], series.tail
    )
    parts = parts[0].clamp(min=0)
    parts[0] = 0.0
    total = float(parts.sum() + tail)
    per_degree = parts[: degree + 1]
    if is_constant(total, mean.square().sum()):
        return ExplainedVariance(per_degree * 0, 0.0, 0.0, torch.ones_like(per_degree))
    return ExplainedVariance(per_degree, total, error, per_degree.cumsum(0) / total)


def _require_gaussian(gaussian: object, d_in: int) -> None:
    if not isinstance(gaussian, Gaussian):
        raise InvalidInputError(
            f"explained_variance needs Gaussian inputs, got {type(gaussian).__name__}; under "
            "other input models read Polynomial.r2"
        )
    if gaussian.d_in != d_in:
        raise InvalidInputError(
            f"the layer reads {d_in} features, the input model has {gaussian.d_in}"
        )


class Coefficients(NamedTuple):
    """Of neurons P_i(t) + z Q_i(t), t = (y - m) / s, in the He_k of t.

    m and s [d_mlp]; P [..., degree + 1, d_mlp]; Q [..., degree, d_mlp], None where there is no z.
    """

    m: Tensor
    s: Tensor
    P: Tensor
    Q: Tensor | None


@torch.no_grad()
def r2_under(
    weights: MLPWeights | GLUWeights, components: Components, neurons: Coefficients
) -> Tensor:
    """[degree + 1] R2 of a factored polynomial's optima of every degree under a mixture.

    1 - error / variance; the variance is the error of degree 0. In every component the error of
    each neuron is again a Hermite series.
    """
    n = len(neurons.P) - 1
    mse = torch.zeros(n + 1, dtype=torch.float64, device=weights.device)
    for weight, component in components:
        moments = preactivation_moments(component, weights, linear_variance=True)
        series = _series(weights, moments)
        e, c = (v.expand(n + 1, *v.shape).clone() for v in (series.e, series.c))
        own_e, own_c = _series_of(neurons, moments)
        e[:, : n + 1] -= own_e
        c[:, : n + 1] -= own_c
        parts, tail, _ = _sum_over_pairs(weights, component, moments, e, c, series.tail)
        mse += weight * (parts.sum(1) + tail)
    mse = mse.clamp(min=0)
    mean = _projected(neurons.P[0, 0], weights)
    return share_explained(mse, mse[0], mean.square().sum())


@torch.no_grad()
def energy_under(
    weights: MLPWeights | GLUWeights, gaussian: Gaussian, neurons: Coefficients
) -> Tensor:
    """[degree + 1] E|f_k|^2 of the parts of a factored polynomial of one degree under a Gaussian.

    f_k is the part of degree k in that Gaussian's own Hermite polynomials, so that they sum to
    E|f|^2, and those of k >= 1 to the variance. The activation does not enter.
    """
    moments = preactivation_moments(gaussian, weights, linear_variance=True)
    m, s, P, Q = neurons
    e, c = _series_of(Coefficients(m, s, P[None], None if Q is None else Q[None]), moments)
    sums, _, _ = _sum_over_pairs(weights, gaussian, moments, e, c, torch.zeros_like(m))
    energy = sums[0].clamp(min=0)
    energy[0] = _projected(e[0, 0], weights).square().sum()
    return energy


def _projected(h: Tensor, weights: MLPWeights | GLUWeights) -> Tensor:
    """h W_out + b_out in float64."""
    out = h @ weights.W_out.double()
    return out if weights.b_out is None else out + weights.b_out.double()


@torch.no_grad()
def variance_under(weights: MLPWeights | GLUWeights, components: Components) -> float:
    """Variance of the layer's output under a mixture, summed over output directions.

    That within the components and that of their means.
    """
    W_out, within = weights.W_out.double(), 0.0
    means: list[Tensor] = []
    shares: list[float] = []
    for weight, component in components:
        moments = preactivation_moments(component, weights, linear_variance=True)
        series = _series(weights, moments)
        parts, tail, _ = _sum_over_pairs(
            weights, component, moments, series.e[None], series.c[None], series.tail
        )
        within += weight * float(parts[0, 1:].sum() + tail)
        means.append(series.e[0] @ W_out)
        shares.append(weight)
    mean, share = torch.stack(means), W_out.new_tensor(shares)
    between = share @ (mean - share @ mean).square().sum(1)
    return within + float(between)


def _series_of(neurons: Coefficients, moments: Preactivations) -> tuple[Tensor, Tensor]:
    """(e, c) [sets, degree + 1, d_mlp] of sets of coefficients under these moments."""
    m, s, P, Q = neurons
    n = P.shape[1] - 1
    inverse = torch.where(s > 0, 1 / s, 0.0)
    basis = hermite_change_of_variable((moments.m - m) * inverse, moments.s * inverse, n)
    factorial = factorials(n + 1, P)
    e = factorial * einsum(P, basis, _IN_BASIS)
    c = torch.zeros_like(e)
    if Q is not None and n:
        c[:, :n] = einsum(Q, basis[:n, :n], _IN_BASIS) * factorial[:n]
        padded = torch.cat([c, torch.zeros_like(c[:, :1])], dim=1)
        for k in range(len(e)):
            e[k] += times_linear(padded[k], moments.z_mean, moments.a)
    return e, c


class _Series(NamedTuple):
    """e [13, d_mlp], c [13, d_mlp] of every neuron, and its variance beyond degree 12."""

    e: Tensor
    c: Tensor
    tail: Tensor


def _series(weights: MLPWeights | GLUWeights, moments: Preactivations) -> _Series:
    m, s, z_mean, a, r_variance = moments
    c = weights.act.hermite_coefficients(m, s, MAX_DEGREE + 1)
    glu = isinstance(weights, GLUWeights)
    # beyond degree 12 a constant has nothing, but its square would take the digits of what varies
    varying = torch.cat([torch.zeros_like(c[:1]), c[1:]])
    q = _square_coefficients(weights.act, m, s, c[0])
    own = times_linear(varying, z_mean, a) if glu else varying[:-1]
    mean_square = q[0]
    if glu:
        mean_square = (z_mean.square() + a.square() + r_variance) * q[0]
        mean_square = mean_square + 2 * z_mean * a * q[1] + a.square() * q[2]
    factorial = factorials(MAX_DEGREE + 1, c)
    summed = (own.square() / factorial).sum(0)
    # r_i He_{k-1}(t_i) c_{k-1} / (k-1)! of degree k <= 12
    summed = summed + r_variance * (varying[:MAX_DEGREE].square() / factorial[:MAX_DEGREE]).sum(0)
    tail = mean_square - summed
    e = times_linear(c, z_mean, a) if glu else c[:-1]
    return _Series(e, c[:-1], torch.where(tail > 1e-13 * mean_square, tail, 0.0))


def _square_coefficients(act: Activation, m: Tensor, s: Tensor, mean: Tensor) -> Tensor:
    """E[(act(y) - mean)^2 He_k(t)], k = 0, 1, 2, by quadrature between the edges of act's panels.

    0 of a constant, whose mean is its value.
    """
    inner = GELU_PANELS if act.closed_form is not None else ()
    edges = sorted({-math.inf, *inner, *act.edges, *act.kinks, act.split, math.inf})
    safe, parts = torch.where(s > 0, s, 1.0), list[Tensor]()
    for i in range(0, len(m), STEP):
        chunk = slice(i, i + STEP)

        def varying(y: Tensor, own: Tensor = mean[chunk, None]) -> Tensor:
            return (act(y) - own).square()

        panels = [
            quadrature_coefficients(varying, m[chunk], safe[chunk], lower, upper, 2)
            for lower, upper in pairwise(edges)
        ]
        parts.append(torch.stack(panels).sum(0))
    return torch.where(s > 0, torch.cat(parts, 1), 0.0)


def _sum_over_pairs(
    weights: MLPWeights | GLUWeights,
    gaussian: Gaussian,
    moments: Preactivations,
    e: Tensor,
    c: Tensor,
    tail: Tensor,
) -> tuple[Tensor, Tensor, float]:
    """Sums over pairs of neurons of <readouts> E[part_k(i) part_k(j)].

    Args:
        e, c: [sets, 13, d_mlp], one set of coefficients for each sum.
        tail: [d_mlp] variance of each neuron beyond degree 12.

    Returns:
        [sets, 13] by degree; what lies beyond; a bound on the error of the latter.
    """
    W_out = weights.W_out.double()
    K = e.shape[1] - 1
    sums = torch.zeros(e.shape[:2], dtype=torch.float64, device=e.device)
    beyond = tail @ W_out.square().sum(1)
    error = torch.zeros_like(beyond)
    root = tail.sqrt()
    centred_relu = weights.act.name == "relu" and isinstance(weights, MLPWeights)
    centred_relu = centred_relu and bool((moments.m == 0).all())
    deviations = moments.r_variance.sqrt()
    for pair in pairs(weights, gaussian, moments, rows_to_columns=True):
        I, J = pair.rows, pair.columns  # noqa: E741
        rho = pair.rho.clamp(-1, 1)
        residual = pair.residual(moments.a, rho)
        twice = 1.0 if I == J else 2.0
        G = twice * (W_out[I] @ W_out[J].T)
        previous = torch.zeros_like(G)
        power = G  # G rho^k / k!, by recurrence in k
        for k in range(K + 1):
            sums[:, k] += _bilinear(e[:, k, I], power, e[:, k, J])
            if residual is not None and k < K:
                alpha, beta, sigma = residual
                # the part of degree k + 1 that holds r
                sums[:, k + 1] += _bilinear(e[:, k + 1, I], power * alpha, c[:, k, J])
                sums[:, k + 1] += _bilinear(c[:, k, I], power * beta, e[:, k + 1, J])
                mixed = power * sigma + previous * alpha * beta
                sums[:, k + 1] += _bilinear(c[:, k, I], mixed, c[:, k, J])
            previous, power = power, power * rho / (k + 1)
        if not tail[I].any() or not tail[J].any():
            continue
        if centred_relu:
            rest = _arc_cosine(rho, moments.s[I, None] * moments.s[J])
            for k in range(K + 1):
                rest -= c[0, k, I, None] * c[0, k, J] * rho**k / math.factorial(k)
        else:
            norm = _cross_norm(rho, residual, deviations[I, None], deviations[J])
            rest = norm ** (K + 1) * root[I, None] * root[J]
        if I == J:
            rest.fill_diagonal_(0.0)
        if centred_relu:
            beyond += torch.sum(G * rest)
        else:
            error += torch.sum(G.abs() * rest)
    return sums, beyond, float(error)


def _bilinear(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    return torch.sum((left @ matrix) * right, dim=1)


def _cross_norm(
    rho: Tensor, residual: tuple[Tensor, Tensor, Tensor] | None, r_I: Tensor, r_J: Tensor
) -> Tensor:
    """Spectral norm of the cross-correlation of (t_i, r_i) with (t_j, r_j), at most 1."""
    if residual is None:
        return rho.abs()
    alpha, beta, sigma = residual
    inverse_I = torch.where(r_I > 0, 1 / r_I, 0.0)
    inverse_J = torch.where(r_J > 0, 1 / r_J, 0.0)
    p, q = alpha * inverse_J, beta * inverse_I
    r = sigma * inverse_I * inverse_J
    square = rho**2 + p**2 + q**2 + r**2
    determinant = rho * r - p * q
    root = (square**2 - 4 * determinant**2).clamp(min=0).sqrt()
    return ((square + root) / 2).sqrt().clamp(max=1)


def _arc_cosine(rho: Tensor, scale: Tensor) -> Tensor:
    """E[relu(y_i) relu(y_j)] for centred y (Cho & Saul 2009)."""
    angle = torch.arccos(rho)
    return scale * (torch.sqrt(1 - rho * rho) + rho * (math.pi - angle)) / (2 * math.pi)
