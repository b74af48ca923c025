"""Fits to the inputs themselves, neuron by neuron, with ends where `tails` puts them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from polylens.fitting.estimator import Batch, Estimator
from polylens.fitting.neuron_gram import NeuronGram, NeuronMoments
from polylens.fitting.tails import best_tails
from polylens.inputs.gaussian import Moments
from polylens.inputs.samples import joined
from polylens.inputs.seen import Seen
from polylens.normal_forms.preactivation import Shown, blocks
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.ends import PreactivationRange
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial
from polylens.ranks import Merge

# docs/fidelity.md, "How much may lie beyond the ends".
TAILS = 0.05
# Inputs that decide where the tails begin.
FIRST = 1200
# Inputs that are kept, to say how good the fit is.
MEASURED = 512


class Gram(Protocol):
    """Normal equations of all inputs so far."""

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None: ...

    def merge(self, by: Merge) -> None: ...

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
        self._moments, self._some = Moments(), list[Batch]()

    @abstractmethod
    def _begun(self, seen: PreactivationRange | None, deciding: Sequence[Shown] | None) -> Gram:
        """Sums of no inputs yet.

        Args:
            seen: gets the range of their preactivations.
            deciding: preactivations of those that said where the tails begin.
        """

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        self.count += len(x)
        self._moments.update(x, sample_weights)
        left = MEASURED - sum(len(x) for x, _ in self._some)
        if left > 0:
            w = None if sample_weights is None else sample_weights[:left].clone()
            self._some.append((x[:left].clone(), w))
        if self._gram is None and not self.tails:
            self._gram = self._begun(self._range, None)
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

    def merge(self, by: Merge) -> None:
        if self._gram is None:
            self._decide_by_first()
        assert self._gram is not None
        self.count = by.total(self.count)
        self._moments.merge(by)
        self._gram.merge(by)  # first: what waits there has not been in the range yet
        if self._range is not None:
            self._range.merge(by)

    def solve(self) -> Polynomial | JointPolynomial:
        if self._gram is None:
            self._decide_by_first()
        assert self._gram is not None
        fitted = self._gram.solve()
        own = fitted.base if isinstance(fitted, JointPolynomial) else fitted
        own.inputs = Seen.of(self._moments, self._some)
        ends, seen = (None, None) if self._range is None else (self._range.ends, self._range.seen)
        return fitted if ends is None else fitted.with_ends(ends).having_seen(seen)

    def _decide(self, x: Tensor, w: Tensor | None) -> Sequence[Shown]:
        """Let these inputs, which are not added, say where the tails begin.

        Returns their preactivations.
        """
        assert self._range is not None
        assert self.tails is not None
        shown = list(blocks(self.weights, x, w))
        self._range.inner = best_tails(self.weights, x, w, self.degree, self.tails, shown)
        self._gram = self._begun(self._range, shown)
        return shown

    def _decide_by_first(self) -> None:
        first, self._first = self._first, []
        if first:
            x, w = joined(first)
            deciding, rest = (
                (x[rows], None if w is None else w[rows])
                for rows in (slice(FIRST), slice(FIRST, None))
            )
            shown = self._decide(*deciding)
            if isinstance(self._gram, _Both):
                self._gram.update(*deciding, shown)
                first = [rest]
        gram = self._gram = self._gram or self._begun(self._range, None)
        for x, w in first:
            gram.update(x, w)


class SamplesEstimator(SampleEstimator):
    """The best P_i(y_i) + z_i Q_i(y_i) for act(y_i) z_i over the inputs, per neuron."""

    name = "samples per neuron"
    _standardise: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def kept_bytes(cls, weights: MLPWeights | GLUWeights, degree: int) -> int:
        size = NeuronGram.size_of(weights, degree)
        return 8 * (weights.d_in**2 + 2 * weights.d_mlp * size**2)

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        moments, drawn = NeuronMoments(self.weights), _Drawn() if self.tails else None
        for x, w in batches():
            moments.update(x, w)
            if drawn is not None:
                drawn.add(x, w)
        self._standardise = moments.standardise()
        if drawn is not None:
            self._decide(drawn.x, drawn.w)

    def _begun(self, seen: PreactivationRange | None, deciding: Sequence[Shown] | None) -> Gram:
        if seen is None or deciding is None:
            return NeuronGram(self.weights, self.degree, self._standardise, seen)
        return _Both(self.weights, self.degree, self._standardise, seen, deciding)


class _Both:
    """Normal equations of what replaces a layer, with ends, and of the optima, without.

    Replacements of a lower degree, which have ends of their own, are fitted to the inputs that
    decided these alone: their part is not worth as many sums again.
    """

    def __init__(
        self,
        weights: MLPWeights | GLUWeights,
        degree: int,
        standardise: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        seen: PreactivationRange,
        deciding: Sequence[Shown],
    ) -> None:
        if standardise is None:
            moments = NeuronMoments(weights)
            for shown in deciding:
                moments.add(*shown)
            standardise = moments.standardise(fallback=1.0)
        self._optima = NeuronGram(weights, degree, standardise)
        self._replacing = NeuronGram(weights, degree, standardise, seen)
        self._lower: list[NeuronGram] = []
        assert seen.inner is not None
        for k in range(1, degree):
            inner = PreactivationRange(weights, seen.inner[k])
            self._lower.append(NeuronGram(weights, k, standardise, inner))
            for shown in deciding:
                self._lower[-1].add(*shown)

    def update(
        self,
        x: Tensor,
        sample_weights: Tensor | None = None,
        shown: Sequence[Shown] | None = None,
    ) -> None:
        self._replacing.update(x, sample_weights, beside=self._optima, shown=shown)

    def merge(self, by: Merge) -> None:
        self._replacing.merge(by, beside=self._optima)

    def solve(self) -> Polynomial:
        top, optima = self._replacing.solve(), self._optima.solve(wait=False)
        P, Q = top.P, top.Q
        for k, gram in enumerate(self._lower, 1):
            own = gram.solve(wait=False)
            P[k, : k + 1] = own.P[k]
            if Q is not None and own.Q is not None:
                Q[k, :k] = own.Q[k]
        optima.ridge = top.ridge
        return optima.with_replacement(P, Q)


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
