"""The kernel of `polylens.fitting.fused`; imported where Triton is there only."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
import triton
import triton.language as tl


@triton.jit
def _of(table, k, d, neuron, there):
    return tl.load(table + k * d + neuron, mask=there, other=0.0)[:, None]


@triton.jit
def _gain(table, first, COUNT: tl.constexpr, d, neuron, there, beyond):
    """sum_k table[first + k] beyond^(k + 1)."""
    value = tl.zeros_like(beyond)
    for k in tl.static_range(COUNT):
        value = (value + _of(table, first + COUNT - 1 - k, d, neuron, there)) * beyond
    return value


@triton.jit
def gram_kernel(
    y_in,
    z_in,
    act_in,
    weights,
    table,
    gram,
    d,
    n,
    DEGREE: tl.constexpr,
    GLU: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LINEAR: tl.constexpr,
    N_clip: tl.constexpr,
    N_below: tl.constexpr,
    N_above: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Adds sum_n w f f^T to gram [d, SIZE, SIZE], f features and target of D neurons.

    Products are added up in float64, one accumulator [D, N] for each pair of features.
    """
    SIZE: tl.constexpr = (2 * DEGREE if GLU else DEGREE) + 2
    clip: tl.constexpr = 4
    below: tl.constexpr = clip + N_clip
    above: tl.constexpr = below + N_below
    neuron = tl.program_id(0) * D + tl.arange(0, D)
    there = neuron < d
    m, inverse = _of(table, 0, d, neuron, there), _of(table, 1, d, neuron, there)
    z_mean, z_inverse = _of(table, 2, d, neuron, there), _of(table, 3, d, neuron, there)
    sums = ()
    for _ in tl.static_range(SIZE * (SIZE + 1) // 2):
        sums = sums + (tl.zeros([D, N], tl.float64),)  # noqa: RUF005
    for start in range(0, n, N):
        row = start + tl.arange(0, N)
        mask = there[:, None] & (row < n)[None, :]
        place = neuron.to(tl.int64)[:, None] * n + row[None, :]
        y = tl.load(y_in + place, mask=mask, other=0.0).to(tl.float64)
        target = tl.load(act_in + place, mask=mask, other=0.0).to(tl.float64)
        w = mask.to(tl.float64)
        if WEIGHTED:
            w = w * tl.load(weights + row, mask=row < n, other=0.0)[None, :]
        near = y
        if N_clip:
            low = _of(table, clip, d, neuron, there)
            high = _of(table, clip + 1, d, neuron, there)
            near = tl.minimum(tl.maximum(y, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
        if N_below:
            beyond = y - _of(table, below, d, neuron, there)
            beyond = tl.minimum(beyond, 0.0, tl.PropagateNan.ALL)
            target -= _gain(table, below + 1, N_below - 1, d, neuron, there, beyond)
        if N_above:
            beyond = y - _of(table, above, d, neuron, there)
            beyond = tl.maximum(beyond, 0.0, tl.PropagateNan.ALL)
            target -= _gain(table, above + 1, N_above - 1, d, neuron, there, beyond)
        one = tl.zeros_like(y) + 1.0
        t = (near - m) * inverse
        features = (one,)
        zeta = one
        if GLU:
            z = tl.load(z_in + place, mask=mask, other=0.0).to(tl.float64)
            target = target * z
            zeta = (z - z_mean) * z_inverse
        he, before = t, one
        for k in tl.static_range(1, DEGREE + 1):
            if k > 1:
                he, before = t * he - (k - 1) * before, he
            if LINEAR and k == 1:
                features = features + ((y - m) * inverse,)  # noqa: RUF005
            else:
                features = features + (he,)  # noqa: RUF005
            if GLU:
                features = features + (zeta * before,)  # noqa: RUF005
        features = features + (target,)  # noqa: RUF005
        added = ()
        for i in tl.static_range(SIZE):
            weighted = w * features[i]
            for j in tl.static_range(i + 1):
                added = added + (sums[i * (i + 1) // 2 + j] + weighted * features[j],)  # noqa: RUF005
        sums = added
    for i in tl.static_range(SIZE):
        for j in tl.static_range(i + 1):
            total = tl.sum(sums[i * (i + 1) // 2 + j], 1)
            entry = gram + neuron.to(tl.int64) * SIZE * SIZE
            total += tl.load(entry + i * SIZE + j, mask=there, other=0.0)
            tl.store(entry + i * SIZE + j, total, mask=there)
            tl.store(entry + j * SIZE + i, total, mask=there)
