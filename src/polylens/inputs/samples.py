"""Samples as the model of a layer's inputs."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polylens.checks import floating
from polylens.devices import numbers
from polylens.errors import InvalidInputError
from polylens.inputs.model import Fitted, InputModel, Layer
from polylens.inputs.residuals import ResidualSums
from polylens.ranks import Merge

linalg: Any = torch.linalg  # without types

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

    measured = True

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
            if not len(x):
                continue
            empty, d_in = False, x.shape[1]
            x, weights = _weighty(x, weights)
            # the rows of a tensor were looked at together
            size = ROWS if isinstance(self._x, Tensor) else max(1, len(x))
            for i in range(0, max(1, len(x)), size):
                w = None if weights is None else weights[i : i + size].to(device)
                yield x[i : i + size].to(device, dtype), w
        if empty:
            raise InvalidInputError("no samples: the iterator is empty, nothing to fit to")

    @torch.no_grad()
    def average(self, of: Callable[[Tensor], Tensor], layer: Layer) -> Tensor:
        total, weight = torch.zeros((), device=layer.device), 0.0
        for x, sample_weights in self.batches(layer.dtype, layer.device):
            w = x.new_ones(len(x)) if sample_weights is None else sample_weights
            total, weight = total + of(x).double() @ w.double(), weight + float(w.sum())
        return total / weight

    @torch.no_grad()
    def r2(self, polynomial: Fitted) -> Tensor:
        """Over the samples, streamed once more."""
        layer, sums = polynomial.weights, ResidualSums()
        for x, sample_weights in self.batches(layer.dtype, layer.device):
            sums.update(layer(x), polynomial.all_degrees(x), sample_weights)
        return sums.shares()

    def _raw(self) -> Iterable[Batch]:
        if not isinstance(self._x, Tensor):
            batches = _called(self._x) if callable(self._x) else self._x
            _require_batches(batches)
            return batches
        return [self._x if self._weights is None else (self._x, self._weights)]

    def __repr__(self) -> str:
        what = tuple(self._x.shape) if isinstance(self._x, Tensor) else type(self._x).__name__
        return f"Samples({what})"

    def __deepcopy__(self, memo: dict[int, object]) -> "Samples":
        return self


def _require_batches(batches: object) -> None:
    """InvalidInputError for what is neither iterable nor callable, or iterable by accident."""
    got, iterable = type(batches), isinstance(batches, Iterable) or callable(batches)
    iterable = iterable and not isinstance(batches, torch.nn.Module | type)
    if not iterable or issubclass(got, str | bytes | Mapping) or hasattr(got, "dtype"):
        raise InvalidInputError(
            "samples are a tensor, an iterable of batches, or a callable that returns one; got "
            f"{got.__name__}"
        )


def _called(source: Callable[[], Iterable[Batch]]) -> Iterable[Batch]:
    try:
        inspect.signature(source).bind()
    except TypeError as error:
        raise InvalidInputError(
            f"samples as a callable are called without arguments, and this one has {error}"
        ) from error
    except ValueError:  # it has no signature to be read
        pass
    return source()


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


def shaped(x: object, weights: object, d_in: int | None) -> tuple[Tensor, Tensor | None]:
    """One batch as x [n, d_in] and weights [n] in float64, or the error that says what is wrong."""
    x = floating("samples", x)
    if not x.dim() or not x.shape[-1]:
        raise InvalidInputError(f"samples must be [..., d_in], got {list(x.shape)}")
    if d_in is not None and x.shape[-1] != d_in:
        raise InvalidInputError(f"samples have {x.shape[-1]} features, {d_in} are expected")
    x = x.detach().reshape(-1, x.shape[-1])
    if weights is None:
        return x, None
    w = _sample_weights(weights).to(x.device)
    if len(w) != len(x):
        raise InvalidInputError(f"{len(x)} samples but {len(w)} sample weights")
    return x, w


def checked(x: object, weights: object, d_in: int | None) -> tuple[Tensor, Tensor | None]:
    """`shaped`, with values that can be fitted to."""
    x, w = shaped(x, weights, d_in)
    flaws = Flaws()
    flaws.note(x, w)
    flaws.require_none()
    return x, w


class Flaws:
    """Samples and weights that cannot be fitted to, counted where they are.

    Whether there are any is asked once, in the end: a GPU would have to be waited for.
    """

    def __init__(self) -> None:
        self._rows, self._found = 0, torch.zeros(2, dtype=torch.long)

    def note(self, x: Tensor, weights: Tensor | None) -> None:
        """Look at x [n, d_in] and weights [n]."""
        self._rows += len(x)
        # the largest of a row is NaN or infinite where any is, and needs no memory
        largest = linalg.vector_norm(x, math.inf, dim=1)
        bad = [(~torch.isfinite(largest)).sum()]
        if weights is not None:
            bad.append((~(torch.isfinite(weights) & (weights >= 0))).sum())
        found = torch.stack([*bad, *[torch.zeros_like(bad[0])] * (2 - len(bad))])
        self._found = found + self._found.to(x.device)

    def merge(self, by: Merge) -> None:
        """Let the counts become what `by` makes of them."""
        self._rows, self._found = by.total(self._rows), by.total(self._found)

    def require_none(self) -> None:
        """InvalidInputError if there were some (how many)."""
        samples, weights = numbers(self._found)
        if samples:
            raise InvalidInputError(f"{samples} of {self._rows} samples are NaN or infinite")
        if weights:
            raise InvalidInputError("sample weights must be finite and >= 0")


def _weighty(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Without samples of weight zero, which decide nothing."""
    if weights is None:
        return x, None
    kept = weights != 0
    return (x, weights) if bool(kept.all()) else (x[kept], weights[kept])


def joined(batches: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """(x, weights) of all batches; a batch without weights has ones where others have weights."""
    x = torch.cat([x for x, _ in batches])
    if all(w is None for _, w in batches):
        return x, None
    ones = (x.new_ones(len(x), dtype=torch.float64) for x, _ in batches)
    return x, torch.cat([o if w is None else w for o, (_, w) in zip(ones, batches, strict=True)])
