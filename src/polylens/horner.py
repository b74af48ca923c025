"""Evaluating a polynomial per neuron, P(v) + z Q(v), by Horner's rule, and how it goes on."""

from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one elementwise block on a CPU: many for the cost of a call, few for a cache.
BLOCK = 1 << 18

Coefficients = tuple[Tensor, ...]  # [d_mlp] each, of v^0, v^1, ...


class Growth(NamedTuple):
    """What a function gains beyond a point: sum_j rates[j - 1] (v - start)^j.

    Attributes:
        start: [d_mlp], infinite where there is none.
        rates: [d_mlp] each.
    """

    start: Tensor
    rates: Coefficients


class Ends(NamedTuple):
    """Where a polynomial ends: P at the end goes on, and with what the activation gains.

    Attributes:
        low, high: [d_mlp] lowest and highest v.
        below, above: gains beyond; None where nothing is gained by any neuron.
    """

    low: Tensor
    high: Tensor
    below: Growth | None
    above: Growth | None


def evaluate(
    p: Coefficients,
    q: Coefficients | None,
    v: Tensor,
    z: Tensor | None,
    mean: Tensor | None = None,
    ends: Ends | None = None,
    reuse: bool = False,
) -> Tensor:
    """P(v) + z Q(v), [..., d_mlp] in v's dtype; of v - mean where there is one.

    With ends it is P(c) + z Q(c) + z gained(v), of an MLP P(c) + gained(v), where c is v - mean
    or the end that it is beyond.

    Args:
        p, q: in the dtype of evaluation.
        reuse: may overwrite v, unless autograd needs it.
    """
    grows = ends is not None and not (ends.below is None and ends.above is None)
    if len(p) == 1 and not grows:
        return p[0].to(v.dtype).expand_as(v)
    needs_graph = torch.is_grad_enabled() and (
        v.requires_grad or (z is not None and z.requires_grad)
    )
    if needs_graph:
        centred = v if mean is None else v - mean
        near = centred if ends is None else centred.clamp(ends.low, ends.high)
        return _value(p, q, near, z, _gains(centred, ends)).to(v.dtype)
    flat = v.reshape(-1, v.shape[-1])
    flat_z = None if z is None else z.reshape(flat.shape)
    target = flat if reuse else flat.new_empty(flat.shape)
    direct = not reuse and len(p) > 1 and target.dtype == p[0].dtype
    rows = max(1, BLOCK // flat.shape[-1]) if v.device.type == "cpu" else max(1, len(flat))
    for i in range(0, len(flat), rows):
        block, into = flat[i : i + rows], target[i : i + rows]
        block = block if mean is None else block - mean
        gains = _gains(block, ends)
        if ends is not None:
            spare = block if reuse or mean is not None else None
            block = torch.clamp(block, ends.low, ends.high, out=spare)
        own_z = None if flat_z is None else flat_z[i : i + rows]
        h = _value(p, q, block, own_z, gains, into if direct else None, inplace=True)
        if h is not into:
            into.copy_(h)
    return target.reshape(v.shape)


def gained(v: Tensor, ends: Ends | None) -> Tensor | None:
    """What is gained beyond the ends, zero between them; None where nothing is anywhere."""
    gains = _gains(v, ends)
    return _add_gains(torch.zeros_like(v), gains, inplace=False) if gains else None


def _gains(v: Tensor, ends: Ends | None) -> list[tuple[Tensor, Tensor]]:
    """How far v is beyond an end and what it gains by unit, for each side with gains."""
    found = []
    for side, limit in () if ends is None else ((ends.below, "max"), (ends.above, "min")):
        if side is not None:
            beyond = (v - side.start).clamp_(**{limit: 0.0})
            found.append((beyond, _horner(side.rates, beyond)))
    return found


def _add_gains(value: Tensor, gains: list[tuple[Tensor, Tensor]], inplace: bool) -> Tensor:
    for beyond, rate in gains:
        value = torch.addcmul(value, beyond, rate, out=value if inplace else None)
    return value


def _value(
    p: Coefficients,
    q: Coefficients | None,
    v: Tensor,
    z: Tensor | None,
    gains: list[tuple[Tensor, Tensor]],
    out: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """P(v) + z Q(v) with gains; `inplace`: in as little memory as can be, without autograd."""
    h, fresh = _horner(p, v, out, inplace), inplace and len(p) > 1
    if z is None:
        return _add_gains(h, gains, fresh)
    if not q and not gains:
        return h
    factor = _horner(q, v, None, inplace) if q else torch.zeros_like(v)
    factor = _add_gains(factor, gains, inplace and not (q and len(q) == 1))
    return torch.addcmul(h, factor, z, out=h if fresh else None)


def _horner(
    coefficients: Coefficients, v: Tensor, out: Tensor | None = None, inplace: bool = False
) -> Tensor:
    if len(coefficients) == 1:
        return coefficients[0].expand_as(v)
    value = torch.addcmul(coefficients[-2], coefficients[-1], v, out=out)
    for a in reversed(coefficients[:-2]):
        value = torch.addcmul(a, value, v, out=value if inplace else None)
    return value
