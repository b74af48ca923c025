"""Evaluating a polynomial per neuron, P(v) + z Q(v), by Horner's rule, and how it goes on."""

from collections.abc import Callable
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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (v, z)):
        return _value(p, q, v, z, mean, ends, lambda name: None).to(v.dtype)
    flat = v.reshape(-1, v.shape[-1])
    flat_z = None if z is None else z.reshape(flat.shape)
    target = flat if reuse else flat.new_empty(flat.shape)
    dtype = torch.promote_types(v.dtype, p[0].dtype)
    direct = target.dtype == dtype and not (reuse and mean is None and ends is None)
    rows = max(1, BLOCK // flat.shape[-1]) if v.device.type == "cpu" else max(1, len(flat))
    memory: dict[str, Tensor] = {}
    for i in range(0, len(flat), rows):
        block, into = flat[i : i + rows], target[i : i + rows]

        def scratch(name: str, block: Tensor = block, into: Tensor = into) -> Tensor:
            if name == "value" and direct:
                return into
            if name not in memory:
                memory[name] = torch.empty_like(block, dtype=dtype)
            return memory[name][: len(block)]

        own_z = None if flat_z is None else flat_z[i : i + rows]
        value = _value(p, q, block, own_z, mean, ends, scratch)
        if value is not into:
            into.copy_(value)
    return target.reshape(v.shape)


def gained(v: Tensor, ends: Ends | None) -> Tensor | None:
    """What is gained beyond the ends, zero between them; None where nothing is anywhere."""
    value = None
    for beyond, rate in _gains(v, ends, lambda name: None):
        value = beyond * rate if value is None else torch.addcmul(value, beyond, rate)
    return value


# Memory for an intermediate result of this name, or None for its own, as autograd needs it.
_Scratch = Callable[[str], Tensor | None]


def _gains(v: Tensor, ends: Ends | None, scratch: _Scratch) -> list[tuple[Tensor, Tensor]]:
    """How far v is beyond an end and what it gains by unit, for each side with gains."""
    found = []
    for side, name, limit in () if ends is None else _sides(ends):
        beyond = torch.sub(v, side.start, out=scratch(name)).clamp_(**{limit: 0.0})
        found.append((beyond, _horner(side.rates, beyond, scratch, f"{name}, by unit")))
    return found


def _sides(ends: Ends) -> list[tuple[Growth, str, str]]:
    sides = (ends.below, "below", "max"), (ends.above, "above", "min")
    return [(side, name, limit) for side, name, limit in sides if side is not None]


def _value(
    p: Coefficients,
    q: Coefficients | None,
    v: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    ends: Ends | None,
    scratch: _Scratch,
) -> Tensor:
    near = v if mean is None else torch.sub(v, mean, out=scratch("near"))
    gains = _gains(near, ends, scratch)
    if ends is not None:
        near = torch.clamp(near, ends.low, ends.high, out=scratch("near"))
    if z is None:
        value = _horner(p, near, scratch, "value")
        for gain in gains:
            value = torch.addcmul(value, *gain, out=scratch("value"))
        return value
    if not q and not gains:
        return _horner(p, near, scratch, "value")
    factor = _horner(q, near, scratch, "factor") if q else near.new_zeros(())
    for gain in gains:
        factor = torch.addcmul(factor, *gain, out=scratch("factor"))
    return torch.addcmul(_horner(p, near, scratch, "value"), factor, z, out=scratch("value"))


def _horner(coefficients: Coefficients, v: Tensor, scratch: _Scratch, name: str) -> Tensor:
    if len(coefficients) == 1:
        return coefficients[0].expand_as(v)
    out = scratch(name)
    value = torch.addcmul(coefficients[-2], coefficients[-1], v, out=out)
    for a in reversed(coefficients[:-2]):
        value = torch.addcmul(a, value, v, out=out)
    return value
