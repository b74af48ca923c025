"""The best quadratic under a Gaussian mixture, by block conjugate gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polylens.errors import ConvergenceError
from polylens.fitting.global_optimum.quadratic_moments import (
    BlockJacobi,
    Component,
    MixtureMoments,
    Quadratic,
)

linalg: Any = torch.linalg  # without types

# The residual is computed anew in float64 when it has fallen by GAIN, and after LONGEST
# iterations. If it has fallen by less than SLOW then, the rounding of float32 may be met, and the
# rest is done in float64; so is all of a problem in fewer than SMALL dimensions.
GAIN, LONGEST, SLOW, SMALL = 1e-3, 100, 0.1, 128
# Directions below this share of a block's largest (as squares) add nothing but rounding.
DEPENDENT = 1e-13
# An estimate that has grown by this is rounding.
DIVERGED = 1e6


def best_quadratic(
    moments: Quadratic, components: Sequence[Component], tolerance: float, max_iterations: int
) -> tuple[Quadratic, int, float]:
    """The quadratic with these moments for every output, by preconditioned conjugate gradients.

    All outputs share one Krylov space (block conjugate gradients in the form of Dubrulle 2001),
    so every output profits from what the others learn about the operator. The residuals are
    those of q coefficients, with q orthonormal in the preconditioner's norm. The products are
    done in float32 and corrected by residuals that are computed in float64, without giving up
    the search directions: the accuracy is that of float64.

    Args:
        components: of a mixture with mean 0 and covariance I on its support, best in their
            `common_basis`.
        tolerance: of the residual |moments - M q| / |moments| of every output, both in the norm
            that the preconditioner induces, computed in float64.

    Returns:
        solution, iterations, largest relative residual over the outputs.

    Raises:
        ConvergenceError: not reached within max_iterations (with the residual).

    Cost: MixtureMoments once an iteration in float32, and once in float64 for every factor of
    1e3 gained; memory of some eight quadratics for every output beside the covariances.
    """
    exact, exact_inverse = MixtureMoments(components), BlockJacobi(components)
    size = moments.dot(exact_inverse(moments)).clamp(min=0).sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    solution = Quadratic(*(torch.zeros_like(part) for part in moments))
    if not bool(size.any()):
        return solution, 0, 0.0
    dtype = torch.float64 if moments.linear.shape[1] < SMALL else torch.float32
    operator, inverse = exact.to(dtype), exact_inverse.to(dtype)
    q, z, coefficients = _orthonormal(moments.combined(scale.diag()).to(dtype), inverse)
    direction, relative, update, begun = z, 1.0, None, 0
    for iteration in range(1, max_iterations + 1):
        image = operator(direction)
        step: Tensor = linalg.pinv(direction.gram(image), hermitian=True, rtol=DEPENDENT)
        change = direction.combined(step @ coefficients)
        update = change if update is None else update.add_(change)
        q, z, mix = _orthonormal(q.add_(image.combined(step), alpha=-1.0), inverse)
        coefficients = mix @ coefficients
        sizes: Tensor = linalg.vector_norm(coefficients, dim=0)
        estimate = float(sizes.max())
        goal = max(tolerance / 2, GAIN * relative)
        going = iteration < min(begun + LONGEST, max_iterations)
        if going and goal < estimate < DIVERGED * relative:
            direction = z.add_(direction.combined(mix.T))
            continue
        trial = update.to(torch.float64).combined(size.diag()).add_(solution)
        residual, now = _residual(moments, trial, exact, exact_inverse, scale)
        if now <= tolerance:
            return trial, iteration, now
        gained = now < relative
        slow = not now < SLOW * relative
        if gained:
            solution, relative = trial, now
        else:  # rounding, the directions' too
            residual, relative = _residual(moments, solution, exact, exact_inverse, scale)
        update, begun = None, iteration
        if slow:
            dtype, operator, inverse = torch.float64, exact, exact_inverse
        left = residual.combined(scale.diag()).to(dtype)
        if gained:
            # Conjugate to the last directions, so that nothing learnt is lost; first without
            # what is left along them, beside which the others can be rounding.
            image, direction = image.to(dtype), direction.to(dtype)
            along = step @ direction.gram(left)
            update = direction.combined(along)
            left.add_(image.combined(along), alpha=-1.0)
            q, z, coefficients = _orthonormal(left, inverse)
            direction = z.add_(direction.combined(step @ image.gram(z)), alpha=-1.0)
        else:
            q, z, coefficients = _orthonormal(left, inverse)
            direction = z
    raise ConvergenceError(
        f"conjugate gradients reached a relative residual of {relative:.3g} in {max_iterations} "
        f"iterations, {tolerance:.3g} was asked for; components that overlap little, or do "
        "not vary where others do, converge slowly: add a variance to their covariances, use "
        "fewer, a larger tolerance=, or fit()"
    )


def _residual(
    moments: Quadratic,
    solution: Quadratic,
    operator: MixtureMoments,
    inverse: BlockJacobi,
    scale: Tensor,
) -> tuple[Quadratic, float]:
    """moments - M solution, and the largest of its norms over the outputs, times scale."""
    pairs = zip(moments, operator(solution), strict=True)
    residual = Quadratic(*(b - Ax for b, Ax in pairs))
    norms = residual.dot(inverse(residual)).clamp(min=0).sqrt() * scale
    return residual, float(norms.max())


def _orthonormal(block: Quadratic, inverse: BlockJacobi) -> tuple[Quadratic, Quadratic, Tensor]:
    """Q, its image under the preconditioner, and mix, with block = Q mix and <Q, inverse Q> = I."""
    image = inverse(block)
    gram = block.gram(image)
    values: Tensor
    vectors: Tensor
    values, vectors = linalg.eigh((gram + gram.T) / 2)
    kept = values > max(DEPENDENT * float(values[-1]), 0.0)
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    forward = vectors / root
    return block.combined(forward), image.combined(forward), root[:, None] * vectors.T
