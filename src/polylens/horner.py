"""Evaluating a polynomial per neuron, P(v) + z Q(v), by Horner's rule, and how it goes on."""

from typing import Any, NamedTuple

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
        factor = _sum(_horner(q, near) if q else None, gained(centred, ends))
        return _combined(_horner(p, near), factor, z).to(v.dtype)
    flat = v.reshape(-1, v.shape[-1])
    flat_z = None if z is None else z.reshape(flat.shape)
    target = flat if reuse else flat.new_empty(flat.shape)
    direct = not reuse and len(p) > 1 and target.dtype == p[0].dtype
    rows = max(1, BLOCK // flat.shape[-1]) if v.device.type == "cpu" else max(1, len(flat))
    for i in range(0, len(flat), rows):
        block, into = flat[i : i + rows], target[i : i + rows]
        block = block if mean is None else block - mean
        more = gained(block, ends)
        if ends is not None:
            spare = block if reuse or mean is not None else None
            block = torch.clamp(block, ends.low, ends.high, out=spare)
        h = _horner_inplace(p, block, into if direct else None)
        factor = _sum(_horner_inplace(q, block) if q else None, more)
        own_z = None if flat_z is None else flat_z[i : i + rows]
        h = _combined(h, factor, own_z, out=h if len(p) > 1 else None)
        if h is not into:
            into.copy_(h)
    return target.reshape(v.shape)


def gained(v: Tensor, ends: Ends | None) -> Tensor | None:
    """What is gained beyond the ends; zero between them."""
    total = None
    if ends is not None and ends.below is not None:
        beyond = (v - ends.below.start).clamp(max=0)
        total = beyond * _horner(ends.below.rates, beyond)
    if ends is not None and ends.above is not None:
        beyond = (v - ends.above.start).clamp(min=0)
        total = _sum(total, beyond * _horner(ends.above.rates, beyond))
    return total


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _combined(h: Tensor, factor: Tensor | None, z: Tensor | None, out: Any = None) -> Tensor:
    """h + z factor, of an MLP h + factor."""
    if factor is None:
        return h
    return torch.add(h, factor, out=out) if z is None else torch.addcmul(h, factor, z, out=out)


def _horner(coefficients: Coefficients, v: Tensor) -> Tensor:
    value = coefficients[-1].expand_as(v)
    for a in reversed(coefficients[:-1]):
        value = torch.addcmul(a, value, v)
    return value


def _horner_inplace(coefficients: Coefficients, v: Tensor, out: Tensor | None = None) -> Tensor:
    if len(coefficients) == 1:
        return coefficients[0].expand_as(v)
    value = torch.addcmul(coefficients[-2], coefficients[-1], v, out=out)
    for a in reversed(coefficients[:-2]):
        torch.addcmul(a, value, v, out=value)
    return value
