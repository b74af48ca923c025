"""Figures. matplotlib's object interface only: no pyplot, no state shared with the notebook."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from polylens.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from polylens.report.report import Report

# Okabe and Ito's colours, told apart by colour-blind readers; markers say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#666666"
FONT: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8}

# R2 = 1 up to rounding cannot be drawn on a log axis at all; this is where it ends.
FLOOR = 1e-12


def report_figure(report: "Report") -> "Figure":
    """Left R2 by layer, a line per degree; right the change of loss by layer.

    R2 is drawn on a log scale of 1 - R2, so that 0.9, 0.99 and 0.999 are equally far apart and
    negative values fit too; dashed is that of the replacing degree where all layers are
    replaced. The right panel is left out where no loss was measured; where prefixes were, a
    line shows what replacing every layer up to there costs.

    Args:
        report: of one layer or more.

    Returns:
        A matplotlib Figure of 7 x 3 inches; `figure.savefig(path)`.

    Raises:
        InvalidInputError: a report without rows.
    """
    if not report.rows:
        raise InvalidInputError("the report has no rows, so there is nothing to draw")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    losses, layout = report.all_row is not None, ConstrainedLayoutEngine(wspace=0.05)
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(7, 3) if losses else (3.8, 3), dpi=200, layout=layout)
        panels = figure.subplots(1, 2 if losses else 1, squeeze=False)[0]
        _draw_unexplained(panels[0], report)
        if losses:
            _draw_losses(panels[1], report)
        for panel in panels:
            _dress(panel, [row.label for row in report.rows])
        figure.suptitle(report.model, fontsize=9, fontweight="bold")
    return figure


def _draw_unexplained(panel: "Axes", report: "Report") -> None:
    rows = [(i, row.r2) for i, row in enumerate(report.rows) if row.r2 is not None]
    places = [i for i, _ in rows]
    ends = {}
    for k in range(min(1, report.fitted_degree), report.fitted_degree + 1):
        values = np.array([max(1 - r2[k], FLOOR) for _, r2 in rows])
        style = (k - 1) % len(COLOURS)
        panel.plot(
            places, values, color=COLOURS[style], marker=MARKERS[style], markersize=3, linewidth=1.2
        )
        if len(values):
            ends[f"deg {k}"] = (values[-1], COLOURS[style])
    _draw_replaced(panel, report, ends)
    scale_r2(panel)
    panel.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    panel.set_ylabel("held-out R²")
    panel.set_title(
        f"Variance explained by the polynomials\n{report.n_tokens:,} held-out activations"
    )
    _label_ends(panel, len(report.rows) - 1, ends)


def _draw_replaced(panel: "Axes", report: "Report", ends: dict[str, tuple[float, str]]) -> None:
    found = [(i, row.r2_replaced) for i, row in enumerate(report.rows)]
    places, left = [], []
    for place, r2 in found:
        if r2 is not None and np.isfinite(r2):
            places.append(place)
            left.append(max(1 - r2, FLOOR))
    if not places:
        return
    colour = COLOURS[(report.degree - 1) % len(COLOURS)]
    panel.plot(places, left, color=colour, linestyle="--", linewidth=1.2)
    ends["replaced"] = (left[-1], colour)


def scale_r2(panel: "Axes") -> None:
    """A reversed log axis of 1 - R2, labelled with R2; from R2 = 0 or below to 0.97 or above."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    low, high = min(low, 0.03), max(high, 1.4)
    panel.set_ylim(high, low)
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))))
    ticks = [step * 10.0**k for k in decades for step in steps]
    panel.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:.10g}"))


def _label_ends(panel: "Axes", last: int, ends: dict[str, tuple[float, str]]) -> None:
    """The name of each line at its right end, moved apart where lines end together."""
    bottom, top = np.log10(panel.get_ylim())
    heights = [(np.log10(value) - bottom) / (top - bottom) for value, _ in ends.values()]
    places = _spread(heights, 0.075)
    for (name, (value, colour)), place in zip(ends.items(), places, strict=True):
        panel.annotate(
            name,
            xy=(last, value),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Heights between 0 and 1, moved to lie at least `gap` apart."""
    order = np.argsort(values)
    placed = np.array(values, dtype=float)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    ceiling = 1.0
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return list(placed)


def _draw_losses(panel: "Axes", report: "Report") -> None:
    places = np.arange(len(report.rows))
    rises = [(r.delta_ce, r.ablation_delta_ce, r.prefix_delta_ce) for r in report.rows]
    values = np.array(rises, dtype=float)
    values[~np.isfinite(values)] = np.nan
    names = (f"degree {report.degree} polynomial", "mean ablation")
    for shift, column, colour, name in zip(
        (-0.2, 0.2), values.T[:2], (COLOURS[0], "#BBBBBB"), names, strict=True
    ):
        panel.bar(places + shift, column, width=0.4, color=colour, label=name)
    if (known := np.isfinite(values[:, 2])).any():
        label = "all up to this layer"
        panel.plot(places[known], values[known, 2], "k.-", linewidth=1.2, markersize=4, label=label)
    _scale(panel, values[np.isfinite(values)])
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set_ylabel("ΔCE [nats per token]")
    panel.set_title(f"Loss with one MLP replaced\n{_all_at_once(report)}")
    panel.legend(frameon=False, fontsize=7, loc="upper right", borderaxespad=0.2)


def _scale(panel: "Axes", values: np.ndarray) -> None:
    """Linear while the bars can be told apart, else symmetric-log; headroom for the legend."""
    sizes = np.abs(values)[values != 0]
    top = values.max(initial=0)
    if len(sizes) and sizes.max() > 30 * np.median(sizes):
        threshold = 10 ** np.floor(np.log10(max(np.quantile(sizes, 0.2), sizes.max() * 1e-4)))
        panel.set_yscale("symlog", linthresh=threshold, linscale=1)
        panel.set_ylim(top=top * 12 if top > 0 else threshold)
    elif top > 0:
        panel.set_ylim(top=top * 1.35)


def _all_at_once(report: "Report") -> str:
    row, base = report.all_row, f"base {report.base_ce:.3f}"
    if row is None or row.delta_ce is None or len(report.rows) == 1:
        return base
    return f"{base}; all {len(report.rows)} at once {row.delta_ce:+.3f}"


def _dress(panel: "Axes", labels: Sequence[str]) -> None:
    step = -(-len(labels) // 8)
    panel.set_xticks(range(0, len(labels), step), labels[::step])
    panel.set_xlim(-0.6, len(labels) - 0.4)
    panel.set_xlabel("layer")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.5)
    panel.set_axisbelow(True)
