"""How good the polynomials of a lens are: the figures of `lens.report`, and their forms."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polylens.checks import Expert, Layer, from_json, label, labelled, to_json
from polylens.errors import InvalidInputError
from polylens.report import columns, rendering
from polylens.report.figure import report_figure
from polylens.report.rows import LayerRow as LayerRow
from polylens.report.rows import WorstToken as WorstToken

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = "polylens.report/2"
# Version 1 had fewer entries, which are None or empty when it is read.
READABLE = (SCHEMA, "polylens.report/1")


@dataclass(frozen=True, repr=False)
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
        worst: the tokens that lose most when all listed layers are replaced, worst first; their
            text goes wherever the report is saved.
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
    worst: tuple[WorstToken, ...] = ()

    def __repr__(self) -> str:
        loss = "" if self.base_ce is None else f", base CE {self.base_ce:.3f}"
        return f"Report({self.model}, {len(self)} layers, degree {self.degree}{loss})"

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
        return rendering.text(self._sheet())

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield from rendering.parts(self._sheet(), options.max_width)

    def _repr_html_(self) -> str:
        return rendering.to_html(self._sheet())

    def to_markdown(self) -> str:
        """The table, with what it is of and its remarks; without text of worst tokens."""
        return rendering.to_markdown(self._sheet())

    def to_pandas(self) -> "DataFrame":
        """A row for each layer, and one without a number for all at once; needs pandas."""
        rows = self.rows if self.all_row is None else (*self.rows, self.all_row)
        return rendering.as_frame(map(vars, rows))

    def _sheet(self) -> rendering.Sheet:
        span = f"{len(self)} layer{'s' if len(self) != 1 else ''}"
        subtitle = f"fitted to {self.inputs}; held-out R² on {self.n_tokens:,} activations"
        if self.base_ce is not None:
            subtitle += f"; base CE {self.base_ce:.4f} nats on {self.n_targets:,} targets"
        rows = self.rows if self.all_row is None else (*self.rows, self.all_row)
        refused = (f"layer {label(n)} refused: {reason}" for n, reason in self.refused.items())
        return rendering.Sheet(
            f"{self.model} ({self.host}): {span} as polynomials",
            subtitle,
            columns.shown(rows, self.degree, self.fitted_degree),
            self.all_row is not None,
            self.worst,
            [*columns.legends(rows, self.degree), *self.notes, *refused],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; figures that are not finite become None."""
        return {"schema": SCHEMA, **_plain(vars(self))}

    def to_json(self, path: str | Path | None = None) -> str:
        """Strict JSON (no NaN), also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """The report that `to_dict` (or `json.loads` of `to_json`) describes.

        Also reads what older versions wrote, without the figures that those did not measure.

        Raises:
            InvalidInputError: another schema, or missing or unknown entries.
        """
        if not isinstance(data, dict) or data.get("schema") not in READABLE:
            got = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise InvalidInputError(
                f"not a report that this version reads: {got!r}, expected {' or '.join(READABLE)}"
            )
        values = {name: value for name, value in data.items() if name != "schema"}
        try:
            values["rows"] = tuple(columns.read(row) for row in values["rows"])
            total = values["all_row"]
            values["all_row"] = None if total is None else columns.read(total)
            values["refused"] = {labelled(k): r for k, r in values["refused"].items()}
            values["notes"] = tuple(values["notes"])
            values["worst"] = tuple(_worst(token) for token in values.get("worst", ()))
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInputError(f"not a complete report: {error}") from error

    def plot(self) -> "Figure":
        """R2 by layer and degree, and the change of loss by layer; see `polylens.report.figure`.

        Raises:
            InvalidInputError: a report without rows.
        """
        return report_figure(
            self.rows,
            self.all_row if self.base_ce is not None else None,
            title=self.model,
            degree=self.degree,
            fitted_degree=self.fitted_degree,
            n_tokens=self.n_tokens,
            base_ce=self.base_ce,
        )


def _worst(data: dict[str, Any]) -> WorstToken:
    values: dict[str, Any] = {**data, "layer": from_json(data["layer"])}
    return WorstToken(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Expert):
        return to_json(value)
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {k if isinstance(k, str) else label(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value
