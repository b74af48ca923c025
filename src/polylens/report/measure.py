"""How the figures of a report are measured: R2 of every layer in one pass, then the losses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from polylens.calibration.seen import read_of_all, require_deterministic, watch
from polylens.calibration.telling import progress as told
from polylens.checks import Layer, Layers, check_at_least, check_degree, check_layers, label
from polylens.devices import memory_named
from polylens.errors import InvalidInputError
from polylens.files.format import sha256
from polylens.hosts.base import Arrival
from polylens.hosts.batch import IGNORED, Batch, Inputs, Stream
from polylens.hosts.offloaded import digests
from polylens.inputs.residuals import ResidualSums
from polylens.installed.installation import Installation
from polylens.polynomials.joint import Fitted
from polylens.ranks import Ranks
from polylens.report.likeness import Likeness
from polylens.report.losses import Losses, measure_losses, passes_per_batch, prefixes_of
from polylens.report.report import LayerRow, Report
from polylens.report.scores import lead_of, number_of_classes, of_each_input
from polylens.report.standing_out import StandingOut, remarks
from polylens.report.worst import Decode, decoder, explain

FIRST_POSITION = "the first position of each sequence is left out of R²: attention sink"

NO_OPTIMUM = "no R² by degree: the lens is of a version that kept only what replaces the layers"
BOTH_WAYS = "the model reads both ways: CE is of each token itself, not of the next one"
# Share of held-out passages that may be those of the calibration by chance.
OVERLAP = 0.05
AS_CLASSES = (
    "KL and top-1 are per input, of the {classes} numbers that the model returns for it as logits "
    "of classes; no cross entropy: no labels"
)
NO_LOSS = "no loss columns: the model reads no tokens whose prediction could be scored"


def measure(
    lens: Installation,
    tokens: Inputs,
    *,
    degree: int | None = None,
    layers: Layers | None = None,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    loss: bool = True,
    prefixes: bool = False,
    zero_ablation: bool = False,
    worst: int = 10,
    decode: Decode | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Report:
    """Measure a lens on held-out tokens; `lens.report` is the usual way here.

    R2 = 1 - sum |y - f_k(x)|^2 / sum |y - mean(y)|^2 over the counted tokens and all output
    dimensions, in float64, for every fitted degree k and all layers in one pass. The losses
    take 2 forward passes per layer and batch, zero ablation one more, the prefixes of L layers
    L - 2, the worst tokens one over their sequences; memory is bounded by one batch.

    Args:
        tokens: [batch, pos] token ids. R2 and the ablation's mean count neither padding nor, with
            lens.exclude_first, the first one of each sequence; losses count every token that is
            not padding. Floats [batch, ...] where the model reads those: all count, and of what is
            returned for each as logits [batch, classes] there are KL and top-1.
        degree: of the replacement, fitted degree by default.
        layers: which rows, all by default.
        attention_mask: [batch, pos], 0 at padding.
        loss: False leaves out the loss columns, and all that is measured with layers replaced.
        prefixes, zero_ablation, worst, decode, ranks: see `Lens.report`.

    Raises:
        InvalidInputError: tokens, mask, degree, layers or another argument that cannot be used,
            or activations that are not finite (which layer).
        UnsupportedModel: a layer that was refused.
    """
    degree = lens.degree if degree is None else check_degree(degree, lens.degree, "attach")
    chosen = check_layers(layers, lens.layers, lens.refused, " in this lens")
    _check_options(loss, prefixes, zero_ablation, worst)
    check_at_least("batch_size", batch_size, 1)
    data = read_of_all(
        lens.host,
        tokens,
        attention_mask,
        lens.layers,
        exclude_first=lens.exclude_first,
        ranks=ranks,
    )
    if ranks is not None:
        options = degree, loss, prefixes, zero_ablation, worst, batch_size
        ranks.require_same(_identity(lens, chosen, options))
    as_text = decoder(lens, decode, _some_ids(data))
    require_deterministic(lens.host.module)
    steps = _own(data, batch_size, ranks)
    tokens_scored, classes = data.targets is not None, None
    if loss and not tokens_scored:
        with torch.no_grad():
            classes = number_of_classes(lens.host, data)
        loss = classes is not None
    passes = loss and passes_per_batch(chosen, prefixes, zero_ablation, tokens_scored)
    per_batch = 1 + passes
    losses, all_row, found, lead = None, None, (), 1
    with (
        memory_named("report", "give a smaller batch_size"),
        torch.no_grad(),
        told(
            title="report",
            show=progress and not (ranks and ranks.rank),
            total=len(steps) * per_batch,
        ) as bar,
    ):
        fits = {layer: _Fit(lens[layer], degree) for layer in chosen}
        _see_all(lens, fits, steps, bar)
        if ranks is not None:
            for fit in fits.values():
                fit.merge(ranks)
        if any(fit.sums.n < 2 for layer, fit in fits.items() if isinstance(layer, int)):
            raise InvalidInputError(
                "fewer than 2 activations are left to measure R2 on after padding and position 0; "
                "give longer sequences, or more of them"
            )
        sums = {n: fits[n].sums for n in chosen}
        rows = [fits[n].row(n) for n in chosen]
        if loss:
            means = {layer: sums[layer].mean for layer in chosen if sums[layer].n}
            about = data if tokens_scored else of_each_input(data)
            lead = lead_of(lens.host, about)
            losses = measure_losses(
                lens,
                degree,
                chosen,
                means,
                _own(about, batch_size, ranks),
                bar,
                prefixes=prefixes,
                zero=zero_ablation,
                worst=worst,
                lead=lead,
                about_tokens=tokens_scored,
                ranks=ranks,
            )
            all_row = replace(LayerRow(None, None), **losses.by_group[tuple(chosen)])
            rows = _with_losses(rows, losses, prefixes_of(chosen) if prefixes else {})
            if losses.rises:
                found = explain(lens, degree, chosen, losses.rises, data, batch_size, as_text)
    return Report(
        model=lens.model_name,
        host=lens.host.name,
        inputs=lens.inputs_summary,
        degree=degree,
        fitted_degree=lens.degree,
        n_tokens=_counted(lens, data, sums),
        n_targets=losses.n_targets if losses is not None and tokens_scored else None,
        base_ce=None if losses is None else losses.base_ce,
        rows=tuple(rows),
        all_row=all_row,
        refused=dict(lens.refused),
        notes=(*_notes(lens, data, fits, lead, classes), *_standing_out(lens, data, fits, as_text)),
        worst=found,
    )


def _own(data: Batch, batch_size: int, ranks: Ranks | None) -> list[tuple[int, Batch]]:
    """(index of its first sequence, batch) of all that are this rank's."""
    steps = [(i * batch_size, step) for i, step in enumerate(data.split(batch_size))]
    return steps if ranks is None else steps[ranks.rank :: ranks.size]


def _identity(
    lens: Installation, layers: Sequence[Layer], options: tuple[Any, ...]
) -> dict[str, Any]:
    """What must be the same on every rank. Cost: one SHA-256 over model and polynomials."""
    return {
        "layers": [label(layer) for layer in layers],
        "degree, loss, prefixes, zero_ablation, worst, batch_size": options,
        "weights": digests(lens.host.module),
        "polynomials": {label(layer): sha256(lens[layer].named_buffers()) for layer in layers},
    }


def _check_options(loss: bool, prefixes: bool, zero_ablation: bool, worst: int) -> None:
    for name, value in (("prefixes", prefixes), ("zero_ablation", zero_ablation)):
        if value and not loss:
            raise InvalidInputError(
                f"{name}=True measures losses and loss=False leaves them out; change one of them"
            )
    if isinstance(worst, bool) or not isinstance(worst, int) or worst < 0:
        raise InvalidInputError(f"worst must be a number of tokens, 0 for none, got {worst!r}")


def _with_losses(
    rows: Sequence[LayerRow], losses: Losses, prefixes: dict[Layer, tuple[Layer, ...]]
) -> list[LayerRow]:
    filled = []
    for row in rows:
        assert row.layer is not None
        found = dict(losses.by_group.get((row.layer,), {}))
        if row.layer in prefixes:
            prefix = losses.by_group[prefixes[row.layer]]
            found |= {"prefix_delta_ce": prefix.get("delta_ce"), "prefix_kl": prefix["kl"]}
        filled.append(replace(row, r2_replaced=losses.r2_replaced[row.layer], **found))
    return filled


def _notes(
    lens: Installation,
    data: Batch,
    fits: Mapping[Layer, "_Fit"],
    lead: int,
    classes: int | None,
) -> Iterator[str]:
    if lens.calibrated_on is not None:
        share = lens.calibrated_on.share_of(data)
        if share > OVERLAP:
            yield (
                f"NOT HELD OUT: {share:.0%} of these tokens are in passages that the lens was "
                "fitted to, so that all figures flatter it; give other text"
            )
    if lens.exclude_first and any(bool(s.starts.any()) for s in data.streams.values()):
        yield FIRST_POSITION
    if classes is not None:
        yield AS_CLASSES.format(classes=classes)
    elif data.targets is None:
        yield NO_LOSS
    if lead == 0 and data.lead is None:
        yield BOTH_WAYS
    if any(fit.optimum is None for fit in fits.values()):
        yield NO_OPTIMUM
    formats = {n: lens.sites[n] for n in fits if lens.sites[n].dequantised}
    for name in dict.fromkeys(site.dequantised for site in formats.values()):
        those = {n: site.error for n, site in formats.items() if site.dequantised == name}
        yield (
            f"layers {', '.join(map(label, those))} are quantised ({name}): polynomials are of the "
            "weights that the format stands for, with which the layers were recomputed to "
            f"{max(those.values()):.1g} of the largest output"
        )
    sums = {layer: fit.sums for layer, fit in fits.items()}
    if unseen := [label(n) for n in sums if sums[n].n < 2]:
        yield f"no R² of experts {', '.join(unseen)}: fewer than 2 tokens were sent there"
    if constant := [label(n) for n in sums if sums[n].n > 1 and sums[n].constant]:
        yield (
            f"the output of layers {', '.join(constant)} does not vary: R² is 1 there where the "
            "polynomial reproduces it, else 0"
        )


def _standing_out(
    lens: Installation, data: Batch, fits: Mapping[Layer, "_Fit"], as_text: Decode
) -> Iterator[str]:
    """Remarks on the inputs of each stream that stand out."""
    streams = {layer: lens.host.stream(layer) for layer in fits}
    for stream in dict.fromkeys(streams.values()):
        there = data.streams.get(stream)

        def name(index: int, there: Stream | None = there) -> str:
            if there is None:
                return f"input {index}"
            at = divmod(index, there.there.shape[1])
            text = "" if there.ids is None else f"{as_text([int(there.ids[at])])!r} at "
            return f"{text}{at[0]}:{at[1]}"

        mine = {n: (fit.standing_out, fit.sums) for n, fit in fits.items() if streams[n] == stream}
        yield from remarks(mine, name)


def _some_ids(data: Batch) -> Tensor:
    """Token ids that are among the inputs, to try a decoder on; none where there are none."""
    ids = data.streams[data.about].ids if data.about in data.streams else None
    found = ids if data.targets is None else data.targets[data.targets != IGNORED]
    return torch.empty(0, dtype=torch.long) if found is None else found.flatten()[:1]


def _counted(lens: Installation, data: Batch, sums: dict[Layer, ResidualSums]) -> int:
    """Activations of a layer; of experts alone, between which they are shared out, tokens."""
    whole = [s.n for layer, s in sums.items() if isinstance(layer, int)]
    if whole:
        return max(whole)
    return int(data.streams[data.about].counted(exclude_first=lens.exclude_first).sum())


class _Fit:
    """What a report measures of one layer on the true stream.

    Attributes:
        optimum: without ends, of every degree; None where a file of an earlier version has none.
    """

    def __init__(self, polynomial: Fitted, degree: int) -> None:
        self._polynomial, self._degree = polynomial, degree
        self._ended = polynomial.ends is not None
        self._replacement = polynomial.truncate(degree)
        self._beyond: Tensor | float = 0.0
        self._seen = polynomial.seen
        self._likeness = Likeness(polynomial, self._replacement)
        self.sums, self.standing_out = ResidualSums(), StandingOut(self._seen)
        try:
            self.optimum = polynomial.optimum()
        except InvalidInputError:
            self.optimum = None

    def see(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """Add inputs x [n, d_in] and true outputs y [n, d_out].

        Args:
            index: [n] of each among all inputs.
        """
        optima = [] if self.optimum is None else list(self.optimum.all_degrees(x))
        replaced = self._replacement(x) if self._ended else optima[self._degree]
        y, replaced = y.double(), replaced.double()  # once for all that follows
        self.sums.update(y, [*optima, replaced] if self._ended else optima)
        if not len(x):
            return
        self._likeness.update(x, y, replaced, seed=int(index[0]))
        gate = None
        if self._ended or self._seen is not None:
            gate = self._polynomial.weights.neurons(x)["y"]
            self._beyond = self._beyond + self._polynomial.outside(gate)[self._degree].sum()
        error = (y - replaced).square().sum(1)
        size = self.sums.centred(y).square().sum(1)
        self.standing_out.update(index, y, size, error, gate)

    def merge(self, ranks: Ranks) -> None:
        """Let all ranks have seen what each has."""
        self._beyond = sum(ranks.gathered(self._beyond))
        for sums in (self.sums, self._likeness, self.standing_out):
            sums.merge(ranks)

    def row(self, layer: Layer) -> LayerRow:
        shares = self.sums.r2(f"layer {label(layer)}")
        if shares is None:
            return LayerRow(layer, None, n_tokens=self.sums.n)
        row = LayerRow(
            layer,
            shares,
            n_tokens=self.sums.n,
            unseen=self.standing_out.unseen,
            unlike=self.standing_out.unlike,
            **self._likeness.columns(),
        )
        if not self._ended:
            return row
        *r2, own = shares
        beyond = float(self._beyond) / self.sums.n
        return replace(row, r2=tuple(r2) or None, r2_replacement=own, beyond=beyond)


def _see_all(
    lens: Installation,
    fits: Mapping[Layer, _Fit],
    steps: Sequence[tuple[int, Batch]],
    bar: tqdm,
) -> None:
    """One pass over the tokens with the true model, for all layers and degrees."""
    streams, first = {layer: lens.host.stream(layer) for layer in fits}, 0
    widths: dict[Layer, int | None] = {}

    def see(layer: Layer, arrival: Arrival, kept: Tensor | None) -> None:
        x, y = arrival.rows(kept)
        width = widths[layer]
        index = arrival.indices(kept, width)
        fits[layer].see(x, y, index + first * (width or 1))

    def ticking() -> Iterator[Batch]:
        nonlocal first
        for begin, step in steps:
            first = begin
            for layer, name in streams.items():
                stream = step.streams.get(name)
                widths[layer] = None if stream is None else stream.there.shape[1]
            yield step
            bar.update()

    watch(lens.host, fits, ticking(), lens.exclude_first, see)
