"""Checks and changes of coordinates that the analyses share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from polylens.brief import Brief
from polylens.checks import real_numbers
from polylens.errors import InvalidInputError
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.model import InputModel

# A covariance of unit diagonal with smaller pivots may be singular.
RANK_TOLERANCE = 1e-12

linalg: Any = torch.linalg  # without types

MetricLike = str | Tensor | InputModel | None


@dataclass(frozen=True, eq=False, repr=False)
class Metric(Brief):
    """A factor L of a metric L L^T on inputs; x = mean + L z with z white.

    Attributes:
        L: [d_in, rank], a diagonal [d_in], or None for the plain inner product.
        d_in: size of the inputs.
        inputs: whose mean and covariance activations are measured from; None where nothing is
            known of them.
    """

    L: Tensor | None
    d_in: int
    inputs: InputModel | None = None

    @property
    def gaussian(self) -> Gaussian | None:
        """Mean and covariance of the inputs, if there are any."""
        return gaussian_of(self.inputs)

    @property
    def rank(self) -> int:
        return self.d_in if self.L is None or self.L.dim() == 1 else self.L.shape[1]

    def to(self, dtype: torch.dtype) -> "Metric":
        return self if self.L is None else replace(self, L=self.L.to(dtype))

    def center(self) -> Tensor:
        """[d_in] mean of the inputs, zero where nothing is known of them."""
        gaussian = self.gaussian
        if gaussian is not None:
            return gaussian.mean
        device = None if self.L is None else self.L.device
        return torch.zeros(self.d_in, dtype=torch.float64, device=device)

    def variance(self, vectors: Tensor) -> Tensor:
        """[k] of x . vectors [d_in, k]; zero where nothing is known of the inputs."""
        gaussian = self.gaussian
        if gaussian is None:
            return torch.zeros_like(vectors[0])
        cov_vectors = gaussian.to(vectors.device).cov_matmul(vectors)
        return linalg.vecdot(vectors, cov_vectors, dim=0)

    def out_of(self, z: Tensor) -> Tensor:
        """L z for z [rank, n]: from white coordinates to input space."""
        if self.L is None:
            return z
        return self.L[:, None] * z if self.L.dim() == 1 else self.L @ z

    def into(self, v: Tensor) -> Tensor:
        """L^T v for v [d_in, n]: a reading direction in white coordinates."""
        if self.L is None:
            return v
        return self.L[:, None] * v if self.L.dim() == 1 else self.L.T @ v


def gaussian_of(inputs: object) -> Gaussian | None:
    """Mean and covariance of an input model where it has them, else None."""
    moments = inputs.mean_and_cov() if isinstance(inputs, InputModel) else None
    return None if moments is None else Gaussian.trusted(*moments)


def metric_of(polynomial: Any, metric: MetricLike) -> Metric:
    """The metric that `metric` names.

    Args:
        metric: None (plain), "covariance" (that of the polynomial's input model), an input model,
            or a positive semidefinite tensor [d_in, d_in] or [d_in].

    Raises:
        InvalidInputError: an unknown name, no covariance to take, a wrong size, an indefinite
            metric, or one that is zero.
    """
    d_in, device = polynomial.d_in, _device(polynomial)
    own = polynomial.inputs
    if metric is None:
        return Metric(None, d_in, own)
    if isinstance(metric, str):
        if metric != "covariance":
            raise InvalidInputError(
                f"metric={metric!r} is unknown; None, 'covariance', an input model or a tensor "
                f"[{d_in}, {d_in}] are possible"
            )
        gaussian = gaussian_of(own)
        if gaussian is None:
            raise InvalidInputError(
                "metric='covariance' needs an input model with a covariance, this polynomial has "
                f"{type(polynomial.inputs).__name__}; pass metric=Gaussian.from_samples(x)"
            )
    elif isinstance(metric, Tensor):
        if metric.shape not in ((d_in, d_in), (d_in,)):
            raise InvalidInputError(
                f"metric must be [{d_in}, {d_in}] or a diagonal [{d_in}], got {tuple(metric.shape)}"
            )
        try:
            gaussian = Gaussian(torch.zeros(d_in, device=metric.device), metric)
        except InvalidInputError as error:
            raise InvalidInputError(f"metric: {error}") from error
    else:
        gaussian = gaussian_of(metric)
        if gaussian is None or gaussian.d_in != d_in:
            got = type(metric).__name__ if gaussian is None else f"{gaussian.d_in} features"
            raise InvalidInputError(f"metric must be an input model of {d_in} features, got {got}")
    gaussian = gaussian.to(device)
    return Metric(_factor(gaussian), d_in, own if isinstance(metric, Tensor) else gaussian)


def direction(u: object, size: int, device: torch.device, name: str = "u") -> Tensor:
    """u as a float64 vector.

    Raises:
        InvalidInputError: no real numbers, another size, not finite, or zero.
    """
    u = real_numbers(name, u, device)
    if tuple(u.shape) != (size,):
        raise InvalidInputError(
            f"{name} must be one direction of shape ({size},), got {tuple(u.shape)}; a class or "
            "token is a column of the matrix that reads it out, and several are a list: list(rows)"
        )
    u = u.double()
    if not torch.isfinite(u).all():
        raise InvalidInputError(
            f"{name} has {int((~torch.isfinite(u)).sum())} NaN or infinite entries"
        )
    if not u.any():
        raise InvalidInputError(f"{name} is the zero vector, so it has no features")
    return u


def several(u: object) -> TypeGuard[Sequence[Tensor]]:
    """Whether these are directions, not one."""
    if not isinstance(u, list | tuple):
        return False
    return all(isinstance(v, Tensor) and v.dim() for v in cast("Sequence[object]", u))


def check_count(k: object, most: int, what: str) -> int:
    """k itself.

    Raises:
        InvalidInputError: not an integer in 1 ... most.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise InvalidInputError(f"k must be an integer in 1 ... {most}, {what}; got {k!r}")
    return k


def check_inputs(x: object, d_in: int, device: torch.device) -> Tensor:
    """x [..., d_in] as float64 on the device.

    Raises:
        InvalidInputError: no floating point, or another size.
    """
    x = real_numbers("x", x, device)
    if x.shape[-1:] != (d_in,) or not x.is_floating_point():
        raise InvalidInputError(
            f"x must be floating point [..., {d_in}], got {x.dtype} {tuple(x.shape)}"
        )
    return x.double()


def _device(polynomial: Any) -> torch.device:
    return next(iter(polynomial.buffers())).device


def _factor(gaussian: Gaussian) -> Tensor:
    cov = gaussian.cov
    if not cov.any():
        raise InvalidInputError("the metric is zero: no direction has any variance under it")
    if cov.dim() == 1:
        return cov.sqrt()
    # in units of the deviations, so that a feature of small ones is not taken for rounding
    deviations = gaussian.variances().clamp(min=torch.finfo(cov.dtype).tiny).sqrt()
    L, info = linalg.cholesky_ex(cov / deviations / deviations[:, None])
    if not info and L.diagonal().min() ** 2 > RANK_TOLERANCE:
        return deviations[:, None] * L
    return gaussian.root().T
