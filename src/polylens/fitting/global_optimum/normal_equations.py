"""The best polynomial of any degree under a Gaussian mixture, where its monomials are few."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polylens.activations.hermite import hermite_to_monomial
from polylens.fitting.global_optimum.quadratic_moments import Component

# Largest number of features and of moments for which the system is formed.
MAX_FEATURES, MAX_MOMENTS = 1200, 200_000
# Directions with less than this share of the largest eigenvalue are not determined.
RANK = 1e-12


def feature_count(r: int, degree: int) -> int:
    """Monomials of degree <= `degree` in r variables."""
    return math.comb(r + degree, degree)


def is_small(r: int, degree: int) -> bool:
    """Whether the normal equations of this size are formed."""
    return (
        feature_count(r, degree) <= MAX_FEATURES
        and feature_count(r, 2 * degree) <= MAX_MOMENTS
        and (2 * degree + 1) ** r < 1 << 62
    )


def exponents(r: int, degree: int) -> Tensor:
    """Exponents [features, r] of all monomials, by increasing total degree."""
    rows = []
    for total in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(r), total):
            row = [0] * r
            for i in chosen:
                row[i] += 1
            rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, r)


def gaussian_moments(powers: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """E[x^alpha] for all rows alpha of `powers` (every monomial up to some degree, in order).

    Stein's lemma: E[x^alpha x_j] = mean_j E[x^alpha] + sum_l cov_jl alpha_l E[x^(alpha - e_l)].
    One degree at a time, all monomials of it at once.
    """
    r = powers.shape[1]
    keys, order, base = _keys(powers)
    units = base ** torch.arange(r)
    totals = powers.sum(1)
    moments = torch.zeros(len(powers), dtype=torch.float64)
    moments[0] = 1.0
    for total in range(1, int(totals.max()) + 1):
        rows = (totals == total).nonzero().squeeze(1)
        j = (powers[rows] > 0).int().argmax(1)  # the variable that is split off
        lower = powers[rows].clone()
        lower[torch.arange(len(rows)), j] -= 1
        lower_keys = keys[rows] - units[j]
        value = mean[j] * moments[_find(lower_keys, keys, order)]
        for i in range(r):
            has = (lower[:, i] > 0).nonzero().squeeze(1)
            if len(has):
                below = moments[_find(lower_keys[has] - units[i], keys, order)]
                value[has] += cov[j[has], i] * lower[has, i] * below
        moments[rows] = value
    return moments


def _keys(powers: Tensor) -> tuple[Tensor, Tensor, int]:
    """One integer per monomial, additive under multiplication; and their sorting order."""
    base = int(powers.max()) + 1 if powers.numel() else 1
    keys = powers @ base ** torch.arange(powers.shape[1])
    return keys, keys.argsort(), base


def _find(wanted: Tensor, keys: Tensor, order: Tensor) -> Tensor:
    return order[torch.searchsorted(keys[order], wanted)]


def solve(
    components: Sequence[Component],
    projections: Callable[[int], list[Tensor]],
    degree: int,
) -> tuple[list[list[Tensor]], Tensor]:
    """Optima of every degree and the second moment [degree + 1] that each explains.

    Args:
        components: of a whitened mixture.
        projections: p -> symmetric tensors T_0 ... T_degree of the optimum under component p,
            which has the same products with all polynomials of that degree as the layer.

    Cost: features^2 moments and one features^3 solution per degree.
    """
    r = len(components[0].mean)
    device = components[0].mean.device
    powers = exponents(r, degree)
    products = exponents(r, 2 * degree)
    keys, order, base = _keys(products)
    feature_keys = powers @ base ** torch.arange(r)
    index = _find(feature_keys[:, None] + feature_keys, keys, order)
    gram, right = 0.0, 0.0
    for p, (weight, mean, cov) in enumerate(components):
        moments = gaussian_moments(products, mean.cpu(), cov.cpu())
        component_gram = moments[index]
        gram = gram + weight * component_gram
        theta = _from_tensors([t.cpu() for t in projections(p)], feature_keys, base)
        right = right + weight * (component_gram @ theta)
    # The products of Hermite polynomials are far better conditioned than monomials.
    to_hermite = _hermite_products(powers, degree)
    gram, right = to_hermite @ gram @ to_hermite.T, to_hermite @ right
    optima, explained = [], []
    for n in range(degree + 1):
        size = feature_count(r, n)
        values, vectors = torch.linalg.eigh(gram[:size, :size])
        inverse = torch.where(values > RANK * values[-1], 1 / values, 0.0)
        theta = vectors @ (inverse[:, None] * (vectors.T @ right[:size]))
        explained.append(torch.sum(theta * right[:size]))
        monomial = to_hermite[:size, :size].T @ theta
        tensors = _to_tensors(monomial, feature_keys[:size], powers[:size], base, n)
        optima.append([t.to(device) for t in tensors])
    return optima, torch.stack(explained).to(device)


def _hermite_products(powers: Tensor, degree: int) -> Tensor:
    """Rows: prod_i He_{alpha_i}(x_i) / sqrt(alpha!) in monomials."""
    scale = torch.tensor(
        [1 / math.sqrt(math.factorial(k)) for k in range(degree + 1)], dtype=torch.float64
    )
    table = torch.tensor(hermite_to_monomial(degree), dtype=torch.float64) * scale[:, None]
    out = torch.ones(len(powers), len(powers), dtype=torch.float64)
    for i in range(powers.shape[1]):
        out *= table[powers[:, i, None], powers[None, :, i]]
    return out


def _tensor_keys(r: int, k: int, base: int) -> Tensor:
    """Key of the monomial that every entry of a [r, ..., r] tensor multiplies, flattened."""
    keys = torch.zeros(1, dtype=torch.int64)
    for _ in range(k):
        keys = (keys[:, None] + base ** torch.arange(r)).flatten()
    return keys


def _from_tensors(tensors: list[Tensor], keys: Tensor, base: int) -> Tensor:
    """Monomial coefficients [features, o] of symmetric tensors T_k [o, r, ..., r]."""
    o, r = tensors[0].shape[0], tensors[1].shape[1] if len(tensors) > 1 else 0
    out = torch.zeros(len(keys), o, dtype=torch.float64)
    order = keys.argsort()
    for k, tensor in enumerate(tensors):
        out.index_add_(0, _find(_tensor_keys(r, k, base), keys, order), tensor.reshape(o, -1).T)
    return out


def _to_tensors(
    theta: Tensor, keys: Tensor, powers: Tensor, base: int, degree: int
) -> list[Tensor]:
    o, r = theta.shape[1], powers.shape[1]
    order = keys.argsort()
    factorial = torch.tensor([math.factorial(k) for k in range(degree + 1)], dtype=torch.float64)
    # A monomial of exponents alpha is in k! / alpha! entries of the tensor.
    entries = factorial[powers.sum(1)] / factorial[powers].prod(1)
    share = theta / entries[:, None]
    return [
        share[_find(_tensor_keys(r, k, base), keys, order)].T.reshape(o, *[r] * k).contiguous()
        for k in range(degree + 1)
    ]
