"""The columns of a report: a row each, which text, HTML, Markdown, JSON and pages read.

To add one: a row here, and a field of its name in `LayerRow` that `measure` or `losses` fills.
Figures draw those that `report.figure` names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polylens.checks import Expert, from_json
from polylens.report.rows import LayerRow, row_label

MISSING = "–"


def number(spec: str) -> Callable[[float | None], str]:
    """By this format; what would be a row of digits is shown by its size."""

    def form(value: float | None) -> str:
        if value is None:
            return MISSING
        return format(value, spec if spec == "," or abs(value) < 1e4 else ".2g")

    return form


def r2(value: float | None) -> str:
    """Four digits, but never 1 where it is not."""
    return ">0.9999" if value is not None and 0.99995 <= value < 1 else number(".4f")(value)


def share(value: float | None) -> str:
    """In percent."""
    return MISSING if value is None else number(".1f")(100 * value) + "%"


@dataclass(frozen=True)
class Column:
    """One column of the table of layers.

    Attributes:
        name: the attribute of a LayerRow, and its key in JSON.
        title: in tables, {degree} standing for the replacing degree; "" where it is in JSON only.
        form: a value as text.
        legend: the line below the tables that explains it; lines are in order of `rank`: the
            loss, other scores, R2 where all is replaced, what they are compared with.
        label: in plots.
        shaded: by its size from 0 to 1, where colours can be shown.
        by_degree: values are tuples over degrees, shown as a column of each degree.
        of_experts: shown only where there are experts; any other where something was measured.
    """

    name: str
    title: str
    form: Callable[[Any], str]
    legend: str = ""
    rank: int = 0
    label: str = ""
    shaded: bool = False
    by_degree: bool = False
    of_experts: bool = False


COLUMNS = (
    Column("layer", "layer", row_label),
    Column("n_tokens", "tokens", number(","), of_experts=True),
    Column("r2", "R² deg {degree}", r2, label="deg {degree}", shaded=True, by_degree=True),
    Column(
        "r2_replacement",
        "R² ends",
        r2,
        "R² deg k: of the optimum, one polynomial; R² ends: of what replaces the layer, degree "
        "{degree} up to its ends and the activation's asymptotes beyond",
        rank=1,
        label="replacement",
        shaded=True,
    ),
    Column(
        "beyond",
        "beyond",
        share,
        "beyond: preactivations of the layer beyond these ends",
        rank=1,
    ),
    Column(
        "r2_replaced",
        "R² repl.",
        r2,
        "R² repl.: of degree {degree}, where every listed layer is replaced",
        rank=1,
        label="replaced",
        shaded=True,
    ),
    Column("delta_ce", "ΔCE deg {degree}", number("+.4f"), label="degree {degree} polynomial"),
    Column(
        "delta_ce_se",
        "±",
        number(".4f"),
        "±: standard error of ΔCE, paired, over sequences",
    ),
    Column(
        "kl",
        "KL",
        number(".4f"),
        "ΔCE and KL: nats per token, degree {degree} in place of one layer's MLP; "
        "all: of every listed layer at once",
        rank=-1,
    ),
    Column(
        "agreement",
        "top-1",
        share,
        "top-1: positions where the most likely token is that of the true model",
    ),
    Column(
        "ablation_delta_ce",
        "ΔCE ablated",
        number("+.4f"),
        "ablated: the output's mean in place of the MLP",
        rank=2,
        label="mean ablation",
    ),
    Column(
        "zero_delta_ce",
        "ΔCE zeroed",
        number("+.4f"),
        "zeroed: nothing in place of the MLP",
        rank=2,
        label="zero ablation",
    ),
    Column(
        "loss_recovered",
        "recovered",
        share,
        "recovered: 1 − ΔCE / ΔCE ablated, the share of what the ablation costs that the "
        "polynomial saves; above 100% where the polynomial lowers the loss",
        rank=2,
    ),
    Column(
        "prefix_delta_ce",
        "ΔCE prefix",
        number("+.4f"),
        "prefix: this and every earlier listed layer replaced",
        rank=2,
        label="all up to this layer",
    ),
    Column("prefix_kl", "", number(".4f")),
    Column(
        "cosine",
        "cos",
        r2,
        "cos, norm: of the outputs, means over inputs of the cosine and of |f(x)| / |y|; ∂cos: "
        "cosine between the derivatives, along random directions",
        rank=1,
    ),
    Column("norm_ratio", "norm", number(".4f")),
    Column("jacobian_cosine", "∂cos", r2),
    Column(
        "unseen",
        "unseen",
        number(".2%"),
        "unseen: preactivations outside the range that calibration saw of each neuron",
        rank=1,
    ),
    Column("unlike", "", number(",")),
)
BY_NAME = {column.name: column for column in COLUMNS}


def read(data: dict[str, Any]) -> LayerRow:
    """The row that a JSON object describes; what it does not have was not measured.

    Raises:
        ValueError: entries that are no columns, or no layer and R2.
    """
    if unknown := data.keys() - BY_NAME:
        raise ValueError(f"a row has unknown entries {sorted(unknown)}")
    r2 = None if data["r2"] is None else tuple(data["r2"])
    values: dict[str, Any] = {**data, "layer": from_json(data["layer"]), "r2": r2}
    return LayerRow(**values)


@dataclass(frozen=True)
class Shown:
    """A column of one report.

    Attributes:
        cells: one for each row; shades: 0 ... 1 or None of each, where it is shaded.
    """

    title: str
    cells: list[str]
    shades: list[float | None] | None = None

    @property
    def width(self) -> int:
        return max(map(len, [*self.title.split(" ", 1), *self.cells]))


def shown(rows: Sequence[LayerRow], degree: int, fitted_degree: int) -> list[Shown]:
    """The columns of these rows, in the order of the table.

    Args:
        degree: of the replacement; fitted_degree: how many R2 there are.
    """
    found: list[Shown] = []
    for column in _chosen(rows):
        values = [getattr(row, column.name) for row in rows]
        if column.by_degree:
            for k in degrees(fitted_degree):
                of_degree = [None if value is None else value[k] for value in values]
                found.append(_filled(column, of_degree, k))
        else:
            found.append(_filled(column, values, degree))
    return found


def legends(rows: Sequence[LayerRow], degree: int) -> list[str]:
    """What explains the columns that are shown."""
    explained = [column for column in _chosen(rows) if column.legend]
    explained.sort(key=lambda column: column.rank)
    return [column.legend.format(degree=degree) for column in explained]


def degrees(fitted_degree: int) -> range:
    """Those that are shown: degree 0 is a constant, whose R2 only says how far the mean moved."""
    return range(min(1, fitted_degree), fitted_degree + 1)


def _chosen(rows: Sequence[LayerRow]) -> list[Column]:
    experts = any(isinstance(row.layer, Expert) for row in rows)
    measured = (c for c in COLUMNS if any(getattr(row, c.name) is not None for row in rows))
    return [c for c in measured if c.title and (experts or not c.of_experts)]


def _filled(column: Column, values: list[Any], degree: int) -> Shown:
    cells = [column.form(value) for value in values]
    return Shown(column.title.format(degree=degree), cells, values if column.shaded else None)
