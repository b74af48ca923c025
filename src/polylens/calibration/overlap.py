"""Whether held-out text is that of the calibration."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polylens.devices import numbers
from polylens.hosts.batch import Batch

# Tokens of a passage, and how many passages are remembered.
LENGTH, KEPT = 12, 1024
# Odd 64-bit constants of the hash.
_BASE, _MIX = 6364136223846793005, -4658895280553007687


class TokenSketch:
    """The passages of some text, of which it remembers those of least hash.

    A passage is LENGTH tokens in a row (a whole sequence that is shorter). Of two texts the share
    of common passages is that among the KEPT of least hash, to about its square root over 32.
    """

    def __init__(self, hashes: Tensor) -> None:
        unique = cast(Tensor, torch.unique(hashes))  # pyright: ignore[reportUnknownMemberType]
        self._hashes = unique[:KEPT]

    @classmethod
    def of(cls, steps: Iterable[Batch]) -> "TokenSketch | None":
        """Of the tokens that the model is run on; None where it is run on something else."""
        found = [each for step in steps for each in _hashes(step)]
        return cls(torch.cat(found)) if found else None

    def share_of(self, other: Batch) -> float:
        """Share of the passages of other text that are in this one; 0 without any."""
        found = list(_hashes(other))
        if not found or not len(self._hashes):
            return 0.0
        hashes = torch.cat(found)
        if len(self._hashes) == KEPT:  # beyond the last nothing is known
            hashes = hashes[hashes <= self._hashes[-1]]
        return float(torch.isin(hashes, self._hashes).double().mean()) if len(hashes) else 0.0

    def to_json(self) -> str:
        return "".join(f"{value & (2**64 - 1):016x}" for value in numbers(self._hashes))

    @classmethod
    def from_json(cls, text: Any) -> "TokenSketch | None":
        """What `to_json` wrote; None for anything else."""
        try:
            hashes = [int(text[i : i + 16], 16) for i in range(0, len(text), 16)]
            return cls(torch.tensor([h - 2**64 * (h >= 2**63) for h in hashes], dtype=torch.int64))
        except (TypeError, ValueError, RuntimeError):
            return None


def _hashes(batch: Batch) -> Sequence[Tensor]:
    """[passages] 64-bit hashes, of each sequence that is tokens."""
    found: list[Tensor] = []
    for stream in batch.streams.values():
        if stream.ids is None:
            continue
        ids, n = stream.ids.cpu().long(), min(LENGTH, stream.ids.shape[1])
        powers = torch.tensor([pow(_BASE, k, 2**63) for k in range(n)])
        whole = stream.there.cpu().unfold(1, n, 1).all(-1)
        hashes = ((ids.unfold(1, n, 1) + 1) * powers).sum(-1)[whole]
        hashes = (hashes ^ (hashes >> 29)) * _MIX
        found.append(hashes ^ (hashes >> 32))
    return found
