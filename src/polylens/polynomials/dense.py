"""A polynomial in dense coefficient tensors, for optima that have no factored form."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polylens.activations.activation import MAX_DEGREE
from polylens.checks import check_degree, check_features
from polylens.errors import ArtifactError, InvalidInputError
from polylens.files.format import Record
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.model import InputModel
from polylens.inputs.residuals import share_explained
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.base import Approximation
from polylens.polynomials.explained_variance import variance_under
from polylens.polynomials.piece import Piece
from polylens.polynomials.quadratic_form import QuadraticForm
from polylens.polynomials.records import checked

linalg: Any = torch.linalg  # without types


class DensePolynomial(Approximation):
    """f(x) = sum_k T_k(xi, ..., xi), xi = (x - center) whiten, with symmetric tensors T_k.

    xi are the whitened coordinates of the inputs on the support of their covariance. The
    optimum of every degree up to `degree` is stored (under a mixture they are not truncations
    of each other), so `truncate` costs nothing. Coefficients stay in float64; evaluation runs
    in the dtype that the layer has, and moves with `.to`.

    Attributes:
        optima: `optima[n][k]` is T_k [d_out, r, ..., r] of the optimum of degree n.
        center: [d_in]; whiten: [d_in, r].
        explained: [degree + 1] variance that each optimum explains.
        weights: the layer, read out along the fitted output directions.
        inputs: the mixture.
        iterations, residual: of conjugate gradients, or None where the solution was direct.
    """

    kind = "dense polynomial"
    center: Tensor
    whiten: Tensor
    explained: Tensor
    T0_0: Tensor
    T1_0: Tensor
    T1_1: Tensor
    T2_2: Tensor

    def __init__(
        self,
        optima: list[list[Tensor]],
        center: Tensor,
        whiten: Tensor,
        explained: Tensor,
        *,
        weights: Any = None,
        inputs: Any = None,
        iterations: int | None = None,
        residual: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("whiten", whiten.contiguous())
        self.register_buffer("explained", explained)
        for n, tensors in enumerate(optima):
            for k, tensor in enumerate(tensors):
                self.register_buffer(f"T{n}_{k}", tensor.contiguous())
        self._degree = len(optima) - 1
        self.weights, self.inputs = weights, inputs
        self.iterations, self.residual = iterations, residual
        self.dtype = dtype or (torch.float64 if weights is None else weights.dtype)

    @property
    def degree(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._degree

    @property
    def d_in(self) -> int:
        return self.center.shape[0]

    @property
    def d_out(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.T0_0.shape[0]

    @property
    def optima(self) -> list[list[Tensor]]:
        return [[getattr(self, f"T{n}_{k}") for k in range(n + 1)] for n in range(self._degree + 1)]

    def extra_repr(self) -> str:
        rank = self.whiten.shape[1]
        return f"degree={self.degree}, d_in={self.d_in}, rank={rank}, d_out={self.d_out}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DensePolynomial":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        moved = self.center
        if moved.is_floating_point() and moved.dtype != torch.float64:
            self.dtype = moved.dtype
        for name, tensor in kept.items():
            self._buffers[name] = None if tensor is None else tensor.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], the optimum of the highest fitted degree."""
        return self._evaluate(x, self.degree)

    def all_degrees(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [degree + 1, ..., d_out]: the optimum of every degree at once."""
        return torch.stack([self._evaluate(x, n) for n in range(self.degree + 1)])

    def _evaluate(self, x: Tensor, n: int) -> Tensor:
        check_features(x, self.d_in, None, self.center.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        flat = x.reshape(-1, self.d_in).to(dtype)
        xi = (flat - self.center.to(dtype)) @ self.whiten.to(dtype)
        tensors = [getattr(self, f"T{n}_{k}").to(dtype) for k in range(n + 1)]
        value = tensors[0].expand(len(xi), -1)
        rank = xi.shape[1]
        for k, tensor in enumerate(tensors[1:] if rank and len(xi) else [], 1):
            term = xi @ tensor.movedim(-1, 0).reshape(rank, -1)
            for _ in range(k - 1):
                term = torch.einsum("br,bar->ba", xi, term.reshape(len(xi), -1, rank))
            value = value + term
        return value.to(x.dtype).reshape(*x.shape[:-1], self.d_out)

    def truncate(self, degree: int) -> "DensePolynomial":
        """The optimum of a lower degree, as fitted; the tensors are shared."""
        check_degree(degree, self.degree, "fit")
        lower = DensePolynomial(
            self.optima[: degree + 1],
            self.center,
            self.whiten,
            self.explained[: degree + 1],
            weights=self.weights,
            inputs=self.inputs,
            iterations=self.iterations if degree == self.degree else None,
            residual=self.residual if degree == self.degree else None,
            dtype=self.dtype,
        )
        lower._take_figures(self, degree)
        return lower

    def linear(self) -> tuple[Tensor, Tensor]:
        """(beta [d_in, d_out], alpha [d_out]) in float64; degree 1 is x beta + alpha."""
        self._require_degree(1, "linear()")
        beta = self.whiten @ self.T1_1.T
        return beta, self.T1_0 - self.center @ beta

    def quadratic_form(self, u: Tensor) -> QuadraticForm:
        """Gamma_u of the degree 2 optimum along u [d_out], in eigenvectors (rank r).

        Raises:
            InvalidInputError: u of another size or not finite, fitted degree below 2.
        """
        self._require_degree(2, "quadratic_form(u)")
        u = self._direction(u, self.center.device)
        values, vectors = linalg.eigh(
            torch.tensordot(u, self.T2_2, dims=1)  # pyright: ignore[reportUnknownMemberType]
        )
        return QuadraticForm(self.whiten @ vectors, values, None, None)

    def piece(self, x: Tensor, u: Tensor) -> Piece:
        x, device = self._one_input(x, self.d_in, self.center.device), self.center.device
        u = self._direction(u, device)
        if self.degree > 2:
            raise InvalidInputError(
                f"a {self.kind} of degree {self.degree} is not one of neurons; truncate(2) is"
            )
        values, vectors = self.center.new_zeros(0), self.whiten[:, :0]
        if self.degree == 2:
            form = self.quadratic_form(u)
            values, vectors = form.p, form.W
        tensors = self.optima[self.degree]
        constant = float(tensors[0] @ u)
        linear = self.whiten @ (tensors[1].T @ u) if self.degree else None
        if linear is not None:
            constant -= float(self.center @ linear)
        zero = torch.zeros_like(values)
        P, shift = torch.stack([zero, zero, values]), -(self.center @ vectors)
        beyond = torch.zeros_like(values, dtype=torch.bool)
        return Piece(self.degree, constant, linear, vectors, shift, P, None, None, None, beyond)

    def optimum_r2(self, gaussian: Gaussian) -> Tensor:
        return self.r2_under([(1.0, gaussian)])

    def r2_under(self, components: list[tuple[float, Gaussian]]) -> Tensor:
        assert self.weights is not None
        total = variance_under(self.weights, components)
        mean_square = float(self.T0_0.square().sum())
        return share_explained(total - self.explained, total, mean_square)

    def record(self) -> Record:
        """The tensors of every optimum, and where xi is zero."""
        metadata = {
            "degree": self.degree,
            "iterations": self.iterations,
            "residual": self.residual,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return metadata, dict(self.named_buffers())

    @classmethod
    def of_record(
        cls,
        weights: MLPWeights | GLUWeights | None,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        inputs: InputModel | None = None,
    ) -> "DensePolynomial":
        n, dtype = metadata["degree"], getattr(torch, metadata["dtype"])
        if type(n) is not int or not 0 <= n <= MAX_DEGREE or not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"the degree is {n!r}, the dtype {dtype!r}")
        (d_out,), (d_in, rank) = tensors["T0_0"].shape, tensors["whiten"].shape
        if weights is not None and (weights.d_in, weights.d_out) != (d_in, d_out):
            raise ArtifactError(f"it is [{d_in}] -> [{d_out}], the layer is not")
        shapes: dict[str, tuple[int, ...]] = {
            "center": (d_in,),
            "whiten": (d_in, rank),
            "explained": (n + 1,),
        }
        names = [[f"T{degree}_{k}" for k in range(degree + 1)] for degree in range(n + 1)]
        shapes |= {name: (d_out, *[rank] * k) for each in names for k, name in enumerate(each)}
        center, whiten, explained, *_ = checked(tensors, shapes)
        return cls(
            [[tensors[name] for name in each] for each in names],
            center,
            whiten,
            explained,
            weights=weights,
            inputs=inputs,
            iterations=metadata["iterations"],
            residual=metadata["residual"],
            dtype=dtype,
        )
