"""How every figure looks. matplotlib's object interface only: no pyplot, no shared state."""

import io
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; markers say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#666666"
DPI = 200
FONT: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8}


@contextmanager
def figure(
    size: tuple[float, float], wspace: float | None = None
) -> "Generator[Figure, None, None]":
    """An empty figure of this size in inches; within the context, text has the shared size.

    Args:
        wspace: between panels, as a share of their width; matplotlib's own by default.
    """
    import matplotlib
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(FONT):
        engine = ConstrainedLayoutEngine(wspace=wspace)
        yield _showing_itself()(figsize=size, dpi=DPI, layout=engine)


@cache
def _showing_itself() -> "type[Figure]":
    """A Figure that a notebook shows without pyplot or a magic, and without them only once."""
    from matplotlib.figure import Figure

    class Drawn(Figure):
        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            out = io.BytesIO()
            self.savefig(out, format="png")
            # drawn for screens of twice the density
            return out.getvalue(), {"width": round(self.get_figwidth() * DPI / 2)}

    Drawn.__name__ = Drawn.__qualname__ = "Figure"
    return Drawn


def tidy(panel: "Axes") -> None:
    """No frame above and to the right, and pale lines across behind what is drawn."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.5)
    panel.set_axisbelow(True)


def style_of(degree: int) -> tuple[str, str]:
    """Colour and marker of a degree; degree 0 has those of the highest."""
    style = (degree - 1) % len(COLOURS)
    return COLOURS[style], MARKERS[style]


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


def depth(layers: Sequence[int]) -> Any:
    """Colours by layer; cividis reads the same to colour-blind eyes, less its pale end."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    top = max(layers[-1], layers[0] + 1)
    return ScalarMappable(Normalize(layers[0], top + 0.15 * (top - layers[0])), "cividis")


def depth_bar(figure: "Figure", panels: Sequence["Axes"], layers: Sequence[int]) -> None:
    """The key to `depth` beside these panels."""
    ticks = layers if len(layers) <= 6 else layers[:: -(-len(layers) // 6)]
    bar = figure.colorbar(depth(layers), ax=list(panels), label="layer", ticks=list(ticks))
    bar.ax.set_ylim(layers[0], max(layers[-1], layers[0] + 1))
