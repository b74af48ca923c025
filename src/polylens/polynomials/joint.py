"""A polynomial per neuron, corrected by the features of all neurons."""

# Matrices and tables of coefficients are upper case.
# pyright: reportConstantRedefinition=false

# It is made of a factored one, and reads what that has derived.
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polylens.activations.hermite import hermite_polynomials
from polylens.checks import check_degree
from polylens.errors import ArtifactError
from polylens.files import format as storage
from polylens.files.format import Record
from polylens.inputs.model import InputModel
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.base import Approximation, kept
from polylens.polynomials.evaluation import clamped, gained
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.piece import Piece
from polylens.polynomials.quadratic_form import QuadraticForm
from polylens.polynomials.records import checked
from polylens.polynomials.shares import Shares


class JointPolynomial(Approximation):
    """f_n(x) = base_n(x) + Phi_n(x) D_n: a factored polynomial and a correction by all neurons.

    Phi_n holds 1, x, and for k = 2 ... n every neuron's He_k(t) and, for a GLU,
    zeta He_{k-1}(t) with zeta = z - E[z]; D_n [features, d_out] reads every feature out into
    every direction. The base is in the span of the same features, so that one product
    Phi_n [features] @ [features, d_out] evaluates both: at degree 2 as many multiplications as
    4/3 of a GLU, at degree 3 twice a GLU. Beyond ends (see `Polynomial.with_ends`)
    t in He_k with k >= 2 and in He_{k-1}(t) zeta is that of the end, and what a neuron gains is
    written along its row of W_out, for a third of a GLU more. Every degree has the ends that suit
    the highest; what is said of the layer as a whole is said of the base's optimum then.

    Attributes:
        base: the per-neuron Polynomial.
        ridge: [degree + 1] chosen strengths; held_out: [degree + 1] held-out mean squared errors
            at those strengths.
        inputs: the samples.
    """

    kind = "joint polynomial"
    center: Tensor
    z_mean: Tensor

    def __init__(
        self,
        base: Polynomial,
        center: Tensor,
        z_mean: Tensor,
        corrections: list[Tensor],
        ridge: tuple[float, ...],
        held_out: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.base = base
        self.ridge, self.held_out = ridge, held_out
        self.register_buffer("center", center)
        self.register_buffer("z_mean", z_mean)
        self._readouts: dict[tuple[int, torch.dtype], Tensor] = {}
        self._read_from = base._horner_cache
        for n, correction in enumerate(corrections):
            self.register_buffer(f"D{n}", correction.contiguous())

    @property
    def degree(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.degree

    @property
    def inputs(self) -> InputModel | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.inputs

    @property
    def weights(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> MLPWeights | GLUWeights:
        return self.base.weights

    @property
    def d_in(self) -> int:
        return self.base.d_in

    @property
    def d_out(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.d_out

    @property
    def corrections(self) -> list[Tensor]:
        """D_n [features, d_out] of every degree."""
        return [getattr(self, f"D{n}") for n in range(self.degree + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], the fit of the highest degree."""
        return self._evaluate(x, self.degree)

    def all_degrees(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [degree + 1, ..., d_out]: the fit of every degree."""
        return torch.stack([self._evaluate(x, n) for n in range(self.degree + 1)])

    def _evaluate(self, x: Tensor, n: int) -> Tensor:
        self.base.require_input(x)
        phi, beyond = features(self.base, self.center, self.z_mean, x, n)
        key = (n, phi.dtype)
        if self._read_from is not self.base._horner_cache:  # the base is another one now
            self._readouts, self._read_from = {}, self.base._horner_cache
        read = self._readouts.get(key)
        if read is None and torch.compiler.is_compiling():
            read = self._readout(n).to(phi.dtype)
        elif read is None:
            with kept():
                read = self._readouts[key] = self._readout(n).to(phi.dtype)
        out = phi @ read
        out = out if beyond is None else out + beyond @ self.base.W_out.to(beyond.dtype)
        return out.to(x.dtype)

    def _readout(self, n: int) -> Tensor:
        """[features, d_out] float64: the base in the same features, plus D_n."""
        return readout(self.base, self.center, self.z_mean, n) + getattr(self, f"D{n}").double()

    def figures(self) -> dict[str, Tensor]:
        return super().figures() | storage.prefixed(self.base.figures(), "neurons.")

    def take_figures(self, tensors: Mapping[str, Tensor]) -> None:
        super().take_figures(tensors)
        self.base.take_figures(storage.within(tensors, "neurons."))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "JointPolynomial":
        kept = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        for name, tensor in kept.items():  # coefficients stay in float64
            self._buffers[name] = tensor.to(self.base.W_in.device)
        self._readouts = {}
        return self

    def own_weights(self) -> "JointPolynomial":
        """Itself, from now on with a copy of the weights, which nobody else writes to."""
        self.base.own_weights()
        return self

    def _forget(self) -> None:
        super()._forget()
        self._readouts = {}

    def over(self, weights: MLPWeights | GLUWeights) -> "JointPolynomial":
        """The same coefficients over the same weights, wherever and in whatever dtype they are."""
        own = [t.to(weights.device) for t in (self.center, self.z_mean, *self.corrections)]
        base = self.base.over(weights)
        like = JointPolynomial(base, own[0], own[1], own[2:], self.ridge, self.held_out)
        like._take_figures(self)
        return like

    @property
    def ends(self) -> Tensor | None:
        return self.base.ends

    @property
    def has_optimum(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.has_optimum

    def extra_repr(self) -> str:
        return self.how_good().lstrip(", \n")

    @property
    def seen(self) -> Tensor | None:
        return self.base.seen

    def outside(self, y: Tensor) -> Tensor:
        return self.base.outside(y)

    def with_ends(self, ends: Tensor, asymptotes: bool = True) -> "JointPolynomial":
        """`Polynomial.with_ends`, of what is not linear in x."""
        return self._with(self.base.with_ends(ends, asymptotes))

    def having_seen(self, y: Tensor | None) -> "JointPolynomial":
        """`Polynomial.having_seen`."""
        return self._with(self.base.having_seen(y))

    def optimum(self, degree: int | None = None) -> "Polynomial | JointPolynomial":
        """The polynomial, without ends, that explains most: with ends that of its own neurons.

        A joint fit with ends has no joint optimum beside it, which would cost as much again.
        """
        if self.base.optimum_P is not None or not self.base.has_optimum:
            return self.base.optimum(degree)
        own = self if self.ends is None else self._with(self.base.optimum())
        return own if degree is None else own.truncate(degree)

    def _with(self, base: Polynomial) -> "JointPolynomial":
        own = self.center, self.z_mean, self.corrections, self.ridge, self.held_out
        return JointPolynomial(base, *own)

    def truncate(self, degree: int) -> "JointPolynomial":
        """The fit of a lower degree; the tensors are shared."""
        degree = check_degree(degree, self.degree, "fit")
        lower = JointPolynomial(
            self.base.truncate(degree),
            self.center,
            self.z_mean,
            self.corrections[: degree + 1],
            self.ridge[: degree + 1],
            self.held_out[: degree + 1],
        )
        lower._take_figures(self, degree)
        return lower

    def linear(self) -> tuple[Tensor, Tensor]:
        """(beta [d_in, d_out], alpha [d_out]) in float64: the linear optimum is x beta + alpha."""
        self._require_degree(1, "linear()")
        own = self.optimum()
        if isinstance(own, Polynomial):
            return own.linear()
        E = self._readout(1)
        return E[1:], E[0] - self.center @ E[1:]

    def quadratic_form(self, u: Tensor) -> QuadraticForm:
        """Gamma_u, x Gamma_u x^T being the second-order term of the degree 2 optimum along u."""
        self._require_degree(2, "quadratic_form(u)")
        own = self.optimum()
        if isinstance(own, Polynomial):
            return own.quadratic_form(u)
        readout = self._readout(2)[1 + self.d_in :] @ self._direction(u, self.center.device)
        inverse = torch.where(self.base.s > 0, 1 / self.base.s, 0.0)
        W, _, V, _ = self.base._activated_first()
        q = None if V is None else readout[self.base.d_mlp :] * inverse
        return QuadraticForm(W, readout[: self.base.d_mlp] * inverse**2, V, q)

    def piece(self, x: Tensor, u: Tensor) -> Piece:
        base, device = self.base, self.center.device
        x, u = self._one_input(x, self.d_in, device), self._direction(u, device)
        constant, linear, read = self._parts(self._readout(self.degree) @ u)
        P, Q = base.m.new_zeros(self.degree + 1, base.d_mlp), None
        P[2:] = read[:, 0] if len(read) else P[2:]
        P = base.in_powers(P)
        if base.Q is not None:
            Q = base.m.new_zeros(max(self.degree, 1), base.d_mlp)
            Q[1:] = read[:, 1] if len(read) else Q[1:]
            Q = base.in_powers(Q)
            P[: len(Q)] -= self.z_mean * Q
        return base._piece(x, P, Q, base.W_out.double() @ u, float(constant), linear)

    @torch.no_grad()
    def shares(self, x: Tensor) -> Shares:
        base, n = self.base, self.degree
        x = self._inputs(x, self.d_in, self.center.device)
        constant, linear, read = self._parts(self._readout(n))
        zero = base.m.new_zeros(1, base.d_mlp)
        z_zero = None if base.Q is None else zero
        gates: list[tuple[Tensor, Tensor | None, float, Tensor]] = []
        for k, readouts in enumerate(read, 2):
            he = base.m.new_zeros(k + 1, base.d_mlp)
            he[k] = 1.0
            gates.append((base.in_powers(he), z_zero, 0.0, readouts[0]))
            if base.Q is not None:
                Q = base.in_powers(he[1:])
                gates.append((-self.z_mean * Q, Q, 0.0, readouts[1]))
        if base.ends is not None:
            gates.append((zero, z_zero, 1.0, base.W_out))
        return base._shares(x, gates, constant, linear)

    def _parts(self, readout: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(constant, linear [d_in, ...], [degree - 1, 1 or 2 branches, d_mlp, ...]) of a readout.

        The last by k = 2 ... degree: of He_k(t), and of a GLU of zeta He_{k - 1}(t).
        """
        base, d_in = self.base, self.d_in
        linear = readout[1 : 1 + d_in] if self.degree else None
        constant = readout[0] if linear is None else readout[0] - self.center @ linear
        rest = readout[1 + d_in * (self.degree > 0) :]
        branches = 1 if base.Q is None else 2
        return constant, linear, rest.reshape(-1, branches, base.d_mlp, *readout.shape[1:])

    def record(self) -> Record:
        """That of the base, and the readouts, each as large as the layer's own."""
        metadata, tensors = self.base.record()
        own = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        # the ridge may be infinite, which JSON does not know
        for name in ("ridge", "held_out"):
            own[name] = torch.tensor(getattr(self, name), dtype=torch.float64)
        return metadata, tensors | own

    @classmethod
    def of_record(
        cls,
        weights: MLPWeights | GLUWeights | None,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        inputs: InputModel | None = None,
    ) -> "JointPolynomial":
        base = Polynomial.of_record(weights, metadata, tensors, inputs)
        shapes: dict[str, tuple[int, ...]] = {"center": (base.d_in,), "z_mean": (base.d_mlp,)}
        for n in range(base.degree + 1):
            shapes[f"D{n}"] = feature_count(base.weights, n), base.d_out
        own = (tensor.to(base.m.device) for tensor in checked(tensors, shapes))
        center, z_mean, *corrections = own
        kept = [tensors[name] for name in ("ridge", "held_out")]  # infinite, or NaN, they may be
        if any(each.dtype != torch.float64 or each.dim() != 1 for each in kept):
            raise ArtifactError("strengths and errors are not float64, one for each degree")
        ridge, held_out = (tuple(map(float, each)) for each in kept)
        if not len(ridge) == len(held_out) == base.degree + 1:
            raise ArtifactError(f"{len(ridge)} strengths and {len(held_out)} errors of degrees")
        return cls(base, center, z_mean, corrections, ridge, held_out)


# What stands beside an MLP: both are over the weights that the model has.
Fitted = Polynomial | JointPolynomial


def features(
    base: Polynomial, center: Tensor, z_mean: Tensor, x: Tensor, n: int
) -> tuple[Tensor, Tensor | None]:
    """[..., features]: 1, x - center, He_2(t), zeta He_1(t), He_3(t), zeta He_2(t), ...

    And [..., d_mlp], what the neurons gain beyond their ends, None where they have none.
    """
    columns, beyond = [torch.ones_like(x[..., :1])], None
    if n:
        columns.append(x - center.to(x.dtype))
    if n > 1 or base.ends is not None:
        tables = base._horner(n).tables
        v, z = base._branches(x)
        beyond = gained(v, tables)
        beyond = beyond if beyond is None or z is None else beyond * z
        v = clamped(v, tables)
        inverse = torch.where(base.s > 1 / torch.finfo(v.dtype).max, 1 / base.s, 0.0)
        t = v * inverse.to(v.dtype)
        he = hermite_polynomials(t, n)
        zeta = None if z is None else z - z_mean.to(z.dtype)
        for k in range(2, n + 1):
            columns.append(he[k])
            if zeta is not None:
                columns.append(zeta * he[k - 1])
    return torch.cat(columns, dim=-1), beyond


def feature_count(layer: MLPWeights | GLUWeights | Polynomial, n: int) -> int:
    """How many features the fit of degree n has."""
    branches = 1 if getattr(layer, "W_gate", None) is None else 2
    return 1 + (layer.d_in if n else 0) + max(n - 1, 0) * branches * layer.d_mlp


def readout(base: Polynomial, center: Tensor, z_mean: Tensor, n: int) -> Tensor:
    """[features, d_out] float64: features(base, center, z_mean, x, n) @ it is base_n(x).

    z_mean must be that of x = center.
    """
    E = base.m.new_zeros(feature_count(base, n), base.d_out)
    W, b, V, _ = base._activated_first()
    W_out, P = base.W_out.double(), base.P[n, : n + 1].clone()
    if V is not None and base.Q is not None:
        P[:n] += z_mean * base.Q[n, :n]
    E[0] += P[0] @ W_out + (0 if base.b_out is None else base.b_out.double())
    if n:
        slope = P[1] * torch.where(base.s > 0, 1 / base.s, 0.0)
        beta = (W.double() * slope) @ W_out
        E[0] += (b - base.m) * slope @ W_out + center @ beta
        E[1 : 1 + base.d_in] += beta
    if n and V is not None and base.Q is not None:
        E[1 : 1 + base.d_in] += (V.double() * base.Q[n, 0]) @ W_out
    gates = [(P[k], None if base.Q is None else base.Q[n, k - 1]) for k in range(2, n + 1)]
    start = 1 + base.d_in
    for factor in (f for pair in gates for f in pair if f is not None):
        E[start : start + base.d_mlp] += factor[:, None] * W_out
        start += base.d_mlp
    return E
