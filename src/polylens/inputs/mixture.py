"""Gaussian mixtures as models of a layer's inputs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polylens.checks import check_at_least, floating, real_numbers
from polylens.devices import usable_device
from polylens.errors import InvalidInputError
from polylens.files.format import Record
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.model import Fitted, InputModel


@dataclass(frozen=True, eq=False, repr=False)
class GaussianMixture(InputModel):
    """x ~ sum_j weights[j] N(means[j], covs[j]), in float64.

    Args:
        weights: [k], non-negative, summing to one.
        means: [k, d_in].
        covs: [k, d_in, d_in], one [1, d_in, d_in] that all share, or diagonals [k, d_in]. Any
            rank. Where k = d_in, diagonals are torch.diag_embed of them: a [d_in, d_in] could be
            one matrix, too.

    Raises:
        InvalidInputError: weights that are no distribution, sizes that do not fit, NaN, a
            covariance that is not symmetric positive semidefinite (which component).

    >>> import polylens
    >>> means = torch.tensor([[-1.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    >>> inputs = polylens.GaussianMixture(torch.tensor([0.75, 0.25]), means, torch.eye(3)[None])
    >>> inputs.gaussian().mean
    tensor([0., 0., 0.], dtype=torch.float64)
    """

    weights: Tensor
    means: Tensor
    covs: Tensor

    def __post_init__(self) -> None:
        given = (("weights", self.weights), ("means", self.means), ("covs", self.covs))
        weights, means, covs = (floating(*each).detach().double() for each in given)
        fits = weights.dim() == 1 and means.dim() == 2 and len(weights) == len(means)
        if not fits or not means.numel():
            raise InvalidInputError(
                "a mixture needs weights [k] and means [k, d_in] with k and d_in >= 1; got "
                f"{tuple(weights.shape)} and {tuple(means.shape)}"
            )
        if not torch.isfinite(weights).all() or (weights < 0).any():
            raise InvalidInputError(
                f"mixture weights must be finite and >= 0, got {_listed(weights)}; a component "
                "of weight zero is allowed"
            )
        total = float(weights.sum())
        if abs(total - 1) > 1e-6:
            raise InvalidInputError(
                f"mixture weights must sum to one, got a sum of {total:.9g}; divide them by it"
            )
        k, d = means.shape
        shape = tuple(covs.shape)
        if shape not in ((k, d, d), (1, d, d), (k, d)) or k == d > 1 == len(shape) - 1:
            square = "; a shared one is covs[None], diagonals are torch.diag_embed(covs)"
            raise InvalidInputError(
                f"covs must be [{k}, {d}, {d}], one that all share [1, {d}, {d}], or diagonals "
                f"[{k}, {d}] where k is not d_in, to fit means [{k}, {d}]; got {list(shape)}"
                f"{square if shape == (d, d) else ''}"
            )
        object.__setattr__(self, "weights", weights / total)
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "covs", covs)
        shared = shape == (1, d, d)
        for j, component in enumerate(self.components[:1] if shared else self.components):
            try:
                Gaussian(component.mean, component.cov)
            except InvalidInputError as error:
                raise InvalidInputError(f"mixture component {j}: {error}") from error
        if not torch.isfinite(means).all():
            bad = _listed((~torch.isfinite(means)).any(1).nonzero().flatten())
            raise InvalidInputError(f"mixture components {bad}: means have NaN or infinite entries")

    @classmethod
    def trusted(cls, weights: Tensor, means: Tensor, covs: Tensor) -> "GaussianMixture":
        """Of float64 tensors known to be valid, without looking at them again."""
        mixture = object.__new__(cls)
        for name, value in (("weights", weights), ("means", means), ("covs", covs)):
            object.__setattr__(mixture, name, value)
        return mixture

    @property
    def components(self) -> tuple[Gaussian, ...]:
        covs = self.covs.expand(len(self.means), *self.covs.shape[1:])
        return tuple(Gaussian.trusted(m, c) for m, c in zip(self.means, covs, strict=True))

    @classmethod
    def from_labels(cls, x: Tensor, labels: Tensor) -> "GaussianMixture":
        """One component per distinct label: mean and covariance (divided by n) of its samples.

        Features that are constant within most labels, such as pixels at the border, leave a fit
        with `fit_global` free there; adding a small variance to `covs` holds it.

        Args:
            x: [n, d_in].
            labels: [n] integers.
        """
        x, labels = floating("x", x), _integers(labels)
        if x.dim() != 2 or labels.dim() != 1 or len(x) != len(labels) or not len(x):
            raise InvalidInputError(
                f"from_labels needs x [n, d_in] and labels [n] with n >= 1; got {tuple(x.shape)} "
                f"and {tuple(labels.shape)}"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise InvalidInputError(f"x has {bad} NaN or infinite entries")
        x = x.detach().double()
        weights: list[float] = []
        means: list[Tensor] = []
        covs: list[Tensor] = []
        for label in np.unique(labels.cpu().numpy()):
            group = x[(labels == int(label)).to(x.device)]
            centred = group - group.mean(0)
            weights.append(len(group) / len(x))
            means.append(group.mean(0))
            covs.append(centred.T @ centred / len(group))
        return cls(x.new_tensor(weights), torch.stack(means), torch.stack(covs))

    @classmethod
    def from_samples(
        cls, x: Tensor, k: int, method: str = "kmeans", seed: int = 0
    ) -> "GaussianMixture":
        """k components from samples x [n, d_in]: k-means clusters, or EM started from them.

        The moments are those of the samples themselves; scikit-learn finds the clusters.
        """
        x = floating("x", x)
        check_at_least("k", k, 1)
        if x.dim() != 2 or k > len(x):
            raise InvalidInputError(
                f"from_samples needs x [n, d_in] and 1 <= k <= n; got {tuple(x.shape)}, k={k}"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise InvalidInputError(f"x has {bad} NaN or infinite entries")
        data = x.detach().double().cpu().numpy()
        if method == "kmeans":
            from sklearn.cluster import KMeans  # pyright: ignore[reportMissingTypeStubs]

            kmeans: Any = KMeans
            labels = kmeans(k, n_init=4, random_state=seed).fit_predict(data)
            return cls.from_labels(x, torch.as_tensor(labels))
        if method == "em":
            from sklearn.mixture import (  # pyright: ignore[reportMissingTypeStubs]
                GaussianMixture as EM,
            )

            em: Any = EM(k, covariance_type="full", random_state=seed, reg_covar=1e-6)
            em.fit(data)
            parts = (em.weights_, em.means_, em.covariances_)
            return cls(*(torch.as_tensor(part, device=x.device) for part in parts))
        raise InvalidInputError(f"method must be 'kmeans' or 'em', got {method!r}")

    @property
    def d_in(self) -> int:
        return self.means.shape[1]

    @property
    def device(self) -> torch.device:
        return self.means.device

    def to(self, device: torch.device | str) -> "GaussianMixture":
        device = usable_device(device)
        if device == self.device:
            return self
        return GaussianMixture.trusted(
            self.weights.to(device), self.means.to(device), self.covs.to(device)
        )

    def weighted_components(self) -> list[tuple[float, Gaussian]]:
        """(weight, Gaussian) of every component whose weight is not zero."""
        pairs = zip(_listed(self.weights), self.components, strict=True)
        return [(weight, component) for weight, component in pairs if weight > 0]

    def gaussian(self) -> Gaussian:
        """The single Gaussian with the mixture's mean and covariance (total covariance)."""
        mean = self.weights @ self.means
        spread = self.means - mean
        cov = (spread.T * self.weights) @ spread
        for weight, component in self.weighted_components():
            within = component.cov
            cov = cov + weight * (torch.diag(within) if within.dim() == 1 else within)
        return Gaussian(mean, (cov + cov.T) / 2)

    def mean_and_cov(self) -> tuple[Tensor, Tensor]:
        single = self.gaussian()
        return single.mean, single.cov

    def r2(self, polynomial: Fitted) -> Tensor:
        """In closed form, component by component."""
        here = self.to(polynomial.weights.device)
        return polynomial.r2_under(here.weighted_components())

    def record(self) -> Record:
        tensors = {"weights": self.weights, "means": self.means, "covs": self.covs}
        return {"model": "GaussianMixture"}, tensors

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "GaussianMixture":
        k, d = tensors["means"].shape
        if tensors["covs"].shape == (d, d):  # 0.1 wrote a shared one like this, and any diagonals
            covs = tensors["covs"]
            tensors = {**tensors, "covs": torch.diag_embed(covs) if k == d > 1 else covs[None]}
        cls(**tensors)  # which divides the weights by their sum; it is 1 to rounding already
        return cls.trusted(**{name: tensor.double() for name, tensor in tensors.items()})

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """[n, d_in] draws in float64, components in random order."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        out = self.means.new_empty(n, self.d_in)
        for j, component in enumerate(self.components):
            rows = (chosen == j).nonzero().squeeze(1)
            if len(rows):
                out[rows] = component.sample(len(rows), generator)
        return out

    def __deepcopy__(self, memo: dict[int, object]) -> "GaussianMixture":
        return self  # immutable, and k d_in^2 large

    def __repr__(self) -> str:
        k = len(self.weights)
        return f"GaussianMixture({k} components, d_in={self.d_in}, {self.device})"


def _integers(labels: object) -> Tensor:
    if isinstance(labels, Tensor) and labels.dtype == torch.bool:
        labels = labels.long()
    found = real_numbers("labels", labels)
    if not (torch.isfinite(found) & (found.double() == found.double().round())).all():
        raise InvalidInputError(f"labels must be integers [n], got {found.dtype}")
    return found.long()


def _listed(values: Tensor) -> list[float]:
    return [value.item() for value in values]
