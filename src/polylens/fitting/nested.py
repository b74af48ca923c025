"""Batches of small least-squares problems, solved for every leading block of columns at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

linalg: Any = torch.linalg  # without types

# A column that keeps less than this of its norm beside the earlier ones is one of them.
DEPENDENT = 1e-9


def triangularise(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """R [n, c, c] and Q^T b [n, c, o] of the systems A [n, r, c] ~ b [n, r, o].

    Gram-Schmidt, twice, column by column and all systems at once. A column that depends on the
    earlier ones is dropped: its row of R is that of the identity and its entry of Q^T b zero,
    so that back-substitution gives it the coefficient zero.
    """
    n, _, c = A.shape
    Q = torch.zeros_like(A)
    R = A.new_zeros(n, c, c)
    norms = linalg.vector_norm(A, dim=1)
    for j in range(c):
        q = A[:, :, j]
        for _ in range(2 if j else 0):
            overlap = torch.einsum("nrj,nr->nj", Q[:, :, :j], q)
            q = q - torch.einsum("nrj,nj->nr", Q[:, :, :j], overlap)
            R[:, :j, j] += overlap
        norm = linalg.vector_norm(q, dim=1)
        kept = norm > DEPENDENT * norms[:, j]
        Q[:, :, j] = torch.where(kept[:, None], q / norm[:, None], 0.0)
        R[:, :, j] = torch.where(kept[:, None], R[:, :, j], 0.0)
        R[:, j, j] = torch.where(kept, norm, 1.0)
    return R, Q.mT @ b


def nested_solutions(R: Tensor, Qb: Tensor, sizes: Sequence[int]) -> Tensor:
    """Solutions [len(sizes), n, c, o] that use only the first `size` columns, zero elsewhere."""
    out = Qb.new_zeros(len(sizes), *Qb.shape)
    for i, size in enumerate(sizes):
        out[i, :, :size] = linalg.solve_triangular(R[:, :size, :size], Qb[:, :size], upper=True)
    return out


def glu_tables(solutions: Tensor, degree: int, z_mean: Tensor) -> tuple[Tensor, Tensor]:
    """P [n+1, n+1, d_mlp] and Q [n+1, n, d_mlp] from solutions [n+1, d_mlp, 2 n + 1].

    Columns are 1, He_1, zeta, He_2, zeta He_1, ...: every degree's basis is a leading block,
    with zeta = z - z_mean.
    """
    P = torch.cat([solutions[:, :, :1], solutions[:, :, 1::2]], dim=2).transpose(1, 2).clone()
    Q = solutions[:, :, 2::2].transpose(1, 2).contiguous()
    P[:, :degree] -= z_mean * Q
    return P, Q
