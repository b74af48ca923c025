"""The best quadratic under a Gaussian mixture, by block conjugate gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polylens.errors import ConvergenceError
from polylens.quadratic_moments import BlockJacobi, Component, MixtureMoments, Quadratic

# What one cycle in float32 gains, before the residual is computed anew in float64; a cycle that
# gains less than SLOW has met the rounding of float32, and the next ones run in float64.
GAIN, SLOW = 1e-4, 0.1
# Directions below this share of a block's largest (as squares) add nothing but rounding.
DEPENDENT = 1e-13


def best_quadratic(
    moments: Quadratic, components: Sequence[Component], tolerance: float, max_iterations: int
) -> tuple[Quadratic, int, float]:
    """The quadratic with these moments for every output, by preconditioned conjugate gradients.

    All outputs share one Krylov space (block conjugate gradients in the form of Dubrulle 2001),
    so every output profits from what the others learn about the operator. The work is done in
    float32, on residuals that are computed in float64: the accuracy is that of float64.

    Args:
        components: of a mixture with mean 0 and covariance I on its support, best in their
            `common_basis`.
        tolerance: of the residual |moments - M q| / |moments| of every output, both in the norm
            that the preconditioner induces, computed in float64.

    Returns:
        solution, iterations, largest relative residual over the outputs.

    Raises:
        ConvergenceError: not reached within max_iterations (with the residual).

    Cost: MixtureMoments once an iteration in float32, once a cycle of 1e4 in float64; memory of
    some eight quadratics for every output beside the covariances.
    """
    operator, inverse = MixtureMoments(components), BlockJacobi(components)
    size = moments.dot(inverse(moments)).clamp(min=0).sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    solution = Quadratic(*(torch.zeros_like(part) for part in moments))
    if not bool(size.any()):
        return solution, 0, 0.0
    residual, relative, iterations, dtype = moments, 1.0, 0, torch.float32
    while True:
        goal = tolerance / 2 if dtype == torch.float64 else max(tolerance / 2, GAIN * relative)
        step, used = _block_cg(
            residual.combined(scale.diag()).to(dtype),
            operator.to(dtype),
            inverse.to(dtype),
            goal,
            max_iterations - iterations,
        )
        iterations += used
        solution.add_(step.to(torch.float64).combined(size.diag()))
        residual = operator(solution)
        residual = Quadratic(*(b - Ax for b, Ax in zip(moments, residual, strict=True)))
        before = relative
        relative = float((residual.dot(inverse(residual)).clamp(min=0).sqrt() * scale).max())
        if relative <= tolerance:
            return solution, iterations, relative
        if iterations >= max_iterations or (dtype == torch.float64 and relative > SLOW * before):
            break
        if relative > SLOW * before:
            dtype = torch.float64
    raise ConvergenceError(
        f"conjugate gradients reached a relative residual of {relative:.3g} in {iterations} "
        f"iterations, {tolerance:.3g} was asked for; components that overlap little converge "
        "slowly: use fewer, a larger tolerance=, or scope='neuron'"
    )


def _block_cg(
    right: Quadratic,
    operator: MixtureMoments,
    inverse: BlockJacobi,
    goal: float,
    max_iterations: int,
) -> tuple[Quadratic, int]:
    """Solution, from zero, with residuals below goal in the preconditioner's norm; iterations.

    The residuals are Q coefficients with Q orthonormal in that norm.
    """
    Q, Z, coefficients = _orthonormal(right, inverse)
    direction = Z
    solution = Quadratic(*(torch.zeros_like(part) for part in right))
    for iteration in range(max_iterations):
        if float(torch.linalg.vector_norm(coefficients, dim=0).max()) <= goal:
            return solution, iteration
        image = operator(direction)
        step = torch.linalg.pinv(direction.gram(image), hermitian=True, rtol=DEPENDENT)
        solution.add_(direction.combined(step @ coefficients))
        Q.add_(image.combined(step), alpha=-1.0)
        del image
        Q, Z, mix = _orthonormal(Q, inverse)
        coefficients = mix @ coefficients
        direction = Z.add_(direction.combined(mix.T))
    return solution, max_iterations


def _orthonormal(block: Quadratic, inverse: BlockJacobi) -> tuple[Quadratic, Quadratic, Tensor]:
    """Q, its image under the preconditioner, and mix, with block = Q mix and <Q, inverse Q> = I."""
    image = inverse(block)
    gram = block.gram(image)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    kept = values > DEPENDENT * values[-1]
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    forward = vectors / root
    return block.combined(forward), image.combined(forward), root[:, None] * vectors.T
