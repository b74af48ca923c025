"""Fits to samples, batch by batch, with ends where `clip` puts them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polylens.fitting.joint_gram import JointGram
from polylens.fitting.neuron_gram import NeuronGram, NeuronMoments
from polylens.fitting.tails import best_tails
from polylens.inputs.samples import Samples, joined
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.ends import Clip, PreactivationRange
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial

# Inputs that decide where the tails begin.
FIRST = 1200

Gram = NeuronGram | JointGram


class SampleFit:
    """Least squares over the inputs of one layer; memory does not grow with their number.

    Args:
        gram: (weights, degree, seen=) -> the normal equations.
        clip: see `polylens.polynomials.ends.Clip`. With a share, the first FIRST inputs say
            where the tails begin, so they should be like all, unless `decide` is given others
            before.

    Attributes:
        weights, clip: as above.
        count: inputs so far.
    """

    def __init__(
        self,
        gram: Callable[..., Gram],
        weights: MLPWeights | GLUWeights,
        degree: int,
        clip: Clip = False,
    ) -> None:
        self._new, self.weights, self._degree, self.clip = gram, weights, degree, clip
        self._range = PreactivationRange(weights) if clip else None
        self._first: list[tuple[Tensor, Tensor | None]] = []
        self._gram = self._begun() if isinstance(clip, bool) else None
        self.count = 0

    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        """Add inputs [n, d_in], weighted by [n] or equally."""
        self.count += len(x)
        if self._gram is not None:
            self._gram.update(x, sample_weights)
            return
        self._first.append((x.clone(), sample_weights))
        if self.count >= FIRST:
            self._decide_by_first()

    def decide(self, x: Tensor, sample_weights: Tensor | None) -> None:
        """Let these inputs, which are not added, say where the tails begin."""
        assert self._range is not None
        args = (self.weights, x, sample_weights, self._degree, self.clip)
        self._range.tails = best_tails(*args)
        self._gram = self._begun()

    def solve(self, inputs: Any = None) -> Polynomial | JointPolynomial:
        """The fit to all inputs so far; InvalidInputError if they are NaN or too few."""
        if self._gram is None:
            self._decide_by_first()
        assert self._gram is not None
        fitted = self._gram.solve(inputs=inputs)
        return fitted if self._range is None else fitted.clipped(self._range.ends)

    def _begun(self) -> Gram:
        return self._new(self.weights, self._degree, seen=self._range)

    def _decide_by_first(self) -> None:
        first, self._first = self._first, []
        if first:
            x, w = joined(first)
            self.decide(x[:FIRST], None if w is None else w[:FIRST])
        gram = self._gram = self._gram or self._begun()
        for x, sample_weights in first:
            gram.update(x, sample_weights)


def fit_samples(
    weights: MLPWeights | GLUWeights, samples: Samples, degree: int, clip: Clip = False
) -> Polynomial:
    """The best P_i(y_i) + z_i Q_i(y_i) for act(y_i) z_i over the samples, per neuron.

    Two passes over samples that can be read twice (moments and which of them decide the tails,
    then normal equations), one over an iterator. Memory is independent of their number.

    Raises:
        InvalidInputError: no samples, NaN, another number of features.
    """
    standardise, drawn = None, None
    if samples.reiterable:
        moments, drawn = NeuronMoments(weights), None if isinstance(clip, bool) else _Drawn()
        for x, sample_weights in samples.batches(torch.float64, weights.device, weights.d_in):
            moments.update(x, sample_weights)
            if drawn is not None:
                drawn.add(x, sample_weights)
        standardise = moments.standardise()
    gram = partial(NeuronGram, standardise=standardise)
    return _fitted(SampleFit(gram, weights, degree, clip), samples, torch.float64, drawn)


def fit_joint(
    weights: MLPWeights | GLUWeights, samples: Samples, degree: int, clip: Clip = False
) -> JointPolynomial:
    """Joint least squares over all neurons' features, with a ridge towards the per-neuron fit.

    See `JointGram`. One pass over the samples; with a share of tails two where they can be read
    twice.

    Raises:
        InvalidInputError: no samples, NaN, or too many features (the size).
    """
    dtype, drawn = torch.promote_types(weights.dtype, torch.float32), None
    fit = SampleFit(JointGram, weights, degree, clip)
    if samples.reiterable and not isinstance(clip, bool):
        drawn = _Drawn()
        for x, sample_weights in samples.batches(dtype, weights.device, weights.d_in):
            drawn.add(x, sample_weights)
    return _fitted(fit, samples, dtype, drawn)


def _fitted(fit: SampleFit, samples: Samples, dtype: torch.dtype, drawn: "_Drawn | None") -> Any:
    if drawn is not None:
        fit.decide(drawn.x, drawn.w)
    for x, sample_weights in samples.batches(dtype, fit.weights.device, fit.weights.d_in):
        fit.update(x, sample_weights)
    return fit.solve(inputs=samples)


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
