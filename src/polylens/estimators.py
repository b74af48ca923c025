"""From the inputs that a layer is seen to read to its polynomial, batch by batch."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from polylens.clipping import Clip, PreactivationRange, require_clip
from polylens.errors import InvalidInputError
from polylens.fit import fit
from polylens.hosts.base import MLPSite
from polylens.inputs import Moments
from polylens.joint import JointPolynomial
from polylens.joint_gram import JointGram
from polylens.neuron_gram import NeuronGram
from polylens.polynomial import Polynomial
from polylens.sample_fit import SampleFit
from polylens.selection import label

# docs/fidelity.md, "Flat tails".
TAILS = 0.03


class Estimator(Protocol):
    """Sums over the inputs of one layer; memory does not grow with their number.

    Args:
        clip: see `polylens.clipping.Clip` and `SampleFit`.
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


class GaussianEstimator:
    """The closed form under a Gaussian with the moments of the inputs."""

    name = "Gaussian"
    default_clip: Mapping[str, Clip] = {"true": False, "sequential": True}

    def __init__(self, site: MLPSite, degree: int, clip: Clip = False) -> None:
        self.site, self.degree = site, degree
        self._moments = Moments()
        self._range = PreactivationRange(site.weights()) if clip else None

    @property
    def count(self) -> int:
        return self._moments.count

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self._moments.update(x, sample_weights)
        if self._range is not None:
            self._range.update(x)

    def polynomial(self) -> Polynomial:
        where = f"layer {label(self.site.layer)} ({self.site.path})"
        fitted = fit(self.site.weights(), self._moments.gaussian(where), self.degree)
        return fitted if self._range is None else fitted.clipped(self._range.ends)


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
    if kind is GaussianEstimator and not isinstance(clip, bool):
        raise InvalidInputError(
            f"clip={clip!r} is for fits to the inputs themselves, which know of it, and a "
            'Gaussian has a closed form without: give True or False, or inputs="samples"'
        )
