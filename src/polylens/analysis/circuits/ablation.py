"""Nodes and edges taken out: what the circuit's model says of the target then, and what the true
one does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polylens.analysis.circuits.paths import Written
from polylens.analysis.circuits.replacement import Layer, Replacement
from polylens.brief import Brief
from polylens.errors import InvalidInputError
from polylens.hosts.base import Arrival, Function
from polylens.hosts.frozen import biased, following
from polylens.report.rendering import Tabled, empty_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, eq=False, repr=False)
class Read(Brief):
    """A part of what the MLP of a layer reads at a position.

    Attributes:
        vector: [d_in], behind the norm in front of it.
    """

    layer: int
    position: int
    vector: Tensor


# What is taken out together: off what is written, or off what is read.
Group = Sequence[Written | Read]
PREDICTIONS = ("predicted", "linear", "gradient", "corrected")
# So much of what is taken out tells what a change is to first order; less drowns in float32.
SMALL = 1 / 64


@dataclass(frozen=True, eq=False, repr=False)
class Ablations(Tabled):
    """How much the target changes when nodes or edges are taken out, by four predictions and in
    truth.

    Attributes:
        names: of what was taken out.
        predicted: [n] by the circuit's model: polynomials, errors and attention patterns as they
            were; norms divide by what they would then.
        linear: [n] less the values of the nodes, or the edges.
        gradient: [n] by attribution patching: the true model's gradient times what is taken out.
        corrected: [n] the gradient, and of the circuit's model the terms of higher order:
            gradient + predicted - what of predicted is linear in what is taken out.
        measured: [n] of the true model, its attention and norms as they are then.
    """

    names: tuple[str, ...]
    predicted: Tensor
    linear: Tensor
    gradient: Tensor
    corrected: Tensor
    measured: Tensor

    def correlation(self, of: str = "predicted") -> float:
        """Pearson's of a prediction, by its name, with what was measured."""
        if len(self.names) < 2:
            raise InvalidInputError("a correlation needs two ablations or more")
        return float(torch.corrcoef(torch.stack([self._of(of), self.measured]))[0, 1])

    def agreement(self, of: str = "predicted") -> float:
        """Share of ablations whose sign is that of what was measured."""
        return float((self._of(of).sign() == self.measured.sign()).double().mean())

    def _of(self, name: str) -> Tensor:
        if name not in PREDICTIONS:
            raise InvalidInputError(f"of must be one of {', '.join(PREDICTIONS)}; got {name!r}")
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self.names)

    def __rich__(self) -> "Table":
        from rich.text import Text

        table = empty_table()
        table.title = "change of the target, in its units"
        kinds = ("measured", "predicted", "linear", "gradient")
        for title in ("without", *kinds):
            table.add_column(title, justify="left" if title == "without" else "right")
        values = (getattr(self, kind).tolist() for kind in kinds)
        for name, *row in zip(self.names, *values, strict=True):
            table.add_row(Text(name), *(f"{value:+.4f}" for value in row))
        return table


def predicted(replacement: Replacement, groups: Sequence[Group]) -> Tensor:
    """[groups]: change of the target of the replacement without what is in each group.

    Attention patterns are held; norms divide by what they would then.
    """
    frozen, target = replacement.frozen, replacement.target
    streams = frozen.streams()
    x = frozen.embedding.expand(len(groups), -1, -1).clone()
    _take_out(x, groups, -1, Written)
    for n, (layer, stream) in enumerate(zip(replacement.layers, streams, strict=False)):
        block, before = layer.block, layer.block.before
        attended, attended_before = x, stream
        if (attention := block.attention) is not None:
            now = replace(attention, before=following(attention.before, stream, x))
            out, out_before = now.written(x), attention.written(stream)
            attended = x + biased(following(attention.behind, out_before, out), out)
            attended_before = stream + biased(attention.behind, out_before)
        reads = (x, stream) if block.parallel else (attended, attended_before)
        read = biased(following(before, reads[1], reads[0]), reads[0]).clone()
        _take_out(read, groups, n, Read)
        written = block.written + _changed(layer, read)
        _take_out(written, groups, n, Written)
        x = attended + biased(following(block.behind, block.written, written), written)
    top = streams[target.layer]
    if not target.tokens:
        return (x - top)[:, target.position] @ target.direction
    first, *against = target.tokens
    read = frozen.W_U[:, first].double()
    read = read - frozen.W_U[:, against[0]].double() if against else read
    now = biased(following(frozen.final, top, x), x)
    return (now - biased(frozen.final, top))[:, target.position] @ read


def to_first_order(replacement: Replacement, groups: Sequence[Group]) -> Tensor:
    """[groups]: the terms of `predicted` that are linear in what is taken out."""
    more, less = (
        [[replace(part, vector=by * part.vector) for part in group] for group in groups]
        for by in (SMALL, -SMALL)
    )
    return (predicted(replacement, more) - predicted(replacement, less)) / (2 * SMALL)


def _changed(layer: Layer, read: Tensor) -> Tensor:
    """[n, pos, d_out]: the polynomial at what is read now, less that at the prompt."""
    if layer.polynomial is None:
        return torch.zeros_like(layer.block.written)[None]
    dtype = next(iter(layer.polynomial.buffers())).dtype
    other = ((read - layer.read).abs().amax(-1) > 0).nonzero(as_tuple=True)
    out = layer.block.written.new_zeros(*read.shape[:-1], layer.block.written.shape[-1])
    now = layer.polynomial(read[other].to(dtype)).double()
    out[other] = now - layer.polynomial(layer.read.to(dtype)).double()[other[-1]]
    return out


def _take_out(x: Tensor, groups: Sequence[Group], n: int, kind: type[Written] | type[Read]) -> None:
    """Off x [groups, pos, d] what each group has of a kind at layer n."""
    for i, group in enumerate(groups):
        for part in group:
            if part.layer == n and isinstance(part, kind):
                x[i, part.position] -= part.vector.to(x)


def measured(
    lens: Any, replacement: Replacement, groups: Sequence[Group], batch_size: int
) -> Tensor:
    """[groups]: the same of the true model."""
    found = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(groups), batch_size):
        some = groups[start : start + batch_size]
        with lens.suspended(), lens.host.edit(_edits(lens, [[], *some])):
            values = target_of(lens, replacement, len(some) + 1)
        found.append((values[1:] - values[0]).cpu())
    return torch.cat(found)


def gradients(lens: Any, replacement: Replacement, groups: Sequence[Group]) -> Tensor:
    """[groups]: change of the target to first order in what is taken out of the true model."""
    layers = sorted({part.layer for group in groups for part in group})
    outputs: dict[int, Tensor] = {}

    def begin(n: int, arrival: Arrival) -> Tensor:
        outputs[n] = arrival.y if arrival.y.requires_grad else arrival.y.requires_grad_()
        return outputs[n]

    functions = {n: (lambda arrival, n=n: begin(n, arrival)) for n in layers}
    with torch.enable_grad(), lens.suspended(), lens.host.edit(functions):
        value = target_of(lens, replacement, 1).sum()
        found = torch.autograd.grad(value, [outputs[n] for n in layers])
    by_layer = dict(zip(layers, (g.detach()[0] for g in found), strict=True))

    def slope(part: Written | Read) -> Tensor:
        g = by_layer[part.layer][part.position]
        if isinstance(part, Written):
            return g.double()
        weights, x = lens[part.layer].weights, replacement.layers[part.layer].read[part.position]
        (of_input,) = torch.func.vjp(weights, x.to(weights.dtype))[1](g.to(weights.dtype))
        return of_input.double()

    return torch.tensor(
        [-sum(float(slope(part) @ part.vector) for part in group) for group in groups],
        dtype=torch.float64,
    )


def target_of(lens: Any, replacement: Replacement, copies: int) -> Tensor:
    """[copies] the target of the true model at as many copies of the prompt, within its hooks."""
    target = replacement.target
    tokens = replacement.frozen.tokens.to(lens.host.device).expand(copies, -1)
    if not target.tokens:
        raise InvalidInputError(
            "what a direction is in the true model is not measured; trace a token, or a pair"
        )
    logits = lens.host.logits(tokens)[:, target.position].double()
    first, *against = target.tokens
    return logits[:, first] - logits[:, against[0]] if against else logits[:, first]


def reading(weights: Any, arrival: Arrival, now: Tensor) -> Tensor:
    """What an MLP of these weights writes where it reads `now` in place of what arrived."""
    x = arrival.x.to(weights.dtype)
    return arrival.y + (weights(now.to(x.dtype)) - weights(x)).to(arrival.y)


def _edits(lens: Any, groups: Sequence[Group]) -> dict[int, Function]:
    layers = {part.layer for group in groups for part in group}
    read = {part.layer for group in groups for part in group if isinstance(part, Read)}

    def function(n: int, arrival: Arrival) -> Tensor:
        y = arrival.y.clone()
        if n in read:
            weights = lens[n].weights
            now = arrival.x.to(weights.dtype, copy=True)
            _take_out(now, groups, n, Read)
            y = reading(weights, arrival, now)
        _take_out(y, groups, n, Written)
        return y

    return {n: (lambda arrival, n=n: function(n, arrival)) for n in layers}


def second_differences(changes: Tensor) -> Tensor:
    """[n] of [n, 3], changes without a, without b and without both: what both did together."""
    return changes[:, 2] - changes[:, 0] - changes[:, 1]
