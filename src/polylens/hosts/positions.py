"""Where sequences start, which activations count and what is scored: nothing else decides it.

Language models park attention on the start of a sequence, where the MLPs' inputs are far from
all others. With `exclude_first` the first position that is no padding is left out of what is
fitted and of R2 (`counted`). Nothing here decides what flows in a replaced model: there an input
is covered by a polynomial or lies beyond its ends, wherever in a call it stands.
"""

import torch
from einops import rearrange
from torch import Tensor

from polylens.hosts.base import Arrival


def unpadded(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[batch, pos] of bool: False at padding."""
    if attention_mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return attention_mask.to(tokens.device) != 0


def counted(tokens: Tensor, attention_mask: Tensor | None, *, exclude_first: bool) -> Tensor:
    """[batch, pos] of bool: True where an activation counts.

    Never at padding; with exclude_first not at the first real position of a sequence either,
    which is position 0 unless the sequence is padded on the left.
    """
    there = unpadded(tokens, attention_mask)
    return there & (there.long().cumsum(-1) > 1) if exclude_first else there


def kept_rows(inputs: Tensor, mask: Tensor | None, *, exclude_first: bool) -> Tensor | None:
    """Which of the [batch * pos, d] activations of a batch count: indices, or None for all.

    Of a batch of token ids as in `counted`; of a batch of floats all.
    """
    if inputs.is_floating_point():
        return None
    flags = counted(inputs, mask, exclude_first=exclude_first).reshape(-1)
    return None if bool(flags.all()) else flags.nonzero().squeeze(1)


def rows(arrival: Arrival, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [n, d_in] and y [n, d_out]: what arrived in the rows that `kept_rows` has chosen.

    At an expert those of its inputs that are among them.
    """
    x, y = (rearrange(t, "... d -> (...) d") for t in (arrival.x, arrival.y))
    if kept is None:
        return x, y
    kept, places = kept.to(x.device), arrival.places
    chosen = kept if places is None else torch.isin(places.rows, kept)
    return x[chosen], y[chosen.to(y.device)]


def targets(there: Tensor, lead: int = 1) -> Tensor:
    """[batch, pos - lead] of bool: where a real position predicts the token `lead` further on.

    Args:
        there: [batch, pos] of bool, `unpadded`.
    """
    return there[:, : there.shape[1] - lead] & there[:, lead:]
