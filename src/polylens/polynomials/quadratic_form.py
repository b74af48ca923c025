"""A symmetric quadratic form in factors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.brief import Brief
from polylens.checks import real_numbers
from polylens.devices import require_room
from polylens.errors import InvalidInputError


@dataclass(frozen=True, eq=False, repr=False)
class QuadraticForm(Brief):
    """Gamma = W diag(p) W^T + (W diag(q) V^T + V diag(q) W^T) / 2, symmetric [d_in, d_in].

    Attributes:
        W: [d_in, d_mlp], V: the same or None.
        p, q: [d_mlp] float64.
    """

    W: Tensor
    p: Tensor
    V: Tensor | None
    q: Tensor | None

    @property
    def d_in(self) -> int:
        return self.W.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """x Gamma x^T for x [..., d_in], in float64 -> [...]."""
        x = self._checked(x, -1)
        y = x @ self.W.double()
        value = (y * y) @ self.p
        if self.V is not None and self.q is not None:
            value = value + (y * (x @ self.V.double())) @ self.q
        return value

    def __matmul__(self, X: Tensor) -> Tensor:
        """Gamma @ X for X [d_in] or [d_in, k], in float64, as thin products."""
        columns = self._checked(X, 0)
        if X.dim() > 2:
            raise InvalidInputError(f"X must be [{self.d_in}, k], got {tuple(X.shape)}")
        columns = columns.reshape(self.d_in, math.prod(X.shape[1:]))
        W = self.W.double()
        inner = W.T @ columns
        neurons = self.p[:, None] * inner
        out = 0.0
        if self.V is not None and self.q is not None:
            V = self.V.double()
            out = V @ (self.q[:, None] * inner) / 2
            neurons = neurons + self.q[:, None] * (V.T @ columns) / 2
        return (W @ neurons + out).reshape(X.shape)

    def _checked(self, x: object, axis: int) -> Tensor:
        """x in float64, if it has d_in entries along this axis."""
        wanted = f"[..., {self.d_in}]" if axis else f"[{self.d_in}] or [{self.d_in}, k]"
        if not isinstance(x, Tensor):
            raise InvalidInputError(f"it must be a real tensor {wanted}, got {type(x).__name__}")
        x = real_numbers(f"what it takes, {wanted},", x, self.W.device)
        if not x.dim() or x.shape[axis] != self.d_in:
            raise InvalidInputError(f"it must be {wanted}, got {tuple(x.shape)}")
        return x.double()

    def to_dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """[d_in, d_in], computed in this dtype.

        Raises:
            OutOfMemory: it and two matrices [d_in, d_mlp] are more than is free; products
                `form @ X` need neither.
        """
        d_in, d_mlp = self.W.shape
        needed = dtype.itemsize * d_in * (2 * d_mlp + 2 * d_in)
        what = f"a dense form [{d_in}, {d_in}] of {d_mlp:,} neurons"
        require_room(needed, self.W.device, what, "use products form @ X")
        W = self.W.to(dtype)
        right = W * self.p.to(dtype)
        if self.V is not None and self.q is not None:
            right = right + self.V.to(dtype) * self.q.to(dtype)
        gamma = W @ right.T
        return (gamma + gamma.T) / 2

    def trace(self) -> Tensor:
        """Sum of the eigenvalues."""
        W = self.W.double()
        total = torch.sum(W * W * self.p)
        if self.V is not None and self.q is not None:
            total = total + torch.sum(W * self.V.double() * self.q)
        return total
