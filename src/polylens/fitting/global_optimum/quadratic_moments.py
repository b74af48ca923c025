"""Quadratics and their moments under a Gaussian mixture, without forming normal equations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

linalg: Any = torch.linalg  # without types

# Below this share of r a covariance's rank makes its thin products the cheaper ones.
THIN = 0.6
# A symmetric product is computed in this many blocks of rows, those right of the diagonal only.
BLOCKS = 6
# Monomials with a mean square below this (the inputs have covariance I) do not occur.
ABSENT = 1e-12
# Steps towards the basis in which all covariances are most nearly diagonal.
ROTATIONS = 12


class Quadratic(NamedTuple):
    """q(x) = constant + linear . x + x matrix x^T for every output; or a functional on such q.

    constant [o], linear [o, r], matrix [o, r, r] symmetric.
    """

    constant: Tensor
    linear: Tensor
    matrix: Tensor

    def to(self, dtype: torch.dtype) -> "Quadratic":
        return Quadratic(*(part.to(dtype) for part in self))

    def combined(self, mix: Tensor) -> "Quadratic":
        """The quadratics sum_o mix[o, s] q_o, one for each s."""
        mix = mix.to(self.constant)
        return Quadratic(
            *(torch.tensordot(mix.T, p, dims=1) for p in self)  # pyright: ignore[reportUnknownMemberType]
        )

    def add_(self, other: "Quadratic", alpha: float = 1.0) -> "Quadratic":
        for part, more in zip(self, other, strict=True):
            part.add_(more, alpha=alpha)
        return self

    def dot(self, other: "Quadratic") -> Tensor:
        """Inner products [o], output by output."""
        linear: Tensor = linalg.vecdot(self.linear, other.linear)
        matrix: Tensor = linalg.vecdot(self.matrix.flatten(1), other.matrix.flatten(1))
        return self.constant * other.constant + linear + matrix

    def gram(self, other: "Quadratic") -> Tensor:
        """Inner products [o, o'] of all pairs, summed in float64."""
        pairs = zip(self, other, strict=True)
        return torch.stack(
            [a.double().reshape(len(a), -1) @ b.double().reshape(len(b), -1).T for a, b in pairs]
        ).sum(0)


class Component(NamedTuple):
    """One Gaussian of a mixture: its weight, mean [r] and cov [r, r].

    factor [rank, r], with cov = factor^T factor, where one is known.
    """

    weight: float
    mean: Tensor
    cov: Tensor
    factor: Tensor | None = None


class Spread(NamedTuple):
    """A covariance, the components that have it, and cov = factor factor^T where that is thin."""

    cov: Tensor
    factor: Tensor | None
    members: Tensor


class MixtureMoments:
    """q -> (E[q], E[q x], E[q x x^T]) under a mixture, by Isserlis.

    With x = mu + eps, eps ~ N(0, Sigma), q is again a quadratic (a', b', C) in eps, and
    E[q] = a' + tr(C Sigma), E[q eps] = Sigma b', E[q eps eps^T] = E[q] Sigma + 2 Sigma C Sigma.

    Cost: per output and distinct covariance two products of r^3, the second one symmetric and
    half computed (thin ones where the rank is below 0.6 r).
    """

    def __init__(self, components: Sequence[Component]) -> None:
        like = components[0].mean
        self.weights = like.new_tensor([c.weight for c in components])
        self.means = torch.stack([c.mean for c in components])
        groups: dict[int, list[int]] = {}
        for index, component in enumerate(components):
            groups.setdefault(component.cov.data_ptr(), []).append(index)
        self.spreads = [
            Spread(
                components[members[0]].cov,
                _thin(components[members[0]]),
                torch.tensor(members, device=like.device),
            )
            for members in groups.values()
        ]

    def to(self, dtype: torch.dtype) -> "MixtureMoments":
        other = object.__new__(MixtureMoments)
        other.weights, other.means = self.weights.to(dtype), self.means.to(dtype)
        other.spreads = [
            Spread(s.cov.to(dtype), None if s.factor is None else s.factor.to(dtype), s.members)
            for s in self.spreads
        ]
        return other

    def __call__(self, q: Quadratic) -> Quadratic:
        w, mu = self.weights[:, None], self.means
        C_mu = (q.matrix @ mu.T).permute(2, 0, 1)  # [k, o, r]
        slopes = q.linear + 2 * C_mu
        values = q.constant + (q.linear @ mu.T).T + torch.einsum("kor,kr->ko", C_mu, mu)
        gradient, mean = torch.empty_like(slopes), torch.empty_like(values)
        matrix = torch.zeros_like(q.matrix)  # its upper blocks are filled first
        for cov, factor, members in self.spreads:
            share = w[members]
            trace = _add_sandwich(matrix, q.matrix, cov, factor, 2 * float(share.sum()))
            gradient[members] = share[:, :, None] * (slopes[members] @ cov)
            mean[members] = share * (values[members] + trace)
            matrix.addcmul_(mean[members].sum(0)[:, None, None], cov)
        # gradient mu^T + mu gradient^T + mean mu mu^T, as one product over the components
        half = gradient + mean[:, :, None] * mu[:, None] / 2
        mixed = torch.einsum("kor,ks->ors", half, mu)
        matrix.add_(mixed).add_(mixed.mT)
        matrix = matrix.triu().add_(matrix.triu(1).mT)
        return Quadratic(mean.sum(0), torch.einsum("ko,kr->or", mean, mu) + gradient.sum(0), matrix)


def _thin(component: Component) -> Tensor | None:
    """F [r, rank] with cov = F F^T, where its products are the cheaper ones."""
    factor = component.factor
    if factor is None:
        values: Tensor
        vectors: Tensor
        values, vectors = linalg.eigh(component.cov)
        kept = values > 1e-14 * values[-1]
        factor = (vectors[:, kept] * values[kept].sqrt()).T
    return None if len(factor) > THIN * len(component.cov) else factor.T.contiguous()


def _add_sandwich(
    out: Tensor, C: Tensor, cov: Tensor, factor: Tensor | None, scale: float
) -> Tensor:
    """Upper blocks of out += scale cov C cov; returns tr(C cov) [o]."""
    if factor is None:
        product = C @ cov
        _add_symmetric(out, cov.expand_as(C), product, scale)
        return product.diagonal(dim1=1, dim2=2).sum(1)
    inner = factor.T @ (C @ factor)
    _add_symmetric(out, factor @ inner, factor.T.expand(len(C), -1, -1), scale)
    return inner.diagonal(dim1=1, dim2=2).sum(1)


def _add_symmetric(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Blocks on and right of the diagonal of out += scale left @ right, known to be symmetric."""
    r = out.shape[1]
    step = -(-r // BLOCKS)
    for i in range(0, r, step):
        out[:, i : i + step, i:].baddbmm_(left[:, i : i + step], right[:, :, i:], alpha=scale)


class BlockJacobi:
    """Approximate inverse of MixtureMoments: exact on 1, x_i and x_i^2, diagonal on x_i x_j.

    Good where the basis makes all covariances nearly diagonal (`common_basis`); for one Gaussian
    N(0, I) it is the inverse.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        r = len(components[0].mean)
        cross = torch.zeros_like(components[0].cov)  # E[x_i^2 x_j^2]
        block = cross.new_zeros(2 * r + 1, 2 * r + 1)
        for weight, mu, cov, _ in components:
            square = cov.diagonal() + mu * mu
            fourth = torch.outer(square, square) + 2 * cov * (cov + 2 * torch.outer(mu, mu))
            cross += weight * fourth
            block[0, 0] += weight
            block[0, 1 : r + 1] += weight * mu
            block[0, r + 1 :] += weight * square
            block[1 : r + 1, 1 : r + 1] += weight * (cov + torch.outer(mu, mu))
            block[1 : r + 1, r + 1 :] += weight * (mu[:, None] * square + 2 * cov * mu)
            block[r + 1 :, r + 1 :] += weight * fourth
        values: Tensor
        vectors: Tensor
        values, vectors = linalg.eigh(block, UPLO="U")
        occurring = torch.where(values > ABSENT * values[-1], values, torch.inf)
        self.inverse = (vectors / occurring) @ vectors.T
        # E[q x_i x_j] = 2 C_ij E[x_i^2 x_j^2], up to the other monomials
        self.cross = torch.where(cross > ABSENT, 0.5 / cross, 0.0)

    def to(self, dtype: torch.dtype) -> "BlockJacobi":
        other = object.__new__(BlockJacobi)
        other.inverse, other.cross = self.inverse.to(dtype), self.cross.to(dtype)
        return other

    def __call__(self, m: Quadratic) -> Quadratic:
        r = m.linear.shape[1]
        diagonal = m.matrix.diagonal(dim1=1, dim2=2)
        solved = torch.cat([m.constant[:, None], m.linear, diagonal], dim=1) @ self.inverse
        matrix = m.matrix * self.cross
        matrix.diagonal(dim1=1, dim2=2).copy_(solved[:, r + 1 :])
        return Quadratic(solved[:, 0].clone(), solved[:, 1 : r + 1].clone(), matrix)


def common_basis(components: Sequence[Component]) -> Tensor:
    """Orthogonal V [r, r] in which the components' covariances are nearly diagonal together.

    Ascends sum_p w_p sum_i (v_i cov_p v_i)^2, which is convex in V, by V <- the orthogonal factor
    of its gradient. Cost: 12 products of r^3 a component, in float32.
    """
    r = len(components[0].mean)
    covs = [(c.weight, c.cov.float()) for c in components]
    cubes = sum((w * cov @ cov @ cov for w, cov in covs), covs[0][1].new_zeros(r, r))
    basis: Tensor = linalg.eigh(cubes).eigenvectors
    for _ in range(ROTATIONS):
        gradient = torch.zeros_like(basis)
        for weight, cov in covs:
            image = cov @ basis
            along: Tensor = linalg.vecdot(basis, image, dim=0)
            gradient += weight * image * along
        left, _, right = linalg.svd(gradient, full_matrices=False)
        basis = left @ right
    factors = linalg.qr(basis.double())
    signs: Tensor = factors.R.diagonal().sign()
    return factors.Q * signs
