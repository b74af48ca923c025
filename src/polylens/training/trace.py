"""R2 over training as data: what is measured on, rows, and the trace that they make."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polylens.brief import Brief
from polylens.checks import Layer, from_json
from polylens.errors import InvalidInputError
from polylens.fitting.fit import Inputs
from polylens.report.rendering import Tabled, as_frame, empty_table
from polylens.training.figure import training_figure
from polylens.training.rows import TraceRow as TraceRow
from polylens.training.rows import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.table import Table


@dataclass(frozen=True, eq=False, repr=False)
class TraceData(Brief):
    """What every checkpoint is measured on.

    Attributes:
        calibration: [n, d_in] inputs, or [batch, pos] token ids for a language model, that the
            polynomials are fitted to.
        held_out: the same kind, that R2 and loss are measured on.
        labels: [n] classes of `held_out`, for the loss and accuracy of a classifier.
        inputs: input models by name for the layers of a classifier that read its own input,
            such as {"gaussian": ..., "mixture": ...}; the Gaussian of `calibration` by default.
            Deeper layers have the Gaussian of what reaches them.
    """

    calibration: Tensor
    held_out: Tensor
    labels: Tensor | None = None
    inputs: Mapping[str, Inputs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("calibration", "held_out"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() < 2 or not len(value):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InvalidInputError(
                    f"{name} must be a tensor [n, d_in], or token ids [batch, pos], with at least "
                    f"one row; got {got}"
                )
        if self.calibration.is_floating_point() != self.held_out.is_floating_point():
            raise InvalidInputError(
                "calibration and held_out must both be inputs or both token ids"
            )
        if self.labels is not None and len(self.labels) != len(self.held_out):
            raise InvalidInputError(
                f"{len(self.labels)} labels for {len(self.held_out)} held-out inputs"
            )
        if self.is_text and (self.labels is not None or self.inputs):
            raise InvalidInputError(
                "labels= and inputs= are for a classifier; of token ids the next ones are predicted"
            )
        if self.labels is not None and not isinstance(self.labels, Tensor):
            raise InvalidInputError(
                f"labels must be a tensor of classes [n], got {type(self.labels).__name__}"
            )
        if not self.is_text and self.calibration.shape[1:] != self.held_out.shape[1:]:
            raise InvalidInputError(
                f"calibration and held_out must be inputs of one shape, got "
                f"{tuple(self.calibration.shape)} and {tuple(self.held_out.shape)}"
            )
        named = self.inputs.values() if isinstance(self.inputs, Mapping) else [None]
        if not all(isinstance(model, Inputs) for model in named):
            raise InvalidInputError(
                "inputs must be input models by name, such as {'gaussian': "
                f"Gaussian.from_samples(x)}}, got {self.inputs!r:.80}"
            )

    @property
    def is_text(self) -> bool:
        return not self.calibration.is_floating_point()


@dataclass(frozen=True, repr=False)
class Trace(Tabled):
    """Rows by step; failed checkpoints have a row with `error`."""

    rows: tuple[TraceRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def measured(self) -> list[TraceRow]:
        """The rows that have R2."""
        return [row for row in self.rows if row.error is None and row.r2 is not None]

    @property
    def steps(self) -> list[int]:
        """Measured steps, in order."""
        return sorted({row.step for row in self.rows if row.error is None})

    @property
    def errors(self) -> dict[int, str]:
        """Why each failed checkpoint failed."""
        return {row.step: row.error for row in self.rows if row.error is not None}

    def series(self, layer: Layer, inputs: str = "gaussian", model: bool = False) -> Tensor:
        """[steps, degree + 1] R2 of one layer, held-out or under the input model.

        Raises:
            InvalidInputError: nothing was measured for this layer and input model.
        """
        rows = [r for r in self.rows if r.error is None and (r.layer, r.inputs) == (layer, inputs)]
        values = [r.r2_model if model else r.r2 for r in sorted(rows, key=lambda r: r.step)]
        if not values or any(v is None for v in values):
            there = list(dict.fromkeys((r.layer, r.inputs) for r in self.rows if r.error is None))
            raise InvalidInputError(f"no R2 of layer {layer}, inputs {inputs!r}; there are {there}")
        return torch.tensor(values, dtype=torch.float64)

    def __rich__(self) -> "Table":
        """A line per step and input model; R2 is the median over layers."""

        rows = self.measured
        degree = max((row.degree for row in rows), default=0)
        table = empty_table()
        for title in ("step", "inputs", "loss", *(f"R² deg {k}" for k in range(1, degree + 1))):
            table.add_column(title, justify="left" if title == "inputs" else "right")
        for step in sorted({row.step for row in self.rows}):
            if step in self.errors:
                table.add_row(str(step), self.errors[step])
            for inputs in dict.fromkeys(row.inputs for row in rows if row.step == step):
                there = [r for r in rows if (r.step, r.inputs) == (step, inputs)]
                loss = "–" if there[0].loss is None else f"{there[0].loss:.4f}"
                r2 = (median((r.r2 or ())[k] for r in there) for k in range(1, degree + 1))
                table.add_row(str(step), inputs, loss, *(f"{value:.4f}" for value in r2))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {"rows": [record(row) for row in self.rows]}

    def to_pandas(self) -> "DataFrame":
        """A row for each step, layer and input model; needs pandas."""
        return as_frame(map(record, self.rows))

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """From a JSON-lines file; a last line cut short by an interruption is left out.

        Raises:
            InvalidInputError: another line that is no row (which).
        """
        lines = Path(path).read_text().splitlines()
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                values["layer"] = from_json(values["layer"])
                for name in ("r2", "r2_model"):
                    if isinstance(values[name], list):
                        values[name] = tuple(values[name])
                rows.append(TraceRow(**values))
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):
                    raise InvalidInputError(
                        f"{path}, line {number} is no row of a trace ({error}); delete the file "
                        "or give another path"
                    ) from error
        return cls(tuple(rows))

    def plot(self) -> "Figure":
        """R2 by degree and the loss, on a log step axis.

        Raises:
            InvalidInputError: nothing was measured.
        """
        return training_figure(self.measured, self.errors)
