"""A report as text, as rich tables, as HTML and as Markdown: how a sheet of it is set."""

import html
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polylens.brief import Brief
from polylens.checks import Expert, label
from polylens.report.columns import MISSING, Shown, number
from polylens.report.rows import WorstToken

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import RenderableType
    from rich.table import Table

TEXT_WIDTH = 100
GAP = 2
# How much is shown of a worst token with what is in front of it, at least and on a page.
CONTEXT_LEAST, CONTEXT_MOST = 16, 60
# Of the columns of a worst token: where it is, and its two cross entropies.
NEEDED = 3

_PRE = (
    '<pre style="font-family:monospace;white-space:pre;overflow-x:auto;line-height:normal">{code}'
    "</pre>"
)
_CSS = (
    ".polylens-report{font-size:90%}.polylens-report td,.polylens-report th"
    "{text-align:right;padding:1px 8px;font-variant-numeric:tabular-nums}"
    ".polylens-report tr.all td{font-weight:600;border-top:1px solid}"
    ".polylens-report .text{text-align:left;white-space:pre}.polylens-report table{margin:.5em 0}"
)


@dataclass(frozen=True)
class Sheet:
    """What there is to set.

    Attributes:
        columns: of the table of layers, all of the same number of cells.
        total: whether their last cells are of all layers at once, set apart.
        worst: tokens; remarks: lines at the end.
    """

    title: str
    subtitle: str
    columns: Sequence[Shown]
    total: bool
    worst: Sequence[WorstToken]
    remarks: Sequence[str]

    @property
    def rows(self) -> list[tuple[bool, list[str]]]:
        """(is it that of all layers?, cells) of each row."""
        rows = [list(cells) for cells in zip(*(c.cells for c in self.columns), strict=True)]
        return [(self.total and i == len(rows) - 1, row) for i, row in enumerate(rows)]


def text(sheet: Sheet) -> str:
    """As plain text without ANSI codes, 100 columns wide."""
    from rich.console import Group

    return as_text(Group(*parts(sheet, TEXT_WIDTH)))


def parts(sheet: Sheet, width: int) -> "Iterator[RenderableType]":
    """Heading, table, worst tokens and remarks; columns that do not fit go into another table."""
    from rich.text import Text

    yield Text(sheet.title, style="bold")
    yield Text(sheet.subtitle)
    fits = sum(column.width + 1 for column in sheet.columns) - 1 <= width
    wide = sum(column.width + GAP for column in sheet.columns) - GAP <= width
    gap = 1 if fits and not wide else GAP
    for columns in _stacked(sheet.columns, width, gap):
        yield Text()
        yield _table(columns, sheet.total, gap)
    if sheet.worst:
        yield Text(f"\n{_WORST_TITLE}\n")
        yield _worst_table(sheet.worst, width)
        yield Text(f"\n{_WORST_REMARK}", style="dim")
    yield Text()
    for line in sheet.remarks:
        yield Text(line, style="dim")


def to_html(sheet: Sheet) -> str:
    """A self-contained <div> for notebooks; R2 is shaded by its size."""
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in sheet.columns)
    body = "".join(_html_row(sheet.columns, i, total) for i, (total, _) in enumerate(sheet.rows))
    remarks = "".join(f"<div>{html.escape(line)}</div>" for line in sheet.remarks)
    return (
        f'<div class="polylens-report"><style>{_CSS}</style>'
        f"<div><b>{html.escape(sheet.title)}</b></div>"
        f"<div>{html.escape(sheet.subtitle)}</div>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{_html_worst(sheet.worst)}{remarks}</div>"
    )


def as_html(renderable: "RenderableType") -> str:
    """Anything that rich prints, for notebooks."""
    from rich.console import Console

    console = Console(file=io.StringIO(), record=True, width=TEXT_WIDTH, force_jupyter=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_PRE)


def as_text(renderable: "RenderableType") -> str:
    """Anything that rich prints, without colours, 100 columns wide."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=TEXT_WIDTH, color_system=None, legacy_windows=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


class Tabled(Brief):
    """A dataclass with a short repr, and with `__rich__` a table for print() and notebooks."""

    def __rich__(self) -> "Table":
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())


def as_frame(rows: "Iterable[Mapping[str, Any]]") -> "DataFrame":
    """Rows as a pandas DataFrame; tuples of numbers become columns name_0, name_1, ...

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas: pip install pandas") from error
    flat: list[dict[str, Any]] = []
    for row in rows:
        flat.append({})
        for name, value in row.items():
            if isinstance(value, tuple | list) and all(isinstance(v, float) for v in value):
                flat[-1].update({f"{name}_{i}": v for i, v in enumerate(value)})
            else:
                flat[-1][name] = label(value) if isinstance(value, Expert) else value
    frame = DataFrame(flat)
    for name in frame.columns:
        values = [row.get(name) for row in flat]
        if None in values and all(v is None or type(v) is int for v in values):
            frame[name] = frame[name].astype("Int64")  # 3 and <NA>, not 3.0 and NaN
    # what was not measured, of any row
    return frame.dropna(axis="columns", how="all")


def to_markdown(sheet: Sheet) -> str:
    """The table as Markdown, with its subtitle and remarks; without text of worst tokens."""
    rows = [[column.title for column in sheet.columns], *(cells for _, cells in sheet.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(["---:"] * len(rows[0])) + " |")
    remarks = (f"- {line}" for line in sheet.remarks)
    return "\n".join([sheet.subtitle, "", *lines, "", *remarks]).rstrip()


def _stacked(columns: Sequence[Shown], width: int, gap: int) -> list[list[Shown]]:
    """The columns in groups that are no wider than this, each with the first one in front."""
    first, *others = columns
    groups: list[list[Shown]] = []
    used = width
    for column in others:
        used += gap + column.width
        if used > width:
            groups.append([first])
            used = first.width + gap + column.width
        groups[-1].append(column)
    return groups


def _table(columns: Sequence[Shown], total: bool, gap: int) -> "Table":
    table = _sheet_table(gap)
    for column in columns:
        table.add_column(_stacked_title(column), justify="right", no_wrap=True)
    rows = list(zip(*(column.cells for column in columns), strict=True))
    for i, cells in enumerate(rows, 1):
        last = total and i == len(rows)
        if last:
            table.add_section()
        table.add_row(*cells, style="bold" if last else None)
    return table


def _stacked_title(column: Shown) -> str:
    return column.title.replace(" ", "\n", 1)


def empty_table(padding: tuple[int, int] | tuple[int, int, int, int] = (0, 1)) -> "Table":
    """How every table looks, without columns yet; its title stands on the left."""
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False, title_justify="left"
    )


def _sheet_table(gap: int = GAP) -> "Table":
    return empty_table((0, 0, 0, gap - 1))  # the box itself has one blank between columns


def _html_row(columns: Sequence[Shown], i: int, total: bool) -> str:
    tds = ""
    for column in columns:
        value = None if column.shades is None else column.shades[i]
        alpha = None if value is None else 0.35 * min(max(value, 0.0), 1.0)
        shade = "" if alpha is None else f' style="background:rgba(0,114,178,{alpha:.2f})"'
        tds += f"<td{shade}>{html.escape(column.cells[i])}</td>"
    return f'<tr class="all">{tds}</tr>' if total else f"<tr>{tds}</tr>"


# ----------------------------------------------------------------- worst tokens

_WORST_TITLE = "Tokens that lose most with every listed layer replaced"
_WORST_REMARK = (
    "CE and KL in nats; layer, error, neuron: where the token is predicted, the layer with the "
    "largest |y − f(x)| / |y|, and its preactivation farthest from the mean of calibration, in "
    "standard deviations"
)
_TEXT = "context → token"
# Title of a column, and the cell of a token.
_WORST: dict[str, Callable[[WorstToken], str]] = {
    "seq:pos": lambda token: f"{token.sequence}:{token.position}",
    "true CE": lambda token: number(".2f")(token.true_ce),
    "replaced CE": lambda token: number(".2f")(token.replaced_ce),
    "KL": lambda token: number(".2f")(token.kl),
    "layer": lambda token: MISSING if token.layer is None else label(token.layer),
    "error /|y|": lambda token: number(".2f")(token.error),
    "neuron": lambda token: MISSING if token.neuron is None else str(token.neuron),
    "at sd": lambda token: number("+.1f")(token.deviation),
}


def _worst_table(worst: Sequence[WorstToken], width: int) -> "Table":
    from rich.text import Text

    table = _sheet_table()
    columns = [Shown(title, [cell(token) for token in worst]) for title, cell in _WORST.items()]
    while sum(c.width + GAP for c in columns) + CONTEXT_LEAST > width and len(columns) > NEEDED:
        columns.pop()  # why, before what
    for column in columns:
        # only the text may be cut
        table.add_column(_stacked_title(column), justify="right", min_width=column.width)
    table.add_column(_TEXT, no_wrap=True)
    room = max(width - sum(column.width + GAP for column in columns), CONTEXT_LEAST)
    for token, *cells in zip(worst, *(column.cells for column in columns), strict=True):
        table.add_row(*cells, Text(_context(token, room)).append(_token(token), style="bold"))
    return table


def _html_worst(worst: Sequence[WorstToken]) -> str:
    if not worst:
        return ""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in _WORST)
    body = ""
    for token in worst:
        tds = "".join(f"<td>{html.escape(cell(token))}</td>" for cell in _WORST.values())
        shown = f"{html.escape(_context(token, CONTEXT_MOST))}<b>{html.escape(_token(token))}</b>"
        body += f'<tr>{tds}<td class="text">{shown}</td></tr>'
    return (
        f'<div>{_WORST_TITLE}</div><table><thead><tr>{head}<th class="text">{_TEXT}</th></tr>'
        f"</thead><tbody>{body}</tbody></table><div>{_WORST_REMARK}</div>"
    )


def _context(token: WorstToken, width: int) -> str:
    """The end of what is in front of it, and an arrow to it; in all no wider than this."""
    before, arrow = _visible(token.context), " → "
    room = max(width - len(arrow) - len(_token(token)), 1)
    return f"{before if len(before) <= room else '…' + before[len(before) - room + 1 :]}{arrow}"


def _token(token: WorstToken) -> str:
    return f"'{_visible(token.text)}'"


def _visible(text: str) -> str:
    """On one line, with what cannot be seen escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
