"""The figure of a report: what is drawn, and that nothing global is touched."""

import subprocess
import sys

import numpy as np
import pytest

from polylens import drawing
from polylens.errors import InvalidInputError
from polylens.report.figure import _spread
from polylens.report.report import LayerRow, Report


def make(n_layers: int, degree: int = 3, loss: bool = True, **changes) -> Report:
    """A report with the shape of SmolLM2's: R2 lowest in the middle, a first layer that matters."""
    rng = np.random.default_rng(0)
    rows = []
    for layer in range(n_layers):
        unexplained = 0.65 * np.sin(np.pi * (layer + 0.5) / n_layers) + 0.03
        r2 = (-0.001, *(1 - unexplained * 0.2**k for k in range(degree)))
        ablation = float(np.exp(rng.normal() - 3 + 4 * (layer == 0)))
        delta = ablation * float(rng.uniform(-0.02, 0.2))
        losses = (delta, abs(delta), ablation, 1 - delta / ablation) if loss else ()
        rows.append(LayerRow(layer, r2, *losses))
    values = {
        "model": "SmolLM2-135M",
        "host": "TransformerBridge",
        "inputs": "Gaussian, 4096 tokens",
        "degree": min(2, degree),
        "fitted_degree": degree,
        "n_tokens": 4064,
        "n_targets": 4064 if loss else None,
        "base_ce": 3.063 if loss else None,
        "rows": tuple(rows),
        "all_row": LayerRow(None, None, 8.56, 9.1, 9.7, 0.12) if loss else None,
    }
    return Report(**{**values, **changes})


def test_figure_shows_every_degree_and_both_losses(tmp_path):
    report = make(30)
    figure = report.plot()
    left, right = figure.axes
    lines = [line for line in left.lines if len(line.get_xdata()) == 30]
    assert len(lines) == 3
    for k, line in enumerate(lines, start=1):
        np.testing.assert_allclose(line.get_ydata(), [1 - row.r2[k] for row in report])
    assert len({line.get_color() for line in lines}) == 3
    assert [text.get_text() for text in left.texts] == ["deg 1", "deg 2", "deg 3"]
    heights = [[bar.get_height() for bar in bars] for bars in right.containers]
    assert heights[0] == [row.delta_ce for row in report]
    assert heights[1] == [row.ablation_delta_ce for row in report]
    assert right.get_yscale() == "symlog"
    assert "all 30 at once +8.560" in right.get_title()
    assert "nats per token" in right.get_ylabel()
    figure.savefig(tmp_path / "figure.png")
    assert tuple(figure.get_size_inches()) == (7, 3)


def test_axis_reads_as_r2_and_rises(tmp_path):
    figure = make(4, degree=5).plot()
    left = figure.axes[0]
    bottom, top = left.get_ylim()
    assert bottom > 1 > top
    figure.savefig(tmp_path / "figure.svg")
    assert {"0", "0.9", "0.99"} <= {label.get_text() for label in left.get_yticklabels()}


@pytest.mark.parametrize("degree", [0, 1, 9])
@pytest.mark.parametrize("loss", [False, True])
def test_any_degree_one_layer_with_and_without_loss(tmp_path, degree, loss):
    figure = make(1, degree, loss).plot()
    assert len(figure.axes) == 1 + loss
    figure.savefig(tmp_path / "figure.png")


def test_negative_perfect_and_missing_r2_are_drawn(tmp_path):
    rows = (
        LayerRow(2, (-1.0, -350.0), 0.0, 0.0, 0.0, None),
        LayerRow(5, (0.0, 1.0), float("inf"), 0.0, -0.1, None),
        LayerRow(9, None, 0.1, 0.1, 0.2, 0.5),
    )
    figure = make(1, 1, rows=rows).plot()
    left = figure.axes[0]
    bottom, top = left.get_ylim()
    assert bottom >= 351
    assert top <= 1e-11
    figure.savefig(tmp_path / "figure.png")
    assert [label.get_text() for label in left.get_xticklabels()] == ["2", "5", "9"]


def test_labels_of_lines_that_end_together_are_apart():
    placed = _spread([0.5, 0.5, 0.51, 0.99, 1.0], 0.1)
    assert min(np.diff(sorted(placed))) >= 0.1 - 1e-12
    assert max(placed) <= 1


def test_empty_report_is_refused():
    with pytest.raises(InvalidInputError, match="no rows"):
        make(1, rows=()).plot()


def test_no_pyplot_and_no_changed_settings(tmp_path):
    code = (
        "import sys, matplotlib\n"
        # Reading the setting "backend" the usual way would itself import pyplot.
        "settings = lambda: dict(dict.items(matplotlib.rcParams))\n"
        "before = settings()\n"
        "from polylens.report.report import LayerRow, Report\n"
        "row = LayerRow(0, (0.0, 0.5), 0.1, 0.1, 0.2, 0.5)\n"
        "figure = Report('m', 'h', 'i', 1, 1, 9, 9, 1.0, (row,), row).plot()\n"
        f"figure.savefig({str(tmp_path / 'figure.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_figure_shows_itself_in_a_notebook():
    with drawing.figure((3, 2)) as drawn:
        drawn.subplots().plot([1, 2])
    png, metadata = drawn._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert metadata == {"width": 300}


def test_a_report_is_a_table_of_pandas():
    report = make(3)
    frame = report.to_pandas()
    assert frame["layer"].tolist()[:3] == [0, 1, 2]
    assert str(frame["layer"].dtype) in ("int64", "Int64")  # also with a row of all layers
    assert frame["r2_3"].tolist()[:3] == [row.r2[3] for row in report]
    assert len(frame) == 3 + (report.all_row is not None)
