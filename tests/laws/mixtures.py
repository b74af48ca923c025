"""Random mixtures of every kind that solvers stumble over, and dense least squares."""

import itertools
import math
import warnings

import torch
from tests.oracles import CUBIC, generator, monomials, random_layer
from torch import Tensor

from polylens import NumericalWarning
from polylens.errors import ConvergenceError
from polylens.fitting.global_optimum import least_squares
from polylens.fitting.global_optimum.fit import fit_global
from polylens.inputs.mixture import GaussianMixture

KINDS = (
    "full",
    "shared",
    "diagonal",
    "units",
    "low rank",
    "equal means",
    "near duplicates",
    "heavy tails",
    "points",
)


def random_mixture_of(kind: str, seed: int, d: int) -> GaussianMixture:
    """2 to 6 components in d dimensions."""
    g = generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    k = int(torch.randint(2, 7, (), generator=g))
    weights = 0.1 + torch.rand(k, generator=g, dtype=torch.float64)
    means, factors = draw(k, d), draw(k, d, d) / math.sqrt(d)
    if kind == "shared":
        factors = factors[:1].expand(k, d, d)
    elif kind == "diagonal":
        factors = torch.diag_embed(0.1 + draw(k, d).abs())
    elif kind == "low rank":
        # components of ranks down to 0 in a common plane
        plane = draw(max(1, d - 1), d)
        factors = factors[:, :, : len(plane)] @ plane
        ranks = torch.randint(0, d + 1, (k,), generator=g)
        factors = factors * (torch.arange(d) < ranks[:, None])[:, :, None]
        means = means[:, : len(plane)] @ plane
    elif kind == "equal means":
        means = means[:1].expand(k, d)
    elif kind == "near duplicates":
        means = means[:1] + 1e-7 * draw(k, d)
        factors = factors[:1] + 1e-7 * draw(k, d, d)
    elif kind == "heavy tails":
        weights[0], factors[0] = 1e-3, 100 * factors[0]
    elif kind == "points":
        factors = 0 * factors
    elif kind == "units":
        units = 10 ** (12 * torch.rand(d, generator=g, dtype=torch.float64) - 6)
        means, factors = means * units, factors * units
    return GaussianMixture(weights / weights.sum(), means, (factors.mT @ factors).contiguous())


def units_of(mixture: GaussianMixture) -> Tensor:
    """The deviation of every feature, 1 for a constant."""
    deviations = mixture.gaussian().variances().clamp(min=0).sqrt()
    return torch.where(deviations > 0, deviations, 1.0)


def layer_for(mixture: GaussianMixture, seed: int, kind: str, act):
    """A random layer whose preactivations are of order one."""
    act = CUBIC if act == "cubic" else act
    layer = random_layer(seed, kind, act, d_in=mixture.d_in, d_mlp=12)
    for name in ("W_in", "W_gate") if kind == "glu" else ("W_in",):
        getattr(layer, name).div_(units_of(mixture)[:, None])
    return layer


def roots(mixture: GaussianMixture) -> list[tuple[float, Tensor, Tensor]]:
    """(weight, mean, root) of every component, cov = root^T root in features' own units."""
    out = []
    for weight, part in mixture.weighted_components():
        scale = part.variances().clamp(min=0).sqrt()
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        values, basis = torch.linalg.eigh(inverse[:, None] * part.cov * inverse)
        root = torch.where(values > 1e-13 * values[-1], values, 0.0).sqrt()
        out.append((weight, part.mean, root[:, None] * basis.T * scale))
    return out


def draws(mixture: GaussianMixture, n: int, seed: int) -> Tensor:
    """n from every component, exact in features of any unit and on any support."""
    g = generator(seed)
    noise = torch.randn(n, mixture.d_in, generator=g, dtype=torch.float64)
    return torch.cat([mean + noise @ root for _, mean, root in roots(mixture)])


def nodes(mixture: GaussianMixture, points: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes x and weights: means of polynomials of degree < 2 points are exact."""
    J = torch.diag(torch.arange(1, points).double().sqrt(), 1)
    xi, vectors = torch.linalg.eigh(J + J.T)
    grid = torch.tensor(list(itertools.product(range(points), repeat=mixture.d_in)))
    eta, share = xi[grid], vectors[0].square()[grid].prod(1)
    parts = roots(mixture)
    x = torch.cat([mean + eta @ root for _, mean, root in parts])
    return x, torch.cat([weight * share for weight, _, _ in parts])


def distance_to_least_squares(polynomial, mixture: GaussianMixture) -> float:
    """Of a quadratic from the optimum at the nodes, as a share of the layer's deviation.

    The layer is a cubic times at most a linear function, so that nothing is approximated.
    """
    x, w = nodes(mixture, 4)
    layer, root = polynomial.weights, w.sqrt()[:, None]
    xi = (x - mixture.gaussian().mean) / units_of(mixture)
    phi = root * monomials(xi, 2)
    size = torch.linalg.vector_norm(phi, dim=0)
    phi = phi / torch.where(size > 0, size, 1.0)
    y = layer(x)
    values = torch.linalg.lstsq(phi, root * y, rcond=1e-11, driver="gelsd").solution
    away = phi @ values - root * polynomial(x)
    spread = root * (y - w @ y)
    return float(torch.linalg.vector_norm(away) / torch.linalg.vector_norm(spread))


def fitted(layer, mixture: GaussianMixture, solver: str, monkeypatch, tolerance=1e-9):
    """The global quadratic by one solver, or the reason why there is none."""
    limit = 0 if solver == "iterative" else 10_000
    monkeypatch.setattr(least_squares, "MAX_QUADRATIC", limit)
    monkeypatch.setattr(least_squares, "MAX_FEATURES", limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericalWarning)
        try:
            polynomial = fit_global(layer, mixture, 2, tolerance=tolerance)
        except ConvergenceError as error:
            return None, str(error)
    return polynomial, "; ".join(str(w.message) for w in caught)
