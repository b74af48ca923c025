"""The best quadratic under a Gaussian mixture, without forming its normal equations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polylens.errors import ConvergenceError


class Quadratic(NamedTuple):
    """q(x) = constant + linear . x + x matrix x^T for every output; or a functional on such q.

    constant [o], linear [o, r], matrix [o, r, r] symmetric.
    """

    constant: Tensor
    linear: Tensor
    matrix: Tensor

    def axpy(self, step: Tensor, other: "Quadratic") -> "Quadratic":
        """self + step * other with step [o], in place."""
        self.constant.add_(step * other.constant)
        self.linear.addcmul_(step[:, None], other.linear)
        self.matrix.addcmul_(step[:, None, None], other.matrix)
        return self

    def dot(self, other: "Quadratic") -> Tensor:
        """Inner products [o]."""
        return (
            self.constant * other.constant
            + torch.linalg.vecdot(self.linear, other.linear)
            + torch.linalg.vecdot(self.matrix.flatten(1), other.matrix.flatten(1))
        )


class Component(NamedTuple):
    """One Gaussian of a mixture: its weight, mean [r] and cov [r, r] = factor factor^T.

    factor [r, rank] is given where it is thin enough to save work, else None.
    """

    weight: float
    mean: Tensor
    cov: Tensor
    factor: Tensor | None = None

    @classmethod
    def of(cls, weight: float, mean: Tensor, cov: Tensor) -> "Component":
        """With a factor if the rank is below 0.6 r, where two thin products cost less than one."""
        values, vectors = torch.linalg.eigh(cov)
        kept = values > 1e-14 * values[-1]
        if float(kept.sum()) > 0.6 * len(mean):
            return cls(weight, mean, cov)
        return cls(weight, mean, cov, vectors[:, kept] * values[kept].sqrt())


def moments_of(q: Quadratic, components: Sequence[Component]) -> Quadratic:
    """(E[q], E[q x], E[q x x^T]) under the mixture, by Isserlis.

    With x = mu + eps, eps ~ N(0, Sigma), q is again a quadratic (a', b', C) in eps, and
    E[q] = a' + tr(C Sigma), E[q eps] = Sigma b', E[q eps eps^T] = E[q] Sigma + 2 Sigma C Sigma:
    two products of r^3 (or r^2 rank) a component.
    """
    matrix = torch.zeros_like(q.matrix)
    means, gradients = [], []
    for weight, mu, cov, factor in components:
        C_mu = q.matrix @ mu
        if factor is None:
            product = q.matrix @ cov
            trace = product.diagonal(dim1=1, dim2=2).sum(1)
            matrix.add_(cov @ product, alpha=2 * weight)
        else:
            inner = factor.T @ (q.matrix @ factor)
            trace = inner.diagonal(dim1=1, dim2=2).sum(1)
            matrix.add_((factor @ inner) @ factor.T, alpha=2 * weight)
        means.append(weight * (q.constant + q.linear @ mu + C_mu @ mu + trace))
        gradients.append(weight * (q.linear + 2 * C_mu) @ cov)
    mean, gradient = torch.stack(means), torch.stack(gradients)  # [k, o], [k, o, r]
    mu = torch.stack([component.mean for component in components])
    # gradient mu^T + mu gradient^T + mean mu mu^T, as one product over the components
    half = gradient + mean[:, :, None] * mu[:, None] / 2
    mixed = torch.einsum("kor,ks->ors", half, mu)
    matrix.add_(mixed).add_(mixed.mT)
    for weighted, component in zip(mean, components, strict=True):
        matrix.addcmul_(weighted[:, None, None], component.cov)
    return Quadratic(mean.sum(0), torch.einsum("ko,kr->or", mean, mu) + gradient.sum(0), matrix)


def invert_standard(m: Quadratic) -> Quadratic:
    """The quadratic whose moments under N(0, I) are m."""
    matrix = m.matrix / 2
    matrix.diagonal(dim1=1, dim2=2).sub_(m.constant[:, None] / 2)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    return Quadratic(m.constant - trace, m.linear.clone(), matrix)


def best_quadratic(
    moments: Quadratic, components: Sequence[Component], tolerance: float, max_iterations: int
) -> tuple[Quadratic, int, float]:
    """The quadratic with these moments, for every output, by preconditioned conjugate gradients.

    The mixture must be whitened (mean 0, covariance I on its support): the preconditioner is the
    exact inverse for N(0, I). Residuals are measured in its norm, relative to the right side.

    Returns:
        solution, iterations, largest relative residual over the outputs.

    Raises:
        ConvergenceError: not reached within max_iterations (with the residual).
    """
    solution = Quadratic(*(torch.zeros_like(part) for part in moments))
    residual = Quadratic(*(part.clone() for part in moments))
    direction = invert_standard(residual)
    size = start = residual.dot(direction)
    relative, iterations = 1.0, 0
    while True:
        share = torch.where(start > 0, size / start, 0.0).clamp(min=0)
        relative = float(share.max().sqrt())
        if relative <= tolerance or iterations == max_iterations:
            break
        image = moments_of(direction, components)
        curvature = direction.dot(image)
        step = torch.where(curvature > 0, size / curvature, 0.0)
        solution.axpy(step, direction)
        residual.axpy(-step, image)
        del image
        z = invert_standard(residual)
        new = residual.dot(z)
        direction = z.axpy(torch.where(size > 0, new / size, 0.0), direction)
        size = new
        iterations += 1
    if not relative <= tolerance:
        raise ConvergenceError(
            f"conjugate gradients reached a relative residual of {relative:.3g} in {iterations} "
            f"iterations, {tolerance:.3g} was asked for; components that overlap little converge "
            "slowly: use fewer, a larger tolerance=, or scope='neuron'"
        )
    return solution, iterations, relative
