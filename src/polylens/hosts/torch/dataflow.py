"""Finding MLPs and GLUs in any torch module by what flows through it, not by names."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor, nn

from polylens.activations.activation import Activation
from polylens.activations.recognition import activation
from polylens.errors import PolylensError, UnsupportedActivation, UnsupportedModel
from polylens.hosts.base import TOLERANCE, Weights, relative_error
from polylens.hosts.offloaded import execution_device
from polylens.hosts.quantised import format_of
from polylens.hosts.recording import (
    Call,
    Dequantised,
    Projection,
    Recording,
    common_path,
    half,
    is_projection,
    position,
    read_projection,
    record,
    spread,
    stacked,
    within,
)
from polylens.hosts.torch.functional import functional_matches
from polylens.normal_forms.fetched import Source, from_source
from polylens.normal_forms.weights import ROLES, GLUWeights, MLPWeights


@dataclass(frozen=True, eq=False)
class Block:
    """One Linear -> activation -> (* Linear) -> Linear.

    Attributes:
        layer: the number of its transformer block, else its place in the order of execution.
        path: dotted path of the module that holds it and nothing else that is an MLP (`owner`);
            of its out-projection where there is none.
        owner: that module.
        source: the projection that is activated.
        linear: the other branch of a GLU, or None.
        out: the out-projection.
        act: the activation module; None where the model calls a function.
        activation: what it computes.
        exit: the outermost module inside the block whose output is that of `out`, bit by bit.
        flat: x has no batch axis of its own: [batch * pos, d_in].
        error: max |normal form - true output| / max |true output|.
        order: place in the order of execution.
    """

    layer: int
    path: str
    owner: nn.Module
    source: Projection
    linear: Projection | None
    out: Projection
    act: nn.Module | None
    activation: Activation
    exit: nn.Module
    flat: bool
    error: float
    order: int

    @property
    def kind(self) -> str:
        return "mlp" if self.linear is None else "glu"

    def tensors(self) -> dict[str, Tensor]:
        """The current parameters by role, as views in x @ W orientation."""
        found = {role: self._read(role, as_it_is=True) for role in ROLES}
        return {role: t for role, t in found.items() if t is not None}

    def parameters(self) -> dict[str, Tensor]:
        """The modules' own tensors by role; that of two roles where it has the halves of both."""
        found: dict[str, Tensor] = {}
        for role in ROLES:
            kind, of = self._projection(role)
            own = {} if of is None else of.parameter("weight" if kind == "W" else "bias")
            found |= {role + name: tensor for name, tensor in own.items()}
        return found

    @property
    def dequantised(self) -> str:
        """Which formats its matrices are in, and what they do to inputs; empty for plain ones."""
        parts = [part for part in self._parts if isinstance(part, Dequantised)]
        names = dict.fromkeys(format_of(part.module) for part in parts)
        return " and ".join(names) + ", which rounds its inputs to 8 bits" * self.rounds

    @property
    def rounds(self) -> bool:
        """Whether any of its maps rounds its inputs to 8 bits."""
        return any(isinstance(part, Dequantised) and part.rounds for part in self._parts)

    @property
    def _parts(self) -> list[Projection]:
        return [part for part in (self.source, self.linear, self.out) if part is not None]

    def _projection(self, role: str) -> tuple[str, Projection | None]:
        """("W" or "b", what has that of a role)."""
        kind, _, part = role.partition("_")
        if part == "gate" and self.linear is None:
            return kind, None
        of = {"in": self.linear or self.source, "gate": self.source, "out": self.out}
        return kind, of[part]

    def _read(self, role: str, *, as_it_is: bool = False) -> Tensor | None:
        kind, of = self._projection(role)
        if of is None:
            return None
        return of.weight(as_it_is=as_it_is) if kind == "W" else of.bias(as_it_is=as_it_is)

    def weights(self) -> Weights:
        """The validated normal form over `tensors()`.

        Where some are offloaded, or quantised, they are fetched, or dequantised, at every use.
        """
        if not all(part.resident for part in self._parts):
            like = {role: t.to("meta") for role, t in self.tensors().items()}
            source = Source(self._read, like, execution_device(self.out.module))
            return from_source(self.activation, source)
        kind = MLPWeights if self.linear is None else GLUWeights
        return kind(act=self.activation, **self.tensors())


@dataclass(frozen=True, eq=False)
class Match:
    """Calls that are connected as in an MLP (linear None) or a GLU."""

    source: tuple[Call, int]
    linear: tuple[Call, int] | None
    out: Call
    act: nn.Module | None
    known: Activation | None = None


@dataclass(frozen=True)
class Refusal:
    """Something like an MLP that is none: where (path), when (order), and why."""

    path: str
    order: int
    reason: str


def find_blocks(model: nn.Module, run: Callable[[], object]) -> tuple[list[Block], dict[int, str]]:
    """Every MLP and GLU that one run of the model passes through.

    Blocks are told by exact equality of what flows from module to module, and verified by
    recomputing their outputs in normal form. Heads and poolers outside the repeated blocks of
    a transformer do not count; a plain classifier has one block per hidden layer (they overlap:
    the out-projection of one is the in-projection of the next).

    Args:
        model: any module with loaded weights.
        run: one small forward pass; called once, twice where activations are functions.

    Returns:
        Blocks by layer, and for each layer that was refused the reason. A module that runs
        several times (shared between layers) is one block.

    Raises:
        UnsupportedModel: weights on the meta device.

    The training flag, hooks and the RNG are as before, also when run raises.
    """
    recording = record(model, run)
    index = _Index(recording)
    matches, refusals = _matches(recording, index)
    taken = {match.out.module for match in matches}
    free = [call for call in recording.projections if call.module not in taken]
    for source, linear, out, known in functional_matches(model, run, recording.projections, free):
        matches.append(Match(source, linear, out, None, known))
    blocks, seen = [], set()
    names = {module: path for path, module in model.named_modules()}
    for match in sorted(matches, key=lambda m: m.source[0].order):
        key = (match.source[0].module, match.source[1], match.out.module)
        if key in seen:
            continue
        seen.add(key)
        place = common_path(match.source[0].path, match.out.path)
        try:
            blocks.append(_verified(model, match, place, index))
        except PolylensError as error:
            reason = f"{match.source[0].path} to {match.out.path}: {error}"
            refusals.append(Refusal(place, match.out.order, reason))
    refusals += [*_expert_stacks(model), *_not_reached(model, recording)]
    blocks, refusals = _without_heads(blocks, refusals)
    numbered, refused = _numbered(model, blocks, refusals)
    return _owned(numbered, names), refused


class _Index:
    """Calls by the values that flowed in and out."""

    def __init__(self, recording: Recording) -> None:
        self.outputs: dict[tuple, list[tuple[Call, int]]] = {}
        self.inputs: dict[tuple, list[Call]] = {}
        for call in recording.projections:
            self.inputs.setdefault(_key(call.x), []).append(call)
            for part in (0, 1, 2) if call.y.shape[-1] % 2 == 0 else (0,):
                self.outputs.setdefault(_key(half(call.y, part)), []).append((call, part))
        self.containers: dict[tuple, list[Call]] = {}
        for call in recording.containers:
            self.containers.setdefault(_key(call.y), []).append(call)

    def sources(self, value: Tensor, before: int) -> list[tuple[Call, int]]:
        """Projections (and halves) whose output this is, the latest first."""
        found = self.outputs.get(_key(value), [])
        found = [(c, p) for c, p in found if c.order < before and _same(half(c.y, p), value)]
        return found[::-1]

    def readers(self, value: Tensor, after: int) -> list[Call]:
        """Projections whose input this is."""
        return [
            c for c in self.inputs.get(_key(value), []) if c.order > after and _same(c.x, value)
        ]

    def siblings(self, source: tuple[Call, int]) -> list[tuple[Call, int]]:
        """Projections of the same size that read what source reads."""
        call, part = source
        if part:
            return [(call, 3 - part)]
        return [
            (c, 0)
            for c in self.inputs.get(_key(call.x), [])
            if c is not call and c.y.shape == call.y.shape and _same(c.x, call.x)
        ]


def _key(t: Tensor) -> tuple:
    flat = t.reshape(-1)
    n = len(flat)
    picked = flat[spread(n, 24).to(t.device)]
    return (n, t.shape[-1], *picked.tolist())


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))


def _matches(recording: Recording, index: _Index) -> tuple[list[Match], list[Refusal]]:
    matches: list[Match] = []
    refusals: list[Refusal] = []
    for call in recording.activations:
        if call.x.shape != call.y.shape or not call.x.numel():
            continue
        sources = index.sources(call.x, call.order)
        found = next((m for s in sources if (m := _match(s, call, index)) is not None), None)
        if found is not None:
            matches.append(found)
        elif sources:
            _refuse_unusual(call, sources[0], refusals)
        elif _feeds_projection(call, recording, index):
            refusals.append(
                Refusal(
                    common_path(call.path, call.path),
                    call.order,
                    f"{call.path} ({type(call.module).__name__}) does not read what a linear map "
                    "wrote: something in between (top-k sparsity, a clamp, a normalisation) has "
                    "no normal form",
                )
            )
    return matches, refusals


def _match(source: tuple[Call, int], act: Call, index: _Index) -> Match | None:
    readers = index.readers(act.y, act.order)
    if readers:
        return Match(source, None, readers[0], act.module)
    for sibling in index.siblings(source):
        branch = half(sibling[0].y, sibling[1])
        if branch.shape == act.y.shape:
            readers = index.readers(act.y * branch, act.order)
            if readers:
                return Match(source, sibling, readers[0], act.module)
    return None


def _refuse_unusual(call: Call, source: tuple[Call, int], refusals: list[Refusal]) -> None:
    """Say so where a projection's output goes through something that is not elementwise."""
    try:
        activation(call.module)
    except UnsupportedActivation as error:
        place = common_path(source[0].path, call.path)
        refusals.append(Refusal(place, call.order, f"{call.path}: {error}"))


def _feeds_projection(call: Call, recording: Recording, index: _Index) -> bool:
    """Whether an activation after some linear map of its width is read by a linear map."""
    width = call.y.shape[-1]
    near = [c for c in recording.projections if -12 < c.order - call.order < 3]
    if not any(c.order < call.order and c.y.shape[-1] == width for c in near):
        return False
    if index.readers(call.y, call.order):
        return True
    alike = [c for c in near if c.y.shape == call.y.shape]
    return any(index.readers(call.y * c.y, call.order) for c in alike)


def _verified(model: nn.Module, match: Match, place: str, index: _Index) -> Block:
    (source_call, source_part), out_call = match.source, match.out
    out = read_projection(out_call)
    source = replace(read_projection(source_call), part=source_part)
    linear = None
    if match.linear is not None:
        linear = replace(read_projection(match.linear[0]), part=match.linear[1])
    parts = [match.source[0], out_call, *([] if match.linear is None else [match.linear[0]])]
    for call in parts:
        _require_unadapted(call, {part.module for part in parts}, place, index)
    act = match.known if match.known is not None else activation(match.act)  # type: ignore[arg-type]
    exits = [c for c in index.containers.get(_key(out_call.y), []) if _same(c.y, out_call.y)]
    inside = [c for c in exits if within(c.path, place) and within(out_call.path, c.path)]
    block = Block(
        layer=0,
        path=place,
        owner=model.get_submodule(place),
        source=source,
        linear=linear,
        out=out,
        act=match.act,
        activation=act,
        exit=min(inside, key=lambda c: len(c.path)).module if inside else out_call.module,
        flat=source_call.x.dim() == 2,
        error=0.0,
        order=out_call.order,
    )
    error = _error(block, source_call.rows, out_call.y)
    dtype = block.out.weight(as_it_is=True).dtype
    # each map that rounds its inputs was verified alone, and what flows between them is equal
    if not (error <= TOLERANCE[dtype] or (block.rounds and isfinite(error))):
        raise UnsupportedModel(
            f"not the normal form of a {block.kind} with {act.name}: recomputed outputs differ by "
            f"{error:.2g} of the largest (tolerance {TOLERANCE[dtype]:.0e})"
        )
    return replace(block, error=error)


def _require_unadapted(call: Call, parts: set[nn.Module], place: str, index: _Index) -> None:
    """UnsupportedModel for a linear map in a module whose other parameters add nothing yet."""
    own = {id(p) for part in parts for p in part.parameters()}
    for around in index.containers.get(_key(call.y), []):
        inside = within(call.path, around.path) and within(around.path, place)
        if not inside or around.path == place or not _same(around.y, call.y):
            continue
        more = [n for n, p in around.module.named_parameters() if id(p) not in own]
        if more:
            raise UnsupportedModel(
                f"{around.path} ({type(around.module).__name__}) has {', '.join(more[:3])} beside "
                f"{call.path}, which change what it computes when they are trained; merge the "
                "adapter first"
            )


def _error(block: Block, x: Tensor, y: Tensor) -> float:
    """max |normal form - y| / max |y| on a few rows."""
    some = slice(None, None, max(1, len(x) // 4))
    x, y = x[some], y.reshape(len(x), -1)[some]

    def through(projection: Projection, x: Tensor) -> Tensor:
        weight, bias = projection.weight(), projection.bias()
        return x.to(weight) @ weight if bias is None else x.to(weight) @ weight + bias

    with torch.no_grad():
        h = block.activation(through(block.source, x))
        h = h if block.linear is None else h * through(block.linear, x)
        return relative_error(through(block.out, h).to(y.device), y)


def _expert_stacks(model: nn.Module) -> list[Refusal]:
    found = []
    for order, (path, module) in enumerate(model.named_modules()):
        three = stacked(module)
        stacks = list(three)
        if len(stacks) < 2 or len({len(p) for p in three.values()}) > 1:
            continue
        if hasattr(module, "limit") and hasattr(module, "alpha"):
            reason = "a clamped, shifted and interleaved gate (GPT-OSS) has no normal form"
        else:
            reason = "a mixture of experts; its stacked experts are not ordinary MLPs"
        name = type(module).__name__
        found.append(Refusal(path, order, f"{path} ({name}, {', '.join(stacks)}): {reason}"))
    return found


def _not_reached(model: nn.Module, recording: Recording) -> list[Refusal]:
    """Blocks with linear maps of which none was called."""
    called = {call.module for call in recording.projections}
    maps: dict[tuple[str, int], list[bool]] = {}
    for path, module in model.named_modules():
        place = position(path)
        if place is not None and is_projection(module):
            maps.setdefault(place, []).append(module in called)
    unreached = [f"{stack}.{i}" for (stack, i), there in maps.items() if not any(there)]
    reason = "these inputs do not pass through it; give those that do"
    return [Refusal(path, 1 << 62, f"{path}: {reason}") for path in unreached]


def _without_heads(
    blocks: list[Block], refusals: list[Refusal]
) -> tuple[list[Block], list[Refusal]]:
    """Where something is repeated, what is not repeated is a head; nor are routers MLPs."""
    if not any(position(place.path) for place in (*blocks, *refusals)):
        return blocks, refusals
    sources = {b.source.module for b in blocks}
    outs = {b.out.module for b in blocks}
    square = {position(b.path) for b in blocks if _widths(b)[0] == _widths(b)[2]}

    def writes_back(block: Block) -> bool:
        """Whether it is as wide as the stream it reads, or one of several hidden layers."""
        d_in, d_mlp, d_out = _widths(block)
        chained = block.source.module in outs or block.out.module in sources
        alone = position(block.path) not in square
        return d_in == d_out or chained or (alone and d_mlp >= d_in)

    blocks = [b for b in blocks if position(b.path) and writes_back(b)]
    taken = {position(b.path) for b in blocks}
    return blocks, [r for r in refusals if position(r.path) not in {None, *taken}]


def _widths(block: Block) -> tuple[int, int, int]:
    tensors = block.tensors()
    return (*tensors["W_in"].shape, tensors["W_out"].shape[1])  # type: ignore[return-value]


def _owned(blocks: list[Block], names: dict[nn.Module, str]) -> list[Block]:
    """Blocks that share their owner, or whose owner calls all its children, own just `out`."""
    shared = [b.owner for b in blocks]
    result = []
    for block in blocks:
        lists = nn.Sequential | nn.ModuleList | nn.ModuleDict
        exits = block.exit
        if shared.count(block.owner) > 1 or isinstance(block.owner, lists) or not block.path:
            path = names[block.out.module]
            block = replace(block, owner=block.out.module, path=path, exit=block.out.module)
        elif isinstance(exits, lists):
            block = replace(block, exit=block.out.module)
        result.append(block)
    return result


def _numbered(
    model: nn.Module, blocks: list[Block], refusals: list[Refusal]
) -> tuple[list[Block], dict[int, str]]:
    positions = [position(b.path) for b in blocks]
    stacks = {p[0] for p in (*positions, *(position(r.path) for r in refusals)) if p}
    if len(stacks) == 1 and all(positions) and len(set(positions)) == len(positions):
        stack = stacks.pop()
        numbers = [p[1] for p in positions if p]
        reasons: dict[int, str] = {}
        for r in refusals:
            where = position(r.path)
            if where and where[1] not in numbers:
                reasons.setdefault(where[1], r.reason)
        total = len(list(model.get_submodule(stack).children())) if stack else 0
        for i in set(range(total)) - set(numbers) - set(reasons):
            reasons[i] = "no MLP was found in this block"
    else:
        entries = sorted([*blocks, *refusals], key=lambda e: e.order)
        numbers = [entries.index(b) for b in blocks]
        reasons = {i: e.reason for i, e in enumerate(entries) if isinstance(e, Refusal)}
    numbered = [replace(b, layer=n) for b, n in zip(blocks, numbers, strict=True)]
    refused = {i: f"layer {i}: {reason}" for i, reason in sorted(reasons.items())}
    return sorted(numbered, key=lambda b: b.layer), refused
