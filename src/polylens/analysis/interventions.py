"""What a model does when something that a layer writes is taken out, scaled or added."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from polylens.analysis.arguments import check_layer, check_lens
from polylens.analysis.layer_tokens import token_id
from polylens.analysis.readout import top_tokens
from polylens.brief import Brief
from polylens.calibration.seen import require_deterministic
from polylens.calibration.tokens import read, token_names
from polylens.checks import Layer, check_at_least, real_numbers
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.hosts.base import Arrival, Function
from polylens.hosts.batch import Batch, Inputs
from polylens.report.columns import MISSING
from polylens.report.rendering import Tabled, as_frame, empty_table
from polylens.report.scores import Cost, lead_of, of_each_input, predictions, score, scored

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

Part = Tensor | Callable[[Tensor], Tensor]
TokenScores = list[tuple[str, float]]


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Brief):
    """y -> y + by * part(x): a change of what one layer writes.

        Edit(3, lens[3].part(2))                        # without its part of degree 2
        Edit(3, features.part(0), by=1.0)               # with twice its first feature
        Edit(3, vector, by=8.0)                         # steered along a vector
        Edit(3, second_differences(lens[3].weights, writers, [a], [b])[0], at=position)

    Attributes:
        layer: an attached one.
        part: a function of the layer's inputs, [n, d_in] -> [n, d_out], or a vector [d_out], such
            as a row of a decoder, a probe or a steering vector.
        by: -1 takes the part out, s - 1 scales it by s, and a vector is added so many times.
        at: the position, the same in every sequence, from the end where negative; or one for each
            sequence [batch]; all by default.
    """

    layer: Layer
    part: Part
    by: float = -1.0
    at: int | Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Effect(Brief):
    """What edits change, against the same model without them.

    Attributes:
        name: of the edits.
        delta_ce: rise of the cross entropy in nats per token, over all tokens, None of a model that
            reads none; delta_ce_se: its standard error, paired and with sequences as its units,
            None of a single one.
        kl: KL(without || with), mean over all positions, or inputs.
        agreement: share of positions whose most likely token stays the same.
        logits: [d_vocab] how much each logit rises, mean over the positions that are edited, less
            the mean over the vocabulary, which softmax cannot see.
        raises, lowers: the tokens whose logits rise and fall most.
    """

    name: Hashable
    delta_ce: float | None
    delta_ce_se: float | None
    kl: float
    agreement: float
    logits: Tensor
    raises: TokenScores
    lowers: TokenScores


def _two_a_line(tokens: TokenScores) -> str:
    shown = [f"{name} {value:+.2f}" for name, value in tokens]
    return "\n".join("  ".join(shown[i : i + 2]) for i in range(0, len(shown), 2))


@dataclass(frozen=True, repr=False)
class Effects(Tabled):
    """Of several interventions on the same text; `effects[name]` is one.

    Attributes:
        base_ce: cross entropy without any, nats per token; None of a model that reads no tokens.
        n_targets: predicted tokens.
        n_positions: positions whose logits are compared; of a model that reads no tokens, inputs.
        rows: by intervention.
    """

    base_ce: float | None
    n_targets: int
    n_positions: int
    rows: tuple[Effect, ...] = field(repr=False)

    def __getitem__(self, name: Hashable) -> Effect:
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise KeyError(f"no intervention {name!r}; there are {[r.name for r in self.rows]}")
        return found

    def __iter__(self) -> Iterator[Effect]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __rich__(self) -> "Table":
        from rich.text import Text

        table = empty_table()
        loss = "" if self.base_ce is None else f", {self.base_ce:.3f} nats each without an edit"
        what = "inputs" if self.base_ce is None else "tokens"
        table.title = (
            f"{self.n_targets or self.n_positions} {what}{loss}; ΔCE and KL in nats, raised and "
            "lowered tokens with the mean change of their logits"
        )
        for title in ("edit", "ΔCE", "KL", "top-1", "raises", "lowers"):
            justify = "right" if title in ("ΔCE", "KL", "top-1") else "left"
            table.add_column(title, justify=justify)
        for row in self.rows:
            error = "" if row.delta_ce_se is None else f" ± {row.delta_ce_se:.4f}"
            loss = MISSING if row.delta_ce is None else f"{row.delta_ce:+.4f}{error}"
            table.add_row(
                Text(str(row.name)),
                loss,
                f"{row.kl:.4f}",
                f"{row.agreement:.1%}",
                *(Text(_two_a_line(end)) for end in (row.raises, row.lowers)),
            )
        return table

    def to_pandas(self) -> "DataFrame":
        """A row for each intervention, without its logits; needs pandas."""
        columns = ("name", "delta_ce", "delta_ce_se", "kl", "agreement")
        return as_frame({each: getattr(row, each) for each in columns} for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, without the tensors."""
        rows = [
            {**{k: v for k, v in vars(row).items() if k != "logits"}, "name": str(row.name)}
            for row in self.rows
        ]
        return {**vars(self), "rows": rows}


@torch.no_grad()
def intervene(
    lens: Any,
    tokens: Inputs | Batch,
    edits: Mapping[Any, Edit | Sequence[Edit]] | Edit,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    n_tokens: int = 4,
    names: Callable[[int], str] | None = None,
) -> Effects:
    """What each of these interventions does to the model's predictions on a text.

    In the true model, or within `lens.replaced()` in the replacement: what flows without edits is
    what they are compared with, and what an edit's part reads is what reaches the layer then.

        effects = analysis.intervene(lens, tokens, {
            "degree 2": Edit(3, lens[3].part(2)),
            "first feature": Edit(3, features.part(0)),
            "both": [Edit(3, lens[3].part(2)), Edit(5, lens[5].part(2))],
        })

    Args:
        lens: attached.
        tokens: [batch, pos] token ids; floats [batch, ...] for a classifier that reads those, which
            has no cross entropy of a next token.
        edits: one or several by name; several in one entry are made together.
        attention_mask: [batch, pos], 0 at padding, which is not edited.
        batch_size: sequences in one forward pass; interventions share it where they fit.
        n_tokens: named at either end of the logits.
        names: token id -> text; the model's tokenizer by default.

    Raises:
        InvalidInputError: tokens or a layer that cannot be used, a position beyond the text or at
            padding, a part of another size.
        UnsupportedModel: a model without logits [batch, pos, d_vocab] or [batch, classes].

    Cost: one forward pass, and one for each intervention.

    >>> import polylens
    >>> from polylens import analysis, demo
    >>> model, tokens = demo.load_model(), demo.batches(demo.texts()[1], 4, 64)
    >>> lens = polylens.attach(model, tokens, layers=2, progress=False)
    >>> edit = analysis.Edit(2, lens[2].weights)  # the whole layer
    >>> analysis.intervene(lens, tokens, {"layer 2": edit})["layer 2"].delta_ce > 0.1
    True
    """
    check_lens(lens)
    by_name = _by_name(edits)
    lens.ready([edit.layer for several in by_name.values() for edit in several], None)
    host = lens.host
    check_at_least("batch_size", batch_size, 1)
    data = read(host, tokens, attention_mask, (), exclude_first=False)
    require_deterministic(host.module)
    has_tokens = data.targets is not None
    if data.targets is None:
        data = of_each_input(data)
    real, lead = data.streams[data.about].there.to(host.device), lead_of(host, data)
    placed = {
        name: [(_checked(lens, edit), _flags(edit.at, real)) for edit in several]
        for name, several in by_name.items()
    }
    for edit in (edit for several in placed.values() for edit, _ in several if has_tokens):
        if host.stream(edit.layer) != data.about:
            raise UnsupportedModel(
                f"layer {edit.layer} reads {host.stream(edit.layer) or 'no tokens'}, and positions "
                f"are those of {data.about}, which are predicted"
            )
    measured = {
        name: _Measured(torch.stack([flags for _, flags in placed[name]]).any(0)) for name in placed
    }
    order, base, start = list(placed), real.new_zeros(1, dtype=torch.float64), 0
    for batch in data.split(batch_size):
        here = slice(start, start + len(batch))
        start += len(batch)
        shape = real[here].shape
        truth = _predictions(lens, batch)
        true = score(truth, None, batch, lead)
        base += true.ce.sum().to(base.device)
        together = max(1, batch_size // len(batch))
        for i in range(0, len(order), together):
            group = order[i : i + together]
            n = len(group)
            rows = [[(edit, flags[here]) for edit, flags in placed[name]] for name in group]
            with host.edit(_functions(rows, shape, has_tokens)):
                stacked = batch.rows(torch.arange(len(batch)).repeat(n))
                logits = _predictions(lens, stacked)
            for name, changed in zip(group, logits.split(len(batch)), strict=True):
                scores = score(changed, truth, batch, lead)
                measured[name].update(scores, true, changed, truth, here)
    n_targets = scored(data, lead).sum(1).cpu()
    total, n_positions = int(n_targets.sum()), int(real.sum())
    if has_tokens and not total:
        raise InvalidInputError("no token follows another one that is not padding: no loss")
    names = names or token_names(host.tokenizer)
    effects = [
        own.effect(name, n_targets, n_positions, n_tokens, names) for name, own in measured.items()
    ]
    return Effects(float(base) / total if total else None, total, n_positions, tuple(effects))


def _predictions(lens: Any, batch: Batch) -> Tensor:
    """Logits [batch, pos, d_vocab]; [batch, 1, classes] of a model that reads no tokens.

    Raises:
        UnsupportedModel: others.
    """
    logits, shape = predictions(lens.host, batch), batch.streams[batch.about].there.shape
    if logits.dim() != 3 or logits.shape[:2] != shape:
        raise UnsupportedModel(
            "interventions need logits [batch, pos, d_vocab], or [batch, classes] of a model that "
            f"reads no tokens; {lens.model_name} returns {list(logits.shape)} for inputs "
            f"{list(shape)}"
        )
    return logits


def logit_gradient(
    lens: Any,
    tokens: Inputs,
    layer: Layer,
    token: int | str,
    against: int | str | None = None,
    *,
    at: int = -1,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """[batch, d_out] float64: the direction of a layer's output that raises a token's logit most.

    The gradient of the logit, less that of another token or the mean of all, at a position by what
    the layer writes there: through all that follows, unlike `logit_direction`.

    Args:
        lens: attached; within `lens.replaced()` it is the gradient in the replacement.
        tokens: [batch, pos] token ids.
        token, against: ids, or text that is one token each.
        at: position.

    Raises:
        InvalidInputError: a token outside of the vocabulary, a position beyond the text.
        UnsupportedModel: an expert, which does not see every position.

    Cost: a forward and a backward pass.
    """
    layer = check_layer(lens, layer)
    lens.ready([layer], None)
    host = lens.host
    token, against = token_id(lens, token), None if against is None else token_id(lens, against)
    if not isinstance(layer, int):
        raise UnsupportedModel(f"{layer!r} sees only what its router sends there; give a layer")
    data = read(host, tokens, attention_mask, (), exclude_first=False)
    if data.targets is None or host.stream(layer) != data.about:
        raise UnsupportedModel(f"layer {layer} does not read tokens that are predicted")
    real = data.streams[data.about].there.to(host.device)
    flags = _flags(at, real)
    outputs: list[Tensor] = []

    def begin(arrival: Arrival) -> Tensor:
        outputs.append(arrival.y.detach().requires_grad_())
        return outputs[-1]

    with torch.enable_grad(), host.edit({layer: begin}):
        logits = host.logits(data)[flags]
        for value in (token, token if against is None else against):
            if isinstance(value, bool) or value not in range(logits.shape[-1]):
                raise InvalidInputError(
                    f"token must be an id in 0 ... {logits.shape[-1] - 1}, got {value!r}"
                )
        other = logits.mean(-1) if against is None else logits[:, against]
        (gradient,) = torch.autograd.grad((logits[:, token] - other).sum(), outputs[-1:])
    return gradient.reshape(*real.shape, -1)[flags].double()


class _Measured:
    """Streamed cost and change of logits of one intervention."""

    def __init__(self, edited: Tensor) -> None:
        self._edited = edited
        self._cost = Cost()
        self._logits: Tensor | None = None

    def update(self, scores: Any, true: Any, changed: Tensor, truth: Tensor, here: slice) -> None:
        self._cost.update(scores, true)
        flags = self._edited[here].to(changed.device)
        moved = (changed[flags].double() - truth[flags].double()).sum(0)
        self._logits = moved if self._logits is None else self._logits + moved

    def effect(
        self,
        name: Hashable,
        n_targets: Tensor,
        n_positions: int,
        n_tokens: int,
        names: Callable[[int], str],
    ) -> Effect:
        assert self._logits is not None
        logits = self._logits / int(self._edited.sum())
        logits = (logits - logits.mean()).cpu()
        scored = bool(n_targets.any())
        return Effect(
            name,
            self._cost.delta_ce(n_targets) if scored else None,
            self._cost.delta_ce_se(n_targets) if scored else None,
            self._cost.kl(n_positions),
            self._cost.agreement(n_positions),
            logits,
            *top_tokens(logits, min(n_tokens, len(logits)), names),
        )


def _functions(
    rows: Sequence[Sequence[tuple[Edit, Tensor]]], shape: torch.Size, text: bool
) -> dict[Layer, Function]:
    """What flows at each layer where copies of a batch stand below each other, one for each row."""
    by_layer: dict[Layer, list[tuple[Edit, Tensor]]] = {}
    for i, several in enumerate(rows):
        for edit, flags in several:
            everywhere = flags.new_zeros(len(rows), *shape)
            everywhere[i] = flags
            by_layer.setdefault(edit.layer, []).append((edit, everywhere.reshape(-1)))
    return {layer: _edited(several, text) for layer, several in by_layer.items()}


def _edited(several: Sequence[tuple[Edit, Tensor]], text: bool) -> Function:
    def function(arrival: Arrival) -> Tensor:
        x = rearrange(arrival.x, "... d -> (...) d")
        y = rearrange(arrival.y, "... d -> (...) d").clone()
        for edit, flags in several:
            flags = flags.to(x.device)
            here = flags if arrival.places is None else flags[arrival.places.rows]
            if not text and arrival.places is None:  # an image has many inputs, say
                here = here.repeat_interleave(len(x) // len(here))
            if len(here) != len(x):
                raise UnsupportedModel(
                    f"layer {edit.layer} reads {len(x)} inputs where there are {len(here)} tokens"
                )
            if not here.any():
                continue
            part = edit.part
            written = part if isinstance(part, Tensor) else part(x[here])
            if not isinstance(written, Tensor) or written.shape[-1:] != y.shape[-1:]:
                got = (
                    tuple(written.shape) if isinstance(written, Tensor) else type(written).__name__
                )
                raise InvalidInputError(
                    f"a part of layer {edit.layer} must write [n, {y.shape[-1]}], got {got}"
                )
            y[here] = (y[here] + edit.by * written.to(y.device)).to(y.dtype)
        return y.reshape(arrival.y.shape)

    return function


def _by_name(edits: Mapping[Any, Edit | Sequence[Edit]] | Edit) -> dict[Any, list[Edit]]:
    named = {"edit": edits} if isinstance(edits, Edit) else edits
    if not isinstance(named, Mapping) or not named:
        raise InvalidInputError(
            f"edits must be one Edit or several by name, got {type(edits).__name__}"
        )
    found = {name: [e] if isinstance(e, Edit) else list(e) for name, e in named.items()}
    for name, several in found.items():
        if not several or not all(isinstance(edit, Edit) for edit in several):
            raise InvalidInputError(f"{name!r} must be an Edit or several, got {named[name]!r}")
    return found


def _checked(lens: Any, edit: Edit) -> Edit:
    edit = replace(edit, layer=check_layer(lens, edit.layer))
    if isinstance(edit.part, Tensor):
        part, d_out = (
            real_numbers("part", edit.part, lens.host.device),
            lens.sites[edit.layer].d_out,
        )
        if tuple(part.shape) != (d_out,) or not torch.isfinite(part).all():
            raise InvalidInputError(
                f"part must be a finite vector ({d_out},), what layer {edit.layer} writes, or a "
                f"function of its inputs; got {tuple(part.shape)}"
            )
        return replace(edit, part=part.double())
    if not callable(edit.part):
        raise InvalidInputError(
            f"part must be a vector or a function of the layer's inputs, got "
            f"{type(edit.part).__name__}"
        )
    return edit


def _flags(at: int | Tensor | None, real: Tensor) -> Tensor:
    """[batch, pos] of bool: the positions that are edited."""
    if at is None:
        return real
    batch, pos = real.shape
    places = real_numbers("at", at, real.device)
    if places.is_floating_point() or tuple(places.shape) not in ((), (batch,)):
        raise InvalidInputError(
            f"at must be a position, or one for each of the {batch} sequences, got {at!r}"
        )
    places = places.long().expand(batch)
    if ((places < -pos) | (places >= pos)).any():
        raise InvalidInputError(
            f"at must be in {-pos} ... {pos - 1}, the text's positions; got {at}"
        )
    flags = torch.zeros_like(real).scatter(1, (places % pos)[:, None], True)
    if not real[flags].all():
        raise InvalidInputError("at names positions that are padding")
    return flags
