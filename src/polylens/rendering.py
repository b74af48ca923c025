"""A report as text, as a rich table, and as HTML."""

import html
import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from polylens.selection import label

if TYPE_CHECKING:
    from polylens.report import LayerRow, Report

_CSS = (
    ".polylens-report{font-size:90%}.polylens-report td,.polylens-report th"
    "{text-align:right;padding:1px 8px;font-variant-numeric:tabular-nums}"
    ".polylens-report tr.all td{font-weight:600;border-top:1px solid}"
)


def text(report: "Report") -> str:
    """The table as plain text: no ANSI codes, as wide as its figures need."""
    width = Console(width=10_000).measure(_table(report)).maximum
    out = io.StringIO()
    console = Console(file=out, width=max(width, 80), color_system=None, legacy_windows=False)
    console.print(renderable(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def renderable(report: "Report") -> Group:
    """The table with its heading and remarks, for a rich Console."""
    head = [Text(_title(report), style="bold"), Text(_subtitle(report))]
    remarks = [Text(line, style="dim") for line in _remarks(report)]
    return Group(*head, Text(), _table(report), Text(), *remarks)


def to_html(report: "Report") -> str:
    """A self-contained <div> for notebooks; R2 is shaded by its size."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in _columns(report))
    body = "".join(_html_row(report, row) for row in _listed(report))
    remarks = "".join(f"<div>{html.escape(line)}</div>" for line in _remarks(report))
    return (
        f'<div class="polylens-report"><style>{_CSS}</style>'
        f"<div><b>{html.escape(_title(report))}</b></div>"
        f"<div>{html.escape(_subtitle(report))}</div>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{remarks}</div>"
    )


def to_markdown(report: "Report") -> str:
    """The table as Markdown, with its subtitle and remarks."""
    rows = [_columns(report), *(_cells(report, row) for row in _listed(report))]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(["---:"] * len(rows[0])) + " |")
    remarks = (f"- {line}" for line in _remarks(report))
    return "\n".join([_subtitle(report), "", *lines, "", *remarks]).rstrip()


def _listed(report: "Report") -> list["LayerRow"]:
    return [*report.rows, *([] if report.all_row is None else [report.all_row])]


def _shown_degrees(report: "Report") -> range:
    # Degree 0 is a constant: its R2 only says how far the held-out mean has moved.
    return range(min(1, report.fitted_degree), report.fitted_degree + 1)


def _columns(report: "Report") -> list[str]:
    r2 = [f"R² deg {k}" for k in _shown_degrees(report)]
    losses = [f"ΔCE deg {report.degree}", "KL", "ΔCE mean abl.", "recovered"]
    tokens = ["tokens"] * _has_experts(report)
    return ["layer", *tokens, *r2, *(losses if report.all_row is not None else [])]


def _has_experts(report: "Report") -> bool:
    return any(isinstance(row.layer, tuple) for row in report.rows)


def _cells(report: "Report", row: "LayerRow") -> list[str]:
    r2 = [_r2(None if row.r2 is None else row.r2[k]) for k in _shown_degrees(report)]
    first = [row.label]
    if _has_experts(report):
        first.append("–" if row.n_tokens is None else f"{row.n_tokens:,}")
    if report.all_row is None:
        return [*first, *r2]
    losses = [_number(row.delta_ce, "+.4f"), _number(row.kl, ".4f")]
    losses += [_number(row.ablation_delta_ce, "+.4f"), _share(row.loss_recovered)]
    return [*first, *r2, *losses]


def _title(report: "Report") -> str:
    span = f"{len(report)} layer{'s' if len(report) != 1 else ''}"
    return f"{report.model} ({report.host}): {span} as polynomials"


def _subtitle(report: "Report") -> str:
    fitted = f"fitted to {report.inputs}; held-out R² on {report.n_tokens:,} activations"
    if report.base_ce is None:
        return fitted
    return f"{fitted}; base CE {report.base_ce:.4f} nats on {report.n_targets:,} targets"


def _remarks(report: "Report") -> list[str]:
    losses = (
        f"ΔCE and KL: nats per token, degree {report.degree} in place of one layer's MLP; "
        "all: of every listed layer at once"
    )
    refused = [f"layer {label(n)} refused: {reason}" for n, reason in report.refused.items()]
    return [*([losses] if report.all_row is not None else []), *report.notes, *refused]


def _table(report: "Report") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in _columns(report):
        table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*_cells(report, row))
    if report.all_row is not None:
        table.add_section()
        table.add_row(*_cells(report, report.all_row), style="bold")
    return table


def _html_row(report: "Report", row: "LayerRow") -> str:
    cells = _cells(report, row)
    shades = [""] * len(cells)
    if row.r2 is not None:
        for i, k in enumerate(_shown_degrees(report), start=1 + _has_experts(report)):
            alpha = 0.35 * min(max(row.r2[k], 0.0), 1.0)
            shades[i] = f' style="background:rgba(0,114,178,{alpha:.2f})"'
    tds = "".join(f"<td{s}>{html.escape(c)}</td>" for s, c in zip(shades, cells, strict=True))
    return f'<tr class="all">{tds}</tr>' if row.layer is None else f"<tr>{tds}</tr>"


def _number(value: float | None, spec: str) -> str:
    if value is None:
        return "–"
    # What would be a row of digits is shown by its size.
    return format(value, spec) if abs(value) < 1e4 else format(value, ".2g")


def _r2(value: float | None) -> str:
    if value is not None and 0.99995 <= value < 1:
        return ">0.9999"
    return _number(value, ".4f")


def _share(value: float | None) -> str:
    return "–" if value is None else _number(100 * value, ".1f") + "%"
