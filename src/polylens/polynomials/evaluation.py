"""Evaluating a polynomial per neuron, P(v) + z Q(v), by Horner's rule, and how it goes on.

This module refers to nothing but torch, for its source travels to where polylens is not installed
(`polylens.hosts.nnsight.inline`): no named tuples or dataclasses, which have methods without
source, and no super().
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Elements of one elementwise block on a CPU: many for the cost of a call, few for a cache.
BLOCK = 1 << 18

# Rows [d_mlp] of a table.
Rows = tuple[Tensor, ...]
# What evaluation reads, by name. "P" and, of a GLU, "Q": coefficients of v^0, v^1, ... Where the
# polynomial ends, "clip": lowest and highest v that it is evaluated at; "below" and "above": what
# is gained beyond, from a start on (infinite where there is none), as rates of (v - start)^1,
# (v - start)^2, ...; each is missing where no neuron has any. Exported models have these names.
Tables = Mapping[str, Rows | Tensor]
NAMES = ("P", "Q", "clip", "below", "above")
ENDS = ("clip", "below", "above")


def evaluate(
    tables: Tables,
    v: Tensor,
    z: Tensor | None = None,
    mean: Tensor | None = None,
    reuse: bool = False,
) -> Tensor:
    """P(v) + z Q(v), [..., d_mlp] in v's dtype; of v - mean where there is one.

    With ends it is P(c) + z Q(c) + z gained(v), of an MLP P(c) + gained(v), where c is v - mean
    or the end that it is beyond.

    Args:
        tables: in the dtype of evaluation.
        reuse: may overwrite v, unless autograd needs it.
    """
    rows = {name: tuple(table) for name, table in tables.items()}
    p = rows["P"]
    if len(p) == 1 and not ("below" in rows or "above" in rows):
        return p[0].to(v.dtype).expand_as(v)
    if is_traced(v, z):
        return _value(rows, v, z, mean, lambda name: None).to(v.dtype)
    flat = v.reshape(-1, v.shape[-1])
    flat_z = None if z is None else z.reshape(flat.shape)
    target = flat if reuse else flat.new_empty(flat.shape)
    dtype = torch.promote_types(v.dtype, p[0].dtype)
    direct = target.dtype == dtype and not (reuse and mean is None and "clip" not in rows)
    step = max(1, BLOCK // flat.shape[-1]) if v.device.type == "cpu" else max(1, len(flat))
    memory: dict[str, Tensor] = {}
    for i in range(0, len(flat), step):
        block, into = flat[i : i + step], target[i : i + step]

        def scratch(name: str, block: Tensor = block, into: Tensor = into) -> Tensor:
            if name == "value" and direct:
                return into
            if name not in memory:
                memory[name] = torch.empty_like(block, dtype=dtype)
            return memory[name][: len(block)]

        own_z = None if flat_z is None else flat_z[i : i + step]
        value = _value(rows, block, own_z, mean, scratch)
        if value is not into:
            into.copy_(value)
    return target.reshape(v.shape)


def clamped(v: Tensor, tables: Tables) -> Tensor:
    """v between the ends."""
    return v.clamp(*tables["clip"]) if "clip" in tables else v


def gained(v: Tensor, tables: Tables) -> Tensor | None:
    """What is gained beyond the ends, zero between them; None where nothing is anywhere."""
    value = None
    rows = {name: tuple(tables[name]) for name in ENDS if name in tables}
    for beyond, rate in _gains(v, rows, lambda name: None):
        value = beyond * rate if value is None else torch.addcmul(value, beyond, rate)
    return value


class PerNeuron(nn.Module):
    """h = P(v) + z Q(v) per neuron, v = y - mean; called as f(y) of an MLP, f(y, z) of a GLU.

    The tables are buffers and keep their dtype: polynomials in half precision are noise.

    Args:
        tables: mean [d_mlp] and `Tables` [rows, d_mlp].
    """

    mean: Tensor
    P: Tensor
    Q: Tensor | None
    clip: Tensor | None
    below: Tensor | None
    above: Tensor | None

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        nn.Module.__init__(self)
        for name in ("mean", *NAMES):
            self.register_buffer(name, tables.get(name))

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        tables = {name: getattr(self, name) for name in NAMES}
        there = {name: table for name, table in tables.items() if table is not None}
        return evaluate(there, y, z, self.mean)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PerNeuron":
        kept = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        nn.Module._apply(self, fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        for name, tensor in kept.items():
            moved: Any = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether something follows the operations, so that none may write to memory of before."""
    level: Any = forward_ad._current_level  # pyright: ignore
    is_tracing: Any = torch.jit.is_tracing  # pyright: ignore
    if torch.compiler.is_compiling() or is_tracing() or level >= 0:
        return True
    wrapped: Any = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and ((grad and tensor.requires_grad) or wrapped(tensor)):
            return True
    return False


# Memory for an intermediate result of this name, or None for its own, as autograd needs it.
_Scratch = Callable[[str], Tensor | None]


def _gains(v: Tensor, rows: Mapping[str, Rows], scratch: _Scratch) -> list[tuple[Tensor, Tensor]]:
    """How far v is beyond an end and what it gains by unit, for each side with gains."""
    found: list[tuple[Tensor, Tensor]] = []
    for name, limit in (("below", "max"), ("above", "min")):
        if name in rows:
            start, *rates = rows[name]
            out = scratch(name)
            beyond = torch.sub(v, start, out=out)
            beyond = torch.clamp(beyond, **{limit: 0.0}, out=out)
            found.append((beyond, _horner(tuple(rates), beyond, scratch, f"{name}, by unit")))
    return found


def _value(
    rows: Mapping[str, Rows],
    v: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    scratch: _Scratch,
) -> Tensor:
    near = v if mean is None else torch.sub(v, mean, out=scratch("near"))
    gains = _gains(near, rows, scratch)
    if "clip" in rows:
        near = torch.clamp(near, *rows["clip"], out=scratch("near"))
    p, q = rows["P"], rows.get("Q", ())
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


def _horner(coefficients: Rows, v: Tensor, scratch: _Scratch, name: str) -> Tensor:
    if len(coefficients) == 1:
        return coefficients[0].expand_as(v)
    out = scratch(name)
    value = torch.addcmul(coefficients[-2], coefficients[-1], v, out=out)
    for a in reversed(coefficients[:-2]):
        value = torch.addcmul(a, value, v, out=out)
    return value
