"""The HTML page of a lens: complete, self-contained, and honest about what it lacks."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from tests.hf_models import build

import polylens
from polylens import analysis, demo
from polylens.analysis.figures import shares_figure
from polylens.cli.page import html_page
from polylens.errors import InvalidInputError

VOID = {"meta", "img", "input"}


class Balanced(HTMLParser):
    """Collects attributes, and checks that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links = [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = [value for name, value in attrs if name in ("src", "href")]
        self.links += [value for value in found if not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made():
    """(lens, report, page) of three layers of the embedded model, the names needing escapes."""
    model = demo.load_bridge()
    texts = demo.texts()
    options = {"method": polylens.TrueStream(estimator="gaussian"), "progress": False}
    tokens = demo.batches(texts[0], 4, 64)
    lens = polylens.attach(model, tokens, degree=2, layers=[0, 1, 3], **options)
    report = lens.report(demo.batches(texts[1], 4, 64), progress=False)
    page = html_page(lens, report, names=lambda token: f"<{token}>")
    yield lens, report, page
    lens.detach()


def test_the_page_loads_nothing_and_every_image_is_drawn(made):
    links = Balanced(made[2]).links
    assert len(links) == 2
    for link in links:
        kind, data = link.split(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert "http" not in re.sub(r'src="data:[^"]*"', "", made[2])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
# The page in a frame of this width; what is found out about it becomes the title.
FRAME = """<!DOCTYPE html><iframe width="{width}" height="900" srcdoc="{page}"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, found = {{}};
  found.wide = page.documentElement.scrollWidth;
  const table = page.querySelector("#report table"), column = [...table.tHead.rows[0].cells];
  const kl = column.findIndex(title => title.textContent === "KL");
  const values = () => [...table.tBodies[0].rows].map(row => row.cells[kl].textContent);
  column[kl].click();
  found.up = values();
  column[kl].click();
  found.down = values();
  const search = page.querySelector("nav input");
  search.value = "layer 1";
  search.dispatchEvent(new Event("input"));
  found.shown = [...page.querySelectorAll("details.layer:not([hidden])")].map(each => each.id);
  document.title = JSON.stringify(found);
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [420, 1280])
def test_in_a_browser_it_fits_sorts_and_searches(made, tmp_path, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(made[2])), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    options += ["--virtual-time-budget=20000", "--window-size=1400,1000", "--dump-dom"]
    dom = subprocess.run(
        [BROWSER, *options, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    found = json.loads(html.unescape(re.findall("<title>(.*?)</title>", dom)[0]))
    assert found["wide"] <= width
    rows = [f"{row.kl:.4f}" for row in sorted(made[1], key=lambda row: row.kl)]
    everything = f"{made[1].all_row.kl:.4f}"
    assert found["up"] == [*rows, everything]
    assert found["down"] == [*reversed(rows), everything]
    assert found["shown"] == ["layer-1"]


def test_the_page_has_the_figures_of_the_report_and_of_each_layer(made):
    lens, report, page = made
    for row in report:
        assert f"<h3>Layer {row.layer}</h3>" in page
        assert page.count(f"{row.r2[2]:.4f}") >= 2
        assert f"{float(lens[row.layer].r2[2]):.4f}" in page
        assert lens.sites[row.layer].path in page
    assert report.inputs in page
    energy = analysis.output_directions(lens[1], 2, 1)
    features = analysis.eigenfeatures(lens[1], energy.vectors[:, 0], 4, metric="covariance")
    section = page.split("<h3>Layer 1</h3>")[1].split("<h3>")[0]
    found = re.findall(r"<tr><td>([+-][^<]*)</td>", section)
    # The direction has no sign of its own.
    sign = 1 if float(found[0]) * float(features.values[0]) > 0 else -1
    assert found == [f"{sign * value:+.3g}" for value in features.values.tolist()]


def test_text_is_escaped(made):
    assert "<code>&lt;" in made[2]
    assert not re.search(r"<\d", made[2])


def test_the_page_is_written_as_returned_and_twice_the_same(made, tmp_path):
    lens, report, page = made
    again = html_page(lens, report, tmp_path / "page.html", names=lambda token: f"<{token}>")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == again == page


def test_a_choice_of_layers_and_of_features(made):
    lens, report, _ = made
    page = html_page(lens, report, layers=3, k=2, n_tokens=1)
    assert re.findall("<h3>Layer (.)</h3>", page) == ["3"]
    assert len(re.findall("<tr>", page.split("<h3>")[1])) == 3


def test_features_are_shown_where_they_are_active(made):
    lens, report, _ = made
    tokens = demo.batches(demo.texts()[1], 8, 32)
    decode = demo.ByteTokenizer().decode
    page = html_page(lens, report, layers=[0, 3], k=2, tokens=tokens, decode=decode)
    Balanced(page)
    u = analysis.output_directions(lens[3], 2, 1).vectors[:, 0]
    features = analysis.eigenfeatures(lens[3], u, 2, metric="covariance")
    found = analysis.examples(lens, {3: features}, tokens, k=3, decode=decode)[3]
    section = page.split("<h3>Layer 3</h3>")[1]
    for row in found.rows:
        # neither u nor a feature has a sign of its own
        best = {f"{abs(e.activation):.1f}" for e in (row.highest[0], row.lowest[0])}
        assert all(value in section for value in best)
        assert f"<b>{html.escape(row.highest[0].token)}</b>".replace("\n", "⏎") in section
    # five tokens that u raises and lowers, and of embeddings where they explain the activation
    named = sum(row.token_r2 >= 0.5 for row in found.rows)
    assert len(re.findall(r"</code> [+-]", section)) == 10 + 10 * named
    assert "where in the text the feature is most active" in page


def test_a_report_of_something_else_is_refused(made):
    lens, report, _ = made
    other = type(report).from_dict({**report.to_dict(), "rows": []})
    with pytest.raises(InvalidInputError, match="give the report of this lens"):
        html_page(lens, other)
    with pytest.raises(InvalidInputError, match="in this order"):
        html_page(report, lens)
    with pytest.raises(InvalidInputError, match="no layer 2"):
        html_page(lens, report, layers=2)


def test_what_is_missing_is_said():
    tokens = torch.randint(3, 88, (8, 32))
    for name, degree, said in (("llama", 1, "no quadratic part"), ("bert", 2, "no tokens: ")):
        model = build(name)
        with polylens.attach(model, tokens, degree=degree, layers=1, progress=False) as lens:
            page = html_page(lens, lens.report(tokens, loss=False, progress=False))
        Balanced(page)
        assert said in page
        assert ("eigenvalues" in page) == (degree == 2)


def test_page_of_a_model_that_reads_features():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))
    x = torch.randn(200, 6)
    with polylens.attach(model.eval(), x, degree=2, progress=False) as lens:
        page = html_page(lens, lens.report(x, progress=False))
    Balanced(page)
    assert html.escape(lens.inputs_summary) in page


def test_shares_figure():
    shares = {"linear": {0: [0.5, 1.0], 3: [0.25, 0.75]}, "quadratic": {3: [1.0]}}
    figure = shares_figure(shares)
    left, right, bar = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[0.5, 1.0], [0.25, 0.75]]
    assert left.lines[0].get_color() != left.lines[1].get_color() == right.lines[0].get_color()
    assert (left.get_title(), right.get_title(), bar.get_ylabel()) == (
        "linear",
        "quadratic",
        "layer",
    )
    with pytest.raises(InvalidInputError, match="no layer was opened"):
        shares_figure({"linear": {}})
