"""Reading a decoder as a FrozenModel, by what flows through it at a prompt and not by names."""

# pyright: reportConstantRedefinition=false

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polylens.checks import Layer
from polylens.errors import UnsupportedModel
from polylens.hosts.base import TOLERANCE, Arrival, Host, Observer, relative_error
from polylens.hosts.frozen import FrozenAttention, FrozenBlock, FrozenModel, FrozenNorm, heads
from polylens.hosts.norms import matching_norm
from polylens.hosts.quiet import quiet
from polylens.hosts.recording import Call, is_projection, position, read_projection

# Rounding of a whole forward pass, relative to the stream at a position.
STREAM = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF = 1e-1
_HINT = "; circuits need a decoder of attention, norms and MLPs that write to a residual stream"


def freeze(host: Host, tokens: Tensor, layers: Iterable[Layer]) -> FrozenModel:
    """The model of a host at tokens [pos], its attention patterns and norm scales as they are.

    Attention layers are modules that return (output, pattern [1, heads, pos, pos]) or have a
    `hook_pattern`; value and output maps are found by recomputing what they return, norms by
    what they read and return, and the whole by the stream behind every block.

    Args:
        layers: whose MLPs are looked into; what the others write is read off the stream.

    Raises:
        UnsupportedModel: attention that is no pattern times a linear map, a stream that is no sum
            of what layers write, no unembedding (which, and by how much).

    Cost: one forward pass; a copy of the stream in float64.
    """
    if getattr(getattr(host.module, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(host.module).__name__} is an encoder with a decoder: the attention from one to "
            "the other cannot be frozen" + _HINT
        )
    seen = _Seen(host, [layer for layer in layers if isinstance(layer, int)])
    with seen.recording(), quiet(host.module), _eager(host.module):
        logits = host.logits(tokens[None].to(host.device))[0]
    return seen.model(tokens, logits)


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """Within the context a Hugging Face model computes its patterns."""
    config = getattr(module, "config", None)
    before, switch = getattr(config, "_attn_implementation", None), None
    if before not in (None, "eager"):
        switch = getattr(module, "set_attn_implementation", None)
        # some, as Falcon, read their configuration only
        if not getattr(module, "_can_set_attn_implementation", lambda: True)():
            switch = partial(setattr, config, "_attn_implementation")
    if switch is None:
        yield
        return
    switch("eager")
    try:
        yield
    finally:
        switch(before)


class _Maps(NamedTuple):
    """A guess at what a FrozenAttention consists of, without norms around it."""

    group: Tensor
    W_V: Tensor
    b_V: Tensor | None
    W_O: Tensor
    b_O: Tensor | None

    def under(self, pattern: Tensor) -> FrozenAttention:
        return FrozenAttention(pattern, *self, None, None)


class _Seen:
    """What flowed through a model in one forward pass with one sequence."""

    def __init__(self, host: Host, layers: list[int]) -> None:
        self.host, self.layers = host, layers
        self.paths = {module: path for path, module in host.module.named_modules()}
        self.norms: list[Call] = []
        self.projections: list[Call] = []
        self.patterns: dict[str, tuple[nn.Module, Tensor]] = {}
        self.attentions: list[Call] = []
        self.blocks: dict[str, tuple[Tensor, Tensor]] = {}
        self.arrivals: dict[int, Arrival] = {}
        found = {position(path) for path in self.paths.values()} - {None}
        self.block_paths = {f"{prefix}.{n}": n for prefix, n in found if prefix}  # type: ignore

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.paths:
                hook = module.register_forward_hook(self._see, with_kwargs=True)
                stack.callback(hook.remove)
            observers: dict[Layer, Observer] = {n: partial(self._arrive, n) for n in self.layers}
            stack.enter_context(self.host.observe(observers))
            yield

    def _arrive(self, layer: int, arrival: Arrival) -> None:
        self.arrivals[layer] = Arrival(_rows(arrival.x), _rows(arrival.y))

    def _see(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        path = self.paths[module]
        x, y = _stream_of(args, kwargs), out[0] if isinstance(out, tuple) and out else out
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return
        if path.endswith("hook_pattern") and y.dim() == 4:
            self.patterns[path.removesuffix(".hook_pattern")] = module, y.detach()[0]
        if x is None or y.dim() not in (2, 3):
            return
        call = Call(0, path, module, _rows(x), _rows(y))
        if is_projection(module) or hasattr(module, "W_U"):
            self.projections.append(call)
        elif "norm" in type(module).__name__.lower() and x.shape == y.shape:
            self.norms.append(call)
        pattern = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        if isinstance(pattern, Tensor) and pattern.dim() == 4 and path not in self.patterns:
            self.patterns[path] = module, pattern.detach()[0]
        if path in self.patterns:
            self.attentions.append(call)
        if path in self.block_paths:
            self.blocks[path] = call.x, call.y
            # of what was inside, only what attention layers consist of is looked at again
            kept = tuple(each.path + "." for each in self.attentions)
            inside = path + "."
            self.projections = [
                each
                for each in self.projections
                if not each.path.startswith(inside) or each.path.startswith(kept)
            ]

    def model(self, tokens: Tensor, logits: Tensor) -> FrozenModel:
        n, name = len(tokens), type(self.host.module).__name__
        within: dict[str, list[Call]] = {}
        for call in self.attentions:
            pattern = self.patterns[call.path][1]
            if pattern.shape[-2:] == (n, n) and (at := self._block_of(call.path)) is not None:
                within.setdefault(at, []).append(call)
        if not within:
            raise UnsupportedModel(
                f"{name}: no attention layer shows its pattern [heads, pos, pos], so its attention "
                "cannot be frozen" + _HINT
            )
        prefix = next(iter(within)).rpartition(".")[0]
        paths = [path for path in self.blocks if path.rpartition(".")[0] == prefix]
        paths.sort(key=lambda path: self.block_paths[path])
        blocks = tuple(self._block(path, within.get(path, [])) for path in paths)
        embedding = self.blocks[paths[0]][0].double()
        final, W_U, b_U, written = self._unembedding(self.blocks[paths[-1]][1])
        dtype = self.blocks[paths[0]][0].dtype
        capped = relative_error(written, _rows(logits)) > TOLERANCE.get(dtype, 1e-4)
        model = FrozenModel(
            tokens, embedding, blocks, final, W_U, b_U, logits.detach().double(), capped
        )
        return replace(model, rounding=self._verified(model, paths, dtype))

    def _verified(self, model: FrozenModel, paths: list[str], dtype: torch.dtype) -> float:
        """The largest rounding of the streams behind the blocks and of what their MLPs read."""
        worst, tolerance = 0.0, STREAM.get(dtype, HALF)
        reads = zip(paths, model.blocks, model.mlp_inputs(), strict=True)
        pairs = [
            (f"what the MLP of {path} reads", x, self.arrivals[self.block_paths[path]].x)
            for path, block, x in reads
            if block.read
        ]
        pairs += [
            (f"the residual stream behind {path}", stream, self.blocks[path][1])
            for path, stream in zip(paths, model.streams()[1:], strict=True)
        ]
        for what, value, true in pairs:
            true = true.double()
            error = float(((value - true).norm(dim=-1) / true.norm(dim=-1)).max())
            worst = max(worst, error)
            if not error <= tolerance:
                raise UnsupportedModel(
                    f"{what} is {error:.1%} away from the model's own when its attention patterns "
                    f"and norm scales are frozen (tolerance {tolerance:.1e})" + _HINT
                )
        return worst

    def _block_of(self, path: str) -> str | None:
        place = position(path)
        return None if place is None else f"{place[0]}.{place[1]}"

    def _block(self, path: str, attentions: list[Call]) -> FrozenBlock:
        entered, left = self.blocks[path]
        layer = self.block_paths[path]
        # a wrapper around an attention layer returns what it does
        attention = self._attention(attentions[0], entered) if attentions else None
        middle = entered.double()
        if attention is not None:
            middle = middle + attention.linear(entered.double()) + attention.bias()
        arrival = self.arrivals.get(layer)
        if arrival is None:
            return FrozenBlock(attention, False, None, None, left.double() - middle, False)
        norm = self._before(arrival.x)
        read = arrival.x if norm is None else norm[0]
        parallel = torch.equal(read, entered)
        if parallel and attentions and attention is not None:
            # what the attention wrote may have been nothing
            parallel = not torch.equal(entered.double(), middle)
        before = None if norm is None else norm[1]
        behind = self._behind(arrival.y)
        return FrozenBlock(attention, parallel, before, behind, arrival.y.double(), True)

    def _before(self, x: Tensor) -> tuple[Tensor, FrozenNorm] | None:
        """(what it read, the norm) whose output is x."""
        for call in reversed(self.norms):
            if call.y.shape == x.shape and torch.equal(call.y, x):
                return call.x, _frozen(call)
        return None

    def _behind(self, y: Tensor) -> FrozenNorm | None:
        for call in self.norms:
            if call.x.shape == y.shape and torch.equal(call.x, y):
                return _frozen(call)
        return None

    def _attention(self, call: Call, entered: Tensor) -> FrozenAttention:
        pattern = self.patterns[call.path][1].double()
        before = self._before(call.x)
        norm = None if before is None else before[1]
        # what it returns, and that without the stream, which BLOOM adds inside
        outputs = (call.y, call.y - entered)
        best, tolerance = None, TOLERANCE.get(call.y.dtype, 4e-2)
        guesses = self._by_role(call, len(pattern)), self._by_projections(call, pattern, entered)
        for maps in chain(*guesses):
            # in front of the norm behind it, and from what it reads behind the one in front
            bare = maps.under(pattern)
            own = bare.linear(call.x.double()) + bare.bias()
            errors = [relative_error(own, y) for y in outputs]
            if errors[0] <= tolerance:
                return replace(bare, before=norm, behind=self._behind(call.y))
            if errors[1] <= tolerance:
                return replace(bare, before=norm)
            best = min(errors if best is None else [best, *errors])
        how = "" if best is None else f" (the best guess is {best:.1e} of its output away)"
        raise UnsupportedModel(
            f"{call.path} ({type(call.module).__name__}): its output is not its pattern times a "
            f"linear map of its input{how}, so its attention cannot be frozen" + _HINT
        )

    def _by_role(self, call: Call, n_heads: int) -> Iterator["_Maps"]:
        """Those of a module that has W_V and W_O [heads, ...] by name."""
        found = {}
        for name in ("W_V", "b_V", "W_O", "b_O"):
            try:
                value = getattr(call.module, name, None)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
                value = None
            found[name] = value.detach() if isinstance(value, Tensor) else None
        W_V, W_O = found["W_V"], found["W_O"]
        if W_V is None or W_O is None or W_V.dim() != 3 or len(W_O) != n_heads:
            return
        group = torch.arange(n_heads, device=W_V.device) // (n_heads // len(W_V))
        yield _Maps(group, W_V, found["b_V"], W_O, found["b_O"])

    def _by_projections(self, call: Call, pattern: Tensor, entered: Tensor) -> Iterator["_Maps"]:
        """Those of the linear layers inside: the out-projection returns what the module does, and
        columns of one that reads its input, times the pattern, are what that reads."""
        inside = [c for c in self.projections if c.path.startswith(call.path + ".")]
        for out in inside:
            if out.y.shape != call.y.shape or not (
                torch.equal(out.y, call.y) or torch.equal(out.y + entered, call.y)
            ):
                continue
            z = out.x
            if z.shape[-1] % len(pattern):
                continue
            z = heads(z.double(), len(pattern)).transpose(0, 1)
            for source in (c for c in inside if torch.equal(c.x, call.x)):
                if source.y.shape[-1] % z.shape[-1]:
                    continue
                value = heads(source.y.double(), source.y.shape[-1] // z.shape[-1])
                columns = self._columns(pattern, value.transpose(0, 1), z)
                used, group = columns.unique(return_inverse=True)
                first, last = read_projection(source), read_projection(out)
                W_V, b_V = heads(first.weight(), value.shape[1])[:, used], first.bias()
                b_V = None if b_V is None else heads(b_V, value.shape[1])[used]
                W_O = heads(last.weight().T, len(pattern)).permute(1, 2, 0)
                yield _Maps(group, W_V.transpose(0, 1), b_V, W_O, last.bias())

    @staticmethod
    def _columns(pattern: Tensor, value: Tensor, z: Tensor) -> Tensor:
        """[heads]: which of value [groups, pos, d_head] under its pattern is z [heads, pos, d]."""
        errors = [(pattern @ v - z).square().sum((1, 2)) for v in value]
        return torch.stack(errors, dim=1).argmin(1)

    def _unembedding(
        self, stream: Tensor
    ) -> tuple[FrozenNorm | None, Tensor, Tensor | None, Tensor]:
        """(norm in front, W_U, b_U, what it wrote) of the map that reads the last stream."""
        for call in reversed(self.projections):
            if call.y.shape[-1] == call.x.shape[-1] or len(call.x) != len(stream):
                continue
            before = self._before(call.x)
            read = call.x if before is None else before[0]
            if read.shape != stream.shape or not torch.equal(read, stream):
                continue
            if hasattr(call.module, "W_U"):
                W_U, b_U = call.module.W_U.detach(), getattr(call.module, "b_U", None)  # type: ignore
                b_U = b_U.detach() if isinstance(b_U, Tensor) else None
            else:
                projection = read_projection(call)
                W_U, b_U = projection.weight(), projection.bias()
            return None if before is None else before[1], W_U, b_U, call.y
        raise UnsupportedModel(
            f"{type(self.host.module).__name__}: no linear map reads a norm of the stream behind "
            "the last block, so there are no logits to trace" + _HINT
        )


def _frozen(call: Call) -> FrozenNorm:
    norm = matching_norm(call.module, call.x, call.y)
    if norm is None:
        raise UnsupportedModel(
            f"{call.path} ({type(call.module).__name__}) is neither a LayerNorm nor an RMSNorm, so "
            "its scale cannot be frozen" + _HINT
        )
    weight, bias = (None if t is None else t.double() for t in (norm.weight, norm.bias))
    shape = FrozenNorm(norm.centred, weight, None, torch.ones_like(call.x[:, :1]).double())
    plain = shape.linear(call.x.double())
    target = call.y.double() if bias is None else call.y.double() - bias
    scale = plain.square().sum(-1, keepdim=True) / (plain * target).sum(-1, keepdim=True)
    return FrozenNorm(norm.centred, weight, bias, scale)


def _stream_of(args: tuple, kwargs: dict) -> Tensor | None:
    """The first floating-point tensor [1, pos, d] or [pos, d] of a call."""
    named = [kwargs[name] for name in ("value_input", "hidden_states") if name in kwargs]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3):
            return value
    return None


def _rows(t: Tensor) -> Tensor:
    """[pos, d] as it is now, whatever works in place later."""
    return t.detach().reshape(-1, t.shape[-1]).clone()
