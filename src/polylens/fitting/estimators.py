"""From the inputs that a layer is seen to read to its polynomial, batch by batch."""

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from polylens.checks import label
from polylens.errors import InvalidInputError, NumericalWarning
from polylens.fitting.fit import fit
from polylens.fitting.joint_gram import JointGram
from polylens.fitting.neuron_gram import NeuronGram
from polylens.fitting.samples import FIRST, SampleFit
from polylens.hosts.base import MLPSite
from polylens.inputs.gaussian import Gaussian, Moments
from polylens.inputs.mixture import GaussianMixture
from polylens.polynomials.ends import Clip, PreactivationRange, require_clip
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial

# docs/fidelity.md, "Tails".
TAILS = 0.05
COMPONENTS = 8


class Estimator(Protocol):
    """Sums over the inputs of one layer; memory does not grow with their number.

    Args:
        clip: see `polylens.polynomials.ends.Clip` and `SampleFit`.
    """

    name: str
    default_clip: Mapping[str, Clip]  # by the stream that calibration is on

    def __init__(self, site: MLPSite, degree: int, clip: Clip = False) -> None: ...

    @property
    def count(self) -> int:
        """Inputs seen so far."""
        ...

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        """Add inputs [n, d_in], weighted by [n] or equally."""
        ...

    def polynomial(self) -> Polynomial | JointPolynomial:
        """The fit to all inputs so far; InvalidInputError if they are NaN or too few."""
        ...


class _MomentEstimator:
    """The closed form under an input model with the moments of the inputs."""

    default_clip: Mapping[str, Clip] = {"true": False, "sequential": True}

    def __init__(self, site: MLPSite, degree: int, clip: Clip = False) -> None:
        self.site, self.degree, self.count = site, degree, 0
        self._range = PreactivationRange(site.weights()) if clip else None

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self.count += len(x)
        self._add(x, sample_weights)
        if self._range is not None:
            self._range.update(x)

    def polynomial(self) -> Polynomial:
        where = f"layer {label(self.site.layer)} ({self.site.path})"
        fitted = fit(self.site.weights(), self._model(where), self.degree)
        return fitted if self._range is None else fitted.clipped(self._range.ends)

    def _add(self, x: Tensor, sample_weights: Tensor | None) -> None:
        raise NotImplementedError

    def _model(self, where: str) -> Gaussian | GaussianMixture:
        raise NotImplementedError


class GaussianEstimator(_MomentEstimator):
    """Under the Gaussian with the mean and covariance of the inputs."""

    name = "Gaussian"

    def __init__(self, site: MLPSite, degree: int, clip: Clip = False) -> None:
        super().__init__(site, degree, clip)
        self._moments = Moments()

    def _add(self, x: Tensor, sample_weights: Tensor | None) -> None:
        self._moments.update(x, sample_weights)

    def _model(self, where: str) -> Gaussian:
        return self._moments.gaussian(where)


class MixtureEstimator(_MomentEstimator):
    """Under a Gaussian for each cluster of the inputs, neuron by neuron.

    The clusters are around the k-means centres of the first FIRST inputs.
    """

    name = f"mixture of {COMPONENTS} clusters"

    def __init__(self, site: MLPSite, degree: int, clip: Clip = False) -> None:
        super().__init__(site, degree, clip)
        self._first: list[tuple[Tensor, Tensor | None]] = []
        self._centres: Tensor | None = None
        self._moments = [Moments() for _ in range(COMPONENTS)]

    def _add(self, x: Tensor, sample_weights: Tensor | None) -> None:
        if self._centres is None:
            self._first.append((x.clone(), sample_weights))
            if self.count >= FIRST:
                self._begin()
            return
        cluster = torch.cdist(x.double(), self._centres).argmin(1)
        for k, moments in enumerate(self._moments):
            own = cluster == k
            moments.update(x[own], None if sample_weights is None else sample_weights[own])

    def _begin(self) -> None:
        first, self._first = self._first, []
        x = torch.cat([x for x, _ in first])[:FIRST]
        self._centres = GaussianMixture.from_samples(x, min(COMPONENTS, len(x))).means
        for batch in first:
            self._add(*batch)

    def _model(self, where: str) -> Gaussian | GaussianMixture:
        if not self.count:
            return Moments().gaussian(where)
        if self._centres is None:
            self._begin()
        found = [moments for moments in self._moments if moments.count]
        with warnings.catch_warnings():  # few inputs in one of the clusters are nothing unusual
            warnings.simplefilter("ignore", NumericalWarning)
            components = [moments.gaussian(where) for moments in found]
        share = torch.tensor([moments.weight for moments in found], dtype=torch.float64)
        means, covs = ([getattr(c, name) for c in components] for name in ("mean", "cov"))
        return GaussianMixture.trusted(
            (share / share.sum()).to(means[0].device), torch.stack(means), torch.stack(covs)
        )


class _SampleEstimator:
    """What the normal equations of all inputs so far give."""

    default_clip: Mapping[str, Clip] = {"true": TAILS, "sequential": TAILS}
    gram: type[NeuronGram] | type[JointGram]

    def __init__(self, site: MLPSite, degree: int, clip: Clip = False) -> None:
        self._fit = SampleFit(self.gram, site.weights(), degree, clip)

    @property
    def count(self) -> int:
        return self._fit.count

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self._fit.update(x, sample_weights)

    def polynomial(self) -> Polynomial | JointPolynomial:
        return self._fit.solve()


class SamplesEstimator(_SampleEstimator):
    """Least squares over the inputs themselves, neuron by neuron."""

    name = "samples per neuron"
    gram = NeuronGram


class JointEstimator(_SampleEstimator):
    """Least squares over the inputs, with the features of all neurons for every output."""

    name = "samples, jointly"
    gram = JointGram


ESTIMATORS: dict[str, type[Estimator]] = {
    "gaussian": GaussianEstimator,
    "mixture": MixtureEstimator,
    "samples": SamplesEstimator,
    "joint": JointEstimator,
}


def estimator(name: str) -> type[Estimator]:
    """The estimator of this name; InvalidInputError lists those there are."""
    if name not in ESTIMATORS:
        raise InvalidInputError(
            f"inputs={name!r} is unknown; {', '.join(map(repr, ESTIMATORS))} are measured on "
            "tokens, 'norm' needs none; or give a Gaussian, or a mapping from layer to Gaussian"
        )
    return ESTIMATORS[name]


def check_clip(kind: type[Estimator], clip: Clip) -> None:
    """InvalidInputError unless clip is a bool or, for fits to samples, a share below 0.5."""
    require_clip(clip)
    if issubclass(kind, _MomentEstimator) and not isinstance(clip, bool):
        raise InvalidInputError(
            f"clip={clip!r} is for fits to the inputs themselves, which know of it; a "
            f'{kind.name} has a closed form without: give True or False, or inputs="samples"'
        )
