"""R2 by degree and the loss over training, from rows."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from polylens.checks import Layer, block, label
from polylens.drawing import COLOURS, GREY, depth, depth_bar, figure, scale_r2, style_of, tidy
from polylens.errors import InvalidInputError
from polylens.training.rows import TraceRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# 1 - R2 below which a curve is drawn as if it were here.
CLOSE = 1e-6


def training_figure(rows: Sequence[TraceRow], failed: Collection[int] = ()) -> "Figure":
    """R2 by degree over training, and the loss below, on a log step axis.

    A panel per layer and input model with a line per degree; of more than two layers a panel per
    degree with a line per layer, coloured by depth. Solid lines are measured on held-out data,
    dotted ones under the input model itself, on the scale of 1 - R2 as in a report's figure.

    Args:
        rows: with R2, in any order.
        failed: steps that could not be measured, marked on the loss panels.

    Raises:
        InvalidInputError: no rows.
    """
    if not rows:
        raise InvalidInputError("the trace has no measured checkpoint, so there is nothing to draw")
    keys = list(dict.fromkeys((row.layer, row.inputs) for row in rows))
    layers = list(dict.fromkeys(layer for layer, _ in keys if layer is not None))
    deep = len(layers) > 2
    columns = max(1, rows[0].degree) if deep else len(keys)
    losses = {row.step: row.loss for row in rows if row.loss is not None}
    heights = (2.4, 1) if losses else (1,)
    size = (1.6 + (1.9 if deep else 2.4) * columns, 3.4 if losses else 2.5)
    with figure(size) as drawn:
        panels = drawn.subplots(
            len(heights), columns, squeeze=False, sharex=True, height_ratios=heights, sharey="row"
        )
        for column, panel in enumerate(panels[0]):
            if deep:
                _draw_layers(panel, rows, layers, column + 1)
                continue
            layer, inputs = keys[column]
            _draw_degrees(panel, [r for r in rows if (r.layer, r.inputs) == keys[column]])
            where = f"layer {label(layer)}, " if layer is not None and len(layers) > 1 else ""
            panel.set_title(f"{where}{inputs} inputs")
        for panel in panels[1] if losses else ():
            steps = sorted(losses)
            panel.plot(steps, [losses[s] for s in steps], color="black", linewidth=1.2)
            for step in failed:
                panel.axvline(step, color=COLOURS[1], linestyle=":", linewidth=0.8)
            panel.set_ylim(bottom=0)
            tidy(panel)
        for panel in panels[-1]:
            panel.set_xlabel("training step")
        scale_r2(panels[0, 0])  # all panels share it
        panels[0, 0].set_ylabel("held-out R²")
        drawn.suptitle("R² over training", fontsize=9, fontweight="bold")
        if any(1 - value < CLOSE for row in rows for value in (row.r2 or ())[1:]):
            drawn.supxlabel(f"flat tops: R² within {CLOSE:g} of 1, drawn there", fontsize=6.5)
        if deep:
            depth_bar(drawn, list(panels[0]), sorted({block(layer) for layer in layers}))
        else:
            handles, names = panels[0, 0].get_legend_handles_labels()
            drawn.legend(handles, names, frameon=False, fontsize=6.5, loc="outside right center")
        if losses:
            panels[1, 0].set_ylabel("loss [nats]")
    return drawn


def _draw_degrees(panel: "Axes", rows: Sequence[TraceRow]) -> None:
    """One layer under one input model, a line per degree."""
    rows = sorted(rows, key=lambda row: row.step)
    steps = [row.step for row in rows]
    modelled = rows[0].r2_model is not None
    for k in range(1, rows[0].degree + 1):
        colour, marker = style_of(k)
        panel.plot(
            steps,
            _left([row.r2 for row in rows], k),
            color=colour,
            marker=marker,
            markersize=2.5,
            linewidth=1.2,
            label=f"degree {k}",
        )
        if modelled:
            left = _left([row.r2_model for row in rows], k)
            panel.plot(steps, left, color=colour, linewidth=1.0, linestyle=":")
    if modelled:
        panel.plot([], [], color=GREY, linewidth=1.0, linestyle=":", label="under the model")
    _scale_steps(panel, steps)


def _draw_layers(
    panel: "Axes", rows: Sequence[TraceRow], layers: Sequence[Layer], degree: int
) -> None:
    """One degree, a line per layer or expert."""
    colours = depth(sorted({block(layer) for layer in layers}))
    for layer in layers:
        found = sorted((row.step, (row.r2 or ())[degree]) for row in rows if row.layer == layer)
        left = [max(1 - value, CLOSE) for _, value in found]
        colour = colours.to_rgba(block(layer))
        panel.plot(
            [step for step, _ in found], left, color=colour, marker=".", markersize=3, linewidth=1.2
        )
    panel.set_title(f"degree {degree}")
    _scale_steps(panel, [row.step for row in rows])


def _left(r2: Sequence[tuple[float, ...] | None], degree: int) -> list[float]:
    """1 - R2 of one degree."""
    return [max(1 - (values or ())[degree], CLOSE) for values in r2]


def _scale_steps(panel: "Axes", steps: Sequence[int]) -> None:
    # Step 0 has a place on the axis, left of step 1.
    panel.set_xscale("symlog", linthresh=1, linscale=0.3)
    if len(set(steps)) > 1:
        panel.set_xlim(left=min(steps))
    else:  # a point in the middle, not on the edge
        panel.set_xlim(min(steps) - 1, min(steps) + 1)
        panel.set_xticks([min(steps)], [str(min(steps))])
    tidy(panel)
