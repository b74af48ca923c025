"""A report as text, as rich tables, and as HTML."""

import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from polylens.checks import Expert, label

if TYPE_CHECKING:
    from polylens.report.report import LayerRow, Report, WorstToken

TEXT_WIDTH = 100
GAP = 2
MISSING = "–"
# How much is shown of a worst token with what is in front of it, at least and on a page.
CONTEXT_LEAST, CONTEXT_MOST = 16, 60

_CSS = (
    ".polylens-report{font-size:90%}.polylens-report td,.polylens-report th"
    "{text-align:right;padding:1px 8px;font-variant-numeric:tabular-nums}"
    ".polylens-report tr.all td{font-weight:600;border-top:1px solid}"
    ".polylens-report .text{text-align:left;white-space:pre}.polylens-report table{margin:.5em 0}"
)


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, a cell for each row, and R2 of each, if it shows that."""

    title: str
    cells: list[str]
    r2: list[float | None] | None = None

    @property
    def width(self) -> int:
        return max(map(len, [*self.title.split(" ", 1), *self.cells]))


def text(report: "Report") -> str:
    """As plain text without ANSI codes, 100 columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=TEXT_WIDTH, color_system=None, legacy_windows=False)
    console.print(Group(*parts(report, TEXT_WIDTH)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def parts(report: "Report", width: int) -> Iterator[RenderableType]:
    """Heading, table, worst tokens and remarks; columns that do not fit go into another table."""
    yield Text(_title(report), style="bold")
    yield Text(_subtitle(report))
    for columns in _stacked(_columns(report), width):
        yield Text()
        yield _table(report, columns)
    if report.worst:
        yield Text(f"\n{_WORST_TITLE}\n")
        yield _worst_table(report, width)
        yield Text(f"\n{_WORST_REMARK}", style="dim")
    yield Text()
    for line in _remarks(report):
        yield Text(line, style="dim")


def to_html(report: "Report") -> str:
    """A self-contained <div> for notebooks; R2 is shaded by its size."""
    columns = _columns(report)
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in columns)
    body = "".join(_html_row(columns, i, row) for i, row in enumerate(_listed(report)))
    remarks = "".join(f"<div>{html.escape(line)}</div>" for line in _remarks(report))
    return (
        f'<div class="polylens-report"><style>{_CSS}</style>'
        f"<div><b>{html.escape(_title(report))}</b></div>"
        f"<div>{html.escape(_subtitle(report))}</div>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{_html_worst(report)}{remarks}</div>"
    )


def to_markdown(report: "Report") -> str:
    """The table as Markdown, with its subtitle and remarks; without text of worst tokens."""
    columns = _columns(report)
    rows = [[c.title for c in columns], *zip(*(c.cells for c in columns), strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(["---:"] * len(rows[0])) + " |")
    remarks = (f"- {line}" for line in _remarks(report))
    return "\n".join([_subtitle(report), "", *lines, "", *remarks]).rstrip()


def _listed(report: "Report") -> list["LayerRow"]:
    return [*report.rows, *([] if report.all_row is None else [report.all_row])]


def _columns(report: "Report") -> list[Column]:
    """Those of which anything was measured."""
    rows = _listed(report)
    columns = [Column("layer", [row.label for row in rows])]
    if any(isinstance(row.layer, Expert) for row in rows):
        columns.append(Column("tokens", [_number(row.n_tokens, ",") for row in rows]))
    # Degree 0 is a constant: its R2 only says how far the held-out mean has moved.
    for k in range(min(1, report.fitted_degree), report.fitted_degree + 1):
        columns.append(_r2_column(f"R² deg {k}", [None if r.r2 is None else r.r2[k] for r in rows]))
    if report.all_row is None:
        return columns
    columns.append(_r2_column("R² repl.", [row.r2_replaced for row in rows]))
    losses = {
        f"ΔCE deg {report.degree}": [_number(row.delta_ce, "+.4f") for row in rows],
        "±": [_number(row.delta_ce_se, ".4f") for row in rows],
        "KL": [_number(row.kl, ".4f") for row in rows],
        "top-1": [_share(row.agreement) for row in rows],
        "ΔCE ablated": [_number(row.ablation_delta_ce, "+.4f") for row in rows],
        "recovered": [_share(row.loss_recovered) for row in rows],
        "ΔCE prefix": [_number(row.prefix_delta_ce, "+.4f") for row in rows],
    }
    columns += [Column(title, cells) for title, cells in losses.items()]
    return [column for column in columns if set(column.cells) != {MISSING}]


def _r2_column(title: str, values: list[float | None]) -> Column:
    return Column(title, [_r2(value) for value in values], values)


def _stacked(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """The columns in groups that are no wider than this, each with the first one in front."""
    first, *others = columns
    groups: list[list[Column]] = []
    used = width
    for column in others:
        used += GAP + column.width
        if used > width:
            groups.append([first])
            used = first.width + GAP + column.width
        groups[-1].append(column)
    return groups


def _title(report: "Report") -> str:
    span = f"{len(report)} layer{'s' if len(report) != 1 else ''}"
    return f"{report.model} ({report.host}): {span} as polynomials"


def _subtitle(report: "Report") -> str:
    fitted = f"fitted to {report.inputs}; held-out R² on {report.n_tokens:,} activations"
    if report.base_ce is None:
        return fitted
    return f"{fitted}; base CE {report.base_ce:.4f} nats on {report.n_targets:,} targets"


def _remarks(report: "Report") -> list[str]:
    shown = {column.title for column in _columns(report)}
    losses = {
        "KL": f"ΔCE and KL: nats per token, degree {report.degree} in place of one layer's MLP; "
        "all: of every listed layer at once",
        "±": "±: standard error of ΔCE, paired, over sequences",
        "top-1": "top-1: positions where the most likely token is that of the true model",
        "R² repl.": f"R² repl.: of degree {report.degree}, where every listed layer is replaced",
        "ΔCE ablated": "ablated: the output's mean in place of the MLP",
        "ΔCE prefix": "prefix: this and every earlier listed layer replaced",
    }
    refused = [f"layer {label(n)} refused: {reason}" for n, reason in report.refused.items()]
    measured = [remark for title, remark in losses.items() if title in shown]
    return [*measured, *report.notes, *refused]


def _table(report: "Report", columns: Sequence[Column]) -> Table:
    table = _empty_table()
    for column in columns:
        table.add_column(_stacked_title(column), justify="right", no_wrap=True)
    for i, row in enumerate(_listed(report)):
        if row.layer is None:
            table.add_section()
        cells = (column.cells[i] for column in columns)
        table.add_row(*cells, style="bold" if row.layer is None else None)
    return table


def _stacked_title(column: Column) -> str:
    return column.title.replace(" ", "\n", 1)


def _empty_table() -> Table:
    padding = (0, 0, 0, GAP - 1)  # the box itself has one blank between columns
    return Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)


def _html_row(columns: Sequence[Column], i: int, row: "LayerRow") -> str:
    tds = ""
    for column in columns:
        value = None if column.r2 is None else column.r2[i]
        alpha = None if value is None else 0.35 * min(max(value, 0.0), 1.0)
        shade = "" if alpha is None else f' style="background:rgba(0,114,178,{alpha:.2f})"'
        tds += f"<td{shade}>{html.escape(column.cells[i])}</td>"
    return f'<tr class="all">{tds}</tr>' if row.layer is None else f"<tr>{tds}</tr>"


# ----------------------------------------------------------------- worst tokens

_WORST_TITLE = "Tokens that lose most with every listed layer replaced"
_WORST_REMARK = (
    "layer, error, neuron: where the token is predicted, the layer with the largest "
    "|y − f(x)| / |y|, and its preactivation farthest from the mean of calibration, in "
    "standard deviations"
)
_TEXT = "context → token"
_WORST = ("seq:pos", "true CE", "replaced CE", "KL", "layer", "error /|y|", "neuron", "at sd")


def _worst_cells(token: "WorstToken") -> list[str]:
    return [
        f"{token.sequence}:{token.position}",
        *(_number(value, ".2f") for value in (token.true_ce, token.replaced_ce, token.kl)),
        MISSING if token.layer is None else label(token.layer),
        _number(token.error, ".2f"),
        MISSING if token.neuron is None else str(token.neuron),
        _number(token.deviation, "+.1f"),
    ]


def _worst_table(report: "Report", width: int) -> Table:
    table = _empty_table()
    rows = [_worst_cells(token) for token in report.worst]
    columns = [Column(t, list(c)) for t, c in zip(_WORST, zip(*rows, strict=True), strict=True)]
    for column in columns:
        # only the text may be cut
        table.add_column(_stacked_title(column), justify="right", min_width=column.width)
    table.add_column(_TEXT, no_wrap=True)
    room = max(width - sum(column.width + GAP for column in columns), CONTEXT_LEAST)
    for token, cells in zip(report.worst, rows, strict=True):
        table.add_row(*cells, Text(_context(token, room)).append(_token(token), style="bold"))
    return table


def _html_worst(report: "Report") -> str:
    if not report.worst:
        return ""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in _WORST)
    body = ""
    for token in report.worst:
        tds = "".join(f"<td>{html.escape(cell)}</td>" for cell in _worst_cells(token))
        shown = f"{html.escape(_context(token, CONTEXT_MOST))}<b>{html.escape(_token(token))}</b>"
        body += f'<tr>{tds}<td class="text">{shown}</td></tr>'
    return (
        f'<div>{_WORST_TITLE}</div><table><thead><tr>{head}<th class="text">{_TEXT}</th></tr>'
        f"</thead><tbody>{body}</tbody></table><div>{_WORST_REMARK}</div>"
    )


def _context(token: "WorstToken", width: int) -> str:
    """The end of what is in front of it, and an arrow to it; in all no wider than this."""
    before, arrow = _visible(token.context), " → "
    room = max(width - len(arrow) - len(_token(token)), 1)
    return f"{before if len(before) <= room else '…' + before[len(before) - room + 1 :]}{arrow}"


def _token(token: "WorstToken") -> str:
    return f"'{_visible(token.text)}'"


def _visible(text: str) -> str:
    """On one line, with what cannot be seen escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _number(value: float | None, spec: str) -> str:
    if value is None:
        return MISSING
    # What would be a row of digits is shown by its size.
    return format(value, spec) if spec == "," or abs(value) < 1e4 else format(value, ".2g")


def _r2(value: float | None) -> str:
    if value is not None and 0.99995 <= value < 1:
        return ">0.9999"
    return _number(value, ".4f")


def _share(value: float | None) -> str:
    return MISSING if value is None else _number(100 * value, ".1f") + "%"
