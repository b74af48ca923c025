"""A polynomial in factored form: a small polynomial per neuron between two weight matrices."""

# Matrices and tables of coefficients are upper case.
# pyright: reportConstantRedefinition=false

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylens.activations.activation import MAX_DEGREE
from polylens.activations.hermite import hermite_to_monomial
from polylens.checks import check_at_least, check_degree, check_features, real_numbers
from polylens.devices import require_room
from polylens.errors import ArtifactError, InvalidInputError
from polylens.files.format import Record
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.model import InputModel
from polylens.normal_forms.fetched import Source, fetched, is_fetched, resident
from polylens.normal_forms.weights import ROLES, GLUWeights, MLPWeights, Sized
from polylens.polynomials.base import Approximation, kept
from polylens.polynomials.ends import Ends
from polylens.polynomials.evaluation import Rows, evaluate
from polylens.polynomials.explained_variance import Coefficients, explained_variance, r2_under
from polylens.polynomials.fused import evaluate_fused
from polylens.polynomials.monomials import expanded_about, outer_powers
from polylens.polynomials.piece import Piece, product
from polylens.polynomials.quadratic_form import QuadraticForm
from polylens.polynomials.records import checked, packed, unpacked
from polylens.polynomials.shares import Shares, Term

# Share of the largest number of a dtype that coefficients may have: Horner's rule multiplies.
HEADROOM = 1e-4
_COEFFICIENTS = ("m", "s", "P", "Q", "E", "optimum_P", "optimum_Q", "seen")


class _Horner(NamedTuple):
    """What evaluation reads, in its dtype: v = x W + shift = y - mean.

    `stacked` [rows, d_mlp] has the rows of the tables and, last, the mean.
    """

    shift: Tensor
    mean: Tensor
    tables: dict[str, Rows]
    stacked: Tensor


class Polynomial(Sized, Approximation):  # pyright: ignore[reportIncompatibleVariableOverride]
    """h_i = P_i(t_i) + z_i Q_i(t_i) per neuron, f(x) = h W_out + b_out.

    t = (y - m) / s standardises the activated preactivation y; z is a GLU's linear branch and
    Q is None for an MLP. The fit of every degree up to `degree` is stored, so `truncate`
    costs nothing. The weights are those that it was made over: `fit` gives it a copy, in a lens
    they are the model's own. A torch module like any other: any batch axes, autograd, `.to`,
    state_dict; coefficients stay in float64, evaluation runs in the weights' dtype (elementwise
    part in float32 for half precision).

    With ends it holds two objects for every degree. The *replacement* is what it evaluates: where
    a neuron's y lies beyond an end, its activation's asymptote goes on in place of the polynomial
    (`with_ends`), so around every input it is another polynomial (`piece`, `shares`). The
    *optimum* is one polynomial everywhere, the one that explains most of the layer under the
    inputs: `optimum(k)`, and what is said about the layer as a whole (`linear`, `quadratic_form`,
    `to_dense`, `part`, `r2`) is about it. Without ends they are the same.

    Attributes:
        m, s: [d_mlp] mean and standard deviation of the preactivation, float64.
        P: [degree + 1, degree + 1, d_mlp]; P[n, k] multiplies He_k(t) in the fit of degree n.
        Q: [degree + 1, degree, d_mlp], the same for the factor of z, or None.
        E: [degree + 1, 2, d_mlp] lowest and highest y, float64, where the fit of each degree
            ends; None where it is a polynomial everywhere.
        optimum_P, optimum_Q: as P and Q, of the optima; None where P and Q are theirs.
        seen: [2, d_mlp] lowest and highest y over the inputs of the fit, or None.
        asymptotes: whether what the activation gains beyond the ends is added.
        inputs: the input model that it was fitted to; None where there is none.
        ridge: relative ridge that a fit to collinear samples needed, else 0.
    """

    kind = "polynomial"
    W_in: Tensor
    W_out: Tensor
    W_gate: Tensor | None
    b_gate: Tensor | None
    b_in: Tensor | None
    b_out: Tensor | None
    m: Tensor
    s: Tensor
    P: Tensor
    Q: Tensor | None
    E: Tensor | None
    optimum_P: Tensor | None
    optimum_Q: Tensor | None
    seen: Tensor | None

    def __new__(cls, weights: Any = None, *_args: Any, **_kwargs: Any) -> "Polynomial":
        elsewhere = cls is Polynomial and is_fetched(weights)
        return object.__new__(_Elsewhere if elsewhere else cls)

    def __init__(  # pyright: ignore[reportInconsistentConstructor]
        self,
        weights: MLPWeights | GLUWeights,
        m: Tensor,
        s: Tensor,
        P: Tensor,
        Q: Tensor | None,
        E: Tensor | None = None,
        inputs: Any = None,
        ridge: float = 0.0,
        asymptotes: bool = True,
    ) -> None:
        super().__init__()
        self.weights_type = type(weights)
        self.act = weights.act
        self.inputs, self.ridge, self.asymptotes = inputs, ridge, asymptotes
        self.has_optimum = True
        tensors = self._held_of(weights)
        given = dict(zip(_COEFFICIENTS, (m, s, P, Q, E), strict=False))
        for name in _COEFFICIENTS:
            tensor = given.get(name)
            tensors[name] = None if tensor is None else tensor.contiguous()
        self._hold(tensors)
        self._horner_cache: dict[tuple[int, torch.dtype], _Horner] = {}

    @property
    def degree(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.P.shape[0] - 1

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.W_in.dtype

    @property
    def device(self) -> torch.device:
        return self.m.device

    @property
    def ends(self) -> Tensor | None:
        """[2, d_mlp] lowest and highest y where what is evaluated ends; None without ends."""
        return None if self.E is None else self.E[-1]

    @property
    def weights(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> MLPWeights | GLUWeights:
        """The layer that this approximates."""
        roles = {name: getattr(self, name) for name in ROLES}
        if self.weights_type is MLPWeights:
            del roles["W_gate"], roles["b_gate"]
        return self.weights_type.trusted(self.act, **roles)

    def optimum_r2(self, gaussian: Gaussian) -> Tensor:
        return explained_variance(self.weights, gaussian, self.degree).r2

    def outside(self, y: Tensor) -> Tensor:
        """[degree + 1, ...] share of the neurons of preactivations y [..., d_mlp] beyond ends."""
        if self.E is None:
            return y.new_zeros(self.degree + 1, *y.shape[:-1], dtype=torch.float64)
        return torch.stack([((y < low) | (y > high)).double().mean(-1) for low, high in self.E])

    def r2_under(self, components: list[tuple[float, Gaussian]]) -> Tensor:
        return r2_under(self.weights, components, Coefficients(self.m, self.s, self.P, self.Q))

    def record(self) -> Record:
        """m, s and the coefficients that are not zero by definition, in float64.

        They are (degree + 1)(degree + 2) / 2 + degree (degree + 1) / 2 + 2 numbers for a neuron of
        a GLU; with ends twice as many, and 2 (degree + 2) more.
        """
        metadata = {"degree": self.degree, "ridge": self.ridge, "asymptotes": self.asymptotes}
        metadata["optimum"] = self.has_optimum
        tensors = {"m": self.m, "s": self.s, "P": packed(self.P, 1)}
        for name, table, extra in (
            ("Q", self.Q, 0),
            ("optimum.P", self.optimum_P, 1),
            ("optimum.Q", self.optimum_Q, 0),
        ):
            tensors |= {} if table is None else {name: packed(table, extra)}
        own = {"ends": self.E, "seen": self.seen}
        return metadata, tensors | {name: t for name, t in own.items() if t is not None}

    @classmethod
    def of_record(
        cls,
        weights: MLPWeights | GLUWeights | None,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        inputs: InputModel | None = None,
    ) -> "Polynomial":
        if weights is None:
            raise ArtifactError("the layer is missing")
        d, glu = weights.d_mlp, isinstance(weights, GLUWeights)
        n = metadata.get("degree", len(tensors["P"]) - 1)
        if type(n) is not int or not 0 <= n <= MAX_DEGREE:
            raise ArtifactError(f"the degree is {n!r}")
        own = {"m": tensors["m"], "s": tensors["s"]}
        shapes: dict[str, tuple[int, ...]] = {"m": (d,), "s": (d,)}
        for prefix in ("", "optimum."):
            for name, extra in (("P", 1), ("Q", 0)) if glu else (("P", 1),):
                if prefix + name in tensors or not prefix:
                    own[prefix + name] = unpacked(tensors[prefix + name], n, extra)
                    shapes[prefix + name] = (n + 1, n + extra, d)
        found = checked(own, shapes)
        held = {name: t.to(weights.device) for name, t in zip(shapes, found, strict=True)}
        if (held["s"] < 0).any():
            raise ArtifactError("s has negative entries")
        ridge, asymptotes = metadata["ridge"], metadata.get("asymptotes", False)
        if not isinstance(ridge, (int, float)) or not isinstance(asymptotes, bool):
            raise ArtifactError(f"ridge={ridge!r} or asymptotes={asymptotes!r} cannot be")
        m, s, P, Q = (held.get(name) for name in ("m", "s", "P", "Q"))
        assert m is not None and s is not None and P is not None  # noqa: PT018
        poly = cls(weights, m, s, P, Q, None, inputs, ridge, asymptotes)
        ends = tensors.get("ends", tensors.get("y_range"))  # the latter in files of 0.1
        if ends is None:
            return poly
        poly = poly.with_ends(ends, asymptotes)
        optima = {f"optimum_{name}": held.get(f"optimum.{name}") for name in ("P", "Q")}
        poly._hold(optima | {"seen": poly.in_order(tensors["seen"]) if "seen" in tensors else None})
        # Of files before there were optima: ends without asymptotes lay at what was seen, so that
        # the coefficients are the optimum's.
        poly.has_optimum = metadata.get("optimum", not asymptotes) is True
        return poly

    def extra_repr(self) -> str:
        kind = "mlp" if self.Q is None else "glu"
        sizes = (
            f"degree={self.degree}, {kind}, d_in={self.d_in}, d_mlp={self.d_mlp}, "
            f"d_out={self.d_out}, act={self.act.name!r}"
        )
        return sizes + self.how_good()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Polynomial":
        kept = {name: getattr(self, name) for name in _COEFFICIENTS}
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        for name, tensor in kept.items():
            setattr(self, name, None if tensor is None else tensor.to(self.W_in.device))
        self._horner_cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], the fit of the highest degree, with its ends."""
        v, z = self._branches(x)
        return self._project(self._neurons(v, z, self.degree, reuse=True))

    def all_degrees(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [degree + 1, ..., d_out]: what `truncate(k)` is, for every k at once."""
        v, z = self._branches(x)
        return torch.stack(
            [self._project(self._neurons(v, z, k, reuse=False)) for k in range(self.degree + 1)]
        )

    def own_weights(self) -> "Polynomial":
        """Itself, from now on with a copy of the weights, which nobody else writes to."""
        with kept():
            for name in ROLES:
                tensor = self._buffers[name]
                self._buffers[name] = None if tensor is None else tensor.clone()
        return self

    def _forget(self) -> None:
        super()._forget()
        self._horner_cache = {}

    def over(self, weights: MLPWeights | GLUWeights) -> "Polynomial":
        """The same coefficients over the same weights, wherever and in whatever dtype they are."""
        own = {name: getattr(self, name) for name in _COEFFICIENTS}
        moved = {n: None if t is None else t.to(weights.device) for n, t in own.items()}
        first = (moved.pop(name) for name in ("m", "s", "P", "Q", "E"))
        poly = Polynomial(weights, *first, self.inputs, self.ridge, self.asymptotes)  # type: ignore
        poly._hold(moved)
        poly.has_optimum = self.has_optimum
        poly._take_figures(self)
        return poly

    def optimum(self, degree: int | None = None) -> "Polynomial":
        """The one polynomial of this degree, without ends, that explains most under the inputs.

        Among those of its form, neuron by neuron; under a Gaussian among all of its degree.

        Args:
            degree: 0 ... self.degree (default).

        Raises:
            InvalidInputError: a degree that there is not; a fit with ends from a file of an earlier
                version, which kept none.
        """
        if not self.has_optimum:
            raise InvalidInputError(
                "this file is of a version that kept only what replaces the layer, whose "
                "coefficients hold between ends and are no statement about the layer as a whole; "
                "fit again with attach(model, tokens)"
            )
        own = self
        if self.E is not None or self.optimum_P is not None:
            stored = self.optimum_P is not None
            P, Q = (self.optimum_P, self.optimum_Q) if stored else (self.P, self.Q)
            own = self._like(P=P, Q=Q, E=None, optimum_P=None, optimum_Q=None)
            own._r2 = self._r2
        return own if degree is None else own.truncate(degree)

    def with_replacement(self, P: Tensor, Q: Tensor | None) -> "Polynomial":
        """With these tables for between ends, which it needs then; its own are of the optimum."""
        return self._like(P=P, Q=Q, optimum_P=self.P, optimum_Q=self.Q)

    def with_ends(self, ends: Tensor, asymptotes: bool = True) -> "Polynomial":
        """The same polynomial, which ends where y leaves this range.

        Far outside what it was fitted to a polynomial grows without bound, while the activation
        does not: one such neuron can decide what a replaced layer writes. Beyond the range it
        is P_i(c) + z Q_i(c) + z (A(y) - A(c)), of an MLP without the z, where c is the end and A
        the polynomial that the activation approaches on that side: nothing is gained below SiLU,
        y - c above it. The fit of every degree, that of 0 included, goes on in this way, and the
        optima stay what they are.

        Args:
            ends: [2, d_mlp] lowest and highest y of each neuron, infinite for no end; of each
                degree [degree + 1, 2, d_mlp].
            asymptotes: False for the value at the end everywhere beyond it.

        Raises:
            InvalidInputError: of another shape, NaN, or lowest above highest.
        """
        E = self.in_order(ends)
        if E.dim() == 2:
            E = E.expand(self.degree + 1, -1, -1)
        if len(E) != self.degree + 1:
            raise InvalidInputError(
                f"ends of {len(E)} degrees were given, the polynomial has {self.degree + 1}"
            )
        return self._like(E=E.contiguous(), asymptotes=asymptotes)

    def having_seen(self, y: Tensor | None) -> "Polynomial":
        """With `seen`, lowest and highest y [2, d_mlp] over the inputs of the fit."""
        return self._like(seen=y)

    def in_order(self, ends: Tensor) -> Tensor:
        """In float64, if they are lowest and highest y; InvalidInputError if they cannot be."""
        if ends is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise InvalidInputError(
                f"ends must be a tensor [2, {self.d_mlp}], got None; optimum() has none"
            )
        ends = real_numbers("ends", ends).to(self.m)
        fits = ends.dim() in (2, 3) and ends.shape[-2:] == (2, self.d_mlp)
        if not fits or not (ends[..., 0, :] <= ends[..., 1, :]).all():
            raise InvalidInputError(
                f"ends must be [2, {self.d_mlp}], lowest and highest y of each neuron; got "
                f"{list(ends.shape)}, or a lowest that is not below the highest"
            )
        return ends

    def truncate(self, degree: int) -> "Polynomial":
        """The fit of a lower degree: without ends the optimum, equal to fitting it again.

        With ends it is what replaces the layer at that degree, with ends of its own.

        Raises:
            InvalidInputError: a degree outside 0 ... self.degree.
        """
        n = check_degree(degree, self.degree, "fit")
        own = {name: getattr(self, name) for name in ("P", "Q", "E", "optimum_P", "optimum_Q")}
        for name, table in own.items():
            if table is not None:
                columns = slice(None) if name == "E" else slice(n + ("P" in name))
                own[name] = table[: n + 1, columns]
        lower = self._like(**own)
        lower._take_figures(self, n)
        return lower

    def part(self, degree: int) -> "Polynomial":
        """What this degree adds: optimum of `degree` minus optimum of `degree - 1`.

        The parts of degree 0 ... n sum to the optimum of degree n; part 0 is a constant and
        holds b_out. With ends, they sum to what goes on there as `with_ends` says: beyond an end
        a part has its value at the end, and part 0 what is gained. Under a Gaussian, parts of
        different degree are uncorrelated.
        """
        n = check_degree(degree, self.degree, "fit")
        own = self.optimum()
        E = None if self.E is None else self.E[-1:].expand(n + 1, -1, -1).contiguous()
        if n == 0:
            return own.truncate(0)._like(E=E)
        P = torch.zeros_like(own.P[: n + 1, : n + 1])
        P[n] = own.P[n, : n + 1] - own.P[n - 1, : n + 1]
        Q = None if own.Q is None else torch.zeros_like(own.Q[: n + 1, :n])
        if Q is not None and own.Q is not None:
            Q[n] = own.Q[n, :n] - own.Q[n - 1, :n]
        # no optimum, so it has no R2
        return own._like(P=P, Q=Q, E=E, b_out=None, inputs=None, asymptotes=False)

    def linear(self) -> tuple[Tensor, Tensor]:
        """(beta [d_in, d_out], alpha [d_out]) in float64: the degree 1 optimum is x beta + alpha.

        For an MLP beta = W_in diag(c_1 / s) W_out. Cost: one product d_in x d_mlp x d_out.
        """
        self._require_degree(1, "linear()")
        W, b, V, b_V = self._activated_first()
        shift = b - self.m
        powers, z_powers = self.optimum()._monomials(1)
        gate = powers[1]
        W_out = self.W_out.double()
        beta = (W.double() * gate) @ W_out
        constant = powers[0] + gate * shift
        if V is not None and z_powers is not None:
            beta = beta + (V.double() * z_powers[0]) @ W_out
            constant = constant + z_powers[0] * b_V
        alpha = constant @ W_out
        return beta, alpha if self.b_out is None else alpha + self.b_out.double()

    def quadratic_form(self, u: Tensor) -> QuadraticForm:
        """Gamma_u with x Gamma_u x^T the pure second-order term of the degree 2 optimum along u.

        Gamma_u = W diag(p (W_out u)) W^T + (W diag(q (W_out u)) V^T + transposed) / 2 with W the
        activated and V the linear branch (no second term for an MLP, where p = c_2 / 2 s^2).
        Symmetric, of rank <= d_mlp (2 d_mlp for a GLU), kept in factors.

        Args:
            u: [d_out], an output direction, not normalised here.

        Raises:
            InvalidInputError: u of another size or not finite, fitted degree below 2.
        """
        self._require_degree(2, "quadratic_form(u)")
        u = self._direction(u, self.device)
        W, _, V, _ = self._activated_first()
        powers, z_powers = self.optimum()._monomials(2)
        readout = self.W_out.double() @ u
        if V is None or z_powers is None:
            return QuadraticForm(W, powers[2] * readout, None, None)
        return QuadraticForm(W, powers[2] * readout, V, z_powers[1] * readout)

    def piece(self, x: Tensor, u: Tensor) -> Piece:
        x = self._one_input(x, self.d_in, self.device)
        u = self._direction(u, self.device)
        powers, z_powers = self._monomials(self.degree, self._dtype)
        readout = self.W_out.double() @ u
        constant = 0.0 if self.b_out is None else float(self.b_out.double() @ u)
        P, Q = powers * readout, None if z_powers is None else z_powers * readout
        return self._piece(x, P, Q, readout, constant, None)

    def _piece(
        self,
        x: Tensor,
        P: Tensor,
        Q: Tensor | None,
        gain: Tensor,
        constant: float,
        linear: Tensor | None,
    ) -> Piece:
        """That of neurons P(v) + z Q(v) that are read out already, but for what ends gain."""
        W, b, V, c = self._activated_first()
        shift = b - self.m
        beyond = torch.zeros_like(self.m, dtype=torch.bool)
        if self.ends is not None:
            ends = Ends(self.act, self.ends, self.asymptotes)
            P, Q, beyond = ends.piece(product(x, W) + shift, self.m, P, Q, gain)
        own_c = None if V is None else c
        return Piece(self.degree, constant, linear, W, shift, P, V, own_c, Q, beyond)

    @torch.no_grad()
    def shares(self, x: Tensor) -> Shares:
        x = self._inputs(x, self.d_in, self.device)
        powers, z_powers = self._monomials(self.degree, self._dtype)
        constant = self.m.new_zeros(self.d_out) if self.b_out is None else self.b_out.double()
        gates = [(powers, z_powers, 1.0, self.W_out)]
        return self._shares(x, gates, constant, None)

    def _shares(
        self,
        x: Tensor,
        gates: list[tuple[Tensor, Tensor | None, float, Tensor]],
        constant: Tensor,
        linear: Tensor | None,
    ) -> Shares:
        """Those of neurons (P, Q, gain times what they gain beyond ends, readout)."""
        W, b, V, c = self._activated_first()
        shift, terms = b - self.m, list[Term]()
        ends = None if self.ends is None else Ends(self.act, self.ends, self.asymptotes)
        v = product(x, W) + shift
        for P, Q, gain, readout in gates:
            P, Q = (t if t is None else t[:, None].expand(-1, len(x), -1) for t in (P, Q))
            assert P is not None
            if ends is not None:
                P, Q, _ = ends.piece(v, self.m, P, Q, gain)
            terms.append(Term(P, Q, readout))
        return Shares.of(x, W, shift, V, c, terms, constant, linear)

    def to_dense(self, max_bytes: int = 1 << 30) -> list[Tensor]:
        """Symmetric coefficient tensors T_k [d_out, d_in, ..., d_in] in float64, k = 0 ... degree.

        The optimum is f(x) = sum_k T_k(x, ..., x). Only for small layers: sizes grow as
        d_out d_in^k.

        Raises:
            InvalidInputError: the tensors would take more than max_bytes.
            OutOfMemory: they, and what is held to make them, are more than is free.
        """
        check_at_least("max_bytes", max_bytes, 0)
        needed = 8 * sum(self.d_out * self.d_in**k for k in range(self.degree + 1))
        if needed > max_bytes:
            raise InvalidInputError(
                f"dense tensors of degree {self.degree} for d_in={self.d_in}, d_out={self.d_out} "
                f"take {needed:,} bytes, more than max_bytes={max_bytes:,}; truncate, use "
                "quadratic_form(u) for one output direction, or raise max_bytes"
            )
        held = needed + 3 * 8 * self.d_out * self.d_in**self.degree
        what = f"dense tensors of degree {self.degree} and what is held to make them"
        require_room(held, self.W_out.device, what, "truncate, or use quadratic_form(u)")
        gate, b, V, b_V = self._activated_first()
        W = gate.double()
        powers, z_powers = self.optimum()._monomials(self.degree)
        raw = expanded_about(powers, b - self.m)
        raw_z = None if z_powers is None else expanded_about(z_powers, b - self.m)
        if raw_z is not None:
            raw[: len(raw_z)] += raw_z * b_V
        tensors: list[Tensor] = []
        for k in range(self.degree + 1):
            tensor = outer_powers(self.W_out.double() * raw[k, :, None], [W] * k)
            if k and raw_z is not None and V is not None and k <= len(raw_z):
                factor = self.W_out.double() * raw_z[k - 1, :, None]
                for position in range(k):
                    columns = [W] * k
                    columns[position] = V.double()
                    tensor = tensor + outer_powers(factor, columns) / k
            tensors.append(tensor)
        if self.b_out is not None:
            tensors[0] = tensors[0] + self.b_out.double()
        return tensors

    def _held_of(self, weights: MLPWeights | GLUWeights) -> dict[str, Tensor | None]:
        """The buffers that weights become."""
        roles = {name: getattr(weights, name, None) for name in ROLES}
        return {name: None if t is None else t.detach() for name, t in roles.items()}

    def _like(self, **changes: Any) -> "Polynomial":
        """The same with other attributes; tensors are shared, weights not checked again."""
        poly = Polynomial.__new__(type(self))
        nn.Module.__init__(poly)
        for name in ("weights_type", "act", "inputs", "ridge", "asymptotes", "has_optimum"):
            setattr(poly, name, changes.get(name, getattr(self, name)))
        poly._hold(self._buffers | {n: t for n, t in changes.items() if n in self._buffers})
        poly._horner_cache = {}
        return poly

    def _hold(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Have these buffers; what is None comes last, for torch.export counts without it."""
        # without register_buffer, whose checks of names take as long as a small fit
        self._buffers.update({name: t for name, t in tensors.items() if t is not None})
        self._buffers.update({name: None for name, t in tensors.items() if t is None})

    def _activated_first(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(W, b) of the activated branch, (V, b_V) of the linear one; missing biases are zero."""
        zero = torch.zeros_like(self.m)
        b_in = zero if self.b_in is None else self.b_in.double()
        if self.W_gate is None:
            return self.W_in, b_in, None, zero
        b_gate = zero if self.b_gate is None else self.b_gate.double()
        return self.W_gate, b_gate, self.W_in, b_in

    def _monomials(
        self, degree: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients of v^j, v = y - m, in P and Q of the optimum of this degree.

        They have 1 / s^j. A neuron whose preactivation varies so little that they are beyond the
        dtype has those of the highest degree of which they are not: it is nearly a constant, and
        what further degrees add is about s of it.
        """
        limit = torch.finfo(dtype).max * HEADROOM
        powers, z_powers = self._raw_monomials(0)
        for k in range(1, degree + 1):
            own, z_own = self._raw_monomials(k)
            fits = own.abs() <= limit
            if z_own is not None:
                fits = torch.cat([fits, z_own.abs() <= limit])
            fits = fits.all(0) | self.P[k].isnan().any(0)  # which is to be seen
            powers = torch.where(fits, own, F.pad(powers, (0, 0, 0, 1)))
            if z_own is not None and z_powers is not None:
                z_powers = torch.where(fits, z_own, F.pad(z_powers, (0, 0, 0, 1)))
        return powers, z_powers

    def _raw_monomials(self, degree: int) -> tuple[Tensor, Tensor | None]:
        powers = self.in_powers(self.P[degree, : degree + 1])
        return powers, None if self.Q is None else self.in_powers(self.Q[degree, :degree])

    def in_powers(self, coefficients: Tensor) -> Tensor:
        """Coefficients of v^j, v = y - m, where these [k, d_mlp] are of He_k(t)."""
        degree, device = len(coefficients), self.s.device
        inverse = torch.where(self.s > 0, 1 / self.s, 0.0)
        scale = inverse ** torch.arange(degree, device=device)[:, None]
        basis = hermite_to_monomial(max(degree - 1, 0))[:degree]
        table = torch.tensor(basis, dtype=torch.float64, device=device).reshape(degree, degree)
        return torch.einsum("kj,kh->jh", table, coefficients) * scale

    @property
    def _dtype(self) -> torch.dtype:
        """That of the elementwise part of evaluation."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if half else self.dtype

    def _horner(self, degree: int) -> _Horner:
        dtype = self._dtype
        key = (degree, dtype)
        if key in self._horner_cache:
            return self._horner_cache[key]
        if torch.compiler.is_compiling():  # then they are no tensors that outlast it
            return self._computed_horner(degree, dtype)
        with kept():
            self._horner_cache[key] = self._computed_horner(degree, dtype)
        return self._horner_cache[key]

    def _computed_horner(self, degree: int, dtype: torch.dtype) -> _Horner:
        powers, z_powers = self._monomials(degree, dtype)
        shift = self._activated_first()[1] - self.m
        tables: dict[str, Rows] = {"P": powers.to(dtype).unbind()}
        if z_powers is not None:
            tables["Q"] = z_powers.to(dtype).unbind()
        if self.E is not None:
            tables.update(Ends(self.act, self.E[degree], self.asymptotes).tables(self.m, dtype))
        stacked = torch.stack(
            [*(row for rows in tables.values() for row in rows), self.m.to(dtype)]
        )
        each = iter(stacked.unbind())
        tables = {name: tuple(next(each) for _ in rows) for name, rows in tables.items()}
        return _Horner(shift.to(dtype), next(each), tables, stacked)

    def evaluation_tables(self) -> dict[str, Tensor]:
        """What `polylens.polynomials.evaluation.PerNeuron` consists of, in new memory."""
        own = self._horner(self.degree)
        stacked = {name: torch.stack(rows) for name, rows in own.tables.items() if rows}
        return {"mean": own.mean.clone()} | stacked

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """v = y - m and the linear branch z, in the dtype of evaluation."""
        self.require_input(x)
        shift = self._horner(self.degree).shift
        if self.W_gate is None:
            return _affine(x, self.W_in, shift), None
        return _affine(x, self.W_gate, shift), _affine(x, self.W_in, self.b_in)

    def require_input(self, x: Tensor) -> None:
        """InvalidInputError for what cannot be evaluated."""
        remedy = "; cast x, or the polynomial with .to"
        check_features(x, self.d_in, self.dtype, self.device, remedy=remedy)

    def neurons(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """h of preactivations that somebody has computed already; f(x) = h W_out + b_out.

        Args:
            y: [..., d_mlp], activated: x W_in + b_in, of a GLU x W_gate + b_gate.
            z: [..., d_mlp], linear branch of a GLU: x W_in + b_in.

        Returns:
            [..., d_mlp] in y's dtype. Cost: degree + 1 elementwise passes, of a GLU twice that.

        Raises:
            InvalidInputError: other shapes, or z that is missing or superfluous.
        """
        needed = {"y": y} if self.Q is None else {"y": y, "z": z}
        remedy = "; the neurons of a GLU need y and z, those of an MLP y"
        for name, given in needed.items():
            own = check_features(given, self.d_mlp, None, self.device, name=name, remedy=remedy)
            if own.shape != y.shape:
                raise InvalidInputError(
                    f"{name} must be [..., {self.d_mlp}], as many as y; got {tuple(own.shape)}"
                )
        if self.Q is None and z is not None:
            raise InvalidInputError("an MLP has no linear branch z; give y only")
        mean = self._horner(self.degree).mean
        return self._neurons(y, z, self.degree, reuse=False, mean=mean).contiguous()

    def _neurons(
        self, v: Tensor, z: Tensor | None, degree: int, reuse: bool, mean: Tensor | None = None
    ) -> Tensor:
        """P(v) + z Q(v), of v - mean where there is one; overwrites v if `reuse` and autograd
        does not need it."""
        own = self._horner(degree)
        fused = evaluate_fused(own.tables, own.stacked, v, z, mean is not None, reuse)
        return evaluate(own.tables, v, z, mean, reuse) if fused is None else fused

    def _project(self, h: Tensor) -> Tensor:
        return _affine(h.to(self.dtype), self.W_out, self.b_out)


class _Elsewhere(Polynomial):
    """One over weights that are fetched whenever they are read; the same in all else."""

    source: Source
    W_in = fetched("W_in")
    W_out = fetched("W_out")
    W_gate = fetched("W_gate")
    b_gate = fetched("b_gate")
    b_in = fetched("b_in")
    b_out = fetched("b_out")

    def _held_of(self, weights: Any) -> dict[str, Tensor | None]:
        self.source = weights.source
        return {}

    @property
    def weights(self) -> MLPWeights | GLUWeights:
        return self.weights_type(self.act, self.source)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def d_in(self) -> int:
        return self.source.like["W_in"].shape[0]

    @property
    def d_mlp(self) -> int:
        return self.source.like["W_in"].shape[1]

    @property
    def d_out(self) -> int:
        return self.source.like["W_out"].shape[1]

    def own_weights(self) -> Polynomial:
        """In memory, from now on with a copy of the weights."""
        return self.over(resident(self.weights))

    def _like(self, **changes: Any) -> Polynomial:
        if changes.keys() & set(ROLES):
            return self.own_weights()._like(**changes)
        poly = super()._like(**changes)
        assert isinstance(poly, _Elsewhere)
        poly.source = self.source
        return poly

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Polynomial:
        raise InvalidInputError(
            "the weights under this polynomial are offloaded, or quantised, and are read where the "
            "model keeps them; own_weights() has them in memory, and can be moved"
        )


def _affine(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x @ W + b; the sum is taken in the wider dtype of the two."""
    if b is None:
        return x @ W
    if b.dtype == W.dtype:
        return torch.addmm(b, x.reshape(-1, x.shape[-1]), W).reshape(*x.shape[:-1], W.shape[1])
    return x @ W + b
