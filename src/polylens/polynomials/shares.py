"""How a polynomial's output at an input is shared among parts of that input, to order two.

At an input x a polynomial with ends is an ordinary polynomial of x (`polylens.polynomials.piece`).
A monomial is a product of factors, each of which is a sum over the parts of the input. Give every
factor of it an equal share, and every two of them, and at x each such polynomial, whatever its
degree, is

    f(x) = constant + x B + x Gamma x^T,    x = sum_a x_a,

    x_a B                what a part does alone, in terms of degree one,
    x_a Gamma x_b^T      what two do together, in all other terms,
    x_a M, M = B + x Gamma      what a part does in all.

With y = x W of the activated and z = x V of the linear branch, P and Q in powers of these, a
neuron's share in Gamma is alpha on W W^T and beta on the symmetrised W V^T,

    alpha = sum_{k >= 2} P_k y^(k - 2) + (k - 1) / (k + 1) Q_k z y^(k - 2),
    beta = sum_{k >= 1} 2 / (k + 1) Q_k y^(k - 1).

The shares of x_a M are the Aumann-Shapley values of the game without input (integrated gradients
from zero): they add up when parts are split further, which Shapley values of a cubic do not, so
that a graph of them does not depend on how finely its nodes are split. At degree 2 both are equal,
and Gamma is the quadratic form.

Sources: Aumann & Shapley 1974, "Values of non-atomic games"; Sundararajan, Taly & Yan 2017,
"Axiomatic attribution for deep networks".
"""

# Matrices and tables of coefficients are upper case.
# pyright: reportConstantRedefinition=false

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polylens.brief import Brief
from polylens.polynomials.monomials import expanded_about
from polylens.polynomials.piece import product
from polylens.polynomials.quadratic_form import QuadraticForm


class Term(NamedTuple):
    """Neurons that are read out by one matrix.

    Attributes:
        P, Q: [powers, n, neurons] coefficients of powers of x W + shift at each input, Q of what
            z is multiplied by, or None.
        readout: [neurons, d_out].
    """

    P: Tensor
    Q: Tensor | None
    readout: Tensor


class _Slopes(NamedTuple):
    """Per input and neuron [n, neurons], what the module's text says; beta of a GLU only."""

    alpha: Tensor
    beta: Tensor | None
    of_y: Tensor
    of_z: Tensor | None
    readout: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Shares(Brief):
    """A layer's polynomial at inputs x [n, d_in], shared to order two, in float64.

    Attributes:
        x: [n, d_in].
        constant: [n, d_out], what there is without any input.
    """

    x: Tensor
    constant: Tensor
    _W: Tensor
    _V: Tensor | None
    _linear: Tensor | None
    _slopes: tuple[_Slopes, ...]

    @classmethod
    def of(
        cls,
        x: Tensor,
        W: Tensor,
        shift: Tensor,
        V: Tensor | None,
        c: Tensor,
        terms: list[Term],
        constant: Tensor,
        linear: Tensor | None,
    ) -> "Shares":
        """Of f(x) = constant + x linear + sum over terms (P(x W + shift) + (x V + c) Q) readout."""
        y, z = product(x, W), None if V is None else product(x, V)
        constant, slopes = constant.expand(len(x), -1), list[_Slopes]()
        for term in terms:
            own, found = _slopes(y, z, shift, c, term)
            constant = constant + own @ term.readout.double()
            slopes.append(found)
        return cls(x, constant, W, V, linear, tuple(slopes))

    def value(self) -> Tensor:
        """[n, d_out]: the polynomial at x."""
        return self.constant + self.forward(slice(None), self.x)

    def forward(self, t: int | slice, parts: Tensor) -> Tensor:
        """[..., d_out]: what parts [..., d_in] of input t, or one of each of some, do in all,
        parts M."""
        y = product(parts, self._W)
        z = None if self._V is None else product(parts, self._V)
        out = 0.0 if self._linear is None else parts @ self._linear
        for s in self._slopes:
            h = y * s.of_y[t]
            if z is not None and s.of_z is not None:
                h = h + z * s.of_z[t]
            out = out + h @ s.readout.double()
        return torch.as_tensor(out)

    def adjoint(self, u: Tensor) -> Tensor:
        """[n, d_in]: M u of every input, for u [n, d_out]."""
        return self._back(slice(None), u)

    def first(self, t: int, u: Tensor) -> Tensor:
        """[d_in]: B u at input t, for u [d_out]."""
        return self._back(slice(t, t + 1), u[None])[0] - self.second(t, u) @ self.x[t]

    def second(self, t: int, u: Tensor) -> QuadraticForm:
        """Gamma along u [d_out] at input t."""
        p = self.x.new_zeros(self._W.shape[1])
        q = None if self._V is None else torch.zeros_like(p)
        for s in self._slopes:
            read = s.readout.double() @ u
            p = p + s.alpha[t] * read
            if q is not None and s.beta is not None:
                q = q + s.beta[t] * read
        return QuadraticForm(self._W, p, self._V, q)

    def _back(self, some: slice, u: Tensor) -> Tensor:
        by_y = u.new_zeros(len(u), self._W.shape[1])
        by_z = torch.zeros_like(by_y)
        for s in self._slopes:
            read = u @ s.readout.double().T
            by_y += s.of_y[some] * read
            if s.of_z is not None:
                by_z += s.of_z[some] * read
        out = by_y @ self._W.double().T
        if self._V is not None:
            out = out + by_z @ self._V.double().T
        return out if self._linear is None else out + u @ self._linear.T


def _slopes(
    y: Tensor, z: Tensor | None, shift: Tensor, c: Tensor, term: Term
) -> tuple[Tensor, _Slopes]:
    """(per neuron what there is without any input, the others)."""
    P = expanded_about(term.P, shift)
    if term.Q is None or z is None:
        alpha = _horner(list(P[2:]), y)
        of_y = P[1] + alpha * y if len(P) > 1 else torch.zeros_like(y)
        return P[0], _Slopes(alpha, None, of_y, None, term.readout)
    Q = expanded_about(term.Q, shift)
    total = y.new_zeros(max(len(P), len(Q), 2), *y.shape)
    total[: len(P)] += P
    total[: len(Q)] += c * Q
    shared = [(k - 1) / (k + 1) * Q[k] for k in range(2, len(Q))]
    alpha = _horner(list(total[2:]), y) + z * _horner(shared, y)
    beta = _horner([2 / (k + 1) * Q[k] for k in range(1, len(Q))], y)
    of_z = Q[0] + beta * y / 2 if len(Q) else torch.zeros_like(y)
    of_y = total[1] + alpha * y + beta * z / 2
    return total[0], _Slopes(alpha, beta, of_y, of_z, term.readout)


def _horner(rows: list[Tensor], y: Tensor) -> Tensor:
    value = torch.zeros_like(y)
    for row in reversed(rows):
        value = value * y + row
    return value
