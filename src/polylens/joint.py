"""One least-squares problem per layer, over the span of all neurons' features."""

from typing import Any

import torch
from torch import Tensor

from polylens import storage
from polylens.approximation import Approximation
from polylens.errors import InvalidInputError
from polylens.hermite import hermite_polynomials
from polylens.neuron_gram import fit_samples
from polylens.polynomial import Polynomial
from polylens.quadratic import QuadraticForm
from polylens.quality import r2
from polylens.records import Record
from polylens.samples import Samples
from polylens.selection import check_degree
from polylens.weights import GLUWeights, MLPWeights

# Ridge strengths tried, in units of a feature's mean square; infinity keeps the per-neuron fit.
STRENGTHS = (float("inf"), 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
# Of every batch, the last fifth of the rows is held out to choose the strength.
HELD_OUT = 0.2
MAX_GRAM_BYTES = 1 << 33
ROWS = 2048


class JointPolynomial(Approximation):
    """f_n(x) = base_n(x) + Phi_n(x) D_n: a factored polynomial and a correction by all neurons.

    Phi_n holds 1, x, and for k = 2 ... n every neuron's He_k(t) and, for a GLU,
    zeta He_{k-1}(t) with zeta = z - E[z]; D_n [features, d_out] reads every feature out into
    every direction, so degree n costs about n times the layer's own products.

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
        for n, correction in enumerate(corrections):
            self.register_buffer(f"D{n}", correction.contiguous())

    @property
    def degree(self) -> int:
        return self.base.degree

    @property
    def inputs(self) -> Any:
        return self.base.inputs

    @property
    def weights(self) -> MLPWeights | GLUWeights:
        return self.base.weights

    @property
    def d_in(self) -> int:
        return self.base.d_in

    @property
    def d_out(self) -> int:
        return self.base.d_out

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], the fit of the highest degree."""
        return self._evaluate(x, self.degree)

    def all_degrees(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [degree + 1, ..., d_out]: the fit of every degree."""
        return torch.stack([self._evaluate(x, n) for n in range(self.degree + 1)])

    def _evaluate(self, x: Tensor, n: int) -> Tensor:
        phi = features(self.base, self.center, self.z_mean, x, n)
        return self.base.truncate(n)(x) + (phi @ getattr(self, f"D{n}").to(phi.dtype)).to(x.dtype)

    def truncate(self, degree: int) -> "JointPolynomial":
        """The fit of a lower degree; the tensors are shared."""
        degree = check_degree(degree, self.degree, "fit")
        corrections = [getattr(self, f"D{n}") for n in range(degree + 1)]
        lower = JointPolynomial(
            self.base.truncate(degree),
            self.center,
            self.z_mean,
            corrections,
            self.ridge[: degree + 1],
            self.held_out[: degree + 1],
        )
        lower._r2 = None if self._r2 is None else self._r2[: degree + 1]
        return lower

    def linear(self) -> tuple[Tensor, Tensor]:
        """(beta [d_in, d_out], alpha [d_out]) in float64: the degree 1 fit is x beta + alpha."""
        beta, alpha = self.base.linear()
        correction = self.D1.double()
        return beta + correction[1:], alpha + correction[0] - self.center.double() @ correction[1:]

    def quadratic_form(self, u: Tensor) -> QuadraticForm:
        """Gamma_u with x Gamma_u x^T the second-order term of the degree 2 fit along u [d_out]."""
        base = self.base.truncate(min(2, self.degree)).quadratic_form(u)
        readout = self.D2.double() @ torch.as_tensor(u).to(self.D2).double()
        inverse = torch.where(self.base.s > 0, 1 / self.base.s, 0.0)
        start, h = 1 + self.d_in, self.base.d_mlp
        p = base.p + readout[start : start + h] * inverse**2
        q = None if base.q is None else base.q + readout[start + h :] * inverse
        return QuadraticForm(base.W, p, base.V, q)

    def _measure_r2(self) -> Tensor:
        return r2(self)

    def _record(self) -> Record:
        metadata, tensors = self.base._record()
        own = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        # the ridge may be infinite, which JSON does not know
        own["ridge"], own["held_out"] = (
            torch.tensor(v, dtype=torch.float64) for v in (self.ridge, self.held_out)
        )
        return metadata, storage.prefixed(tensors, "base.") | own

    @classmethod
    def _of(cls, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> "JointPolynomial":
        base = Polynomial._of(metadata, storage.within(tensors, "base."))
        corrections = [tensors[f"D{n}"] for n in range(base.degree + 1)]
        ridge, held_out = (tuple(tensors[name].tolist()) for name in ("ridge", "held_out"))
        return cls(base, tensors["center"], tensors["z_mean"], corrections, ridge, held_out)


def features(base: Polynomial, center: Tensor, z_mean: Tensor, x: Tensor, n: int) -> Tensor:
    """[..., features]: 1, x - center, He_2(t), zeta He_1(t), He_3(t), zeta He_2(t), ..."""
    columns = [torch.ones_like(x[..., :1])]
    if n:
        columns.append(x - center.to(x.dtype))
    if n > 1:
        v, z = base._branches(x)
        t = v * torch.where(base.s > 0, 1 / base.s, 0.0).to(v.dtype)
        he = hermite_polynomials(t, n)
        zeta = None if z is None else z - z_mean.to(z.dtype)
        for k in range(2, n + 1):
            columns.append(he[k])
            if zeta is not None:
                columns.append(zeta * he[k - 1])
    return torch.cat(columns, dim=-1)


@torch.no_grad()
def fit_joint(weights: MLPWeights | GLUWeights, samples: Samples, degree: int) -> JointPolynomial:
    """Joint least squares over all neurons' features, with a ridge towards the per-neuron fit.

    For every degree minimises the mean of |f - base_n - Phi_n D|^2 + strength |D|^2 (features at
    unit mean square); the strength is the one of least error on the last fifth of each batch,
    and D is then solved from all samples. Streamed: memory is features^2 float64, with
    features = 1 + d_in + (degree - 1) d_mlp (2 d_mlp for a GLU), whatever the number of samples.

    Raises:
        InvalidInputError: samples that can be read only once, or too many features (the size).
    """
    if not samples.reiterable:
        raise InvalidInputError(
            "a joint fit reads the samples three times; pass a tensor, a list of batches or a "
            "callable that returns a fresh iterator"
        )
    size = _size(weights, degree)
    if 16 * size * size > MAX_GRAM_BYTES:
        raise InvalidInputError(
            f"{size:,} features need Gram matrices of {16 * size * size:,} bytes; use "
            "scope='neuron' or a lower degree"
        )
    base = fit_samples(weights, samples, degree)
    double = _in_double(base)
    center, z_mean = _centers(double, samples)
    sums = [_Sums(size, weights.d_out, degree, center.device) for _ in range(2)]
    for x, w in samples.batches(torch.float64, center.device, weights.d_in):
        cut = len(x) - int(HELD_OUT * len(x))
        for part, rows in zip(sums, (slice(0, cut), slice(cut, None)), strict=True):
            for i in range(0, len(x[rows]), ROWS):
                block = x[rows][i : i + ROWS]
                phi = features(double, center, z_mean, block, degree)
                error = double.weights(block) - double.all_degrees(block)
                part.add(phi, error, None if w is None else w[rows][i : i + ROWS])
    corrections, ridge, held_out = [], [], []
    for n in range(degree + 1):
        correction, strength, mse = _choose(*sums, n, _size(weights, n))
        corrections.append(correction)
        ridge.append(strength)
        held_out.append(mse)
    return JointPolynomial(base, center, z_mean, corrections, tuple(ridge), tuple(held_out))


def _in_double(base: Polynomial) -> Polynomial:
    """The same polynomial evaluated in float64."""
    weights = base.weights.to(torch.float64)
    return Polynomial(weights, base.m, base.s, base.P, base.Q, inputs=base.inputs)


def _size(weights: MLPWeights | GLUWeights, n: int) -> int:
    branches = 2 if isinstance(weights, GLUWeights) else 1
    return 1 + (weights.d_in if n else 0) + max(n - 1, 0) * branches * weights.d_mlp


def _centers(base: Polynomial, samples: Samples) -> tuple[Tensor, Tensor]:
    """Means of x and of the linear branch."""
    total, count = torch.zeros_like(base.W_in[:, 0]), 0.0
    for x, w in samples.batches(torch.float64, base.W_in.device, base.d_in):
        total += x.sum(0) if w is None else w @ x
        count += len(x) if w is None else float(w.sum())
    center = total / count
    z_mean = center @ base.W_in
    return center, z_mean if base.b_in is None else z_mean + base.b_in


class _Sums:
    """Phi^T Phi, Phi^T error of every degree, and the errors' squares."""

    def __init__(self, size: int, d_out: int, degree: int, device: torch.device) -> None:
        zeros = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(size, size, **zeros)
        self.cross = torch.zeros(degree + 1, size, d_out, **zeros)
        self.square = torch.zeros(degree + 1, **zeros)
        self.count = 0.0

    def add(self, phi: Tensor, error: Tensor, w: Tensor | None) -> None:
        weighted = phi if w is None else phi * w[:, None]
        self.gram.addmm_(weighted.T, phi)
        self.cross += weighted.T @ error
        squares = error.square().sum(2)
        self.square += squares.sum(1) if w is None else squares @ w
        self.count += len(phi) if w is None else float(w.sum())


def _choose(train: _Sums, test: _Sums, n: int, size: int) -> tuple[Tensor, float, float]:
    """Correction, strength and held-out error of degree n."""
    count = train.count + test.count
    gram = train.gram[:size, :size] + test.gram[:size, :size]
    diagonal = gram.diagonal() / count
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()[:, None]
    test_gram = test.gram[:size, :size] * scale * scale.T
    test_cross = test.cross[n, :size] * scale
    best = (float(test.square[n]), float("inf"))
    if test.count > 0 and train.count > 0:
        train_gram = train.gram[:size, :size] * scale * scale.T / train.count
        values, vectors = torch.linalg.eigh(train_gram)
        projected = vectors.T @ (train.cross[n, :size] * scale / train.count)
        for strength in STRENGTHS[1:]:
            D = vectors @ (projected / (values.clamp(min=0) + strength)[:, None])
            error = float(test.square[n] + torch.sum(D * (test_gram @ D - 2 * test_cross)))
            best = min(best, (error, strength))
    error, strength = best
    mse = error / test.count if test.count else float("nan")
    correction = torch.zeros_like(train.cross[n, :size])
    if strength < float("inf"):
        system = gram * scale * scale.T / count
        system.diagonal().add_(strength)
        right = (train.cross[n, :size] + test.cross[n, :size]) * scale / count
        correction = scale * torch.cholesky_solve(right, torch.linalg.cholesky(system))
    return correction, strength, mse
