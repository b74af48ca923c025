"""The optimum over all polynomials in x under a Gaussian mixture."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from polylens.checks import renamed
from polylens.errors import InvalidInputError
from polylens.fitting.estimator import require_fit
from polylens.fitting.gaussian import fit_gaussian
from polylens.fitting.global_optimum import conjugate_gradients, normal_equations
from polylens.fitting.global_optimum.quadratic_moments import (
    Component,
    MixtureMoments,
    Quadratic,
    common_basis,
)
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.dense import DensePolynomial

# Directions with less than this share of the largest variance are not part of the support.
SUPPORT = 1e-12
MAX_ITERATIONS = 500
# Bytes of the largest intermediate when a component's optimum is made dense.
DENSE_BYTES = 1 << 28
# Bytes of one dense quadratic for all outputs in float64; the solver holds about eight.
MAX_QUADRATIC_BYTES = 1 << 30


@renamed()
@torch.no_grad()
def fit_global(
    weights: MLPWeights | GLUWeights,
    mixture: GaussianMixture,
    degree: int,
    *,
    outputs: Tensor | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = MAX_ITERATIONS,
) -> DensePolynomial:
    """The polynomial of degree <= n in x closest to the layer under the mixture.

    Under component p the layer has the same products with polynomials of degree <= n as its
    Gaussian optimum f_p, so the optimum solves (sum_p w_p M_p) theta = sum_p w_p M_p theta_p
    with M_p the moments of component p. Everything happens in coordinates in which the mixture
    has mean 0 and covariance I, on the support of its covariance.

    Degree 1 is direct at any size, because M is then the identity. Degree 2 with more than
    1,200 monomials is solved by block conjugate gradients, matrix-free, in the basis that makes
    the components' covariances most nearly diagonal together; iterations and residual are
    recorded. Anything with fewer is solved from explicit normal equations.

    Args:
        weights: the layer.
        mixture: the distribution of its inputs.
        degree: 0 ... 12.
        outputs: [d_out, k], the output directions to fit, as columns; None for all.
        tolerance: relative residual of conjugate gradients.

    Raises:
        InvalidInputError: outputs of another size; too many monomials for degree >= 3, too many
            outputs for degree 2 (with the sizes).
        ConvergenceError: the tolerance was not reached.

    Cost: at degree 2 some 50 iterations, each of one and a half products of d_in^3 in float32
    per output and distinct covariance; 2 minutes on two cores and 1 GB for d_in = 784, 10
    components and 10 outputs.
    """
    remedy = "under a Gaussian fit() is the optimum, for samples there is fit_joint()"
    require_fit(weights, mixture, degree, GaussianMixture, remedy)
    if not tolerance > 0:
        raise InvalidInputError(f"tolerance must be positive, got {tolerance}")
    layer = _along(weights.to(torch.float64), outputs)
    mixture_here = mixture.to(layer.device)
    white = _whitened(mixture_here)
    iterative = degree == 2 and not normal_equations.is_small(len(white.color), 2)
    if iterative:
        white = white.rotated(common_basis(white.components))
    if len(white.color):
        moved = _in_coordinates(layer, white.mean, white.color)
        solution = _solve(moved, white.components, degree, tolerance, max_iterations)
    else:
        solution = _at_a_point(layer(white.mean), degree)
    optima, explained, iterations, residual = solution
    return DensePolynomial(
        optima,
        white.mean,
        white.whiten,
        explained,
        weights=layer,
        inputs=mixture,
        iterations=iterations,
        residual=residual,
        dtype=weights.dtype,
    )


class _Whitened(NamedTuple):
    """Coordinates xi = (x - mean) whiten on the support of a mixture, x = mean + xi color."""

    mean: Tensor
    color: Tensor
    whiten: Tensor
    components: list[Component]

    def rotated(self, V: Tensor) -> "_Whitened":
        """In coordinates xi V."""
        covs = {c.cov.data_ptr(): _sandwich(V, c.cov) for c in self.components}
        components = [
            Component(c.weight, c.mean @ V, covs[c.cov.data_ptr()]) for c in self.components
        ]
        return _Whitened(self.mean, V.T @ self.color, self.whiten @ V, components)


def _whitened(mixture: GaussianMixture) -> _Whitened:
    single = mixture.gaussian()
    values, vectors = torch.linalg.eigh(single.cov)
    kept = values > SUPPORT * values[-1].clamp(min=0)
    root, vectors = values[kept].clamp(min=0).sqrt(), vectors[:, kept]
    color, whiten = root[:, None] * vectors.T, vectors / root
    covs: dict[int, Tensor] = {}  # components may share one
    components = []
    for weight, gaussian in mixture.weighted_components():
        key = gaussian.cov.data_ptr()
        if key not in covs:
            covs[key] = _sandwich(whiten, gaussian.cov)
        components.append(Component(weight, (gaussian.mean - single.mean) @ whiten, covs[key]))
    return _Whitened(single.mean, color, whiten, components)


Solution = tuple[list[list[Tensor]], Tensor, int | None, float | None]


def _at_a_point(constant: Tensor, degree: int) -> Solution:
    """Optima, explained variances, iterations and residual where the inputs never vary."""
    optima = [_constant(constant, k) for k in range(degree + 1)]
    return optima, constant.new_zeros(degree + 1), None, None


def _solve(
    layer: MLPWeights | GLUWeights,
    components: list[Component],
    degree: int,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Optima, explained variances, iterations and residual in whitened coordinates."""
    r, iterations, residual = layer.d_in, None, None
    if degree <= 1:
        optima, explained = _affine(layer, components, degree)
    elif normal_equations.is_small(r, degree):
        optima, second = normal_equations.solve(
            components, lambda p: _dense(layer, components[p], degree), degree
        )
        explained = second - second[0]
    elif degree == 2:
        optima, explained = _affine(layer, components, 1)
        _check_size(layer.d_out, r)
        moments = _moments(layer, components)
        best, iterations, residual = conjugate_gradients.best_quadratic(
            moments, components, tolerance, max_iterations
        )
        optima.append([best.constant, best.linear, best.matrix])
        gained = (best.dot(moments) - moments.constant.square()).sum()
        explained = torch.cat([explained, gained[None]])
    else:
        raise InvalidInputError(
            f"degree {degree} in {r} dimensions has {normal_equations.feature_count(r, degree):,} "
            f"monomials, more than the {normal_equations.MAX_FEATURES:,} whose normal equations "
            "are formed; use degree <= 2, fewer input dimensions, or fit()"
        )
    return optima, explained, iterations, residual


def _along(layer: MLPWeights | GLUWeights, outputs: Tensor | None) -> MLPWeights | GLUWeights:
    """The layer read out along the columns of outputs."""
    if outputs is None:
        return layer
    U = torch.as_tensor(outputs, device=layer.device).detach().double()
    if U.dim() != 2 or len(U) != layer.d_out or not U.shape[1] or not torch.isfinite(U).all():
        raise InvalidInputError(
            f"outputs must be finite columns [{layer.d_out}, k], got {tuple(U.shape)}"
        )
    b_out = None if layer.b_out is None else layer.b_out @ U
    return replace(layer, W_out=layer.W_out @ U, b_out=b_out)


def _in_coordinates(
    layer: MLPWeights | GLUWeights, center: Tensor, color: Tensor
) -> MLPWeights | GLUWeights:
    """The layer as a function of xi, x = center + xi color."""

    def moved(W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        shift = center @ W
        return color @ W, shift if b is None else shift + b

    W_in, b_in = moved(layer.W_in, layer.b_in)
    if isinstance(layer, MLPWeights):
        return replace(layer, W_in=W_in, b_in=b_in)
    W_gate, b_gate = moved(layer.W_gate, layer.b_gate)
    return replace(layer, W_in=W_in, b_in=b_in, W_gate=W_gate, b_gate=b_gate)


def _sandwich(whiten: Tensor, cov: Tensor) -> Tensor:
    half = cov[:, None] * whiten if cov.dim() == 1 else cov @ whiten
    product = whiten.T @ half
    return (product + product.T) / 2


def _constant(value: Tensor, degree: int) -> list[Tensor]:
    """Coefficient tensors in no variables at all."""
    return [value, *(value.new_zeros(len(value), *[0] * k) for k in range(1, degree + 1))]


def _affine(
    layer: MLPWeights | GLUWeights, components: list[Component], degree: int
) -> tuple[list[list[Tensor]], Tensor]:
    """Degree 0 and 1, by the law of total covariance; mean 0 and covariance I overall."""
    mean = beta = torch.zeros((), dtype=torch.float64, device=layer.device)
    for weight, mu, cov in components:
        slope, intercept = fit_gaussian(layer, Gaussian.trusted(mu, cov), 1).linear()
        local = mu @ slope + intercept
        mean = mean + weight * local
        beta = beta + weight * (cov @ slope + mu[:, None] * local)
    optima = [[mean], [mean, beta.T.contiguous()]]
    explained = torch.stack([mean.new_zeros(()), beta.square().sum()])
    return optima[: degree + 1], explained[: degree + 1]


def _dense(layer: MLPWeights | GLUWeights, component: Component, degree: int) -> list[Tensor]:
    """Coefficient tensors of a component's optimum, some outputs at a time."""
    step = max(1, DENSE_BYTES // (8 * layer.d_in ** max(degree - 1, 1) * layer.d_mlp))
    pieces = []
    poly = fit_gaussian(layer, Gaussian.trusted(component.mean, component.cov), degree)
    for i in range(0, layer.d_out, step):
        poly.W_out = layer.W_out[:, i : i + step]
        poly.b_out = None if layer.b_out is None else layer.b_out[i : i + step]
        pieces.append(poly.to_dense(max_bytes=1 << 62))
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _moments(layer: MLPWeights | GLUWeights, components: list[Component]) -> Quadratic:
    """Products of the layer with 1, xi and xi xi^T under the mixture."""
    parts = (MixtureMoments([c])(Quadratic(*_dense(layer, c, 2))) for c in components)
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total


def _check_size(d_out: int, r: int) -> None:
    size = 8 * d_out * r * r
    if size > MAX_QUADRATIC_BYTES:
        raise InvalidInputError(
            f"quadratic forms of {d_out} output directions in {r} dimensions take {size:,} bytes, "
            f"and conjugate gradients hold eight times that; choose directions with outputs=U "
            f"[{d_out}, k]"
        )
