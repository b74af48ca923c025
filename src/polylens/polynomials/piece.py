"""The ordinary polynomial that a polynomial with ends is around one input, along one direction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.brief import Brief
from polylens.polynomials.monomials import expanded_about

# Elements of a weight matrix that are cast to float64 at a time.
CAST = 1 << 24


@dataclass(frozen=True, eq=False, repr=False)
class Piece(Brief):
    """f(x) . u = constant + x . linear + sum_i P_i(v_i) + z_i Q_i(v_i), v = x W + b, z = x V + c.

    P and Q of neurons beyond an end are those of their asymptote, so that this equals the
    polynomial with ends for all inputs that are beyond the same ends. In float64; W and V are the
    layer's own.

    Attributes:
        degree: of the polynomial; an asymptote may be of a higher one.
        constant: float.
        linear: [d_in], what no neuron reads, or None.
        W, b: [d_in, neurons], [neurons].
        P: [powers, neurons] coefficients of 1, v, v^2, ..., times what is read out along u.
        V, c, Q: of the linear branch of a GLU and of its factor, or None.
        beyond: [neurons], which are beyond an end.
    """

    degree: int
    constant: float
    linear: Tensor | None
    W: Tensor
    b: Tensor
    P: Tensor
    V: Tensor | None
    c: Tensor | None
    Q: Tensor | None
    beyond: Tensor

    def about_zero(self) -> tuple[Tensor, Tensor | None]:
        """(P, Q) as coefficients of powers of x W, for z = x V."""
        P = expanded_about(self.P, self.b)
        if self.Q is None or self.c is None:
            return P, None
        Q = expanded_about(self.Q, self.b)
        total = P.new_zeros(max(len(P), len(Q)), P.shape[1])
        total[: len(P)] += P
        total[: len(Q)] += self.c * Q
        return total, Q

    def read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x W and x V [..., neurons] in float64."""
        return product(x, self.W), None if self.V is None else product(x, self.V)


def product(x: Tensor, W: Tensor) -> Tensor:
    """x @ W in float64, without a copy of all of W."""
    step, x = max(1, CAST // max(1, len(W))), x.double()
    starts = range(0, max(1, W.shape[1]), step)
    return torch.cat([x @ W[:, i : i + step].double() for i in starts], dim=-1)
