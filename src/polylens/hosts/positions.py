"""Where sequences start, which activations count and what is scored: nothing else decides it.

Language models park attention on the start of a sequence, where the MLPs' inputs are far from
all others. With `exclude_first` it is left out of what is fitted and measured (`counted`) and
stays true in a replaced model (`starts`, `keep_starts`). Left out is the first position that is
no padding; true stays position 0 of what the model is called on, unless that is a single position,
which continues a cached prompt.

`has_starts`, `at_starts` and `with_starts` refer to nothing but torch: they travel with
`hosts.nnsight.inline` to where polylens is not installed.
"""

import torch
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
    x, y = (t.reshape(-1, t.shape[-1]) for t in (arrival.x, arrival.y))
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


def starts(rows: Tensor, pos: int) -> Tensor:
    """[n] of bool: which of these rows of [batch * pos, d] activations start a sequence."""
    return rows % pos == 0 if pos > 1 else torch.zeros_like(rows, dtype=torch.bool)


def has_starts(h: Tensor) -> bool:
    """Whether h [batch, pos, d] has a position that starts a sequence."""
    return h.dim() >= 3 and h.shape[-2] > 1


def at_starts(h: Tensor) -> Tensor:
    """[batch, 1, d] of h [batch, pos, d] that `has_starts`: a view."""
    return h[..., :1, :]


def with_starts(out: Tensor, true: Tensor) -> Tensor:
    """out [batch, pos, d] that `has_starts`, with `true` [batch, 1, d] there."""
    return torch.cat([true, out[..., 1:, :]], dim=-2)


def keep_starts(out: Tensor, arrival: Arrival, pos: int | None = None) -> Tensor:
    """out, with the true output where sequences start.

    Args:
        out: [batch, pos, d], of an expert [n, d].
        pos: where it may be [batch * pos, d], too.
    """
    first = None if arrival.places is None else arrival.places.first
    if first is None and pos is not None and out.dim() == 2:
        first = starts(torch.arange(len(out), device=out.device), pos)
    if first is not None:
        return torch.where(first[:, None], arrival.y, out)
    return with_starts(out, at_starts(arrival.y)) if has_starts(out) else out
