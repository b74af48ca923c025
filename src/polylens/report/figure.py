"""R2 and losses by layer, from rows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from polylens.drawing import COLOURS, GREY, figure, scale_r2, style_of, tidy
from polylens.errors import InvalidInputError
from polylens.report.columns import BY_NAME, degrees
from polylens.report.rows import LayerRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# R2 = 1 up to rounding cannot be drawn on a log axis at all; this is where it ends.
FLOOR = 1e-12


def report_figure(
    rows: Sequence[LayerRow],
    all_row: LayerRow | None,
    *,
    title: str,
    degree: int,
    fitted_degree: int,
    n_tokens: int,
    base_ce: float | None,
) -> "Figure":
    """Left R2 by layer, a line per degree; right the change of loss by layer.

    R2 is drawn on a log scale of 1 - R2, so that 0.9, 0.99 and 0.999 are equally far apart and
    negative values fit too; dashed is that of the replacing degree where all layers are
    replaced. The right panel is left out where no loss was measured; where prefixes were, a
    line shows what replacing every layer up to there costs.

    Args:
        rows: one or more; all_row: of all layers at once, None where no loss was measured.
        title: of the whole figure.
        degree, fitted_degree, n_tokens, base_ce: as in a `Report`.

    Returns:
        A matplotlib Figure of 7 x 3 inches; `figure.savefig(path)`.

    Raises:
        InvalidInputError: no rows.
    """
    if not rows:
        raise InvalidInputError("the report has no rows, so there is nothing to draw")
    with figure((3.8 if all_row is None else 7, 3), wspace=0.05) as drawn:
        panels = drawn.subplots(1, 1 if all_row is None else 2, squeeze=False)[0]
        panels[0].set_title(
            f"Variance explained by the polynomials\n{n_tokens:,} held-out activations"
        )
        _draw_unexplained(panels[0], rows, degree, fitted_degree)
        if all_row is not None:
            base = "" if base_ce is None else f"base {base_ce:.3f}"
            panels[1].set_title(f"Loss with one MLP replaced\n{base}{_at_once(rows, all_row)}")
            _draw_losses(panels[1], rows, degree)
        for panel in panels:
            _dress(panel, [row.label for row in rows])
        drawn.suptitle(title, fontsize=9, fontweight="bold")
    return drawn


def _draw_unexplained(
    panel: "Axes", rows: Sequence[LayerRow], degree: int, fitted_degree: int
) -> None:
    measured = [(i, row.r2) for i, row in enumerate(rows) if row.r2 is not None]
    places = [i for i, _ in measured]
    ends: dict[str, tuple[float, str]] = {}
    for k in degrees(fitted_degree):
        values = np.array([max(1 - r2[k], FLOOR) for _, r2 in measured])
        colour, marker = style_of(k)
        panel.plot(places, values, color=colour, marker=marker, markersize=3, linewidth=1.2)
        if len(values):
            ends[BY_NAME["r2"].label.format(degree=k)] = (values[-1], colour)
    _draw_replaced(panel, rows, degree, ends)
    scale_r2(panel)
    panel.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    panel.set_ylabel("held-out R²")
    _label_ends(panel, len(rows) - 1, ends)


def _draw_replaced(
    panel: "Axes", rows: Sequence[LayerRow], degree: int, ends: dict[str, tuple[float, str]]
) -> None:
    places, left = [], []
    for place, row in enumerate(rows):
        if row.r2_replaced is not None and np.isfinite(row.r2_replaced):
            places.append(place)
            left.append(max(1 - row.r2_replaced, FLOOR))
    if places:
        colour, _ = style_of(degree)
        panel.plot(places, left, color=colour, linestyle="--", linewidth=1.2)
        ends[BY_NAME["r2_replaced"].label] = (left[-1], colour)


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


def _draw_losses(panel: "Axes", rows: Sequence[LayerRow], degree: int) -> None:
    places = np.arange(len(rows))
    shown = ("delta_ce", "ablation_delta_ce", "prefix_delta_ce")
    labels = [BY_NAME[name].label.format(degree=degree) for name in shown]
    values = np.array([[getattr(row, name) for name in shown] for row in rows], dtype=float)
    values[~np.isfinite(values)] = np.nan
    for shift, i, colour in ((-0.2, 0, COLOURS[0]), (0.2, 1, "#BBBBBB")):
        panel.bar(places + shift, values[:, i], width=0.4, color=colour, label=labels[i])
    if (known := np.isfinite(values[:, 2])).any():
        at, rises = places[known], values[known, 2]
        panel.plot(at, rises, "k.-", linewidth=1.2, markersize=4, label=labels[2])
    _scale(panel, values[np.isfinite(values)])
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set_ylabel("ΔCE [nats per token]")
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


def _at_once(rows: Sequence[LayerRow], all_row: LayerRow) -> str:
    if all_row.delta_ce is None or len(rows) == 1:
        return ""
    return f"; all {len(rows)} at once {all_row.delta_ce:+.3f}"


def _dress(panel: "Axes", labels: Sequence[str]) -> None:
    step = -(-len(labels) // 8)
    panel.set_xticks(range(0, len(labels), step), labels[::step])
    panel.set_xlim(-0.6, len(labels) - 0.4)
    panel.set_xlabel("layer")
    tidy(panel)
