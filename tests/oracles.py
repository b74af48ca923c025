"""Random layers and input models, and what the fits are compared with."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.fitting.fit import fit, fit_joint
from polylens.fitting.global_optimum.fit import fit_global
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.inputs.samples import Samples
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.dense import DensePolynomial

# By what they are the optimum over.
FITS = {"neuron": fit, "joint": fit_joint, "global": fit_global}

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "hardswish")
# Those that quadrature converges slowly for.
KINKED = {"relu", "hardswish"}
# y - y^2 / 2, and 1 + y - y^3 / 5: activations that are polynomials
QUADRATIC = Activation("quadratic", lambda y: y - y * y / 2, (0.0, 1.0, -0.5), (0.0, 1.0, -0.5))
CUBIC = Activation(
    "cubic", lambda y: 1 + y - y**3 / 5, (1.0, 1.0, 0.0, -0.2), (1.0, 1.0, 0.0, -0.2)
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_layer(
    seed: int, kind: str = "mlp", act="gelu", d_in=4, d_mlp=6, d_out=3, biases=True
) -> MLPWeights | GLUWeights:
    g = generator(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    roles = {
        "W_in": draw(d_in, d_mlp, scale=1.5 / math.sqrt(d_in)),
        "W_out": draw(d_mlp, d_out),
        "act": act,
    }
    if biases:
        roles |= {"b_in": draw(d_mlp, scale=0.5), "b_out": draw(d_out)}
    if kind == "mlp":
        return MLPWeights(**roles)
    if biases:
        roles["b_gate"] = draw(d_mlp, scale=0.5)
    return GLUWeights(W_gate=draw(d_in, d_mlp, scale=1.5 / math.sqrt(d_in)), **roles)


def random_gaussian(seed: int, d: int = 4, rank: int | None = None) -> Gaussian:
    g = generator(seed)
    factor = torch.randn(d, d if rank is None else rank, generator=g, dtype=torch.float64)
    mean = 0.5 * torch.randn(d, generator=g, dtype=torch.float64)
    return Gaussian(mean, factor @ factor.T / d)


def random_mixture(seed: int, d: int = 4, k: int = 3) -> GaussianMixture:
    g = generator(seed)
    weights = 0.2 + torch.rand(k, generator=g, dtype=torch.float64)
    parts = [random_gaussian(seed + 1 + j, d) for j in range(k)]
    means = torch.stack([p.mean for p in parts]) * 2
    covs = torch.stack([p.cov for p in parts]) / 2
    return GaussianMixture(weights / weights.sum(), means, covs)


def input_model(kind: str, seed: int, d: int = 4):
    if kind == "gaussian":
        return random_gaussian(seed, d)
    if kind == "mixture":
        return random_mixture(seed, d)
    return Samples(random_mixture(seed, d).sample(400, generator(seed)))


def draws(inputs, n: int, seed: int) -> Tensor:
    """Independent draws, or all samples of a Samples."""
    if isinstance(inputs, Samples):
        return torch.cat([x for x, _ in inputs.batches(torch.float64, torch.device("cpu"))])
    return inputs.sample(n, generator(seed))


def monomials(x: Tensor, degree: int) -> Tensor:
    """All monomials of x [n, d] up to a total degree, [n, features]."""
    columns = [torch.ones_like(x[:, 0])]
    for total in range(1, degree + 1):
        for chosen in itertools.combinations_with_replacement(range(x.shape[1]), total):
            columns.append(x[:, list(chosen)].prod(1))
    return torch.stack(columns, 1)


def nodes(inputs: Gaussian | GaussianMixture, n: int) -> tuple[Tensor, Tensor]:
    """Points [N, d] and weights [N] of Gauss-Hermite quadrature with n nodes a dimension: exact
    for polynomials of degree 2 n - 1."""
    points, weights = np.polynomial.hermite_e.hermegauss(n)
    points, weights = torch.as_tensor(points), torch.as_tensor(weights / weights.sum())
    parts = [(1.0, inputs)] if isinstance(inputs, Gaussian) else inputs.weighted_components()
    found = []
    for share, part in parts:
        root = part.root()
        grid = torch.cartesian_prod(*[points] * len(root)).reshape(-1, len(root))
        w = torch.cartesian_prod(*[weights] * len(root)).reshape(-1, len(root)).prod(1)
        found.append((part.mean + grid @ root, float(share) * w))
    x, w = zip(*found, strict=True)
    return torch.cat(x), torch.cat(w)


def assert_uncorrelated(
    layer: MLPWeights | GLUWeights,
    polynomial: Callable[[Tensor], Tensor],
    degree: int,
    inputs: Gaussian | GaussianMixture,
) -> None:
    """E[(layer - polynomial) monomial] is zero for all monomials, as nearly as quadrature knows."""
    means = []
    for n in (16, 24, 36):
        x, w = nodes(inputs, n)
        left, phi = layer(x) - polynomial(x), monomials(x, degree)
        means.append((left * w[:, None]).T @ phi)
        scale = (w @ left.square()).sqrt()[:, None] * (w @ phi.square()).sqrt()
    spread = torch.stack([abs(means[2] - mean) for mean in means[:2]]).amax(0).amax(0)
    least = 1e-3 if layer.act.name in KINKED else 1e-9
    worst = float((means[2].abs() / (least * (1 + scale) + 3 * spread)).max())
    assert worst < 1, f"residual correlates with a monomial: {worst:.1f} times what is allowed"


def assert_within_confidence(
    predicted: Tensor, x: Tensor, y: Tensor, degree: int, at: Tensor, sigmas: float = 5.0
) -> None:
    """The dense least-squares fit to (x, y), evaluated at points, agrees within its intervals.

    Standard errors are the sandwich estimate, as the residual depends on x.
    """
    phi, phi_at = monomials(x, degree), monomials(at, degree)
    inverse = torch.linalg.inv(phi.T @ phi)
    theta = inverse @ (phi.T @ y)
    leverage = phi_at @ inverse @ phi.T  # [points, n]
    error = (leverage.square() @ (y - phi @ theta).square()).sqrt()
    worst = float(((predicted - phi_at @ theta).abs() / error.clamp(min=1e-12)).max())
    assert worst < sigmas, f"outside ordinary least squares by {worst:.1f} standard errors"


def assert_same_function(a, b, x: Tensor, tolerance: float = 1e-9) -> None:
    """Two polynomials agree at x in every degree, relative to the spread of their values."""
    left, right = a.all_degrees(x), b.all_degrees(x)
    scale = 1 + right.abs().max()
    difference = float((left - right).abs().max() / scale)
    assert difference <= tolerance, f"functions differ by {difference:.2e} (relative)"


def sampled_r2(polynomial, x: Tensor) -> tuple[Tensor, Tensor]:
    """R2 [degree + 1] on draws x and its standard error, from 20 batches."""
    weights = polynomial.weights
    y = weights(x)
    values = []
    residual = (polynomial.all_degrees(x) - y).square().sum(2)
    centred = (y - y.mean(0)).square().sum(1)
    for r, c in zip(residual.chunk(20, dim=1), centred.chunk(20), strict=True):
        values.append(1 - r.sum(1) / c.sum())
    values = torch.stack(values)
    return 1 - residual.sum(1) / centred.sum(), values.std(0) / math.sqrt(len(values))


def assert_r2(polynomial: "DensePolynomial", x: Tensor, sigmas: float = 5.0, slack=0.0) -> None:
    """Its closed-form r2 agrees with draws x."""
    expected, error = sampled_r2(polynomial, x)
    worst = float(((polynomial.r2 - expected).abs() / (error + slack + 1e-5)).max())
    assert worst < sigmas, f"r2 is {worst:.1f} standard errors from {expected.tolist()}"
