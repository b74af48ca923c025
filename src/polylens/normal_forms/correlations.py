"""How the preactivations of every two neurons vary together under a Gaussian, block by block.

Sums over pairs of neurons (Mehler's formula, see `polylens.polynomials.explained_variance`) go
through here, so that no d_mlp x d_mlp matrix is held.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from polylens.inputs.gaussian import Gaussian
from polylens.normal_forms.preactivation import Preactivations, branches
from polylens.normal_forms.weights import GLUWeights, MLPWeights

BLOCK = 1024


class Pairs(NamedTuple):
    """Of a block of neurons (rows) and another (columns).

    Attributes:
        rho: correlation of the activated branches, Cov(t_i, t_j), to rounding in [-1, 1].
        linear: of a GLU Cov(t_i, z_j), Cov(z_i, t_j), Cov(z_i, z_j).
    """

    rows: slice
    columns: slice
    rho: Tensor
    linear: tuple[Tensor, Tensor, Tensor] | None

    def residual(self, a: Tensor, rho: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Cov(t_i, r_j), Cov(r_i, t_j), Cov(r_i, r_j) of r = z - E[z] - a t; None for an MLP."""
        if self.linear is None:
            return None
        t_z, z_t, z_z = self.linear
        a_I, a_J = a[self.rows, None], a[self.columns]
        sigma = z_z - a_I * t_z - z_t * a_J + a_I * rho * a_J
        return t_z - rho * a_J, z_t - a_I * rho, sigma


def pairs(
    weights: MLPWeights | GLUWeights,
    gaussian: Gaussian,
    moments: Preactivations,
    *,
    rows_to_columns: bool = False,
) -> Iterator[Pairs]:
    """Every pair of blocks of BLOCK neurons, column by column.

    Args:
        moments: of these weights under this Gaussian.
        rows_to_columns: only those with rows <= columns; the others are their transposes.
    """
    W, _, V, _ = branches(weights)
    inverse = torch.where(moments.s > 0, 1 / moments.s, 0.0)
    n = len(moments.s)
    for j in range(0, n, BLOCK):
        J = slice(j, j + BLOCK)
        cov_W = gaussian.cov_matmul(W[:, J].double() * inverse[J])
        cov_V = None if V is None else gaussian.cov_matmul(V[:, J].double())
        for i in range(0, j + 1 if rows_to_columns else n, BLOCK):
            I = slice(i, i + BLOCK)  # noqa: E741
            W_I = W[:, I].double() * inverse[I]
            rho = W_I.T @ cov_W
            if V is None or cov_V is None:
                yield Pairs(I, J, rho, None)
                continue
            V_I = V[:, I].double()
            yield Pairs(I, J, rho, (W_I.T @ cov_V, V_I.T @ cov_W, V_I.T @ cov_V))
