"""The best polynomial of any degree under a Gaussian mixture, where its monomials are few.

Under a part of the mixture, a polynomial and a layer are rows of numbers: their coefficients in
products of Hermite polynomials of the part's own coordinates, which are orthonormal. So the
optimum over the mixture is a least-squares problem with some rows for every part. It is solved
by orthogonal transformations; forming its normal equations would square its condition, which
for heavy tails is all that float64 has.
"""

import itertools
import math
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polylens.errors import NumericalWarning
from polylens.fitting.global_optimum.parts import Coordinates, Part, expansion
from polylens.normal_forms.weights import GLUWeights, MLPWeights

linalg: Any = torch.linalg  # without types

# Largest number of features for which the problem is formed; for quadratics, of which there is
# an iterative solver, up to where this is the faster one.
MAX_FEATURES, MAX_QUADRATIC = 1200, 400
# Rows are transformed as soon as there are this many times the features.
ROWS = 4
# What is left of a feature beside those of lower degree, as a share of its size, when it is
# rounding: the data do not tell it from them.
DEPENDENT = 1e-12
# Norm of the inverse of what is left, features of length one, up to which none is missing.
PLAIN = 1e4
EPSILON = torch.finfo(torch.float64).eps
# Rounding of what is left, in units of EPSILON; and the share of the outputs that it may cost
# without a word.
ROUNDING, SILENT = 10, 1e-7


def feature_count(r: int, degree: int) -> int:
    """Monomials of degree <= `degree` in r variables."""
    return math.comb(r + degree, degree)


def is_small(r: int, degree: int) -> bool:
    """Whether least squares over all monomials are done."""
    limit = min(MAX_FEATURES, MAX_QUADRATIC) if degree == 2 else MAX_FEATURES
    return feature_count(r, degree) <= limit


class Monomials(NamedTuple):
    """All monomials x^alpha of degree <= n in r variables, by increasing degree.

    powers [features, r]; ends[k]: how many have a degree <= k; up [ends[n - 1], r]: where
    x^alpha x_l is; split, lower, lowest [features]: x^alpha = x_j x^lower, j = split, and where
    x^lower / x_j is, or -1.
    """

    powers: Tensor
    ends: list[int]
    up: Tensor
    split: Tensor
    lower: Tensor
    lowest: Tensor


@lru_cache(maxsize=16)
def monomials(r: int, n: int) -> Monomials:
    """The table of all monomials of degree <= n in r variables."""
    combine = itertools.combinations_with_replacement
    factors = [alpha for k in range(n + 1) for alpha in combine(range(r), k)]
    where = {alpha: i for i, alpha in enumerate(factors)}
    ends = [feature_count(r, k) for k in range(n + 1)]
    up = [[where[tuple(sorted((*a, j)))] for j in range(r)] for a in factors if len(a) < n]
    powers = [[alpha.count(j) for j in range(r)] for alpha in factors]
    lowest = [where[a[2:]] if a[:1] == a[1:2] != () else -1 for a in factors]
    return Monomials(
        torch.tensor(powers, dtype=torch.int64).reshape(len(factors), r),
        ends,
        torch.tensor(up, dtype=torch.int64).reshape(len(up), r),
        torch.tensor([alpha[0] if alpha else 0 for alpha in factors]),
        torch.tensor([where[alpha[1:]] for alpha in factors]),
        torch.tensor(lowest),
    )


def solve(
    layer: MLPWeights | GLUWeights, white: Coordinates, degree: int
) -> tuple[list[list[Tensor]], Tensor]:
    """Optima of every degree and the variance [degree + 1] that each explains.

    Warns:
        NumericalWarning: features that differ by little more than their rounding matter.

    Cost: rows * features^2, with as many rows from every part as it has monomials.
    """
    r, device = white.rank, white.center.device
    table = monomials(r, degree)
    triangle = torch.zeros(0, len(table.powers), dtype=torch.float64)
    right = torch.zeros(0, layer.d_out, dtype=torch.float64)
    pending: list[tuple[Tensor, Tensor]] = []
    for p, (part, there) in enumerate(zip(white.parts, white.white, strict=True)):
        share = math.sqrt(part.weight)
        coefficients = share * _coefficients(layer, part, degree).cpu()
        features = share * hermite_features(there.mean.cpu(), there.factor.cpu(), degree)
        pending.append((features, coefficients))
        if p == len(white.parts) - 1 or sum(len(a) for a, _ in pending) > ROWS * len(table.powers):
            A = torch.cat([triangle, *(a for a, _ in pending)])
            b = torch.cat([right, *(b for _, b in pending)])
            reflectors, scales = torch.geqrf(A)
            rank = min(A.shape)
            right = torch.ormqr(reflectors, scales, b, transpose=True)[:rank]
            triangle, pending = reflectors[:rank].triu(), []
    levels = _levels(triangle, right, table.ends)
    _warn_of_rounding(levels)
    to_monomials = _expanded(table, torch.zeros(r), torch.eye(r).double(), orthonormal=False)
    optima: list[list[Tensor]] = []
    for n in range(degree + 1):
        size = table.ends[n]
        theta = to_monomials[:size, :size] @ _substituted(levels[: n + 1], table.ends)
        optima.append([t.to(device) for t in _to_tensors(theta, table, n)])
    explained = torch.stack([level.right.square().sum() for level in levels])
    explained[0] = 0.0
    return optima, explained.cumsum(0).to(device)


def hermite_features(mean: Tensor, factor: Tensor, degree: int) -> Tensor:
    """[rows, features]: products of Hermite polynomials in xi = mean + eta factor, in those in eta.

    Both are orthonormal under N(0, I).
    """
    table = monomials(factor.shape[1], degree)
    return _expanded(table, mean, factor, orthonormal=True)


def _expanded(table: Monomials, mean: Tensor, factor: Tensor, orthonormal: bool) -> Tensor:
    """Products of Hermite polynomials in mean + eta factor, in those in eta or in monomials.

    By the recurrence sqrt(k) h_k = x h_{k-1} - sqrt(k-1) h_{k-2} in one variable of each.
    """
    degree = len(table.ends) - 1
    rows = monomials(len(factor), degree)
    raised = rows.powers[: len(rows.up)].double()
    out = torch.zeros(len(rows.powers), len(table.powers), dtype=torch.float64)
    out[0, 0] = 1.0
    for k in range(1, degree + 1):
        columns = torch.arange(table.ends[k - 1], table.ends[k])
        j, height = table.split[columns], rows.ends[k - 1]
        before = out[:height, table.lower[columns]]
        new = out.new_zeros(len(out), len(columns))
        new[:height] = mean[j] * before
        for l in range(len(factor)):  # noqa: E741
            step = factor[l, j] * before
            up, root = rows.up[:height, l], (raised[:height, l, None] + 1).sqrt()
            if not orthonormal:
                new[up] += step
                continue
            # x h_a = sqrt(a + 1) h_{a+1} + sqrt(a) h_{a-1}
            new[up] += root * step
            down = (up < height).nonzero().squeeze(1)
            new[down] += root[down] * step[up[down]]
        exponent = table.powers[columns, j].double()
        lowest = table.lowest[columns]
        new -= (exponent - 1).sqrt() * torch.where(lowest >= 0, out[:, lowest], 0.0)
        out[:, columns] = new / exponent.sqrt()
    return out


def _coefficients(layer: MLPWeights | GLUWeights, part: Part, degree: int) -> Tensor:
    """[rows, d_out] of a layer in orthonormal products of Hermite polynomials of a part's eta.

    He_k(eta . u) / k! is the sum over all products of degree k of u^alpha He_alpha / alpha!, and
    (eta . v) He_{k-1}(eta . u) / (k - 1)! that of the derivative of u^alpha along v.
    """
    e, u, c, v = expansion(layer, part, degree)
    table = monomials(len(u), degree)
    powers, along = u.new_zeros(2, len(table.powers), u.shape[1])
    powers[0] = 1.0
    series = [e[0] * powers[:1]]
    for k in range(1, degree + 1):
        rows = torch.arange(table.ends[k - 1], table.ends[k])
        j, lower = table.split[rows], table.lower[rows]
        root = table.powers[rows, j, None].double().sqrt().to(u.device)
        powers[rows] = powers[lower] * u[j] / root
        series.append(e[k] * powers[rows])
        if v is not None and c is not None:
            along[rows] = (along[lower] * u[j] + powers[lower] * v[j]) / root
            series[k] += c[k - 1] * along[rows]
    out = torch.cat(series) @ layer.W_out
    if layer.b_out is not None:
        out[0] += layer.b_out
    return out


class _Level(NamedTuple):
    """What the features of one degree add: rows that they alone determine.

    basis [features, kept] of coefficients, values [kept] that it is multiplied by; beyond
    [kept, features of higher degree]; right [kept, d_out].
    """

    basis: Tensor
    values: Tensor
    beyond: Tensor
    right: Tensor


def _levels(triangle: Tensor, right: Tensor, ends: list[int]) -> list[_Level]:
    """The triangular system by degree, without features that those below determine."""
    sizes: Tensor = linalg.vector_norm(triangle, dim=0)
    inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
    levels: list[_Level] = []
    start, triangular = 0, True
    for end in ends:
        scale = inverse[start:end, None]
        block, beyond = triangle[:, start:end] * scale.T, triangle[:, end:]
        kept = end - start
        basis, values = block.new_full((), torch.inf), block.new_ones(kept)
        if triangular and len(block) >= kept:
            identity = torch.eye(kept, dtype=block.dtype)
            basis = linalg.solve_triangular(block[:kept], identity, upper=True)
        size: Tensor = linalg.vector_norm(basis)
        if not bool(size < PLAIN):
            triangular = False
            turn: Tensor
            rows: Tensor
            turn, values, rows = linalg.svd(block)
            kept = int((values > DEPENDENT).sum())
            basis, values, beyond, right = (
                rows[:kept].T,
                values[:kept],
                turn.T @ beyond,
                turn.T @ right,
            )
        levels.append(_Level(scale * basis, values, beyond[:kept], right[:kept]))
        below = beyond[kept:]
        triangle = torch.cat([below.new_zeros(len(below), end), below], dim=1)
        right, start = right[kept:], end
    return levels


def _substituted(levels: list[_Level], ends: list[int]) -> Tensor:
    """Coefficients [features, d_out] of the optimum over the features of these levels."""
    higher = levels[0].right.new_zeros(0, levels[0].right.shape[1])
    for level in reversed(levels):
        right = level.right - level.beyond[:, : len(higher)] @ higher
        higher = torch.cat([level.basis @ (right / level.values[:, None]), higher])
    return higher


def _warn_of_rounding(levels: list[_Level]) -> None:
    """Where the outputs have a share in directions that rounding has turned."""
    total = math.sqrt(sum(float(level.right.square().sum()) for level in levels))
    turned = [ROUNDING * EPSILON / level.values[:, None] * level.right for level in levels]
    lost = math.sqrt(sum(float(part.square().sum()) for part in turned))
    if lost > SILENT * total:
        warnings.warn(
            f"the optimum under this mixture is accurate to {lost / total:.1g} of the outputs "
            "only: some components are so narrow, or so far out, that polynomials of this degree "
            "differ there by little more than rounding; use a lower degree or add a variance to "
            "the covariances",
            NumericalWarning,
            stacklevel=4,
        )


def _to_tensors(theta: Tensor, table: Monomials, degree: int) -> list[Tensor]:
    """Symmetric tensors T_k [o, r, ..., r] of monomial coefficients [features, o]."""
    r = table.powers.shape[1]
    # A monomial of exponents alpha is in k! / alpha! entries of the tensor.
    factorial = torch.tensor([math.factorial(k) for k in range(degree + 1)], dtype=torch.float64)
    powers = table.powers[: len(theta)]
    share = theta * (factorial[powers].prod(1) / factorial[powers.sum(1)])[:, None]
    place = torch.zeros(1, dtype=torch.int64)
    tensors: list[Tensor] = []
    for k in range(degree + 1):
        tensors.append(share[place].T.reshape(-1, *[r] * k).contiguous())
        if k < degree:
            place = table.up[place].flatten()
    return tensors
