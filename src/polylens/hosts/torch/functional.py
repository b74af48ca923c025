"""MLPs whose activation is a function call: found by value, confirmed by feeding in a grid."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from polylens.activations.activation import Activation
from polylens.activations.recognition import NEAR, activation
from polylens.activations.table import known_activations
from polylens.hosts.quiet import quiet
from polylens.hosts.recording import Call, half, probing, spread

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
_SAMPLES = 64

Source = tuple[Call, int]


def functional_matches(
    model: nn.Module, run: Callable[[], object], calls: list[Call], free: list[Call]
) -> Iterator[tuple[Source, Source | None, Call, Activation]]:
    """(activated projection, other branch of a GLU or None, out-projection, activation).

    A projection in `free` whose input equals a known activation of an earlier projection's
    output (times that of a sibling) is a candidate. A second run with the earlier projection's
    output replaced by a grid (and the sibling's by ones) shows which function it really is.
    """
    candidates = list(_candidates(calls, free))
    if not candidates:
        return
    outputs: dict[nn.Module, list[tuple[int, Tensor]]] = {}
    seen = {out.module: torch.empty(0) for _, _, out in candidates}
    for source, linear, _ in candidates:
        outputs.setdefault(source[0].module, []).append((source[1], NEAR))
        if linear is not None:
            outputs.setdefault(linear[0].module, []).append((linear[1], torch.ones(1)))
    with quiet(model), probing(outputs, seen):
        run()
    for source, linear, out in candidates:
        values = seen[out.module]
        known = _identified(values, source)
        if known is not None:
            yield source, linear, out, known


def _identified(values: Tensor, source: Source) -> Activation | None:
    n = values.numel()
    if n != half(source[0].y, source[1]).numel():
        return None
    probe = NEAR if n >= len(NEAR) else NEAR[spread(len(NEAR), n)]
    m = len(probe)
    got = values.reshape(-1)[: n // m * m].reshape(-1, m).double().cpu()
    fitting = []
    for act in _activations():
        expected = act.fn(probe.to(values.dtype).double().cpu())
        error = (got - expected).abs()
        if float((error / expected.abs().clamp(min=1.0)).max()) <= _TOLERANCE[values.dtype]:
            # half precision tells near relatives apart only where they are small
            fitting.append((float((error / expected.abs().clamp(min=1e-6)).mean()), act))
    return min(fitting, key=lambda pair: pair[0])[1] if fitting else None


def _activations() -> list[Activation]:
    names = {activation(name).name for name in known_activations()} - {"identity"}
    return [activation(name) for name in sorted(names)]


def _candidates(
    calls: list[Call], free: list[Call]
) -> Iterator[tuple[Source, Source | None, Call]]:
    groups: dict[tuple[int, int], list[Source]] = {}
    for call in calls:
        for part in (0, 1, 2) if call.y.shape[-1] % 2 == 0 else (0,):
            y = half(call.y, part)
            groups.setdefault((y.numel(), y.shape[-1]), []).append((call, part))
    wanted: dict[tuple[int, int], list[Call]] = {}
    for call in {c.module: c for c in reversed(free)}.values():
        key = (call.x.numel(), call.x.shape[-1])
        if key in groups and call.x.dtype in _TOLERANCE:
            wanted.setdefault(key, []).append(call)
    used: set[tuple[nn.Module, int]] = set()
    for key, outs in wanted.items():
        sources = groups[key]
        branches: list[tuple[int, int | None]] = [(i, None) for i in range(len(sources))]
        branches += _pairs(sources)
        yield from _matching(sources, branches, outs, used)


def _pairs(sources: list[Source]) -> list[tuple[int, int | None]]:
    """(activated, linear) of projections that read the same, or halves of one."""
    readers: dict[tuple, list[int]] = {}
    for i, (call, _) in enumerate(sources):
        corner = call.x.reshape(-1)[:8].tolist()
        readers.setdefault((tuple(call.x.shape), *corner), []).append(i)
    pairs: list[tuple[int, int | None]] = []
    for group in readers.values():
        for i in group:
            for j in group:
                halves = sources[i][0] is sources[j][0]
                if i != j and halves == bool(sources[i][1]) and halves == bool(sources[j][1]):
                    pairs.append((i, j))
    return pairs


def _matching(
    sources: list[Source],
    branches: list[tuple[int, int | None]],
    outs: list[Call],
    used: set[tuple[nn.Module, int]],
) -> Iterator[tuple[Source, Source | None, Call]]:
    y = torch.stack([_sample(half(c.y, p)) for c, p in sources])
    x = torch.stack([_sample(c.x) for c in outs])
    acts = _activations()
    activated = torch.stack([act.fn(y) for act in acts])
    rows = torch.tensor([i for i, _ in branches])
    factor = torch.stack([torch.ones_like(y[0]) if j is None else y[j] for _, j in branches])
    table = activated[:, rows] * factor
    # an activation that changed nothing here is no evidence of one
    changed = (table - y[rows] * factor).abs().amax(-1) > 1e-3 * y[rows].abs().amax(-1)
    scale = x.abs().amax(-1).clamp(min=1e-30)
    distance = torch.cdist(x, table.reshape(-1, x.shape[-1]), p=float("inf")) / scale[:, None]
    distance = torch.where(changed.reshape(-1), distance, float("inf"))
    for out, row in zip(outs, distance, strict=True):
        tolerance = _TOLERANCE[out.x.dtype]
        for hit in (row <= tolerance).nonzero().flatten().tolist():
            i, j = branches[hit % len(branches)]
            source, linear = sources[i], None if j is None else sources[j]
            if source[0].order > out.order or (source[0].module, source[1]) in used:
                continue
            value = acts[hit // len(branches)].fn(half(source[0].y, source[1]).double())
            value = value if linear is None else value * half(linear[0].y, linear[1]).double()
            error = (value.reshape(-1) - out.x.reshape(-1).double()).abs().max()
            if float(error) <= tolerance * float(out.x.abs().max()):
                used.add((source[0].module, source[1]))
                yield source, linear, out
                break


def _sample(t: Tensor) -> Tensor:
    flat = t.reshape(-1)
    return flat[spread(len(flat), _SAMPLES).to(t.device)].double().cpu()
