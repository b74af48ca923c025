"""A mixture in coordinates of its own, and a layer's products with polynomials under its parts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from polylens.activations.hermite import times_linear
from polylens.inputs.mixture import GaussianMixture
from polylens.normal_forms.preactivation import branches
from polylens.normal_forms.weights import GLUWeights, MLPWeights

linalg: Any = torch.linalg  # without types

# Directions with less than this share of the largest deviation are not part of the support:
# above it, components' factors are exact enough to agree on what the support is.
SUPPORT = 1e-8
# A feature that varies by less than this share of its size is a constant.
CONSTANT = 1e-13


class Part(NamedTuple):
    """One Gaussian of a mixture: its weight, x = mean + eta factor with eta ~ N(0, I).

    mean [r], factor [rank, r]. Parts with one covariance hold one factor.
    """

    weight: float
    mean: Tensor
    factor: Tensor


class Coordinates(NamedTuple):
    """xi = (x - center) whiten on the support of a mixture; there it has mean 0 and covariance I.

    center [d_in], whiten [d_in, r]; parts of the mixture in x, and in xi.
    """

    center: Tensor
    whiten: Tensor
    parts: list[Part]
    white: list[Part]

    @property
    def rank(self) -> int:
        return self.whiten.shape[1]

    def rotated(self, V: Tensor) -> "Coordinates":
        """With xi V in place of xi."""
        return self._replace(whiten=self.whiten @ V, white=_mapped(self.white, 0.0, V))


def coordinates(mixture: GaussianMixture) -> Coordinates:
    """Coordinates in which a mixture is white, and its parts in them.

    Every feature is first divided by its own deviation, so that units of any size are the same
    to what follows. Nothing is squared on the way from the parts' factors to the support.
    """
    covs: dict[int, Tensor] = {}  # components may share one
    parts: list[Part] = []
    for weight, gaussian in mixture.weighted_components():
        key = gaussian.cov.data_ptr()
        if key not in covs:
            covs[key] = gaussian.root()
        parts.append(Part(weight, gaussian.mean, covs[key]))
    shares = mixture.weights.new_tensor([part.weight for part in parts])
    means = torch.stack([part.mean for part in parts])
    center = shares @ means
    spread = shares.sqrt()[:, None] * (means - center)
    groups: dict[int, float] = {}
    for part in parts:
        groups[id(part.factor)] = groups.get(id(part.factor), 0.0) + part.weight
    factors = {id(part.factor): part.factor for part in parts}
    stacked = torch.cat([*(groups[key] ** 0.5 * factors[key] for key in groups), spread])
    deviations: Tensor = linalg.vector_norm(stacked, dim=0)
    varies = deviations > CONSTANT * means.abs().amax(0)
    inverse = torch.where(varies, 1 / deviations, 0.0)
    values: Tensor
    rows: Tensor
    _, values, rows = linalg.svd(stacked * inverse, full_matrices=False)
    kept = values > SUPPORT * values.max() if varies.any() else values > torch.inf
    whiten = inverse[:, None] * rows[kept].T / values[kept]
    return Coordinates(center, whiten, parts, _mapped(parts, center, whiten))


def _mapped(parts: list[Part], center: Tensor | float, V: Tensor) -> list[Part]:
    factors = {id(part.factor): part.factor @ V for part in parts}
    return [Part(p.weight, (p.mean - center) @ V, factors[id(p.factor)]) for p in parts]


class Expansion(NamedTuple):
    """A layer under one part, in Hermite series of t = eta . u and the part r of z beyond it.

    Neuron i is sum_k e_k He_k(t_i) / k! + r_i c_k He_k(t_i) / k!, r_i = eta . v_i, with u_i of
    unit length and v_i orthogonal to it. e [n + 1, d_mlp], c [n, d_mlp], u and v [rank, d_mlp];
    of an MLP c and v are None.
    """

    e: Tensor
    u: Tensor
    c: Tensor | None
    v: Tensor | None


def expansion(layer: MLPWeights | GLUWeights, part: Part, degree: int) -> Expansion:
    """The layer under a part in the layer's own coordinates, to degree n."""
    W, b, V, b_V = branches(layer)
    slopes = part.factor @ W
    s: Tensor = linalg.vector_norm(slopes, dim=0)
    # deviations below the rounding of their own sum are those of a constant
    deviations: Tensor = linalg.vector_norm(part.factor, dim=0)
    s = torch.where(s > 1e-15 * (deviations @ W.abs()), s, 0.0)
    u = slopes * torch.where(s > 0, 1 / s, 0.0)
    m = part.mean @ W if b is None else part.mean @ W + b
    if V is None:
        return Expansion(layer.act.hermite_coefficients(m, s, degree), u, None, None)
    slopes, z_mean = part.factor @ V, part.mean @ V
    a: Tensor = linalg.vecdot(u, slopes, dim=0)
    c = layer.act.hermite_coefficients(m, s, degree + 1)
    e = times_linear(c, z_mean if b_V is None else z_mean + b_V, a)
    return Expansion(e, u, c[:degree], slopes - a * u)


def products(
    layer: MLPWeights | GLUWeights, part: Part, white: Part, degree: int
) -> tuple[Tensor, ...]:
    """E[f] [o], E[f xi] [o, r] and E[f xi xi^T] [o, r, r] under a part, up to a degree <= 2.

    Args:
        part, white: the part in x and in xi.
    """
    e, u, c, v = expansion(layer, part, degree)
    W_out, mu = layer.W_out, white.mean
    value = e[0] @ W_out if layer.b_out is None else e[0] @ W_out + layer.b_out
    if degree == 0:
        return (value,)
    # E[f eta eta^T - f] = sum_i W_out_i (e_2 u u^T + c_1 (u v^T + v u^T)); F^T turns it into xi
    U = white.factor.T @ u
    slope = U @ (e[1, :, None] * W_out)
    V = None if v is None else white.factor.T @ v
    if V is not None and c is not None:
        slope += V @ (c[0, :, None] * W_out)
    slope = slope.T
    first = value[:, None] * mu + slope
    if degree == 1:
        return value, first
    spread = white.factor.T @ white.factor - torch.outer(mu, mu)
    second = value[:, None, None] * spread
    second += first[:, :, None] * mu + mu[:, None] * first[:, None, :]
    for o in range(len(value)):
        half = U * (e[2] * W_out[:, o] / 2)
        if V is not None and c is not None:
            half += V * (c[1] * W_out[:, o])
        product = half @ U.T
        second[o] += product + product.T
    return value, first, second
