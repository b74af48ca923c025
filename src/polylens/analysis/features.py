"""Eigenfeatures of the quadratic form along one output direction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from polylens.analysis.arguments import check_polynomial
from polylens.analysis.eigensolver import extreme_eigenpairs
from polylens.analysis.figures import spectrum_figure
from polylens.analysis.metric import (
    Metric,
    MetricLike,
    check_count,
    check_inputs,
    direction,
    gaussian_of,
    metric_of,
    several,
)
from polylens.analysis.parts import FeaturePart, chosen, feature_part
from polylens.brief import Brief
from polylens.errors import ConvergenceError, InvalidInputError
from polylens.polynomials.quadratic_form import QuadraticForm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Above this size nothing of d_in x d_in is formed or diagonalised.
DENSE = 1024
COLUMNS = 256
# A residual that products in float32 reach, and the smallest that float64 does.
SINGLE, TIGHTEST = 1e-6, 1e-13
# Neurons at a time on a CPU: few enough to stay in cache between their two products.
NEURONS = 256
# Eigenvalues below this share of the largest are rounding.
ZERO = 1e-12


@dataclass(frozen=True, eq=False, repr=False)
class RestrictedQuadratic(Brief):
    """g(x) = constant + x . linear + sum_i values_i ((x - center) . vectors_i)^2, in float64.

    Attributes:
        constant: float; linear, center: [d_in].
        values: [k]; vectors: [d_in, k].
        polynomial, u: what it was restricted from, and along which output direction.
    """

    constant: float
    linear: Tensor
    center: Tensor
    values: Tensor
    vectors: Tensor
    polynomial: Any = field(repr=False)
    u: Tensor = field(repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [...]."""
        x = check_inputs(x, len(self.linear), self.linear.device)
        activations = (x - self.center) @ self.vectors
        return self.constant + x @ self.linear + activations.square() @ self.values

    def r2(self, x: Tensor, target: Tensor | None = None) -> float:
        """1 - mean squared error / variance over inputs x [n, d_in].

        Args:
            target: [n], what to explain; the layer's own output along u by default.

        Raises:
            InvalidInputError: fewer than two inputs, sizes that do not fit, a constant target.
        """
        value = self(x)
        if target is None:
            weights = self.polynomial.weights
            with torch.no_grad():
                y = weights(torch.as_tensor(x).to(self.linear.device, weights.dtype))
            target = y.double() @ self.u
        wanted = torch.as_tensor(target).to(value)
        if wanted.shape != value.shape or value.numel() < 2:
            raise InvalidInputError(
                f"R2 needs two inputs or more and a target for each; got outputs "
                f"{tuple(value.shape)} and targets {tuple(wanted.shape)}"
            )
        spread = (wanted - wanted.mean()).square().sum()
        if spread == 0:
            raise InvalidInputError("the target is constant on these inputs: R2 has no meaning")
        return 1 - float((value - wanted).square().sum() / spread)


@dataclass(frozen=True, eq=False, repr=False)
class EigenFeatures(Brief):
    """The largest eigenpairs of L^T Gamma_u L, L L^T the metric (L = 1 for the plain one).

    Along u the second-order term is sum_i values_i (vectors_i . x)^2 over all features; the
    activations vectors_i . x are uncorrelated with variance 1 under a covariance metric.

    Attributes:
        values: [k] by falling absolute value; the sign says whether the feature raises or lowers
            the output along u.
        vectors: [d_in, k] reading directions, in input space.
        patterns: [d_in, k] what the input looks like where the feature is active: metric @
            vectors, the vectors themselves under the plain metric.
        residuals: [k] |M q - value q| / |values_0|, M = L^T Gamma_u L, in float64. A value is off
            by the order of its square, a vector by it over the distance to the next value.
        polynomial, u, metric: where they come from.
    """

    values: Tensor
    vectors: Tensor
    patterns: Tensor
    residuals: Tensor
    polynomial: Any = field(repr=False)
    u: Tensor = field(repr=False)
    metric: Metric = field(repr=False)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def form(self) -> QuadraticForm:
        return self.polynomial.quadratic_form(self.u)

    @cached_property
    def energy(self) -> float:
        """|L^T Gamma_u L|_F^2, exact; twice that is the variance of the part of degree 2.

        Computed when first read: O(d_in^2 d_mlp), in blocks of columns.
        """
        return quadratic_energy(self.form, self.metric)

    @cached_property
    def share(self) -> Tensor:
        """[k] share of the energy that the first 1, 2, ..., k features keep together."""
        return self.values.square().cumsum(0) / self.energy

    def restricted(self, k: int | None = None) -> RestrictedQuadratic:
        """The degree 2 optimum along u with its quadratic part cut down to the first k features.

        Constant and linear part stay whole, taken about the mean of the inputs (zero where the
        input model has none). What is cut is replaced by its mean, so that under a Gaussian in
        its covariance metric the squared error is exactly twice the energy cut.

        Raises:
            InvalidInputError: k not in 1 ... len(self).
        """
        k = check_count(len(self) if k is None else k, len(self), "the features at hand")
        values, vectors = self.values[:k], self.vectors[:, :k]
        constant, linear, form = second_order(self.polynomial, self.u)
        gaussian = gaussian_of(self.polynomial.inputs)
        center = torch.zeros_like(linear)
        if gaussian is not None:
            gaussian = gaussian.to(linear.device)
            center = gaussian.mean
            spread = torch.linalg.vecdot(vectors, gaussian.cov_matmul(vectors), dim=0)
            constant = constant + _mean_of(form, gaussian) - float(values @ spread)
        shifted = form @ center
        return RestrictedQuadratic(
            constant - float(center @ shifted),
            linear + 2 * shifted,
            center,
            values,
            vectors,
            self.polynomial,
            self.u,
        )

    def part(self, features: int | Sequence[int] | None = None) -> FeaturePart:
        """What these features, all by default, add to the layer's output along u.

        x -> sum_i values_i (((x - mean) . vectors_i)^2 - its mean) u / |u|^2, a function of inputs
        [..., d_in] that `Edit` takes out, scales or adds.

        Raises:
            InvalidInputError: a feature that is not there.
        """
        which = chosen(features, len(self))
        outputs = self.values[which, None] * self.u / self.u.square().sum()
        return feature_part(self.metric, self.vectors[:, which], outputs, 2)

    def plot(
        self,
        shape: tuple[int, int] | None = None,
        n: int = 4,
        *,
        title: str = "Quadratic features of the output along u",
    ) -> "Figure":
        """Spectrum, and of images of this shape the first n patterns of either sign."""
        share = float(self.share[-1])
        return spectrum_figure(
            self.values,
            self.patterns,
            share,
            shape,
            n,
            title=title,
            value="eigenvalue",
            signed=True,
        )


@overload
def eigenfeatures(
    polynomial: Any,
    u: Tensor,
    k: int = 8,
    *,
    metric: MetricLike = None,
    method: str = "auto",
    tolerance: float | None = None,
    seed: int = 0,
) -> EigenFeatures: ...


@overload
def eigenfeatures(
    polynomial: Any,
    u: Sequence[Tensor],
    k: int = 8,
    *,
    metric: MetricLike = None,
    method: str = "auto",
    tolerance: float | None = None,
    seed: int = 0,
) -> list[EigenFeatures]: ...


@torch.no_grad()
def eigenfeatures(
    polynomial: Any,
    u: Tensor | Sequence[Tensor],
    k: int = 8,
    *,
    metric: MetricLike = None,
    method: str = "auto",
    tolerance: float | None = None,
    seed: int = 0,
) -> EigenFeatures | list[EigenFeatures]:
    """The k eigenfeatures of Gamma_u of largest absolute eigenvalue, of both signs.

    L^T Gamma_u L q = value q; the reading direction Gamma_u L q / value has L^T vector = q, so
    no metric is inverted and a singular covariance is exact on its support.

    Args:
        polynomial: of degree 2 or more; its optimum of degree 2 is opened.
        u: [d_out] output direction: a logit, a class, a probe, a row of an SAE's decoder; or a
            list of several, such as `list(sae.W_dec)`, for a list of results.
        k: how many.
        metric: None for the plain inner product; "covariance" for that of the input model, in
            which features are ordered by the variance they explain; or a tensor or input model.
        method: "dense" diagonalises, "iterative" only applies the factors, "auto" is dense up to
            d_in = 1024.
        tolerance: largest `residuals` of the iterative method: 1e-6 by default, and 1e-9 for
            weights in float64. From 1e-6 on it iterates in float32 and ends in float64.
        seed: of the iterative method's starting block.

    Raises:
        InvalidInputError: u of another size, zero or not finite; k above the rank; an indefinite
            metric; an unknown method; a tolerance below 1e-13; a polynomial of degree below 2.
        ConvergenceError: the iterative method did not reach the tolerance.

    Cost: dense O(d_in^2 (d_mlp + d_in)); iterative some tens of products of the factors with
    16 vectors, a copy of them, and no d_in x d_in matrix but the metric.
    Source: Belrose & Rigg 2025; Pearce et al. 2024, "Bilinear MLPs enable weight-based
    mechanistic interpretability".

    >>> import torch, polylens
    >>> W = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> layer = polylens.GLUWeights(W, torch.ones(3, 1), W, "identity")  # sum of (W x)^2
    >>> poly = polylens.fit(layer, polylens.Gaussian.standard(3), degree=2)
    >>> polylens.analysis.eigenfeatures(poly, torch.ones(1), k=2).values
    tensor([9., 4.], dtype=torch.float64)
    """
    if method not in ("auto", "dense", "iterative"):
        raise InvalidInputError(f"method must be 'auto', 'dense' or 'iterative', got {method!r}")
    check_polynomial(polynomial)
    if several(u):
        options = {"metric": metric, "method": method, "tolerance": tolerance, "seed": seed}
        return [eigenfeatures(polynomial, each, k, **options) for each in u]
    device = next(iter(polynomial.buffers())).device
    u = direction(u, polynomial.d_out, device)
    form = polynomial.quadratic_form(u)
    if tolerance is None:
        tolerance = 1e-9 if form.W.dtype == torch.float64 else SINGLE
    if not isinstance(tolerance, float) or not TIGHTEST <= tolerance < 1:
        raise InvalidInputError(f"tolerance must be in {TIGHTEST} ... 1, got {tolerance!r}")
    in_metric = metric_of(polynomial, metric)
    rank = min(in_metric.rank, form.W.shape[1] * (1 if form.V is None else 2))
    check_count(k, rank, "the highest rank that the form can have")
    if method == "dense" or (method == "auto" and form.d_in <= DENSE):
        gamma = form.to_dense()
        matrix = in_metric.into(in_metric.into(gamma).T)
        q = torch.linalg.eigh((matrix + matrix.T) / 2)
        order = q.eigenvalues.abs().argsort(descending=True)[:k]
        pairs = _ritz(in_metric, lambda X: gamma @ X, q.eigenvectors[:, order])
    else:
        pairs = _iterated(form, in_metric, k, tolerance, seed)
    values, q, image, residuals = pairs
    nonzero = int((values.abs() > ZERO * values[0].abs()).sum()) if values[0] else 0
    if nonzero < k:
        raise InvalidInputError(
            f"k={k} is larger than the rank: along u the form has {nonzero} non-zero "
            f"eigenvalues; ask for k <= {nonzero}"
            if nonzero
            else "the quadratic form along u is zero: the layer has no second-order term there"
        )
    patterns = in_metric.out_of(q)
    vectors = patterns if in_metric.L is None else image / values
    return EigenFeatures(values, vectors, patterns, residuals, polynomial, u, in_metric)


@torch.no_grad()
def quadratic_energy(form: QuadraticForm, metric: Metric | None = None) -> float:
    """|L^T Gamma L|_F^2 from the factors, 256 columns at a time.

    Exact; O(d_in^2 d_mlp) like forming Gamma, without holding it.
    """
    metric = Metric(None, form.d_in) if metric is None else metric
    product = _products(form)
    eye = torch.eye(metric.rank, dtype=torch.float64, device=form.W.device)
    return sum(
        float(metric.into(product(metric.out_of(columns))).square().sum())
        for columns in eye.split(COLUMNS, dim=1)
    )


def second_order(polynomial: Any, u: Tensor) -> tuple[float, Tensor, QuadraticForm]:
    """(a, b [d_in], Gamma_u): along u the degree 2 optimum is a + x . b + x Gamma_u x^T.

    In float64 whatever the dtype of the weights, and without the clipping of preactivations.
    """
    form = polynomial.quadratic_form(u)
    exact = polynomial.optimum(2).double()
    with torch.enable_grad():
        origin = u.new_zeros(polynomial.d_in).requires_grad_()
        value = exact(origin[None])[0] @ u
        (linear,) = torch.autograd.grad(value, origin)
    return float(value.detach()), linear, form


def _mean_of(form: QuadraticForm, gaussian: Any) -> float:
    """tr(Gamma cov)."""
    cov_W = gaussian.cov_matmul(form.W.double())
    total = torch.linalg.vecdot(form.W.double(), cov_W, dim=0) @ form.p
    if form.V is not None and form.q is not None:
        total = total + torch.linalg.vecdot(form.V.double(), cov_W, dim=0) @ form.q
    return float(total)


Pairs = tuple[Tensor, Tensor, Tensor, Tensor]


def _iterated(form: QuadraticForm, metric: Metric, k: int, tolerance: float, seed: int) -> Pairs:
    """By block Lanczos in float32 as far as that goes, in float64 for the rest."""

    product = _products(form)

    def run(dtype: torch.dtype, tolerance: float, start: Tensor | None) -> Pairs:
        factor = metric.to(dtype)
        # Half the tolerance, since rounding adds to what the iteration sees.
        q = extreme_eigenpairs(
            lambda z: factor.into(product(factor.out_of(z.to(dtype)))).double(),
            metric.rank,
            k,
            form.W.device,
            tolerance / 2,
            seed,
            start,
        )[1]
        return _ritz(metric, product, q)

    start = None
    if tolerance >= SINGLE or form.W.dtype != torch.float64:
        pairs = run(torch.float32, max(tolerance, SINGLE), None)
        if pairs[-1].max() <= tolerance:
            return pairs
        start = pairs[1]
    pairs = run(torch.float64, tolerance, start)
    if pairs[-1].max() > tolerance:
        raise ConvergenceError(
            f"the residuals of {k} eigenpairs end at {float(pairs[-1].max()):.1e}, above the "
            f"tolerance {tolerance:.1e}; give a larger one, or method='dense'"
        )
    return pairs


def _ritz(metric: Metric, product: Callable[[Tensor], Tensor], q: Tensor) -> Pairs:
    """(values, q, Gamma L q, residuals) of the best eigenpairs in the span of orthonormal q."""
    image = product(metric.out_of(q))
    reached = metric.into(image)
    projected = q.T @ reached
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    order = values.abs().argsort(descending=True)
    values, rotation = values[order], rotation[:, order]
    q, image, reached = (t @ rotation for t in (q, image, reached))
    residuals = torch.linalg.vector_norm(reached - q * values, dim=0)
    return values, q, image, residuals / values[0].abs().clamp(min=torch.finfo(q.dtype).tiny)


def _products(form: QuadraticForm) -> Callable[[Tensor], Tensor]:
    """X -> Gamma X in the dtype of X, for many products.

    Neurons as rows, and both products with a block of them while it is in cache: one pass over
    the factors instead of two, and a cast of each block instead of a copy in another dtype.
    """
    size = NEURONS if form.W.device.type == "cpu" else form.W.shape[1]

    def blocks(factor: Tensor) -> tuple[Tensor, ...]:
        return factor.T.contiguous().split(size)

    W = blocks(form.W)
    V = None if form.V is None else blocks(form.V)

    def product(X: Tensor) -> Tensor:
        rows = X.T.contiguous()
        out = torch.zeros_like(rows)
        p = form.p.to(rows).split(size)
        q = None if form.q is None else (form.q / 2).to(rows).split(size)
        for i, block in enumerate(W):
            w = block.to(rows.dtype)
            y = rows @ w.T
            if V is None or q is None:
                out.addmm_(y * p[i], w)
            else:
                v = V[i].to(rows.dtype)
                out.addmm_(y * p[i] + (rows @ v.T) * q[i], w).addmm_(y * q[i], v)
        return out.T

    return product
