"""Fits to the inputs themselves, neuron by neuron, with ends where `tails` puts them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from polylens.fitting.estimator import Batch, Estimator
from polylens.fitting.neuron_gram import NeuronGram, NeuronMoments
from polylens.fitting.tails import best_tails
from polylens.inputs.gaussian import Moments
from polylens.inputs.samples import joined
from polylens.inputs.seen import Seen
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.ends import PreactivationRange
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial

# docs/fidelity.md, "Tails".
TAILS = 0.05
# Inputs that decide where the tails begin.
FIRST = 1200


class Gram(Protocol):
    """Normal equations of all inputs so far."""

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None: ...

    def solve(self) -> Polynomial | JointPolynomial: ...


class SampleEstimator(Estimator):
    """What the normal equations of all inputs give.

    With a share of tails, the first FIRST inputs say where these begin, so they should be like
    all, unless `prepare` has seen others before.
    """

    default_tails: ClassVar[Mapping[str, float | None]] = {"true": TAILS, "replaced": TAILS}

    def __init__(
        self, weights: MLPWeights | GLUWeights, degree: int, tails: float | None = None
    ) -> None:
        super().__init__(weights, degree, tails)
        self._range = None if tails is None else PreactivationRange(weights)
        self._first: list[Batch] = []
        self._gram: Gram | None = None
        self._moments = Moments()

    @abstractmethod
    def _begun(self, seen: PreactivationRange | None) -> Gram:
        """Sums of no inputs yet; `seen` gets the range of their preactivations."""

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self.count += len(x)
        self._moments.update(x, sample_weights)
        if self._gram is None and not self.tails:
            self._gram = self._begun(self._range)
        if self._gram is not None:
            self._gram.update(x, sample_weights)
            return
        w = None if sample_weights is None else sample_weights.clone()
        self._first.append((x.clone(), w))
        if sum(len(x) for x, _ in self._first) >= FIRST:
            self._decide_by_first()

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        if self.tails:
            drawn = _Drawn()
            for batch in batches():
                drawn.add(*batch)
            self._decide(drawn.x, drawn.w)

    def solve(self) -> Polynomial | JointPolynomial:
        if self._gram is None:
            self._decide_by_first()
        assert self._gram is not None
        fitted = self._gram.solve()
        own = fitted.base if isinstance(fitted, JointPolynomial) else fitted
        own.inputs = Seen.of(self._moments)
        ends = None if self._range is None else self._range.ends
        return fitted if ends is None else fitted.with_ends(ends)

    def _decide(self, x: Tensor, w: Tensor | None) -> None:
        """Let these inputs, which are not added, say where the tails begin."""
        assert self._range is not None
        assert self.tails is not None
        self._range.inner = best_tails(self.weights, x, w, self.degree, self.tails)
        self._gram = self._begun(self._range)

    def _decide_by_first(self) -> None:
        first, self._first = self._first, []
        if first:
            x, w = joined(first)
            self._decide(x[:FIRST], None if w is None else w[:FIRST])
        gram = self._gram = self._gram or self._begun(self._range)
        for x, w in first:
            gram.update(x, w)


class SamplesEstimator(SampleEstimator):
    """The best P_i(y_i) + z_i Q_i(y_i) for act(y_i) z_i over the inputs, per neuron."""

    name = "samples per neuron"
    _standardise: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        moments, drawn = NeuronMoments(self.weights), _Drawn() if self.tails else None
        for x, w in batches():
            moments.update(x, w)
            if drawn is not None:
                drawn.add(x, w)
        self._standardise = moments.standardise()
        if drawn is not None:
            self._decide(drawn.x, drawn.w)

    def _begun(self, seen: PreactivationRange | None) -> NeuronGram:
        return NeuronGram(self.weights, self.degree, self._standardise, seen)


class _Drawn:
    """FIRST of the samples, drawn uniformly, always the same."""

    x: Tensor
    w: Tensor | None

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._keys = torch.empty(0)

    def add(self, x: Tensor, w: Tensor | None) -> None:
        keys = torch.cat([self._keys, torch.rand(len(x), generator=self._random)])
        if len(self._keys):
            x, w = joined([(self.x, self.w), (x, w)])
        kept = keys.argsort()[:FIRST].sort().values
        self._keys, kept = keys[kept], kept.to(x.device)
        self.x, self.w = x[kept], None if w is None else w[kept]
