"""Inputs that stand out: which hold much of a layer's variance, or are unlike calibration's."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from polylens.checks import Layer, label
from polylens.inputs.residuals import ResidualSums
from polylens.ranks import Ranks

# An input holds much if it has this share of a layer's variance, ...
MUCH = 0.1
# ... and is unlike what calibration saw if this share of its preactivations lies beyond it.
UNLIKE = 0.05
# How many are remembered of each layer, and named in all.
KEPT, NAMED = 8, 4

# Of an input, by its index: what a reader knows it by.
Name = Callable[[int], str]


class StandingOut:
    """Streamed over the inputs of one layer.

    Attributes:
        unlike: how many inputs are unlike those of calibration; None where nothing says which.
    """

    def __init__(self, seen: Tensor | None) -> None:
        self._seen = seen
        self._outside: Tensor | float = 0.0
        self._unlike: Tensor | int = 0
        self._n = 0
        # rows: what they are ordered by, the index of the input
        self._far: Tensor | None = None
        self._heavy: Tensor | None = None
        self._outputs = torch.empty(0)

    def update(
        self,
        index: Tensor,
        y: Tensor,
        size: Tensor,
        error: Tensor,
        preactivations: Tensor | None,
    ) -> None:
        """Add some inputs.

        Args:
            index: [n] of each among all inputs.
            y: [n, d_out] outputs; size: [n] their squared distances from any fixed point.
            error: [n] squared error of what replaces the layer.
            preactivations: [n, d_mlp] y; not read where calibration's are not known.
        """
        if not len(index):
            return
        self._n += len(index)
        index = index.to(y.device, torch.float64)
        self._keep_heavy(torch.stack([size, index, error]), y)
        if self._seen is None or preactivations is None:
            return
        low, high = self._seen
        share = ((preactivations < low) | (preactivations > high)).double().mean(-1)
        self._outside = self._outside + share.sum()
        self._unlike = self._unlike + (share > UNLIKE).sum()
        self._keep_far(torch.stack([share, index]))

    def _keep_heavy(self, new: Tensor, outputs: Tensor) -> None:
        if self._heavy is not None:
            new, outputs = torch.cat([self._heavy, new], 1), torch.cat([self._outputs, outputs])
        kept = _largest(new[0])
        self._heavy, self._outputs = new[:, kept], outputs[kept]

    def _keep_far(self, new: Tensor) -> None:
        new = new if self._far is None else torch.cat([self._far, new], 1)
        self._far = new[:, _largest(new[0])]

    def merge(self, ranks: Ranks) -> None:
        """Let all ranks have seen what each has; what is kept goes to the CPU."""
        sums = self._outside, self._unlike, self._n
        found = ranks.gathered((*sums, self._far, self._heavy, self._outputs))
        self._far = self._heavy = None
        self._outside, self._unlike, self._n = (sum(each[i] for each in found) for i in range(3))
        for *_, far, heavy, outputs in found:
            if heavy is not None:
                self._keep_heavy(heavy, outputs)
            if far is not None:
                self._keep_far(far)

    @property
    def unlike(self) -> int | None:
        return None if self._far is None else int(self._unlike)

    @property
    def unseen(self) -> float | None:
        """Share of all preactivations that lie beyond those of calibration."""
        return None if self._far is None else float(self._outside) / self._n

    def far(self) -> Iterator[tuple[int, float]]:
        """(index, share of its preactivations beyond calibration's), the largest first."""
        for share, index in [] if self._far is None else self._far.T.tolist():
            if share > UNLIKE:
                yield int(index), share

    def heavy(self, sums: ResidualSums) -> tuple[list[tuple[int, float]], float | None]:
        """[(index, its share of the variance)], and R2 of the replacement without these inputs.

        Args:
            sums: of all inputs.
        """
        total = sums.variance * sums.n
        if self._heavy is None or not total > 0:
            return [], None
        least = max(MUCH, 20 / self._n) * total
        there = (self._heavy[0] > least).nonzero().squeeze(1)
        if not len(there):
            return [], None
        sizes, index, errors = self._heavy[:, there]
        found = [(int(i), float(size) / total) for size, i in zip(sizes, index, strict=True)]
        return found, sums.last_without(sums.centred(self._outputs[there]), errors)


def remarks(layers: Mapping[Layer, tuple[StandingOut, ResidualSums]], name: Name) -> Iterator[str]:
    """What a report says of the inputs of these layers, which have one index in all of them."""
    heavy, far = dict[int, list[str]](), dict[int, list[str]]()
    for layer, (found, sums) in layers.items():
        inputs, without = found.heavy(sums)
        r2 = "" if without is None else f", R² {without:.4f} without"
        for index, share in inputs:
            heavy.setdefault(index, []).append(f"{share:.0%} of layer {label(layer)}{r2}")
        for index, share in found.far():
            far.setdefault(index, []).append(f"{share:.0%} of layer {label(layer)}")
    if heavy:
        yield (
            f"inputs that hold more than {MUCH:.0%} of a layer's variance each, which R² there "
            f"is about first: {_named(heavy, name)}"
        )
    if far:
        most = max(found.unlike or 0 for found, _ in layers.values())
        yield (
            f"inputs unlike those of calibration, with more than {UNLIKE:.0%} of a layer's "
            f"preactivations beyond all that it saw (at most {most:,} in one layer): "
            f"{_named(far, name)}"
        )


def _largest(sizes: Tensor) -> Tensor:
    """Indices of the KEPT largest."""
    return sizes.topk(min(KEPT, len(sizes))).indices


def _named(inputs: Mapping[int, list[str]], name: Name) -> str:
    order = sorted(inputs, key=lambda index: -len(inputs[index]))
    named: list[str] = []
    for index in order[:NAMED]:
        where = inputs[index]
        several = f" and {len(where) - 1} more" if len(where) > 1 else ""
        named.append(f"{name(index)} ({where[0]}{several})")
    more = f" and {len(order) - NAMED} more" if len(order) > NAMED else ""
    return ", ".join(named) + more
