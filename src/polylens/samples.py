"""Samples as the model of a layer's inputs: streamed least squares, neuron by neuron."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from polylens.errors import InvalidInputError
from polylens.neuron_gram import NeuronGram, NeuronMoments, checked
from polylens.polynomial import Polynomial
from polylens.weights import GLUWeights, MLPWeights

# Rows of a tensor handed out at a time.
ROWS = 1024

Batch = Tensor | tuple[Tensor, Tensor]


class Samples:
    """The inputs themselves as the input model.

    Args:
        x: a tensor [..., d_in]; an iterable of such batches; or a callable that returns a fresh
            iterator of batches. A batch may be (x, sample_weights [...]) with weights >= 0. An
            iterator that can be read only once serves one per-neuron fit, which then has its
            features standardised by the first batch; everything else reads the samples twice.
        weights: non-negative sample weights [...] of a tensor x.

    Raises:
        InvalidInputError: here or while reading: no samples, NaN, sizes that do not fit.
    """

    def __init__(
        self,
        x: Tensor | Iterable[Batch] | Callable[[], Iterable[Batch]],
        weights: Tensor | None = None,
    ) -> None:
        if isinstance(x, Tensor):
            if not x.dim() or not x.is_floating_point() or not x.numel():
                raise InvalidInputError(
                    f"samples must be floating point [..., d_in], got {x.dtype} {tuple(x.shape)}"
                )
            x = x.detach().reshape(-1, x.shape[-1])
            if weights is not None:
                weights = torch.as_tensor(weights).reshape(-1)
        elif weights is not None:
            raise InvalidInputError("weights= goes with a tensor; let batches be (x, weights)")
        elif not callable(x) and not isinstance(x, Iterable):
            raise InvalidInputError(
                "samples are a tensor, an iterable of batches, or a callable that returns one; "
                f"got {type(x).__name__}"
            )
        self._x, self._weights, self._used = x, weights, False

    @property
    def d_in(self) -> int | None:
        """Number of features; None while no batch has been seen."""
        return self._x.shape[1] if isinstance(self._x, Tensor) else None

    @property
    def reiterable(self) -> bool:
        """Whether the samples can be read more than once."""
        x = self._x
        return isinstance(x, Tensor) or callable(x) or iter(x) is not x

    def batches(
        self, dtype: torch.dtype, device: torch.device, d_in: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(x [n, d_in], sample weights [n] in float64 or None), checked."""
        if not self.reiterable:
            if self._used:
                raise InvalidInputError(
                    "this iterator of samples is used up and they are needed again; pass a list, "
                    "or a callable that returns a fresh iterator"
                )
            self._used = True
        empty = True
        for batch in self._raw():
            x, weights = batch if isinstance(batch, tuple) else (batch, None)
            x, weights = checked(x, weights, d_in)
            if len(x):
                empty, d_in = False, x.shape[1]
                yield x.to(device, dtype), None if weights is None else weights.to(device)
        if empty:
            raise InvalidInputError("no samples: the iterator is empty, nothing to fit to")

    def _raw(self) -> Iterable[Any]:
        if not isinstance(self._x, Tensor):
            return self._x() if callable(self._x) else self._x
        if self._weights is None:
            return self._x.split(ROWS)
        if len(self._weights) != len(self._x):
            raise InvalidInputError(
                f"{len(self._x)} samples but {len(self._weights)} sample weights"
            )
        return zip(self._x.split(ROWS), self._weights.split(ROWS), strict=True)

    def __repr__(self) -> str:
        what = tuple(self._x.shape) if isinstance(self._x, Tensor) else type(self._x).__name__
        return f"Samples({what})"

    def __deepcopy__(self, memo: dict) -> "Samples":
        return self


def fit_samples(weights: MLPWeights | GLUWeights, samples: Samples, degree: int) -> Polynomial:
    """The best P_i(y_i) + z_i Q_i(y_i) for act(y_i) z_i over the samples, per neuron.

    Two passes over samples that can be read twice (moments, then normal equations), one over an
    iterator. Memory is independent of their number.

    Raises:
        InvalidInputError: no samples, NaN, another number of features.
    """
    standardise = None
    dtype, device = torch.float64, weights.device
    if samples.reiterable:
        moments = NeuronMoments(weights)
        for x, sample_weights in samples.batches(dtype, device, weights.d_in):
            for i in range(0, len(x), ROWS):
                w = None if sample_weights is None else sample_weights[i : i + ROWS]
                moments.update(x[i : i + ROWS], w)
        standardise = moments.standardise()
    gram = NeuronGram(weights, degree, standardise)
    for x, sample_weights in samples.batches(dtype, device, weights.d_in):
        gram.update(x, sample_weights)
    return gram.solve(inputs=samples)
