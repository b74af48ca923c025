"""Everything about a lens on one HTML page that needs no other file."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import polylens.analysis.figures as figures
from polylens.analysis import (
    EigenFeatures,
    degree_energy,
    eigenfeatures,
    singular_features,
)
from polylens.analysis.examples import MEANINGFUL, Example, FeatureRow, examples, feature_rows
from polylens.analysis.layer_tokens import TokenScores, input_moments, written_tokens
from polylens.analysis.metric import gaussian_of
from polylens.calibration.tokens import token_names
from polylens.checks import Layer, Layers, check_layers, label
from polylens.errors import InvalidInputError, PolylensError, UnsupportedModel
from polylens.fitting.fit import fit
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.seen import LeftOut, Seen
from polylens.lens import Lens
from polylens.report.columns import BY_NAME, MISSING
from polylens.report.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPONENTS = 64

_CSS = """
:root{color-scheme:light dark;--ink:#111;--paper:#fff;--faint:#555;--line:#ccc;--code:#f2f2f2}
@media(prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181c;--faint:#a0a0a0;--line:#444;
--code:#2a2d33}}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;max-width:76rem;margin:0 auto;padding:1rem;
color:var(--ink);background:var(--paper)}
h1,p,code,td.text{overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:0;display:inline}
nav{position:sticky;top:0;background:var(--paper);border-bottom:1px solid var(--line);
padding:.4rem 0;display:flex;flex-wrap:wrap;gap:.3rem .8rem;align-items:center;
max-height:30vh;overflow-y:auto;z-index:1}
nav a{color:inherit}nav input{flex:1;min-width:9rem;max-width:16rem;font:inherit}
section,details{scroll-margin-top:6rem}details{margin:.8rem 0}summary{cursor:pointer}
table{border-collapse:collapse;font-size:85%}
td,th{padding:1px 8px;text-align:right;white-space:nowrap}
th{cursor:pointer;user-select:none}th[aria-sort=ascending]::after{content:" ▲"}
th[aria-sort=descending]::after{content:" ▼"}
td.text,th.text{text-align:left;vertical-align:top;min-width:12rem}
td.text{white-space:normal}
thead th{border-bottom:1px solid var(--line)}
div.wide{overflow-x:auto;max-width:100%;background:
linear-gradient(90deg,var(--paper) 30%,transparent) 0/2rem 100% no-repeat local,
linear-gradient(270deg,var(--paper) 30%,transparent) 100%/2rem 100% no-repeat local,
linear-gradient(90deg,var(--line),transparent) 0/.8rem 100% no-repeat scroll,
linear-gradient(270deg,var(--line),transparent) 100%/.8rem 100% no-repeat scroll}
img{max-width:100%;height:auto;background:#fff}
p.note{color:var(--faint);font-size:90%}[hidden]{display:none}
code{font-size:95%;background:var(--code);padding:0 2px;white-space:pre-wrap}
"""

# Sorts a table by a click on a title (rows of all layers stay last), and shows the layers that a
# word is in.
_SCRIPT = """
const value = cell => {
  const text = cell.textContent.trim().replace("−", "-").replace(/,/g, "");
  const number = parseFloat(text.replace(/^>/, ""));
  return Number.isNaN(number) ? text : number;
};
for (const title of document.querySelectorAll("th")) {
  title.title = "sort";
  title.addEventListener("click", () => {
    const up = title.getAttribute("aria-sort") !== "ascending";
    const at = title.cellIndex, body = title.closest("table").tBodies[0];
    for (const other of title.parentNode.cells) other.removeAttribute("aria-sort");
    title.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].filter(row => !row.classList.contains("all"));
    rows.sort((a, b) => {
      const [x, y] = [value(a.cells[at]), value(b.cells[at])];
      const order = typeof x === typeof y ? (x < y ? -1 : x > y) : typeof x === "number" ? -1 : 1;
      return up ? order : -order;
    });
    for (const row of [...rows, ...body.querySelectorAll("tr.all")]) body.append(row);
  });
}
document.querySelector("nav input").addEventListener("input", event => {
  const word = event.target.value.toLowerCase();
  for (const layer of document.querySelectorAll("details.layer")) {
    layer.hidden = !layer.textContent.toLowerCase().includes(word);
    layer.open ||= word !== "" && !layer.hidden;
  }
});
"""


@dataclass(frozen=True)
class Opening:
    """What linear algebra says about one layer.

    Attributes:
        layer: index.
        shares: cumulative, by kind: "output directions", "linear", "eigenfeatures".
        features: along the output direction of most quadratic variance; None below degree 2.
        writes: tokens which that direction raises and lowers; rows: the features and the tokens
            they read; none where the host or the layer has no tokens by name.
        missing: why something is left out.
    """

    layer: Layer
    shares: dict[str, list[float]]
    features: EigenFeatures | None = None
    writes: tuple[TokenScores, TokenScores] | None = None
    rows: tuple[FeatureRow, ...] = ()
    missing: str = ""


def html_page(
    lens: Lens,
    report: Report,
    path: str | Path | None = None,
    *,
    layers: Layers | None = None,
    names: Callable[[int], str] | None = None,
    k: int = 4,
    n_tokens: int = 5,
    tokens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> str:
    """A report, its figure, the input model, spectra and the strongest features of each layer.

    Each layer is opened along the output direction that carries most of its quadratic variance.
    Features are read out in tokens where a model has an embedding and an unembedding by name.

    Args:
        lens: what the report is about; a detached one serves as well.
        report: of `lens.report`.
        path: also written there.
        layers: which to open; all of the report by default.
        names: token id -> text; the model's tokenizer by default, ids where it has none.
        k: features per layer; n_tokens: named at either end of each.
        tokens: [batch, pos], such as those of the report: a text in which each feature is shown
            where it is most active, for one more forward pass. Without one there are the tokens
            whose embedding alone activates it, which say little behind the first layers.
        attention_mask: of the tokens, 0 at padding.
        decode: list of token ids -> text, for these; the model's tokenizer by default.

    Returns:
        The page, which loads nothing from anywhere.

    Raises:
        InvalidInputError: a report of other layers than the lens has, or without rows.

    Cost: per opened layer one d_out x d_out eigenproblem, O(d_mlp^2 d_in), and its eigenfeatures.
    """
    if not isinstance(lens, Lens) or not isinstance(report, Report):
        raise InvalidInputError(
            f"give a lens and its report, in this order; got {type(lens).__name__} and "
            f"{type(report).__name__}"
        )
    reported = [row.layer for row in report.rows if row.layer is not None]
    strangers = [layer for layer in reported if layer not in lens.layers]
    if strangers or not reported:
        raise InvalidInputError(
            f"the report has layers {reported} and the lens {list(lens.layers)}; give the report "
            "of this lens"
        )
    wanted = reported if layers is None else layers
    chosen = check_layers(wanted, lens.layers, lens.refused, " in this lens")
    names = names or token_names(lens.host.tokenizer)
    openings = [_open(lens, layer, n_tokens, names) for layer in chosen]
    readable = {o.layer: o.features for o in openings if o.writes and o.features is not None}
    if tokens is not None and readable:
        options = {"k": 3, "n_tokens": n_tokens, "attention_mask": attention_mask, "decode": decode}
        seen = examples(lens, readable, tokens, **options)
        openings = [replace(o, rows=seen[o.layer].rows) if o.layer in seen else o for o in openings]
    openings = [replace(opening, rows=opening.rows[:k]) for opening in openings]
    parts = [
        f"<h1>{html.escape(report.model)}</h1>",
        _contents(openings),
        f'<section id="report"><div class="wide">{report._repr_html_()}</div></section>',
        _image(report.plot(), "R² by layer and degree, and change of loss"),
        '<h2 id="layers">Layers and input model</h2>',
        _note(f"{report.inputs}. {_LAYERS}"),
        _layers_table(lens, report),
    ]
    if shown := _shares(openings):
        parts += [
            '<h2 id="components">How many components carry a layer</h2>',
            _note(
                "Left to right: output directions by the variance of the second-order part, "
                "singular features of the linear part, and eigenfeatures along the first of those "
                "output directions, all in the covariance of the layer's inputs. Where the fit has "
                "kept none, it is that which the norm in front implies, and the output directions "
                "are those of its closed form."
            ),
            _image(figures.shares_figure(shown), "cumulative shares"),
        ]
    read = _EMBEDDINGS if tokens is None else _EXAMPLES
    parts += ['<h2 id="features">Strongest quadratic features</h2>', _note(f"{_FEATURES} {read}")]
    parts += [_opening(opening) for opening in openings]
    title = html.escape(f"polylens: {report.model}")
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_CSS}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n<script>{_SCRIPT}</script></body></html>\n"
    )
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


_LAYERS = (
    "|mean| and std: length of the mean of the layer's inputs, and their standard deviation in a "
    "coordinate, in the model's units; eff. rank: how many directions carry their variance. R² "
    "under the model is in closed form, beside what was held out. Read back to: largest relative "
    "difference of the layer's output from that recomputed of its weights."
)
_FEATURES = (
    "Along the output direction u of most quadratic variance, a feature adds value × activation² "
    "to the output; both ends of its activation, in standard deviations from the mean, count alike."
    " u has no sign of its own; it raises and lowers the logits named: by so much for each unit "
    "that the layer writes along u, through the final norm, before its scale divides."
)
_EMBEDDINGS = (
    "Tokens are those whose embedding alone activates a feature most, either way: behind the first "
    "layers that says little of what it reads; a page made with tokens shows examples instead."
)
_EXAMPLES = (
    "Each end shows where in the text the feature is most active, and the tokens whose embedding "
    f"alone activates it where embeddings explain {MEANINGFUL:.0%} of its variance or more."
)


@torch.no_grad()
def _open(lens: Lens, layer: Layer, n_tokens: int, names: Callable[[int], str]) -> Opening:
    polynomial, shares = lens[layer], {}
    try:
        moments = input_moments(lens, layer)
        shares["linear part"] = singular_features(polynomial, metric=moments).share.tolist()
        if polynomial.degree < 2:
            return Opening(layer, shares, missing="fitted to degree 1: no quadratic part")
        closed = polynomial
        if not isinstance(polynomial.inputs, Gaussian):
            closed = fit(polynomial.weights, moments, 2)
        values, vectors = torch.linalg.eigh(degree_energy(closed, 2))
        values = values.flip(0).clamp(min=0)
        shares["output directions"] = (values.cumsum(0) / values.sum()).tolist()
        u = vectors[:, -1]
        most = min(16, polynomial.d_in, polynomial.weights.d_mlp)
        features = eigenfeatures(polynomial, u, most, metric=moments)
        shares["eigenfeatures of u"] = features.share.tolist()
    except PolylensError as error:
        return Opening(layer, shares, missing=str(error))
    try:
        rows = feature_rows(lens, layer, features, n_tokens, names)
        return Opening(
            layer, shares, features, written_tokens(lens, layer, u, n_tokens, names), rows
        )
    except UnsupportedModel as error:
        return Opening(layer, shares, features, missing=f"no tokens: {error}")


def _shares(openings: Sequence[Opening]) -> dict[str, dict[Layer, list[float]]]:
    kinds = ("output directions", "linear part", "eigenfeatures of u")
    found = {
        kind: {o.layer: o.shares[kind][:COMPONENTS] for o in openings if kind in o.shares}
        for kind in kinds
    }
    return {kind: by_layer for kind, by_layer in found.items() if by_layer}


def _contents(openings: Sequence[Opening]) -> str:
    places = {"report": "Report", "layers": "Layers", "features": "Features"}
    places |= {_place(each.layer): label(each.layer) for each in openings}
    links = "".join(f'<a href="#{place}">{title}</a>' for place, title in places.items())
    return (
        f'<nav>{links}<input type="search" placeholder="find in features" aria-label="find"></nav>'
    )


def _place(layer: Layer) -> str:
    return f"layer-{label(layer)}"


def _opening(opening: Opening) -> str:
    head = f"<summary><h3>Layer {label(opening.layer)}</h3></summary>"
    place = _place(opening.layer)
    return f'<details class="layer" id="{place}" open>{head}{_opened(opening)}</details>'


def _opened(opening: Opening) -> str:
    head = _note(opening.missing) if opening.missing else ""
    if opening.features is None:
        return head
    values, share = opening.features.values.tolist(), opening.features.share.tolist()
    if opening.writes is None:
        listed = ", ".join(f"{value:+.3g}" for value in values)
        return head + _note(f"eigenvalues {listed}; {share[-1]:.1%} of the quadratic energy")
    up, down = (_tokens(end) for end in opening.writes)
    writes = f"<p>u raises {up}, lowers {down}.</p>"
    cells = [
        [
            f"{row.value:+.3g}",
            f"{row.share:.1%}",
            _end(row.highest, row.high),
            _end(row.lowest, row.low),
        ]
        for row in opening.rows
    ]
    return (
        head
        + writes
        + _table(["value", "share of energy", "one end [sd]", "other end [sd]"], cells, 2)
    )


def _layers_table(lens: Lens, report: Report) -> str:
    top = lens.degree
    titles = ["layer", "kind", "activation", "d_in", "d_mlp", "|mean|", "std", "eff. rank"]
    r2 = BY_NAME["r2"]
    titles += [f"{r2.title.format(degree=top)}: held out", "under the model", "read back to"]
    titles.append("path")
    cells = []
    for row in report.rows:
        assert row.layer is not None
        site, polynomial = lens.sites[row.layer], lens[row.layer]
        held_out = r2.form(None if row.r2 is None else row.r2[top])
        moments, model_r2 = [MISSING] * 3, MISSING
        left_out = isinstance(polynomial.inputs, LeftOut)
        gaussian = None if left_out else gaussian_of(polynomial.inputs)
        if gaussian is not None:
            cov = gaussian.cov
            trace = cov.diagonal().sum() if cov.dim() == 2 else cov.sum()
            # Participation ratio: equal variances count fully, small ones hardly.
            rank = trace.square() / cov.square().sum()
            mean = torch.linalg.vector_norm(gaussian.mean)
            moments = [f"{mean:.3g}", f"{(trace / gaussian.d_in).sqrt():.3g}", f"{rank:.0f}"]
            if not isinstance(polynomial.inputs, Seen):
                model_r2 = r2.form(float(polynomial.r2[top]))
        cells.append(
            [
                *(row.label, site.kind, html.escape(site.activation.name)),
                *(str(site.d_in), str(site.d_mlp), *moments, held_out, model_r2),
                *(f"{site.error:.0e}", html.escape(site.path)),
            ]
        )
    return _table(titles, cells, len(titles) - 1)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], text_from: int) -> str:
    """Cells are HTML; from column `text_from` on they are text, set flush left."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ("" if i < text_from else ' class="text"' for i in range(len(cells)))
        return "".join(f"<{tag}{c}>{t}</{tag}>" for c, t in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head = line("th", [html.escape(title) for title in titles])
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _end(examples: Sequence[Example], tokens: TokenScores) -> str:
    lines = (
        f"{e.activation:+.1f} <code>{_shown(e.before)}<b>{_shown(e.token)}</b>{_shown(e.after)}"
        "</code>"
        for e in examples
    )
    lines = [*lines, *[_tokens(tokens)] * bool(tokens)]
    return "".join(f"<div>{line}</div>" for line in lines)


def _shown(text: str) -> str:
    return html.escape(text.replace("\n", "⏎"))


def _tokens(scores: TokenScores) -> str:
    return " ".join(f"<code>{html.escape(name)}</code> {score:+.1f}" for name, score in scores)


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _image(figure: "Figure", alt: str) -> str:
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "polylens"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    data = base64.b64encode(out.getvalue()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}"></p>'
