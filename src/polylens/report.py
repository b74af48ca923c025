"""How good the polynomials of a lens are: R2 by layer and degree, and what replacing costs."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from torch import Tensor
from tqdm.auto import tqdm

from polylens import rendering
from polylens.calibration import require_deterministic, watch
from polylens.errors import InvalidInputError
from polylens.hosts.base import Layer
from polylens.lockstep import Step
from polylens.scoring import ResidualSums, score
from polylens.selection import check_degree, check_layers, label, labelled
from polylens.tokens import batches, counted, rows, validate_inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from polylens.lens import Lens

SCHEMA = "polylens.report/1"

# Below this many nats an ablation is harmless, and the share of it recovered means nothing.
HARMLESS = 1e-6

FIRST_POSITION = (
    "position 0 is left out of R² and stays true under replacement and ablation: attention sink"
)

NO_LOSS = "no loss columns: the model reads no tokens whose prediction could be scored"


@dataclass(frozen=True)
class LayerRow:
    """One layer of a report; losses in nats per token, None where they were not measured.

    Attributes:
        layer: index, (index, expert), or None for the row in which all are replaced at once.
        r2: held-out R2 of degree 0, 1, ..., fitted degree; None for that last row. Of an output
            that does not vary it is 1 where it is reproduced, else 0.
        delta_ce: next-token cross entropy with the polynomial minus without.
        kl: mean over positions of KL(true model || model with the polynomial).
        ablation_delta_ce: the same as delta_ce with the output's mean in place of the polynomial.
        loss_recovered: 1 - delta_ce / ablation_delta_ce; None where the ablation is harmless.
        n_tokens: activations that R2 counts; of an expert those that were routed to it.
    """

    layer: Layer | None
    r2: tuple[float, ...] | None
    delta_ce: float | None = None
    kl: float | None = None
    ablation_delta_ce: float | None = None
    loss_recovered: float | None = None
    n_tokens: int | None = None

    @property
    def label(self) -> str:
        return "all" if self.layer is None else label(self.layer)


@dataclass(frozen=True)
class Report:
    """The figures of a lens on held-out tokens; `print(report)`, or leave it last in a cell.

    `report[layer]`, `len(report)` and iteration give the rows.

    Attributes:
        model, host, inputs: which model, in which framework, fitted to which input model.
        degree: of the replacement whose loss was measured; fitted_degree: highest one there is.
        n_tokens: activations counted in R2 (positions of a sequence, patches of an image).
        n_targets: predicted tokens counted in the loss.
        base_ce: cross entropy of the unchanged model, nats per token.
        rows: one per layer; all_row: every listed layer replaced at once.
        refused: reason for each layer that has no polynomial.
        notes: what a reader should know about how this was measured.
    """

    model: str
    host: str
    inputs: str
    degree: int
    fitted_degree: int
    n_tokens: int
    n_targets: int | None
    base_ce: float | None
    rows: tuple[LayerRow, ...]
    all_row: LayerRow | None = None
    refused: dict[Layer, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __getitem__(self, layer: Layer) -> LayerRow:
        for row in self.rows:
            if row.layer == layer:
                return row
        raise InvalidInputError(
            f"no layer {layer!r} in this report; there are {[row.layer for row in self.rows]}"
        )

    def __str__(self) -> str:
        return rendering.text(self)

    def __rich__(self) -> Group:
        return rendering.renderable(self)

    def _repr_html_(self) -> str:
        return rendering.to_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; figures that are not finite become None."""
        return {"schema": SCHEMA, **_plain(asdict(self))}

    def to_json(self, path: str | Path | None = None) -> str:
        """Strict JSON (no NaN), also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """The report that `to_dict` (or `json.loads` of `to_json`) describes.

        Raises:
            InvalidInputError: another schema, or missing or unknown entries.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise InvalidInputError(f"not a report of this version: {got!r}, expected {SCHEMA!r}")
        values = {name: value for name, value in data.items() if name != "schema"}
        try:
            values["rows"] = tuple(_row(row) for row in values["rows"])
            values["all_row"] = None if values["all_row"] is None else _row(values["all_row"])
            values["refused"] = {labelled(k): r for k, r in values["refused"].items()}
            values["notes"] = tuple(values["notes"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInputError(f"not a complete report: {error}") from error

    def plot(self) -> "Figure":
        """Unexplained variance by layer and degree, and the change of loss by layer.

        Raises:
            InvalidInputError: a report without rows.
        """
        from polylens.plots import report_figure

        return report_figure(self)


def measure(
    lens: "Lens",
    tokens: Tensor,
    *,
    degree: int | None = None,
    layers: Iterable[Layer] | int | None = None,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    loss: bool = True,
    progress: bool = True,
) -> Report:
    """Measure a lens on held-out tokens; `lens.report` is the usual way here.

    R2 = 1 - sum |y - f_k(x)|^2 / sum |y - mean(y)|^2 over the counted tokens and all output
    dimensions, in float64, for every fitted degree k and all layers in one pass. The losses
    take 2 forward passes per layer and batch; memory is bounded by one batch.

    Args:
        tokens: [batch, pos] token ids. R2 and the ablation's mean count neither padding nor,
            with lens.exclude_first, position 0; losses count every token that is not padding.
            Floats [batch, ...] where the model reads those: all count, and there is no loss.
        degree: of the replacement, fitted degree by default.
        layers: which rows, all by default.
        attention_mask: [batch, pos], 0 at padding.
        loss: False leaves the loss columns out.

    Raises:
        InvalidInputError: tokens, mask, degree or layers that cannot be used, or activations
            that are not finite (which layer).
        UnsupportedModel: a layer that was refused.
    """
    degree = lens.degree if degree is None else check_degree(degree, lens.degree, "attach")
    chosen = check_layers(layers, lens.layers, lens.refused, " in this lens")
    d_vocab = getattr(getattr(lens.host.model, "cfg", None), "d_vocab", None)
    reads_tokens = lens.host.reads_tokens
    tokens, mask = validate_inputs(
        tokens, attention_mask, reads_tokens=reads_tokens, d_vocab=d_vocab
    )
    loss = loss and reads_tokens
    require_deterministic(lens.host.module)
    device = lens.host.device
    steps = list(batches(tokens.to(device), None if mask is None else mask.to(device), batch_size))
    passes = len(steps) * (1 + (loss and 1 + 2 * len(_groups(chosen))))
    with torch.no_grad(), tqdm(total=passes, desc="report", disable=not progress) as bar:
        sums = _residual_sums(lens, chosen, steps, bar)
        rows = [LayerRow(n, sums[n].r2(n), n_tokens=sums[n].n) for n in chosen]
        base_ce = n_targets = all_row = None
        if loss:
            means = {layer: sums[layer].mean for layer in chosen if sums[layer].n}
            base_ce, n_targets, losses = _losses(lens, degree, chosen, means, steps, bar)
            all_row = LayerRow(None, None, **losses[tuple(chosen)])
            rows = [
                replace(row, **losses.get((n,), {})) for n, row in zip(chosen, rows, strict=True)
            ]
    notes = [FIRST_POSITION] if lens.exclude_first else []
    notes += [] if reads_tokens else [NO_LOSS]
    if unseen := [label(n) for n in chosen if sums[n].n < 2]:
        notes.append(f"no R² of experts {', '.join(unseen)}: fewer than 2 tokens were sent there")
    if constant := [label(n) for n in chosen if sums[n].n > 1 and sums[n].constant]:
        notes.append(
            f"the output of layers {', '.join(constant)} does not vary: R² is 1 there where the "
            "polynomial reproduces it, else 0"
        )
    return Report(
        model=lens.model_name,
        host=lens.host.name,
        inputs=lens.inputs_summary,
        degree=degree,
        fitted_degree=lens.degree,
        n_tokens=_counted(lens, steps) if reads_tokens else max(s.n for s in sums.values()),
        n_targets=n_targets,
        base_ce=base_ce,
        rows=tuple(rows),
        all_row=all_row,
        refused=dict(lens.refused),
        notes=tuple(notes),
    )


def _counted(lens: "Lens", steps: Sequence[Step]) -> int:
    return sum(int(counted(*step, exclude_first=lens.exclude_first).sum()) for step in steps)


def _residual_sums(
    lens: "Lens", layers: Sequence[Layer], steps: Sequence[Step], bar: tqdm
) -> dict[Layer, ResidualSums]:
    """One pass over the tokens with the true model, for all layers and degrees."""
    sums = {layer: ResidualSums() for layer in layers}

    def see(layer: Layer, x: Tensor, y: Tensor, kept: Tensor | None) -> None:
        sums[layer].update(rows(y, kept), lens[layer].all_degrees(rows(x, kept)))

    def ticking() -> Iterator[Step]:
        for step in steps:
            yield step
            bar.update()

    watch(lens.host, layers, ticking(), lens.exclude_first, see)
    if any(s.n < 2 for layer, s in sums.items() if isinstance(layer, int)):
        raise InvalidInputError(
            "fewer than 2 activations are left to measure R2 on after padding and position 0; "
            "give longer sequences, or more of them"
        )
    return sums


def _losses(
    lens: "Lens",
    degree: int,
    layers: Sequence[Layer],
    means: dict[Layer, Tensor],
    steps: Sequence[Step],
    bar: tqdm,
) -> tuple[float, int, dict[tuple[Layer, ...], dict[str, float | None]]]:
    """Base cross entropy, number of targets, and the losses of each group of layers."""
    groups = _groups(layers)
    replaced = {group: torch.zeros(2, dtype=torch.float64) for group in groups}
    ablated = {group: torch.zeros(2, dtype=torch.float64) for group in groups}
    base, sizes = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for batch, mask in steps:
        real = counted(batch, mask, exclude_first=False)
        sizes += torch.tensor([int((real[:, 1:] & real[:, :-1]).sum()), int(real.sum())])
        truth = lens.host.logits(batch, mask)
        if truth.dim() != 3 or truth.shape[:2] != batch.shape:
            raise InvalidInputError(
                f"the loss columns need logits [batch, pos, d_vocab]; {lens.model_name} returns "
                f"{list(truth.shape)} for tokens {list(batch.shape)}; use report(..., loss=False)"
            )
        base += score(truth, None, batch, real)
        bar.update()
        for group in groups:
            with lens.replaced(group, degree):
                logits = lens.host.logits(batch, mask)
            replaced[group] += score(logits, truth, batch, real)
            constants = {
                layer: _constant(means[layer], batch.shape, lens.exclude_first)
                for layer in group
                if layer in means
            }
            with lens.host.substitute(constants):
                logits = lens.host.logits(batch, mask)
            ablated[group] += score(logits, None, batch, real)
            bar.update(2)
    if sizes[0] == 0:
        raise InvalidInputError("no token follows another one that is not padding: no loss")
    base_ce = float(base[0] / sizes[0])
    losses = {
        group: _loss_fields(base_ce, replaced[group] / sizes, ablated[group] / sizes)
        for group in groups
    }
    return base_ce, int(sizes[0]), losses


def _loss_fields(base_ce: float, replaced: Tensor, ablated: Tensor) -> dict[str, float | None]:
    """Both are [cross entropy, KL], means."""
    delta, ablation = float(replaced[0]) - base_ce, float(ablated[0]) - base_ce
    return {
        "delta_ce": delta,
        "kl": float(replaced[1]),
        "ablation_delta_ce": ablation,
        "loss_recovered": None if ablation < HARMLESS else 1 - delta / ablation,
    }


def _constant(mean: Tensor, shape: torch.Size, keep_first: bool):
    """The mean in place of an MLP's output; position 0 stays true where `replaced` keeps it."""

    def ablate(x: Tensor, y: Tensor) -> Tensor:
        flat = y.reshape(-1, y.shape[-1])
        out = mean.to(y).expand_as(flat)
        if keep_first:
            places = getattr(y, "places", None)
            every = torch.arange(len(flat), device=y.device) % shape[1] == 0
            out = torch.where((every if places is None else places.first)[:, None], flat, out)
        return out.reshape(y.shape)

    return ablate


def _groups(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Each layer alone (experts are not, they are many), then all at once, if that is another."""
    alone = [(layer,) for layer in layers if isinstance(layer, int)]
    return list(dict.fromkeys([*alone, tuple(layers)]))


def _row(data: dict[str, Any]) -> LayerRow:
    layer, r2 = data["layer"], data["r2"]
    layer = tuple(layer) if isinstance(layer, list) else layer
    return LayerRow(**{**data, "layer": layer, "r2": None if r2 is None else tuple(r2)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k if isinstance(k, str) else label(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value
