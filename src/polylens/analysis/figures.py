"""Figures of the analyses, from tensors and rows."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from polylens.checks import block
from polylens.drawing import COLOURS, GREY, MARKERS, depth, depth_bar, figure, style_of, tidy
from polylens.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from polylens.hosts.base import Layer

TINY = np.finfo(float).tiny

# Blue to white to vermilion, from the same colour-blind safe set as the lines.
SIGNED = ((0.0, COLOURS[0]), (0.5, "#FFFFFF"), (1.0, COLOURS[1]))


def spectrum_figure(
    values: Tensor,
    patterns: Tensor,
    share: float,
    shape: tuple[int, int] | None,
    n: int = 4,
    *,
    title: str,
    value: str,
    signed: bool,
) -> "Figure":
    """Left the values, right the first n patterns, of either sign, as images.

    Args:
        values: [k] by falling absolute value; patterns: [d_in, k].
        share: of the energy that they keep together.
        shape: (height, width) of an image; height * width = d_in. None for inputs that are no
            images: the values alone.
        n: pictures per row.
        title: of the whole figure.
        value: what the values are; signed, whether features raise or lower something.

    Raises:
        InvalidInputError: a shape that does not give d_in, n < 1.
    """
    d_in = len(patterns)
    if shape is not None and (len(shape) != 2 or shape[0] * shape[1] != d_in or n < 1):
        raise InvalidInputError(
            f"shape must be (height, width) with height * width = {d_in}, and n >= 1; got "
            f"{shape!r} and {n}"
        )
    sizes = values.cpu().numpy()
    kinds = {"raises": (sizes > 0, 1), "lowers": (sizes < 0, 0)}
    kinds = kinds if signed else {"": (sizes > 0, 0)}
    with figure((3.2 if shape is None else 1.7 + 0.85 * n, 2.4)) as drawn:
        drawn.suptitle(title, fontsize=8)
        left: Any = drawn
        right: Any = None
        if shape is not None:
            parts: Any = drawn.subfigures(1, 2, width_ratios=(1.7, 0.85 * n))
            left, right = parts
        panel = left.subplots()
        ranks = np.arange(1, len(sizes) + 1)
        for (verb, (which, colour)), marker in zip(kinds.items(), MARKERS, strict=False):
            points = (ranks[which], np.abs(sizes[which]), marker)
            panel.plot(*points, color=COLOURS[colour], markersize=3, label=verb)
        panel.set_xlabel("feature")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel(f"|{value}|" if signed else value)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{len(sizes)} features:\n{share:.1%} of energy")
        if signed:
            panel.legend(frameon=False, handletextpad=0.1, borderaxespad=0.1)
        tidy(panel)
        if shape is None:
            return drawn
        pictures = right.subplots(len(kinds), n, squeeze=False)
        for row, (verb, (which, colour)) in zip(pictures, kinds.items(), strict=True):
            _draw_pictures(row, values, patterns, np.flatnonzero(which)[:n], shape)
            if signed:
                row[0].set_ylabel(f"{verb} it", color=COLOURS[colour])
    return drawn


def features_figure(values: Sequence[float], shown: Sequence[str], title: str) -> "Figure":
    """Bars of the values of features, each with a text.

    Raises:
        InvalidInputError: no features.
    """
    if not values:
        raise InvalidInputError("there are no features to draw")
    with figure((6.0, 0.6 + 0.22 * len(values))) as drawn:
        panel = drawn.subplots()
        ranks = range(1, len(values) + 1)
        colours = [COLOURS[1 if value > 0 else 0] for value in values]
        panel.barh(ranks, [abs(value) for value in values], color=colours)
        for rank, value, text in zip(ranks, values, shown, strict=True):
            label = " ".join(text.split()).replace("$", r"\$")  # no mathematics
            panel.text(abs(value), rank, f" {label}", va="center", fontsize=6, clip_on=False)
        panel.set_xlim(0, 2.2 * max(map(abs, values)) or 1.0)
        panel.set_ylim(len(values) + 0.6, 0.4)
        panel.set_yticks(list(ranks))
        panel.set_ylabel("feature")
        panel.set_xlabel("|value|, blue where it lowers the output")
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
    return drawn


def class_features_figure(
    by_class: Sequence[tuple[Tensor, Tensor]],
    shape: tuple[int, int],
    names: Sequence[str] | None = None,
) -> "Figure":
    """For each class, the patterns of the strongest feature that raises and that lowers it.

    Args:
        by_class: (values [k], patterns [d_in, k]) of the `EigenFeatures` of each class.
        shape: (height, width) of an image.
        names: of the classes; numbers by default.

    Raises:
        InvalidInputError: no classes, a shape that does not give d_in.
    """
    if not by_class or shape[0] * shape[1] != len(by_class[0][1]):
        raise InvalidInputError(
            "give (values, patterns) of one EigenFeatures per class, and the shape of their images"
        )
    names = [str(i) for i in range(len(by_class))] if names is None else list(names)
    with figure((0.68 * len(by_class) + 0.3, 2.3)) as drawn:
        drawn.suptitle("Strongest quadratic features of each class's output", fontsize=8)
        drawn.supxlabel(
            "numbers: eigenvalues; pictures: what an input looks like where the feature is active",
            fontsize=6.5,
        )
        panels = drawn.subplots(2, len(by_class), squeeze=False)
        for column, (name, (values, patterns)) in enumerate(zip(names, by_class, strict=True)):
            sizes = values.cpu().numpy()
            for row, wanted in enumerate((sizes > 0, sizes < 0)):
                chosen = np.flatnonzero(wanted)[:1]
                _draw_pictures(panels[row, column : column + 1], values, patterns, chosen, shape)
            panels[0, column].set_title(f"{name}\n{panels[0, column].get_title()}")
        panels[0, 0].set_ylabel("raises it", color=COLOURS[1])
        panels[1, 0].set_ylabel("lowers it", color=COLOURS[0])
    return drawn


def distances_figure(layers: Sequence[str], by_degree: Sequence[Sequence[float]]) -> "Figure":
    """Distances by layer, of all degrees and of each.

    Args:
        by_degree: of each layer, what each degree contributes.

    Raises:
        InvalidInputError: no layers.
    """
    if not layers:
        raise InvalidInputError("no layer was compared, so there is nothing to draw")
    with figure((3.5, 2.4)) as drawn:
        panel = drawn.subplots()
        places = range(len(layers))
        panel.plot(places, [sum(parts) for parts in by_degree], color="black", label="all")
        for k in range(max(map(len, by_degree))):
            colour, marker = style_of(k) if k else (GREY, "")
            parts = [each[k] if k < len(each) else 0.0 for each in by_degree]
            panel.plot(
                places, parts, color=colour, marker=marker, markersize=3, linewidth=1, label=f"{k}"
            )
        step = -(-len(layers) // 12)
        panel.set_xticks(list(places)[::step], list(layers)[::step])
        panel.set_xlabel("layer")
        panel.set_ylabel("E|f − g|² / Var f")
        panel.set_title("Distance of the polynomials f and g of two lenses")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=6.5, title="degree", title_fontsize=6.5)
        tidy(panel)
    return drawn


def shares_figure(shares: "Mapping[str, Mapping[Layer, Sequence[float]]]") -> "Figure":
    """How many components carry a layer: a panel per kind, a line per layer, coloured by depth.

    Args:
        shares: panel title -> layer -> cumulative share of the first 1, 2, ... components.

    Raises:
        InvalidInputError: nothing to draw.
    """
    layers = sorted({block(layer) for by_layer in shares.values() for layer in by_layer})
    if not layers:
        raise InvalidInputError("no layer was opened, so there are no shares to draw")
    colours = depth(layers)
    with figure((0.6 + 2.2 * len(shares), 2.2)) as drawn:
        panels: Sequence[Axes] = drawn.subplots(1, len(shares), sharey=True, squeeze=False)[0]
        for panel, (title, by_layer) in zip(panels, shares.items(), strict=True):
            for layer, values in by_layer.items():
                ranks = range(1, len(values) + 1)
                colour = colours.to_rgba(block(layer))
                panel.plot(ranks, values, color=colour, linewidth=1.2, marker=".", markersize=3)
            panel.set_title(title)
            panel.set_xlabel("components")
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_minor_formatter("")
            panel.set_ylim(0, 1.03)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            tidy(panel)
        panels[0].set_ylabel("share kept")
        depth_bar(drawn, panels, layers)
    return drawn


def interactions_figure(
    names: Sequence[str],
    constant: float,
    linear: Tensor,
    pairs: Tensor,
    k: int = 16,
    *,
    title: str = "",
) -> "Figure":
    """Heat map of what the k writers that take part most add, in pairs and alone.

    A cell below the diagonal is what two writers add together, both orders of them; one on the
    diagonal a writer with itself.

    Args:
        names: of the n writers.
        constant, linear [n], pairs [n, n]: of the output along u, which they sum to.
        title: what the output and u are.

    Raises:
        InvalidInputError: no writers, k < 1.
    """
    if not len(names) or k < 1:
        raise InvalidInputError(f"a heat map needs a writer and k >= 1, got {len(names)}, {k}")
    first = linear.cpu().numpy()
    second = np.tril(2 * pairs.cpu().numpy())
    np.fill_diagonal(second, pairs.diagonal().cpu().numpy())
    total = constant + first.sum() + second.sum()
    parts = np.abs(pairs.cpu().numpy()).sum(0) + np.abs(first)
    chosen = np.sort(np.argsort(-parts)[:k])
    left_out = 1 - np.abs(_within(second, chosen)).sum() / max(np.abs(second).sum(), TINY)
    sums = (
        f"{total:+.3g} = {constant:+.3g} constant {first.sum():+.3g} alone "
        f"{second.sum():+.3g} in pairs"
    ).replace("-", "−")
    if len(chosen) < len(names):
        sums += (
            f"\n{len(chosen)} of {len(names)} writers; pairs with others are {left_out:.0%} of "
            "the sizes of all"
        )
    shown = [names[i] for i in chosen]
    second, first = _within(second, chosen), first[chosen]
    side = 1.9 + 0.17 * len(chosen)
    limit = float(max(np.abs(second).max(), np.abs(first).max())) or 1.0
    second = np.where(np.tri(len(chosen), dtype=bool), second, np.nan)
    with figure((max(side + 1.0, 3.5), side + 0.3)) as drawn:
        left, right = drawn.subplots(1, 2, width_ratios=(len(chosen), max(1, len(chosen) / 12)))
        for panel, values in ((left, second), (right, first[:, None])):
            image = panel.imshow(values, cmap=_signed_map(), norm=_root_scale(limit), aspect="auto")
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
        ticks = [-limit, -limit / 4, 0, limit / 4, limit]
        bar = drawn.colorbar(image, ax=[left, right], ticks=ticks, fraction=0.05, pad=0.02)
        labels = [f"{tick:+.2g}".replace("-", "−") if tick else "0" for tick in ticks]
        bar.ax.set_yticklabels(labels, fontsize=6)
        bar.ax.minorticks_off()
        unit = "added to the logits" if "logit" in title else "added along u"
        bar.set_label(f"{unit} (square-root scale)", fontsize=6)
        left.set_xticks(range(len(shown)), shown, rotation=90, fontsize=6)
        left.set_yticks(range(len(shown)), shown, fontsize=6)
        right.set_xticks([])
        right.set_yticks([])
        left.set_title("two writers together")
        right.set_title("one\nalone")
        drawn.suptitle(
            "\n".join([*wrap(title or "Output along u", 14 * int(side + 1)), sums]), fontsize=7
        )
    return drawn


def attacks_figure(
    success: Mapping[str, Mapping[float, float]],
    *,
    n_right: int,
    mean_norm: float,
    target: int | None = None,
    dashed: Sequence[str] = (),
) -> "Figure":
    """Share of right answers that each attack turned over, against the norm.

    Args:
        success: attack -> norm -> share.
        n_right, mean_norm, target: as in `Attacks`.
        dashed: attacks whose lines are.

    Raises:
        InvalidInputError: no attack.
    """
    if not success:
        raise InvalidInputError("no attack was evaluated, so there is nothing to draw")
    with figure((3.5, 2.6)) as drawn:
        panel = drawn.subplots()
        for i, (name, shares) in enumerate(success.items()):
            norms = sorted(shares)
            panel.plot(
                norms,
                [shares[norm] for norm in norms],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=3,
                linewidth=1.2,
                linestyle="--" if name in dashed else "-",
                label=name,
            )
        panel.set_xlabel(f"L2 norm of the perturbation (mean |x| {mean_norm:.3g})")
        panel.set_ylabel("answers turned over" if target is None else f"answers made {target}")
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_title(f"True network, {n_right:,} inputs it had right")
        panel.legend(frameon=False, fontsize=6.5)
        tidy(panel)
    return drawn


def _within(square: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return square[np.ix_(chosen, chosen)]


def _draw_pictures(
    panels: Any, values: Tensor, patterns: Tensor, chosen: np.ndarray, shape: tuple[int, int]
) -> None:
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    for panel, i in zip(panels, chosen, strict=False):
        image = patterns[:, i].cpu().numpy().reshape(shape)
        limit = float(np.abs(image).max()) or 1.0
        # An eigenvector has no sign of its own; drawn so that its largest pixel is positive.
        image = image * (1 if image.flat[np.abs(image).argmax()] > 0 else -1)
        panel.imshow(image, cmap=_signed_map(), vmin=-limit, vmax=limit)
        value = f"{float(values[i]):+.2g}".replace("-", "−")
        panel.set_title(value, fontsize=7, pad=2)


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


def circuit_figure(
    places: Sequence[tuple[int, int, str]],
    values: Sequence[float],
    edges: Sequence[tuple[int, int, float]],
    names: Sequence[str],
    title: str,
) -> "Figure":
    """Nodes by position and layer, as large as their values, and edges between them.

    Args:
        places: (layer, position, kind) of each node, -1 the layer of embeddings.
        values: of each node, what it contributes.
        edges: (source, reader, weight), by number of a node.
        names: of the positions.
    """
    markers = {"token": "s", "target": "s", "error": "D", "feature": "o"}
    beside: dict[tuple[int, int], list[int]] = {}
    for i, (row, position, _) in enumerate(places):
        beside.setdefault((row, position), []).append(i)
    shift = {}
    for members in beside.values():
        step = 0.8 / max(len(members), 6)
        shift |= {i: step * (n - (len(members) - 1) / 2) for n, i in enumerate(members)}
    points = [(position + shift[i], row) for i, (row, position, _) in enumerate(places)]
    largest = max(
        (abs(v) for v, p in zip(values, places, strict=True) if p[2] != "target"), default=1
    )
    most = max((abs(weight) for *_, weight in edges), default=1.0)
    rows = sorted({row for row, _, _ in places})
    size = (min(12.0, 1.5 + 0.5 * len(names)), min(10.0, 1.6 + 0.3 * (rows[-1] - rows[0] + 1)))
    with figure(size) as drawn:
        panel = drawn.subplots()
        for i, j, weight in edges:
            (a, b), (c, d) = points[i], points[j]
            colour = COLOURS[1] if weight > 0 else COLOURS[0]
            width = 0.2 + 1.8 * abs(weight) / most
            panel.plot([a, c], [b, d], color=colour, linewidth=width, alpha=0.4, zorder=1)
        for (x, y), (_, _, kind), value in zip(points, places, values, strict=True):
            share = 1.0 if kind == "target" else abs(value) / max(largest, TINY)
            colour = COLOURS[1] if value > 0 else COLOURS[0]
            marker, area = markers.get(kind, "^"), 4 + 30 * share
            panel.scatter([x], [y], s=area, c=colour, marker=marker, linewidths=0, zorder=2)
        panel.set_xticks(range(len(names)), [name[:10] for name in names], rotation=60, ha="right")
        panel.set_yticks(rows, ["tokens", *(str(row) for row in rows[1:-1]), "target"])
        panel.set_ylabel("layer")
        panel.set_title(title.replace("$", r"\$"))
        panel.spines[["top", "right"]].set_visible(False)
    return drawn
