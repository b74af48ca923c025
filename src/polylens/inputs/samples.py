"""Samples as the model of a layer's inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from polylens.checks import floating
from polylens.errors import InvalidInputError
from polylens.inputs.model import Fitted, InputModel
from polylens.inputs.residuals import ResidualSums

# Rows of a tensor handed out at a time.
ROWS = 1024

Batch = Tensor | tuple[Tensor, Tensor]


class Samples(InputModel):
    """The inputs themselves as the input model. Data, so files do not keep them.

    Args:
        x: a tensor [..., d_in]; an iterable of such batches; or a callable that returns a fresh
            iterator of batches. A batch may be (x, sample_weights [...]) with weights >= 0. An
            iterator that can be read only once serves one fit (per neuron, features are then
            standardised by the first batch); R2 reads the samples again.
        weights: non-negative sample weights [...] of a tensor x.

    Raises:
        InvalidInputError: here or while reading: no samples, NaN, sizes that do not fit.

    >>> import polylens
    >>> layer = polylens.MLPWeights(torch.eye(2), torch.ones(2, 1), "relu")
    >>> x = torch.tensor([[0.0, 1.0], [1.0, -1.0], [2.0, 3.0]])
    >>> polylens.fit(layer, polylens.Samples(x), 2)(x).round().squeeze()  # three points, a parabola
    tensor([1., 1., 5.])
    """

    def __init__(
        self,
        x: Tensor | Iterable[Batch] | Callable[[], Iterable[Batch]],
        weights: Tensor | None = None,
    ) -> None:
        if isinstance(x, Tensor):
            x = floating("samples", x)
            if not x.dim() or not x.numel():
                raise InvalidInputError(f"samples must be [..., d_in], got {list(x.shape)}")
            x = x.detach().reshape(-1, x.shape[-1])
            if weights is not None:
                weights = _sample_weights(weights)
        elif weights is not None:
            raise InvalidInputError("weights= goes with a tensor; let batches be (x, weights)")
        else:
            _require_batches(x)
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
            x, weights = checked(*_parts(batch), d_in)
            if len(x):
                empty, d_in = False, x.shape[1]
                yield x.to(device, dtype), None if weights is None else weights.to(device)
        if empty:
            raise InvalidInputError("no samples: the iterator is empty, nothing to fit to")

    @torch.no_grad()
    def r2(self, polynomial: Fitted) -> Tensor:
        """Over the samples, streamed once more."""
        layer, sums = polynomial.weights, ResidualSums()
        for x, sample_weights in self.batches(layer.dtype, layer.device):
            sums.update(layer(x), polynomial.all_degrees(x), sample_weights)
        return sums.shares()

    def _raw(self) -> Iterable[Batch]:
        if not isinstance(self._x, Tensor):
            batches = self._x() if callable(self._x) else self._x
            _require_batches(batches)
            return batches
        if self._weights is None:
            return torch.split(self._x, ROWS)
        if len(self._weights) != len(self._x):
            raise InvalidInputError(
                f"{len(self._x)} samples but {len(self._weights)} sample weights"
            )
        return zip(torch.split(self._x, ROWS), torch.split(self._weights, ROWS), strict=True)

    def __repr__(self) -> str:
        what = tuple(self._x.shape) if isinstance(self._x, Tensor) else type(self._x).__name__
        return f"Samples({what})"

    def __deepcopy__(self, memo: dict[int, object]) -> "Samples":
        return self


def _require_batches(batches: object) -> None:
    """InvalidInputError for what is neither iterable nor callable, or iterable by accident."""
    got, iterable = type(batches), isinstance(batches, Iterable) or callable(batches)
    if not iterable or issubclass(got, str | bytes | Mapping) or hasattr(got, "dtype"):
        raise InvalidInputError(
            "samples are a tensor, an iterable of batches, or a callable that returns one; got "
            f"{got.__name__}"
        )


def _parts(batch: object) -> tuple[object, object]:
    """(x, sample weights or None)."""
    if not isinstance(batch, tuple):
        return batch, None
    parts = cast("tuple[object, ...]", batch)
    if len(parts) != 2:
        raise InvalidInputError(f"a batch is x or (x, sample_weights), got {len(parts)} things")
    return parts[0], parts[1]


def _sample_weights(weights: object) -> Tensor:
    """[n] float64, of numbers of any kind but complex: counts of repetitions, too."""
    counts = isinstance(weights, Tensor) and not weights.is_complex()
    w = weights.double() if isinstance(weights, Tensor) and counts else weights
    return floating("sample weights", w).detach().double().reshape(-1)


def checked(x: object, weights: object, d_in: int | None) -> tuple[Tensor, Tensor | None]:
    """One batch as x [n, d_in] and weights [n] in float64, or the error that says what is wrong."""
    x = floating("samples", x)
    if not x.dim() or not x.shape[-1]:
        raise InvalidInputError(f"samples must be [..., d_in], got {list(x.shape)}")
    if d_in is not None and x.shape[-1] != d_in:
        raise InvalidInputError(f"samples have {x.shape[-1]} features, {d_in} are expected")
    x = x.detach().reshape(-1, x.shape[-1])
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(1).sum())
        raise InvalidInputError(f"{bad} of {len(x)} samples in a batch are NaN or infinite")
    if weights is None:
        return x, None
    w = _sample_weights(weights).to(x.device)
    if len(w) != len(x):
        raise InvalidInputError(f"{len(x)} samples but {len(w)} sample weights")
    if not torch.isfinite(w).all() or (w < 0).any():
        raise InvalidInputError("sample weights must be finite and >= 0")
    return x, w


def joined(batches: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """(x, weights) of all batches; a batch without weights has ones where others have weights."""
    x = torch.cat([x for x, _ in batches])
    if all(w is None for _, w in batches):
        return x, None
    ones = (x.new_ones(len(x), dtype=torch.float64) for x, _ in batches)
    return x, torch.cat([o if w is None else w for o, (_, w) in zip(ones, batches, strict=True)])
