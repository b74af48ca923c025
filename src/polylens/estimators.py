"""From the inputs that a layer is seen to read to its polynomial, batch by batch."""

from typing import Protocol

import torch
from torch import Tensor

from polylens.clipping import Clip, PreactivationRange
from polylens.errors import InvalidInputError
from polylens.fit import fit
from polylens.hosts.base import MLPSite
from polylens.inputs import Moments
from polylens.joint import JointPolynomial
from polylens.joint_gram import JointGram
from polylens.neuron_gram import NeuronGram
from polylens.polynomial import Polynomial
from polylens.selection import label
from polylens.tails import best_tails

# Inputs that are kept to see where the tails begin, before any is fitted.
FIRST = 2400
# docs/fidelity.md, "Flat tails".
TAILS = 0.03


class Estimator(Protocol):
    """Sums over the inputs of one layer; memory does not grow with their number.

    Args:
        clip: see `polylens.clipping.Clip`. With a share, the first FIRST inputs say where the
            tails begin, so they should be like all.
    """

    name: str
    default_clip: Clip  # where many layers are replaced

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
    default_clip: Clip = True

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


class _GramEstimator:
    """What the normal equations of all inputs so far give."""

    default_clip: Clip = TAILS
    gram: type[NeuronGram] | type[JointGram]

    def __init__(self, site: MLPSite, degree: int, clip: Clip = False) -> None:
        self._weights, self._degree = site.weights(), degree
        self._clip = clip
        self._range = PreactivationRange(self._weights) if clip else None
        self._first: list[tuple[Tensor, Tensor | None]] = []
        self._gram = self._begun() if isinstance(clip, bool) else None
        self.count = 0

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self.count += len(x)
        if self._gram is not None:
            self._gram.update(x, sample_weights)
            return
        self._first.append((x.clone(), sample_weights))
        if self.count >= FIRST:
            self._gram = self._begun()

    def polynomial(self) -> Polynomial | JointPolynomial:
        gram = self._gram or self._begun()
        fitted = gram.solve()
        return fitted if self._range is None else fitted.clipped(self._range.ends)

    def _begun(self) -> NeuronGram | JointGram:
        """The normal equations, of what was kept so far."""
        if self._range is not None and not isinstance(self._clip, bool) and self.count:
            x = torch.cat([x for x, _ in self._first])[:FIRST]
            w = [w for _, w in self._first if w is not None]
            w = torch.cat(w)[:FIRST] if w else None
            self._range.tails = best_tails(self._weights, x, w, self._degree, self._clip)
        gram = self.gram(self._weights, self._degree, seen=self._range)
        for x, sample_weights in self._first:
            gram.update(x, sample_weights)
        self._first = []
        return gram


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


def check_clip(kind: type[Estimator], clip: Clip) -> None:
    """InvalidInputError unless clip is a bool or, for fits to samples, a share below 0.5."""
    if isinstance(clip, bool):
        return
    if not isinstance(clip, float) or not 0 < clip < 0.5:
        raise InvalidInputError(
            f"clip={clip!r}: give False, True (to the range of the preactivations seen), or the "
            "share of them, between 0 and 0.5, that may follow the activation's asymptotes"
        )
    if kind is GaussianEstimator:
        raise InvalidInputError(
            f"clip={clip!r} is for fits to the inputs themselves, which know of it, and a "
            'Gaussian has a closed form without: give True or False, or inputs="samples"'
        )
