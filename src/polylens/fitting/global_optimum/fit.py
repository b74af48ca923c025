"""The optimum over all polynomials in x under a Gaussian mixture."""

from dataclasses import replace

import torch
from torch import Tensor

from polylens.checks import floating, renamed
from polylens.devices import require_room
from polylens.errors import ConvergenceError, InvalidInputError
from polylens.fitting.estimator import require_fit
from polylens.fitting.global_optimum import conjugate_gradients, least_squares
from polylens.fitting.global_optimum.parts import Coordinates, coordinates, products
from polylens.fitting.global_optimum.quadratic_moments import Component, Quadratic, common_basis
from polylens.inputs.mixture import GaussianMixture
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.base import kept
from polylens.polynomials.dense import DensePolynomial

MAX_ITERATIONS = 500


@renamed()
@kept()
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

    Everything happens in coordinates in which the mixture has mean 0 and covariance I, on the
    support of its covariance; every feature is measured by its own deviation before.

    Degree 1 is direct at any size, because there the moments of the mixture are the identity.
    Degree 2 with more than 400 monomials is solved by block conjugate gradients, matrix-free,
    in the basis that makes the components' covariances most nearly diagonal together; iterations
    and residual are recorded. Anything with fewer is a least-squares problem in the Hermite
    series of every component, solved by orthogonal transformations.

    Args:
        weights: the layer.
        mixture: the distribution of its inputs.
        degree: 0 ... 12.
        outputs: [d_out, k], the output directions to fit, as columns; None for all.
        tolerance: relative residual of conjugate gradients.

    Raises:
        InvalidInputError: outputs of another size; too many monomials for degree >= 3.
        OutOfMemory: too many outputs for degree 2 (with the sizes).
        ConvergenceError: the tolerance was not reached.

    Warns:
        NumericalWarning: components so narrow or so far out that float64 does not hold the
            optimum (with what is lost).

    Cost: at degree 2 some 50 iterations, each of one and a half products of d_in^3 in float32
    per output and distinct covariance; 2 minutes on two cores and 1 GB for d_in = 784, 10
    components and 10 outputs.

    >>> import torch, polylens
    >>> layer = polylens.MLPWeights(torch.randn(2, 8), torch.randn(8, 1), "silu")
    >>> means = torch.tensor([[-1.0, 0.0], [2.0, 1.0], [0.0, 0.0]])
    >>> mixture = polylens.GaussianMixture(torch.full((3,), 1 / 3), means, torch.eye(2)[None])
    >>> neuron = polylens.fit(layer, mixture, degree=2)
    >>> optimum = polylens.fit_global(layer, mixture, degree=2)
    >>> bool(optimum.r2[-1] >= neuron.r2[-1])
    True
    """
    remedy = "under a Gaussian fit() is the optimum, for samples there is fit_joint()"
    require_fit(weights, mixture, degree, GaussianMixture, remedy)
    if type(tolerance) not in (float, int) or not 0 < tolerance < 1:
        raise InvalidInputError(
            f"tolerance must be a number between 0 and 1, the relative residual; got {tolerance!r}"
        )
    layer = _along(weights.to(torch.float64, copy=True), outputs)
    try:
        white = coordinates(mixture.to(layer.device))
        if degree == 2 and not least_squares.is_small(white.rank, 2):
            _require_room(layer, white.rank)
            white = white.rotated(common_basis(_components(white)))
        solution = _solve(layer, white, degree, tolerance, max_iterations)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConvergenceError(
            f"the optimum was not found: {error} Components whose sizes or distances differ by "
            "more than float64 holds do that; fit() does not need it"
        ) from error
    optima, explained, iterations, residual = solution
    return DensePolynomial(
        optima,
        white.center,
        white.whiten,
        explained,
        weights=layer,
        inputs=mixture,
        iterations=iterations,
        residual=residual,
        dtype=weights.dtype,
    )


Solution = tuple[list[list[Tensor]], Tensor, int | None, float | None]


def _solve(
    layer: MLPWeights | GLUWeights,
    white: Coordinates,
    degree: int,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Optima, explained variances, iterations and residual in white coordinates."""
    if not white.rank:
        return *_at_a_point(layer(white.center), degree), None, None
    if degree >= 2 and least_squares.is_small(white.rank, degree):
        return *least_squares.solve(layer, white, degree), None, None
    if degree > 2:
        count = least_squares.feature_count(white.rank, degree)
        raise InvalidInputError(
            f"degree {degree} in {white.rank} dimensions has {count:,} monomials, more than the "
            f"{least_squares.MAX_FEATURES:,} over which the least squares are done; use "
            "degree <= 2, fewer input dimensions, or fit() for every neuron's best polynomial"
        )
    moments: list[Tensor] = []
    for part, there in zip(white.parts, white.white, strict=True):
        for k, tensor in enumerate(products(layer, part, there, degree)):
            share = tensor.mul_(part.weight)
            moments[k : k + 1] = [moments[k].add_(share) if k < len(moments) else share]
    # where mean and covariance are 0 and I, the products are the coefficients
    optima = [moments[: k + 1] for k in range(min(degree, 1) + 1)]
    explained = moments[0].new_zeros(degree + 1)
    if degree:
        explained[1:] = moments[1].square().sum()
    if degree < 2:
        return optima, explained, None, None
    right = Quadratic(*moments)
    best, iterations, residual = conjugate_gradients.best_quadratic(
        right, _components(white), tolerance, max_iterations
    )
    explained[2] = (best.dot(right) - right.constant.square()).sum()
    return [*optima, list(best)], explained, iterations, residual


def _components(white: Coordinates) -> list[Component]:
    covs = {id(part.factor): part.factor.T @ part.factor for part in white.white}
    return [Component(p.weight, p.mean, covs[id(p.factor)], p.factor) for p in white.white]


def _at_a_point(constant: Tensor, degree: int) -> tuple[list[list[Tensor]], Tensor]:
    """Optima and explained variances where the inputs never vary."""
    tensors = [constant.new_zeros(len(constant), *[0] * k) for k in range(1, degree + 1)]
    optima = [[constant, *tensors[:k]] for k in range(degree + 1)]
    return optima, constant.new_zeros(degree + 1)


def _along(layer: MLPWeights | GLUWeights, outputs: Tensor | None) -> MLPWeights | GLUWeights:
    """The layer read out along the columns of outputs."""
    if outputs is None:
        return layer
    U = floating("outputs", outputs).detach().to(layer.device, torch.float64)
    if U.dim() != 2 or len(U) != layer.d_out or not U.shape[1] or not torch.isfinite(U).all():
        raise InvalidInputError(
            f"outputs must be finite columns [{layer.d_out}, k], got {tuple(U.shape)}"
        )
    b_out = None if layer.b_out is None else layer.b_out @ U
    return replace(layer, W_out=layer.W_out @ U, b_out=b_out)


def _require_room(layer: MLPWeights | GLUWeights, r: int) -> None:
    """For what conjugate gradients hold: eight quadratic forms of every output."""
    what = f"eight quadratic forms of {layer.d_out} output directions in {r} dimensions"
    remedy = f"choose directions with outputs=U [{layer.d_out}, k]"
    require_room(8 * 8 * layer.d_out * r * r, layer.device, what, remedy)
