"""From the inputs that a layer is seen to read to its polynomial, batch by batch."""

from typing import Protocol

from torch import Tensor

from polylens.errors import InvalidInputError
from polylens.fit import fit
from polylens.hosts.base import MLPSite
from polylens.inputs import Moments
from polylens.joint import JointPolynomial
from polylens.joint_gram import JointGram
from polylens.neuron_gram import NeuronGram, PreactivationRange
from polylens.polynomial import Polynomial
from polylens.selection import label


class Estimator(Protocol):
    """Sums over the inputs of one layer; memory does not grow with their number.

    Args:
        clip: evaluate the polynomial at no y beyond those seen.
    """

    name: str

    def __init__(self, site: MLPSite, degree: int, clip: bool = False) -> None: ...

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

    def __init__(self, site: MLPSite, degree: int, clip: bool = False) -> None:
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


class _GramEstimator:
    """What the normal equations of all inputs so far give."""

    gram: type[NeuronGram] | type[JointGram]

    def __init__(self, site: MLPSite, degree: int, clip: bool = False) -> None:
        weights = site.weights()
        self._range = PreactivationRange(weights) if clip else None
        self._gram = self.gram(weights, degree, seen=self._range)
        self.count = 0

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self._gram.update(x, sample_weights)
        self.count += len(x)

    def polynomial(self) -> Polynomial | JointPolynomial:
        fitted = self._gram.solve()
        return fitted if self._range is None else fitted.clipped(self._range.ends)


class SamplesEstimator(_GramEstimator):
    """Least squares over the inputs themselves, neuron by neuron."""

    name = "samples per neuron"
    gram = NeuronGram


class JointEstimator(_GramEstimator):
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
