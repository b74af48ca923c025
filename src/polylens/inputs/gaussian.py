"""A Gaussian as the model of a layer's inputs."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from polylens.checks import check_at_least, floating
from polylens.devices import usable_device
from polylens.errors import InvalidInputError, NumericalWarning
from polylens.files.format import Record
from polylens.inputs.model import Fitted, InputModel
from polylens.ranks import Merge

linalg: Any = torch.linalg  # without types
# Of d correlated features, directions with less than d times this share of the largest
# variance are the rounding of their covariance.
ROUNDING = 10 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False, repr=False)
class Gaussian(InputModel):
    """x ~ N(mean, cov), in float64.

    Args:
        mean: [d_in].
        cov: [d_in, d_in], or [d_in] for a diagonal. Any rank: it is never inverted.

    Raises:
        InvalidInputError: sizes that do not fit, NaN, asymmetry, a negative eigenvalue.

    >>> import polylens
    >>> inputs = polylens.Gaussian(mean=torch.zeros(3), cov=torch.ones(3))  # a diagonal
    >>> inputs.d_in
    3
    >>> x = torch.randn(500, 3)
    >>> polylens.Gaussian.from_samples(x).cov.shape
    torch.Size([3, 3])
    """

    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        mean, cov = floating("mean", self.mean), floating("cov", self.cov)
        if mean.dim() != 1 or not len(mean):
            raise InvalidInputError(
                f"mean must be of shape [d_in], d_in at least 1, got {list(mean.shape)}"
            )
        d, rounded = mean.shape[0], cov.dtype != torch.float64
        if tuple(cov.shape) not in ((d, d), (d,)) or cov.device != mean.device:
            raise InvalidInputError(
                f"cov must be [{d}, {d}] or a diagonal [{d}] on {mean.device}, to fit mean [{d}]; "
                f"got {tuple(cov.shape)} on {cov.device}"
            )
        mean, cov = mean.detach().double(), cov.detach().double()
        for name, tensor in (("mean", mean), ("cov", cov)):
            if not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise InvalidInputError(f"{name} has {bad} NaN or infinite entries")
        _require_positive_semidefinite(cov, rounded)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "cov", cov)

    @classmethod
    def trusted(cls, mean: Tensor, cov: Tensor) -> "Gaussian":
        """Of float64 tensors known to be valid, without looking at them again."""
        gaussian = object.__new__(cls)
        object.__setattr__(gaussian, "mean", mean)
        object.__setattr__(gaussian, "cov", cov)
        return gaussian

    @classmethod
    def standard(cls, d_in: int, device: torch.device | str | None = None) -> "Gaussian":
        """N(0, I), stored as a diagonal."""
        check_at_least("d_in", d_in, 1)
        zeros = torch.zeros(d_in, dtype=torch.float64, device=device)
        return cls(zeros, torch.ones_like(zeros))

    @classmethod
    def from_samples(cls, samples: Tensor | Iterable[Tensor]) -> "Gaussian":
        """Mean and covariance (divided by n) of [..., d_in] samples, or of batches of them.

        Streamed in float64: memory is d_in^2 however many samples there are.
        Warns with a NumericalWarning when there are too few samples for full rank; the fit is
        exact all the same.
        """
        moments = Moments()
        for batch in _batches(samples):
            x = floating("samples", batch)
            if not x.dim() or not x.shape[-1]:
                raise InvalidInputError(f"samples must be [..., d_in], got {list(x.shape)}")
            moments.update(x)
        return moments.gaussian()

    @property
    def d_in(self) -> int:
        return self.mean.shape[0]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def cov_matmul(self, W: Tensor) -> Tensor:
        """cov @ W for W [d_in, n]."""
        return self.cov[:, None] * W if self.cov.dim() == 1 else self.cov @ W

    def variances(self) -> Tensor:
        """The diagonal of cov, [d_in]."""
        return self.cov if self.cov.dim() == 1 else self.cov.diagonal()

    def root(self) -> Tensor:
        """F [rank, d_in] with cov = F^T F, to the rounding of every feature in its own units."""
        if self.cov.dim() == 1:
            return torch.diag(self.cov.sqrt())[self.cov > 0]
        deviations = self.variances().clamp(min=0).sqrt()
        inverse = torch.where(deviations > 0, 1 / deviations, 0.0)
        # rounding may be beyond what a covariance can be
        correlations = (inverse[:, None] * self.cov * inverse).clamp(-1, 1)
        values, vectors = linalg.eigh(correlations)
        kept = values > ROUNDING * len(self.cov) * values[-1].clamp(min=0)
        return (values[kept].sqrt() * vectors[:, kept]).T * deviations

    def to(self, device: torch.device | str) -> "Gaussian":
        device = usable_device(device)
        if device == self.device:
            return self
        return Gaussian.trusted(self.mean.to(device), self.cov.to(device))

    def mean_and_cov(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.cov

    def r2(self, polynomial: Fitted) -> Tensor:
        """In closed form: what is fitted to a Gaussian is the optimum of every degree."""
        return polynomial.optimum_r2(self)

    def record(self) -> Record:
        return {"model": "Gaussian"}, {"mean": self.mean, "cov": self.cov}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "Gaussian":
        return cls(**tensors)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """[n, d_in] draws in float64; exact on the support of a singular covariance."""
        check_at_least("n", n, 0)
        noise = torch.randn(
            n, self.d_in, dtype=torch.float64, device=self.device, generator=generator
        )
        if self.cov.dim() == 1:
            return self.mean + noise * self.cov.sqrt()
        root = self.root()
        return self.mean + noise[:, : len(root)] @ root

    def __deepcopy__(self, memo: dict[int, object]) -> "Gaussian":
        return self  # immutable, and d_in^2 large

    def __repr__(self) -> str:
        shape = "diagonal" if self.cov.dim() == 1 else "full"
        return f"Gaussian(d_in={self.d_in}, {shape} covariance, {self.device})"


def _require_positive_semidefinite(cov: Tensor, rounded: bool) -> None:
    """InvalidInputError if it is not; `rounded` if it was given in less than float64."""
    hint = (
        "; in less than float64 that can be rounding alone: compute it in float64, such as "
        "torch.cov(x.double().T), or take Gaussian.from_samples(x)"
        if rounded
        else ""
    )
    scale = float(cov.abs().max()) if cov.numel() else 0.0
    if cov.dim() == 1:
        lowest = float(cov.min()) if cov.numel() else 0.0
    else:
        asymmetry = float((cov - cov.T).abs().max())
        if asymmetry > 1e-8 * scale:
            raise InvalidInputError(
                f"cov is not symmetric: entries differ by up to {asymmetry:.3g} at a scale of "
                f"{scale:.3g}; pass (cov + cov.T) / 2 if that is rounding"
            )
        ridge = 1e-10 * scale * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
        if scale == 0 or linalg.cholesky_ex(cov + ridge).info == 0:
            return
        lowest = float(linalg.eigvalsh(cov)[0])
    if lowest < -1e-8 * scale or (cov.dim() == 1 and lowest < 0):
        raise InvalidInputError(
            f"cov is not positive semidefinite: its lowest eigenvalue is {lowest:.6g} "
            f"at a scale of {scale:.3g}{hint}"
        )


def _batches(samples: object) -> Iterable[object]:
    if isinstance(samples, Tensor) or hasattr(samples, "dtype"):
        return [samples]
    if not isinstance(samples, Iterable):
        got = type(samples).__name__
        raise InvalidInputError(f"samples are a tensor or batches of them, got {got}")
    return cast("Iterable[object]", samples)


class Moments:
    """Streamed mean and covariance in float64, of one or many batches, optionally weighted.

    Sums are taken about the mean of the first batch, so that a mean much larger than the
    deviations costs no digits. Memory: d_in^2 float64.

    Attributes:
        count: samples so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._weight: Tensor | float = 0.0
        self._shift = self._sum = self._outer = torch.empty(0)

    @torch.no_grad()
    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        """Add samples x [..., d_in] with weights [...], 1 by default."""
        x = x.detach().reshape(-1, x.shape[-1]).double()
        if not len(x):
            return
        if not len(self._shift):
            d = x.shape[-1]
            self._shift = x.mean(0)
            self._sum = torch.zeros_like(self._shift)
            self._outer = torch.zeros(d, d, dtype=x.dtype, device=x.device)
        elif x.shape[-1] != self._shift.shape[0]:
            raise InvalidInputError(
                f"samples have {x.shape[-1]} features, earlier ones had {self._shift.shape[0]}"
            )
        x = x - self._shift
        if sample_weights is None:
            weighted, weight = x, float(len(x))
        else:
            w = sample_weights.reshape(-1).to(x)
            weighted, weight = x * w[:, None], w.sum()
        self._sum += weighted.sum(0)
        self._outer.addmm_(weighted.T, x)
        self.count += len(x)
        self._weight = self._weight + weight

    def merge(self, by: Merge) -> None:
        """Let the sums become what `by` makes of them; all are about one mean."""
        if not len(self._shift):
            return
        self.count = by.total(self.count)
        self._weight = by.total(self._weight)
        self._sum, self._outer = by.total(self._sum), by.total(self._outer)

    def gaussian(self, name: str = "the samples", *, warn: bool = True) -> Gaussian:
        """The Gaussian with these moments.

        Args:
            name: of what they are of, for errors.
            warn: with a NumericalWarning of fewer samples than features.

        Raises:
            InvalidInputError: no samples, or NaN or infinite ones (how many features).
        """
        if not self.count:
            raise InvalidInputError(f"{name}: no samples, nothing to take moments of")
        bad = int((~torch.isfinite(self._sum)).sum())
        if bad:
            raise InvalidInputError(
                f"{name}: {bad} of {len(self._sum)} features have NaN or infinite values"
            )
        if warn and self.count <= len(self._sum):
            warnings.warn(
                f"{name}: {self.count} samples give a covariance of rank at most "
                f"{self.count - 1} in {len(self._sum)} dimensions; the fit is exact for that "
                "covariance, more tokens would describe the inputs better",
                NumericalWarning,
                stacklevel=2,
            )
        weight = float(self._weight)
        delta = self._sum / weight
        cov = torch.addr(self._outer, delta, delta, beta=1 / weight, alpha=-1)
        return Gaussian.trusted(self._shift + delta, cov)
