"""Figures of the analyses, by the conventions of `plots`: no pyplot, no shared state."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from polylens.checks import label
from polylens.errors import InvalidInputError
from polylens.hosts.base import Layer
from polylens.report.figure import COLOURS, FONT, GREY, MARKERS, scale_r2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from polylens.analysis import Attacks, EigenFeatures, Interactions
    from polylens.training.tracer import Trace

# 1 - R2 below which a curve over training is drawn as if it were here.
CLOSE = 1e-6
# Blue to white to vermilion, from the same colour-blind safe set as the lines.
SIGNED = ((0.0, COLOURS[0]), (0.5, "#FFFFFF"), (1.0, COLOURS[1]))
ATTACK_NAMES = {
    "random": "random",
    "singular": "top singular vector of β",
    "linear": "linear part, per class pair",
    "gradient": "gradient, one step",
    "pgd": "gradient, PGD",
}


def spectrum_figure(features: "EigenFeatures", shape: tuple[int, int], n: int = 4) -> "Figure":
    """Left the eigenvalues, right the first n patterns of either sign as images.

    Args:
        features: of inputs that are images.
        shape: (height, width) of an image; height * width = d_in.
        n: pictures per row.

    Raises:
        InvalidInputError: a shape that does not give d_in, n < 1.
    """
    d_in = len(features.patterns)
    if len(shape) != 2 or shape[0] * shape[1] != d_in or n < 1:
        raise InvalidInputError(
            f"shape must be (height, width) with height * width = {d_in}, and n >= 1; got "
            f"{shape!r} and {n}"
        )
    values = features.values.cpu().numpy()
    signed = {"+": np.flatnonzero(values > 0)[:n], "−": np.flatnonzero(values < 0)[:n]}
    with _figure((1.7 + 0.85 * n, 2.2)) as figure:
        parts: Any = figure.subfigures(1, 2, width_ratios=(1.7, 0.85 * n))
        left, right = parts
        panel = left.subplots()
        ranks = np.arange(1, len(values) + 1)
        for sign, style, colour in (
            ("raises", values > 0, COLOURS[1]),
            ("lowers", values < 0, COLOURS[0]),
        ):
            marker = MARKERS[0] if sign == "raises" else MARKERS[1]
            panel.plot(
                ranks[style], np.abs(values[style]), marker, color=colour, markersize=3, label=sign
            )
        panel.set_xlabel("feature")
        panel.set_ylabel("|eigenvalue|")
        panel.set_ylim(bottom=0)
        share = float(features.share[-1])
        panel.set_title(f"{len(values)} features:\n{share:.1%} of energy")
        panel.legend(frameon=False, handletextpad=0.1, borderaxespad=0.1)
        _tidy(panel)
        pictures = right.subplots(2, n, squeeze=False)
        for row, (sign, chosen) in zip(pictures, signed.items(), strict=True):
            _draw_pictures(row, features, chosen, shape)
            verb = "raises" if sign == "+" else "lowers"
            row[0].set_ylabel(f"{verb} it", color=COLOURS[1 if sign == "+" else 0])
    return figure


def class_features_figure(
    by_class: Sequence["EigenFeatures"], shape: tuple[int, int], names: Sequence[str] | None = None
) -> "Figure":
    """For each class, the patterns of the strongest feature that raises and that lowers it.

    Raises:
        InvalidInputError: no classes, a shape that does not give d_in.
    """
    if not by_class or shape[0] * shape[1] != len(by_class[0].patterns):
        raise InvalidInputError("give one EigenFeatures per class, and the shape of their images")
    names = [str(i) for i in range(len(by_class))] if names is None else list(names)
    with _figure((0.68 * len(by_class) + 0.3, 1.85)) as figure:
        panels = figure.subplots(2, len(by_class), squeeze=False)
        for column, (name, features) in enumerate(zip(names, by_class, strict=True)):
            values = features.values.cpu().numpy()
            for row, wanted in enumerate((values > 0, values < 0)):
                chosen = np.flatnonzero(wanted)[:1]
                _draw_pictures(panels[row, column : column + 1], features, chosen, shape)
            panels[0, column].set_title(f"{name}\n{panels[0, column].get_title()}")
        panels[0, 0].set_ylabel("raises it", color=COLOURS[1])
        panels[1, 0].set_ylabel("lowers it", color=COLOURS[0])
    return figure


def training_figure(trace: "Trace") -> "Figure":
    """R2 by degree over training, and the loss below.

    A panel per layer and input model with a line per degree; of more than two layers a panel per
    degree with a line per layer, coloured by depth. Solid lines are measured on held-out data,
    dotted ones under the input model itself, on the scale of 1 - R2 as in `report_figure`.
    Failed checkpoints are marked on the loss panels.

    Raises:
        InvalidInputError: a trace in which nothing was measured.
    """
    rows = trace.measured
    if not rows:
        raise InvalidInputError("the trace has no measured checkpoint, so there is nothing to draw")
    keys = list(dict.fromkeys((row.layer, row.inputs) for row in rows))
    layers = list(dict.fromkeys(layer for layer, _ in keys if layer is not None))
    deep = len(layers) > 2
    columns = max(1, rows[0].degree) if deep else len(keys)
    losses = {row.step: row.loss for row in rows if row.loss is not None}
    heights = (2.4, 1) if losses else (1,)
    with _figure((1.6 + (1.9 if deep else 2.4) * columns, 3.4 if losses else 2.5)) as figure:
        panels = figure.subplots(
            len(heights), columns, squeeze=False, sharex=True, height_ratios=heights, sharey="row"
        )
        for column, panel in enumerate(panels[0]):
            if deep:
                _draw_layers(panel, rows, layers, column + 1)
                continue
            layer, inputs = keys[column]
            _draw_trace(panel, [r for r in rows if (r.layer, r.inputs) == keys[column]])
            where = f"layer {label(layer)}, " if layer is not None and len(layers) > 1 else ""
            panel.set_title(f"{where}{inputs} inputs")
        for panel in panels[1] if losses else ():
            steps = sorted(losses)
            panel.plot(steps, [losses[s] for s in steps], color="black", linewidth=1.2)
            for step in trace.errors:
                panel.axvline(step, color=COLOURS[1], linestyle=":", linewidth=0.8)
            panel.set_ylim(bottom=0)
            _tidy(panel)
        for panel in panels[-1]:
            panel.set_xlabel("training step")
        scale_r2(panels[0, 0])  # all panels share it
        panels[0, 0].set_ylabel("R²")
        if deep:
            _depth_bar(figure, list(panels[0]), sorted({_block(layer) for layer in layers}))
        else:
            handles, names = panels[0, 0].get_legend_handles_labels()
            figure.legend(handles, names, frameon=False, fontsize=6.5, loc="outside right upper")
        if losses:
            panels[1, 0].set_ylabel("loss [nats]")
    return figure


def shares_figure(shares: Mapping[str, Mapping[Layer, Sequence[float]]]) -> "Figure":
    """How many components carry a layer: a panel per kind, a line per layer, coloured by depth.

    Args:
        shares: panel title -> layer -> cumulative share of the first 1, 2, ... components.

    Raises:
        InvalidInputError: nothing to draw.
    """
    layers = sorted({_block(layer) for by_layer in shares.values() for layer in by_layer})
    if not layers:
        raise InvalidInputError("no layer was opened, so there are no shares to draw")
    depth = _depth(layers)
    with _figure((0.6 + 2.2 * len(shares), 2.2)) as figure:
        panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
        for panel, (title, by_layer) in zip(panels, shares.items(), strict=True):
            for layer, values in by_layer.items():
                ranks = range(1, len(values) + 1)
                colour = depth.to_rgba(_block(layer))
                panel.plot(ranks, values, color=colour, linewidth=1.2, marker=".", markersize=3)
            panel.set_title(title)
            panel.set_xlabel("components")
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_minor_formatter("")
            panel.set_ylim(0, 1.03)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            _tidy(panel)
        panels[0].set_ylabel("share kept")
        _depth_bar(figure, list(panels), layers)
    return figure


def interactions_figure(interactions: "Interactions", k: int = 16) -> "Figure":
    """Heat map of pairs of the k writers that take part most; first-order terms beside it.

    Raises:
        InvalidInputError: no writers, k < 1.
    """
    if not len(interactions) or k < 1:
        raise InvalidInputError(
            f"a heat map needs a writer and k >= 1, got {len(interactions)}, {k}"
        )
    pairs = interactions.pairs.cpu().numpy()
    linear = interactions.linear.cpu().numpy()
    chosen = np.sort(np.argsort(-(np.abs(pairs).sum(0) + np.abs(linear)))[:k])
    names = [interactions.names[i] for i in chosen]
    pairs, linear = pairs[np.ix_(chosen, chosen)], linear[chosen]
    side = 1.6 + 0.16 * len(chosen)
    limit = float(max(np.abs(pairs).max(), np.abs(linear).max())) or 1.0
    with _figure((side + 1.0, side)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(len(chosen), max(1, len(chosen) / 12)))
        for panel, values in ((left, pairs), (right, linear[:, None])):
            image = panel.imshow(values, cmap=_signed_map(), norm=_root_scale(limit), aspect="auto")
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
        ticks = [-limit, -limit / 4, 0, limit / 4, limit]
        bar = figure.colorbar(image, ax=[left, right], ticks=ticks, fraction=0.05, pad=0.02)
        labels = [f"{tick:+.2g}".replace("-", "−") if tick else "0" for tick in ticks]
        bar.ax.set_yticklabels(labels, fontsize=6)
        bar.ax.minorticks_off()
        bar.set_label("contribution along u (square-root scale)", fontsize=6)
        left.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        left.set_yticks(range(len(names)), names, fontsize=6)
        right.set_xticks([])
        right.set_yticks([])
        left.set_title("pairs (second order)")
        right.set_title("first\norder")
        figure.suptitle(
            f"Output along u: {interactions.total:+.3g} = {interactions.constant:+.3g} constant "
            f"{float(interactions.linear.sum()):+.3g} first {float(interactions.pairs.sum()):+.3g} "
            "second order",
            fontsize=7,
        )
    return figure


def attacks_figure(attacks: "Attacks") -> "Figure":
    """Share of right answers that each attack turned over, against the norm.

    Raises:
        InvalidInputError: no rows.
    """
    if not attacks.rows:
        raise InvalidInputError("no attack was evaluated, so there is nothing to draw")
    with _figure((3.5, 2.6)) as figure:
        panel = figure.subplots()
        names = list(dict.fromkeys(row.attack for row in attacks.rows))
        for i, name in enumerate(names):
            success = attacks.success(name)
            norms = sorted(success)
            panel.plot(
                norms,
                [success[n] for n in norms],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=3,
                linewidth=1.2,
                linestyle="--" if name in ("gradient", "pgd") else "-",
                label=ATTACK_NAMES.get(name, name),
            )
        panel.set_xlabel(f"L2 norm of the perturbation (mean |x| {attacks.mean_norm:.3g})")
        goal = "answers turned over" if attacks.target is None else f"answers made {attacks.target}"
        panel.set_ylabel(goal)
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_title(f"True network, {attacks.n_right:,} inputs it had right")
        panel.legend(frameon=False, fontsize=6.5)
        _tidy(panel)
    return figure


@contextmanager
def _figure(size: tuple[float, float]):
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FONT):
        yield Figure(figsize=size, dpi=200, layout="constrained")


def _draw_pictures(
    panels: Any, features: "EigenFeatures", chosen: np.ndarray, shape: tuple[int, int]
) -> None:
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    for panel, i in zip(panels, chosen, strict=False):
        image = features.patterns[:, i].cpu().numpy().reshape(shape)
        limit = float(np.abs(image).max()) or 1.0
        # An eigenvector has no sign of its own; drawn so that its largest pixel is positive.
        image = image * (1 if image.flat[np.abs(image).argmax()] > 0 else -1)
        panel.imshow(image, cmap=_signed_map(), vmin=-limit, vmax=limit)
        value = f"{float(features.values[i]):+.2g}".replace("-", "−")
        panel.set_title(value, fontsize=7, pad=2)


def _draw_trace(panel: "Axes", rows: list[Any]) -> None:
    rows = sorted(rows, key=lambda row: row.step)
    steps = [row.step for row in rows]
    for k in range(1, rows[0].degree + 1):
        style = (k - 1) % len(COLOURS)
        colour, marker = COLOURS[style], MARKERS[style]
        left = [max(1 - row.r2[k], CLOSE) for row in rows]
        panel.plot(
            steps,
            left,
            color=colour,
            marker=marker,
            markersize=2.5,
            linewidth=1.2,
            label=f"degree {k}",
        )
        if rows[0].r2_model is not None:
            left = [max(1 - row.r2_model[k], CLOSE) for row in rows]
            panel.plot(steps, left, color=colour, linewidth=1.0, linestyle=":")
    if rows[0].r2_model is not None:
        panel.plot([], [], color=GREY, linewidth=1.0, linestyle=":", label="under the model")
    _scale_steps(panel, steps)


def _draw_layers(panel: "Axes", rows: list[Any], layers: Sequence[Layer], degree: int) -> None:
    """One degree, a line per layer or expert."""
    depth = _depth(sorted({_block(layer) for layer in layers}))
    for layer in layers:
        found = sorted((r.step, r.r2[degree]) for r in rows if r.layer == layer)
        steps, values = zip(*found, strict=True)
        left = [max(1 - value, CLOSE) for value in values]
        colour = depth.to_rgba(_block(layer))
        panel.plot(steps, left, color=colour, marker=".", markersize=3, linewidth=1.2)
    panel.set_title(f"degree {degree}")
    _scale_steps(panel, [row.step for row in rows])


def _scale_steps(panel: "Axes", steps: Sequence[int]) -> None:
    # Step 0 has a place on the axis, left of step 1.
    panel.set_xscale("symlog", linthresh=1, linscale=0.3)
    panel.set_xlim(left=min(steps))
    _tidy(panel)


def _block(layer: Layer) -> int:
    return layer[0] if isinstance(layer, tuple) else layer


def _depth(layers: Sequence[int]) -> Any:
    """Colours by layer; cividis reads the same to colour-blind eyes, less its pale end."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    top = max(layers[-1], layers[0] + 1)
    return ScalarMappable(Normalize(layers[0], top + 0.15 * (top - layers[0])), "cividis")


def _depth_bar(figure: "Figure", panels: list[Any], layers: Sequence[int]) -> None:
    ticks = layers if len(layers) <= 6 else layers[:: -(-len(layers) // 6)]
    bar = figure.colorbar(_depth(layers), ax=panels, label="layer", ticks=list(ticks))
    bar.ax.set_ylim(layers[0], max(layers[-1], layers[0] + 1))


def _signed_map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", SIGNED)


def _root_scale(limit: float) -> Any:
    """Colours by signed square root, so that one large term does not hide the others."""
    from matplotlib.colors import FuncNorm

    return FuncNorm(
        (lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v)),
        vmin=-limit,
        vmax=limit,
    )


def _tidy(panel: "Axes") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.5)
    panel.set_axisbelow(True)
