"""How the figures of a report are measured: R2 of every layer in one pass, then the losses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from polylens.calibration.seen import require_deterministic, watch
from polylens.calibration.telling import progress as told
from polylens.calibration.tokens import read
from polylens.checks import Layer, Layers, check_at_least, check_degree, check_layers, label
from polylens.errors import InvalidInputError
from polylens.hosts.base import Arrival
from polylens.hosts.batch import IGNORED, Batch, Inputs
from polylens.inputs.residuals import ResidualSums
from polylens.installed.installation import Installation
from polylens.polynomials.joint import Fitted
from polylens.report.losses import Losses, measure_losses, passes_per_batch, prefixes_of
from polylens.report.report import LayerRow, Report
from polylens.report.scores import lead_of
from polylens.report.worst import Decode, decoder, explain

FIRST_POSITION = "the first position of each sequence is left out of R²: attention sink"

NO_OPTIMUM = "no R² by degree: the lens is of a version that kept only what replaces the layers"
BOTH_WAYS = "the model reads both ways: CE is of each token itself, not of the next one"
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
    worst: int = 10,
    decode: Decode | None = None,
    progress: bool = True,
) -> Report:
    """Measure a lens on held-out tokens; `lens.report` is the usual way here.

    R2 = 1 - sum |y - f_k(x)|^2 / sum |y - mean(y)|^2 over the counted tokens and all output
    dimensions, in float64, for every fitted degree k and all layers in one pass. The losses
    take 2 forward passes per layer and batch, the prefixes of L layers L - 2 more, the worst
    tokens one over their sequences; memory is bounded by one batch.

    Args:
        tokens: [batch, pos] token ids. R2 and the ablation's mean count neither padding nor, with
            lens.exclude_first, the first one of each sequence; losses count every token that is
            not padding. Floats [batch, ...] where the model reads those: all count, and there is
            no loss.
        degree: of the replacement, fitted degree by default.
        layers: which rows, all by default.
        attention_mask: [batch, pos], 0 at padding.
        loss: False leaves out the loss columns, and all that is measured with layers replaced.
        prefixes, worst, decode: see `Lens.report`.

    Raises:
        InvalidInputError: tokens, mask, degree, layers or another argument that cannot be used,
            or activations that are not finite (which layer).
        UnsupportedModel: a layer that was refused.
    """
    degree = lens.degree if degree is None else check_degree(degree, lens.degree, "attach")
    chosen = check_layers(layers, lens.layers, lens.refused, " in this lens")
    _check_options(loss, prefixes, worst)
    check_at_least("batch_size", batch_size, 1)
    data = read(lens.host, tokens, attention_mask, lens.layers, exclude_first=lens.exclude_first)
    targets = data.targets if loss else None
    loss = targets is not None
    as_text = str if targets is None else decoder(lens, decode, targets[targets != IGNORED])
    require_deterministic(lens.host.module)
    steps = list(data.split(batch_size))
    per_batch = 1 + (loss and passes_per_batch(chosen, prefixes))
    losses, all_row, found, lead = None, None, (), 1
    with (
        torch.no_grad(),
        told(title="report", show=progress, total=len(steps) * per_batch) as bar,
    ):
        fits = {layer: _Fit(lens[layer], degree) for layer in chosen}
        sums = _residual_sums(lens, fits, steps, bar)
        rows = [fits[n].row(n, sums[n]) for n in chosen]
        if loss:
            means = {layer: sums[layer].mean for layer in chosen if sums[layer].n}
            lead = lead_of(lens.host, data)
            losses = measure_losses(lens, degree, chosen, means, steps, bar, prefixes, worst, lead)
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
        n_targets=None if losses is None else losses.n_targets,
        base_ce=None if losses is None else losses.base_ce,
        rows=tuple(rows),
        all_row=all_row,
        refused=dict(lens.refused),
        notes=tuple(_notes(lens, data, sums, fits, lead)),
        worst=found,
    )


def _check_options(loss: bool, prefixes: bool, worst: int) -> None:
    if prefixes and not loss:
        raise InvalidInputError(
            "prefixes=True measures losses and loss=False leaves them out; change one of them"
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
            found |= {"prefix_delta_ce": prefix["delta_ce"], "prefix_kl": prefix["kl"]}
        filled.append(replace(row, r2_replaced=losses.r2_replaced[row.layer], **found))
    return filled


def _notes(
    lens: Installation,
    data: Batch,
    sums: dict[Layer, ResidualSums],
    fits: Mapping[Layer, "_Fit"],
    lead: int,
) -> Iterator[str]:
    if lens.exclude_first and any(bool(s.starts.any()) for s in data.streams.values()):
        yield FIRST_POSITION
    if data.targets is None:
        yield NO_LOSS
    if lead == 0 and data.lead is None:
        yield BOTH_WAYS
    if any(fit.optimum is None for fit in fits.values()):
        yield NO_OPTIMUM
    if unseen := [label(n) for n in sums if sums[n].n < 2]:
        yield f"no R² of experts {', '.join(unseen)}: fewer than 2 tokens were sent there"
    if constant := [label(n) for n in sums if sums[n].n > 1 and sums[n].constant]:
        yield (
            f"the output of layers {', '.join(constant)} does not vary: R² is 1 there where the "
            "polynomial reproduces it, else 0"
        )


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
        try:
            self.optimum = polynomial.optimum()
        except InvalidInputError:
            self.optimum = None

    def see(self, x: Tensor) -> Tensor:
        """[..., n, d_out] outputs at x [n, d_in]: of every optimum, and of the replacement."""
        found = [] if self.optimum is None else list(self.optimum.all_degrees(x))
        if self._ended:
            found.append(self._replacement(x))
            y = self._polynomial.weights.neurons(x)["y"]
            self._beyond = self._beyond + self._polynomial.outside(y)[self._degree].sum()
        return torch.stack(found)

    def row(self, layer: Layer, sums: ResidualSums) -> LayerRow:
        shares = sums.r2(f"layer {label(layer)}")
        if shares is None or not self._ended:
            return LayerRow(layer, shares, n_tokens=sums.n)
        *r2, own = shares
        return LayerRow(
            layer,
            tuple(r2) or None,
            n_tokens=sums.n,
            r2_replacement=own,
            beyond=float(self._beyond) / sums.n,
        )


def _residual_sums(
    lens: Installation, fits: Mapping[Layer, _Fit], steps: Sequence[Batch], bar: tqdm
) -> dict[Layer, ResidualSums]:
    """One pass over the tokens with the true model, for all layers and degrees."""
    sums = {layer: ResidualSums() for layer in fits}

    def see(layer: Layer, arrival: Arrival, kept: Tensor | None) -> None:
        x, y = arrival.rows(kept)
        sums[layer].update(y, fits[layer].see(x))

    def ticking() -> Iterator[Batch]:
        for step in steps:
            yield step
            bar.update()

    watch(lens.host, fits, ticking(), lens.exclude_first, see)
    if any(s.n < 2 for layer, s in sums.items() if isinstance(layer, int)):
        raise InvalidInputError(
            "fewer than 2 activations are left to measure R2 on after padding and position 0; "
            "give longer sequences, or more of them"
        )
    return sums
