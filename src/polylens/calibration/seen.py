"""What a model is run on to see the inputs of its layers, and what of them counts in a fit."""

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from polylens.calibration.telling import OfLayer
from polylens.calibration.tokens import opened, read
from polylens.checks import Layer, check_at_least, label
from polylens.errors import (
    AttachmentError,
    InvalidInputError,
    NumericalWarning,
    PolylensError,
    UnsupportedModel,
)
from polylens.fitting.estimator import Estimator
from polylens.fitting.fit import estimator
from polylens.hosts.base import Arrival, Host, MLPSite, Observer
from polylens.hosts.batch import Batch, Inputs
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.joint import Fitted
from polylens.ranks import Forget, Ranks

# Inputs that every rank sees first, so that all decide alike: more than an estimator decides by.
LEADING = 4096
WEIGHTINGS = {"equal": "", "output": "weighted by 1 / |output|"}
# Norms of outputs below this share of the largest weigh no more than it.
SMALLEST = 1e-6
NOT_REACHED = "{}: the given inputs do not pass through it; give those that do"
DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


@dataclass(frozen=True)
class Calibration:
    """What a model is run on to see the inputs of its layers.

    Attributes:
        host: the model.
        steps: the batches, those of all ranks.
        exclude_first: leave out where sequences start.
        progress: show a progress bar.
        ranks: of which this process runs the model on its share; None alone.
    """

    host: Host
    steps: Sequence[Batch]
    exclude_first: bool
    progress: bool
    ranks: Ranks | None = None

    @classmethod
    def on(
        cls,
        host: Host,
        inputs: Inputs,
        attention_mask: Tensor | None,
        layers: Iterable[Layer],
        *,
        exclude_first: bool,
        batch_size: int,
        progress: bool,
        ranks: Ranks | None = None,
    ) -> "Calibration":
        """On these tokens [batch, pos], floats, or mapping of all that the model takes.

        Raises:
            InvalidInputError: inputs, mask or batch size that cannot be used.
        """
        check_at_least("batch_size", batch_size, 1)
        data = read_of_all(
            host, inputs, attention_mask, layers, exclude_first=exclude_first, ranks=ranks
        )
        exclude_first = any(bool(s.starts.any()) for s in data.streams.values()) and exclude_first
        steps = list(data.rows(visiting_order(len(data))).split(batch_size))
        return cls(host, steps, exclude_first, progress, ranks)

    def describe(self, origin: str) -> list[str]:
        """How many inputs there are, of which origin, and what was left out."""
        flags = [
            each.streams[each.about].there for each in self.steps if each.about in each.streams
        ]
        if flags:
            count = sum(int(each.sum()) for each in flags)
        else:
            count, origin = sum(map(len, self.steps)), "inputs"
        return [f"{count} {origin}", *["first positions excluded"] * self.exclude_first]

    @cached_property
    def leading(self) -> int:
        """How many batches come first on every rank: LEADING inputs of each layer."""
        if self.ranks is None:
            return len(self.steps)
        sizes = Counter[str]()
        for i, step in enumerate(self.steps, 1):
            for name in step.streams:
                there = step.counted(name, exclude_first=self.exclude_first)
                sizes[name] += len(step) if there is None else int(there.sum())
            if not step.streams:
                sizes[""] += len(step)
            if min(sizes.values()) >= LEADING:
                return i
        return len(self.steps)

    @cached_property
    def mine(self) -> Sequence[Batch]:
        """The batches that this process runs the model on, those that come first before others.

        Rank 0 counts those, the others forget them. Of what follows every rank has its turn.
        """
        if self.ranks is None:
            return self.steps
        own = self.steps[self.leading + self.ranks.rank :: self.ranks.size]
        return [*self.steps[: self.leading], *own]

    def settle(self, layer: Layer, seen: Estimator) -> None:
        """Between the batches that come first and others: by now everything is decided."""
        if self.ranks is None:
            return
        if self.leading < len(self.steps) and seen.count < LEADING:
            raise UnsupportedModel(
                f"layer {label(layer)} got {seen.count} inputs of the first {self.leading} "
                "batches: layers that run for some inputs only are not fitted over ranks; leave "
                "them out with layers=, or attach in one process"
            )
        if self.ranks.rank:
            seen.merge(Forget())

    def solved(self, seen: Estimator, layer: Layer, site: MLPSite) -> Fitted:
        """The fit to what all ranks saw, the same on each to the bit; warns as `solved`."""
        found = solved(seen, layer, site)
        if self.ranks is None:
            return found
        weights = site.weights().tensors().keys()
        for name, buffer in found.named_buffers():
            if name.split(".")[-1] not in weights:
                self.ranks.of_first(buffer)
        return found

    def merge(self, layer: Layer, seen: Estimator) -> None:
        """Let an estimator have seen what all ranks saw."""
        if self.ranks is None:
            return
        if len(self.mine) == self.leading:
            self.settle(layer, seen)
        self.ranks.gathered(None)
        seen.merge(self.ranks)

    def kept(self, i: int, layer: Layer) -> Tensor | None:
        """[batch, pos] of bool, which positions of my batch i count at a layer; None for all."""
        return self.mine[i].counted(self.host.stream(layer), exclude_first=self.exclude_first)


@dataclass(frozen=True)
class SeenInputs:
    """Fits to the inputs that layers are seen to read while the model runs on tokens.

    Args:
        estimator: what turns them into a polynomial: "gaussian", "samples", "joint", or a
            subclass of `Estimator`.
        tails: how much may lie beyond the ends of a neuron's polynomial; there its preactivation
            follows the asymptote of the activation, which is 0 or y for SiLU and GELU. None: no
            ends. 0.0: ends at the lowest and highest preactivation seen. A share, 0.05: further
            inside, so that so much of the layer's preactivations lies beyond, at the neurons and
            on the sides where it pays most; for "samples" and "joint", whose fit knows of it, at
            the cost of about three fits to 1,200 tokens, which are kept until then.
        weighting: of the inputs: "equal", or "output": by 1 / |true output|. What comes after a
            layer is normalised, so that rare huge outputs, which decide equal squares, matter
            less than their size.

    Raises:
        InvalidInputError: an estimator, tails or a weighting that there is not.
    """

    estimator: str | type[Estimator]
    tails: float | Literal["default"] | None
    weighting: str

    stream: ClassVar[str]
    # Sequences sampled from the model where no tokens are given.
    sampled: ClassVar[int]

    def __post_init__(self) -> None:
        self.kind.check_tails(self.share_beyond)
        if self.weighting not in WEIGHTINGS:
            raise InvalidInputError(
                f"weighting={self.weighting!r} is unknown; there are "
                f"{', '.join(map(repr, WEIGHTINGS))}"
            )

    @property
    def kind(self) -> type[Estimator]:
        return estimator(self.estimator)

    @property
    def share_beyond(self) -> float | None:
        """`tails`, or what the estimator takes on this stream."""
        if isinstance(self.tails, str) and self.tails == "default":
            return self.kind.default_tails[self.stream]
        return self.tails

    def begin(self, weights: MLPWeights | GLUWeights, degree: int) -> Estimator:
        """An estimator that has seen nothing yet."""
        return self.kind(weights, degree, self.share_beyond)

    def show(self, seen: Estimator, arrival: Arrival, kept: Tensor | None) -> None:
        """Let an estimator see what arrived in the rows that count."""
        x, y = arrival.rows(kept)
        seen.update(x, self._weights(y))

    def _weights(self, y: Tensor) -> Tensor | None:
        """[n] of inputs with true outputs y [n, d_out]; None for equal ones."""
        if self.weighting == "equal" or not len(y):
            return None
        size = cast(Tensor, torch.linalg.vector_norm(y, dim=1, dtype=torch.float64))  # pyright: ignore
        floor = SMALLEST * size.max()
        return torch.where(floor > 0, 1 / size.maximum(floor), 1.0)

    def describe(self) -> list[str]:
        """The options that are not the plain ones."""
        tails, described = self.share_beyond, list[str]()
        if self.weighting != "equal":
            described.append(WEIGHTINGS[self.weighting])
        if tails is not None:
            within = f"tails of {tails:.3g}" if tails else "at the preactivations seen"
            described.append(f"ends {'with ' * bool(tails)}{within}")
        return described


def read_of_all(
    host: Host,
    inputs: Inputs,
    attention_mask: Tensor | None,
    layers: Iterable[Layer],
    *,
    exclude_first: bool,
    ranks: Ranks | None,
) -> Batch:
    """`read` what all ranks give, one after the other.

    Raises:
        InvalidInputError: inputs or a mask that cannot be used, or that differ in shape.
    """
    read_own = partial(read, host, layers=layers, exclude_first=exclude_first)
    own = read_own(inputs, attention_mask)
    return own if ranks is None else read_own(*_of_all(ranks, inputs, attention_mask))


def _of_all(ranks: Ranks, inputs: Any, attention_mask: Any) -> tuple[Any, Any]:
    """What the ranks give, one after the other: (inputs, mask).

    Raises:
        InvalidInputError: sequences of several lengths, or a mask or mapping on some ranks only.
    """
    inputs, attention_mask = opened(inputs, attention_mask)
    mapping = isinstance(inputs, Mapping)
    given: dict[str, Any] = dict(cast(Any, inputs)) if mapping else {"tokens": inputs}
    names = sorted(given) if mapping else None
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
    given = {name: torch.as_tensor(each).cpu() for name, each in given.items()}
    shapes = {name: f"{list(each.shape[1:])} for each sequence" for name, each in given.items()}
    ranks.require_same({**shapes, "a mapping of": names})
    found = ranks.gathered(given)
    whole = {name: torch.cat([each[name] for each in found]) for name in given}
    mask = whole.pop("attention_mask", None) if attention_mask is not None else None
    return (whole if mapping else whole["tokens"]), mask


def visiting_order(n: int) -> Tensor:
    """A permutation of n sequences, so that the first are like all where texts follow texts."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def watch(
    host: Host,
    layers: Iterable[Layer],
    steps: Iterable[Batch],
    exclude_first: bool,
    see: Callable[[Layer, Arrival, Tensor | None], None],
) -> None:
    """One forward pass over the batches; see(layer, arrival, kept) at every layer of every batch.

    `arrival.rows(kept)` are the true inputs and outputs that count.
    """
    streams = {layer: host.stream(layer) for layer in layers}
    kept: dict[str, Tensor | None] = {}

    def observer(layer: Layer) -> Observer:
        return lambda arrival: see(layer, arrival, kept[streams[layer]])

    with host.observe({layer: observer(layer) for layer in streams}):
        for step in steps:
            kept = {n: step.counted(n, exclude_first=exclude_first) for n in streams.values()}
            host.run(step)


def require_deterministic(model: nn.Module) -> None:
    """AttachmentError if a forward pass would apply dropout."""
    if not model.training:
        return
    named = cast(Iterable[tuple[str, nn.Module]], model.named_modules())
    dropouts = ((name, each) for name, each in named if isinstance(each, DROPOUTS))
    active = [name for name, each in dropouts if each.training and each.p > 0]
    if active:
        raise AttachmentError(
            f"the model is in training mode with dropout ({active[0]} and {len(active) - 1} more), "
            "so its MLP inputs are random; call model.eval() first"
        )


def solved(seen: Estimator, layer: Layer, site: MLPSite) -> Fitted:
    """The fit to all inputs seen so far; what it warns of and refuses names the layer."""
    with warnings.catch_warnings(record=True) as caught, naming(layer, site):
        warnings.simplefilter("always", NumericalWarning)
        found = seen.solve()
    for each in caught:
        if each.category is NumericalWarning:
            warnings.warn(OfLayer(layer, _named(layer, site), str(each.message)), stacklevel=2)
        else:
            warnings.warn(each.message, each.category, stacklevel=2)
    return found


@contextmanager
def naming(layer: Layer, site: MLPSite) -> Generator[None, None, None]:
    """Add layer and path to whatever polylens raises inside."""
    try:
        yield
    except UnsupportedModel:
        raise
    except PolylensError as error:
        raise type(error)(f"{_named(layer, site)}: {error}") from error


def _named(layer: Layer, site: MLPSite) -> str:
    return f"layer {label(layer)} ({site.path})"
