"""The kernel of `polylens.polynomials.fused`; imported where Triton is there only."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
import triton
import triton.language as tl


@triton.jit
def _row(table, k, d, column, inside):
    return tl.load(table + k * d + column, mask=inside, other=0.0)[None, :]


@triton.jit
def _horner(table, first, COUNT: tl.constexpr, v, d, column, inside):
    """sum_k table[first + k] v^k."""
    value = _row(table, first + COUNT - 1, d, column, inside) + tl.zeros_like(v)
    for k in tl.static_range(1, COUNT):
        value = value * v + _row(table, first + COUNT - 1 - k, d, column, inside)
    return value


@triton.jit
def evaluate_kernel(
    v_in,
    z_in,
    out,
    table,
    n,
    d,
    v_stride,
    z_stride,
    out_stride,
    GLU: tl.constexpr,
    MEAN: tl.constexpr,
    N_P: tl.constexpr,
    N_Q: tl.constexpr,
    N_clip: tl.constexpr,
    N_below: tl.constexpr,
    N_above: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """One tile [N, D] of P(c) + z (Q(c) + gained), of an MLP without the z."""
    row = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    column = tl.program_id(1) * D + tl.arange(0, D)
    inside = column < d
    mask = (row < n)[:, None] & inside[None, :]
    v = tl.load(v_in + row[:, None] * v_stride + column[None, :], mask=mask, other=0.0)
    v = v.to(table.dtype.element_ty)
    Q: tl.constexpr = N_P
    clip: tl.constexpr = Q + N_Q
    below: tl.constexpr = clip + N_clip
    above: tl.constexpr = below + N_below
    if MEAN:
        v = v - _row(table, above + N_above, d, column, inside)
    near = v
    if N_clip:
        low = _row(table, clip, d, column, inside)
        high = _row(table, clip + 1, d, column, inside)
        near = tl.minimum(tl.maximum(v, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
    value = _horner(table, 0, N_P, near, d, column, inside)
    gained = tl.zeros_like(v)
    if N_Q:
        gained = _horner(table, Q, N_Q, near, d, column, inside)
    if N_below:
        beyond = v - _row(table, below, d, column, inside)
        beyond = tl.minimum(beyond, 0.0, tl.PropagateNan.ALL)
        gained += beyond * _horner(table, below + 1, N_below - 1, beyond, d, column, inside)
    if N_above:
        beyond = v - _row(table, above, d, column, inside)
        beyond = tl.maximum(beyond, 0.0, tl.PropagateNan.ALL)
        gained += beyond * _horner(table, above + 1, N_above - 1, beyond, d, column, inside)
    if GLU:
        z = tl.load(z_in + row[:, None] * z_stride + column[None, :], mask=mask, other=0.0)
        gained = gained * z.to(table.dtype.element_ty)
    value += gained
    place = out + row[:, None] * out_stride + column[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=mask)
