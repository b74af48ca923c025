"""Report: its figures against dense computations, its forms, and every error path."""

import io
import json
from contextlib import contextmanager
from dataclasses import fields, replace
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import polylens
from polylens.calibration.tokens import validate_tokens
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.hosts.base import Arrival, Host
from polylens.hosts.batch import Stream, batch_of
from polylens.report import columns
from polylens.report.measure import measure
from polylens.report.report import SCHEMA, LayerRow, Report

D_VOCAB, D, D_MLP = 11, 6, 16


class TinyModel(torch.nn.Module):
    """Embedding, residual MLPs, unembedding; each position sees itself and the one before."""

    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embed, self.unembed = normal(D_VOCAB, D), normal(D, D_VOCAB)
        self.weights = [
            polylens.MLPWeights(
                normal(D, D_MLP) / D**0.5,
                normal(D_MLP, D) / D_MLP**0.5,
                "gelu",
                normal(D_MLP) / 4,
                normal(D),
            )
            for _ in range(n_layers)
        ]


class TinyHost(Host):
    """The least that a Host can be; `flat` hands the MLPs [batch * pos, d], as OPT does."""

    reads_tokens = True
    d_vocab = D_VOCAB
    n_positions = None

    def __init__(self, flat: bool = False) -> None:
        super().__init__(TinyModel().eval(), "tiny")
        self.flat = flat
        self.observers: dict = {}
        self.functions: dict = {}

    def _given(self, inputs, attention_mask):
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return batch_of((inputs,), mask)

    def logits(self, inputs, attention_mask=None):
        (tokens,) = self.given(inputs, attention_mask).args
        x = self.model.embed[tokens]
        x = x + 0.5 * torch.roll(x, 1, dims=1) * (torch.arange(x.shape[1]) > 0)[:, None]
        for layer, weights in enumerate(self.model.weights):
            inputs = x.reshape(-1, D) if self.flat else x
            y = weights(inputs)
            if layer in self.observers:
                self.observers[layer](Arrival(inputs, y))
            if layer in self.functions:
                y = self.functions[layer](Arrival(inputs, y))
            x = x + y.reshape(x.shape)
        return x @ self.model.unembed

    forward = run = logits

    def sites(self):
        raise NotImplementedError

    def install(self, site, emitter):
        raise NotImplementedError

    @contextmanager
    def observe(self, observers):
        self.observers = observers
        try:
            yield
        finally:
            self.observers = {}

    @contextmanager
    def substitute(self, functions):
        self.functions = functions
        try:
            yield
        finally:
            self.functions = {}

    edit = substitute


class TinyLens:
    """What `measure` needs of a Lens."""

    model_name, inputs_summary, calibrated_on = "tiny <model>", "standard Gaussian", None

    def __init__(self, host: TinyHost, degree: int = 3, exclude_first: bool = True) -> None:
        self.host, self.degree, self.exclude_first = host, degree, exclude_first
        self.layers = (0, 1, 2)
        self.sites = {layer: SimpleNamespace(dequantised="") for layer in self.layers}
        self.refused = {7: "layer 7 (blocks.7.mlp): SoLU is not elementwise"}
        inputs = polylens.Gaussian(torch.zeros(D).double(), 2 * torch.eye(D).double())
        self.polynomials = [polylens.fit(w, inputs, degree) for w in host.model.weights]

    def __getitem__(self, layer):
        return self.polynomials[layer]

    @contextmanager
    def flowing(self, degrees):
        def swap(layer, degree):
            poly = self[layer].truncate(degree)
            return lambda arrival: poly(arrival.x)

        with self.host.substitute({layer: swap(layer, n) for layer, n in degrees.items()}):
            yield


@pytest.fixture
def tokens():
    return torch.randint(D_VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[0, 6:] = 0
    mask[3, :4] = 0
    mask[4, 1:] = 0
    return mask


def _dense_r2(lens, tokens, flags):
    """R2 by its definition, everything in memory at once."""
    seen = {}

    def keep(layer):
        def observe(arrival):
            seen[layer] = tuple(t.reshape(-1, D).numpy() for t in (arrival.x, arrival.y))

        return observe

    with lens.host.observe({layer: keep(layer) for layer in lens.layers}):
        lens.host.run(tokens)
    out = {}
    for layer, (x, y) in seen.items():
        x, y = x[flags.reshape(-1).numpy()], y[flags.reshape(-1).numpy()]
        centred = ((y - y.mean(0)) ** 2).sum()
        f = [lens[layer].truncate(k)(torch.as_tensor(x)).numpy() for k in range(lens.degree + 1)]
        out[layer] = [1 - ((y - p) ** 2).sum() / centred for p in f]
    return out


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_r2_equals_dense_computation(tokens, flat, batch_size):
    lens = TinyLens(TinyHost(flat))
    report = measure(lens, tokens, batch_size=batch_size, loss=False, progress=False)
    flags = torch.ones(5, 9, dtype=torch.bool)
    flags[:, 0] = False
    expected = _dense_r2(lens, tokens, flags)
    for row in report:
        np.testing.assert_allclose(row.r2, expected[row.layer], rtol=0, atol=1e-12)
    assert report.n_tokens == 40
    assert report.all_row is None
    assert report.base_ce is None
    assert report[0].delta_ce is None


def test_padding_and_first_position_do_not_count(tokens, mask):
    for exclude_first in (False, True):
        lens = TinyLens(TinyHost(), exclude_first=exclude_first)
        report = measure(lens, tokens, attention_mask=mask, batch_size=2, progress=False)
        flags = mask.bool().clone()
        if exclude_first:
            flags[[0, 1, 2, 4], 0] = False
            flags[3, 4] = False
        expected = _dense_r2(lens, tokens, flags)
        np.testing.assert_allclose(report[1].r2, expected[1], rtol=0, atol=1e-12)
        assert report.n_tokens == int(flags.sum())
        assert any("first position" in note for note in report.notes) == exclude_first


def test_offset_far_larger_than_the_spread_does_not_cancel(tokens):
    lens = TinyLens(TinyHost())
    plain = measure(lens, tokens, loss=False, progress=False)
    lens.host.model.weights = [
        polylens.MLPWeights(w.W_in, w.W_out, w.act, w.b_in, w.b_out + 1e6)
        for w in lens.host.model.weights[:1]
    ]
    lens.layers = (0,)
    moved = polylens.fit(lens.host.model.weights[0], lens[0].inputs, lens.degree)
    lens.polynomials = [moved]
    shifted = measure(lens, tokens, loss=False, batch_size=1, progress=False)
    np.testing.assert_allclose(shifted[0].r2, plain[0].r2, atol=1e-7)


def _by_definition(lens, tokens, mask, functions):
    """(cross entropy, KL) from torch's own losses on the whole batch."""
    truth = lens.host.logits(tokens)
    with lens.host.substitute(functions):
        logits = lens.host.logits(tokens)
    targets = tokens.clone()
    targets[mask == 0] = -100
    targets[:, 1:][mask[:, :-1] == 0] = -100
    ce = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:], ignore_index=-100)
    real = mask.bool()
    kl = F.kl_div(logits.log_softmax(-1)[real], truth.softmax(-1)[real], reduction="batchmean")
    return float(ce), float(kl)


@pytest.mark.parametrize("exclude_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_equal_torch(tokens, mask, padded, exclude_first):
    lens = TinyLens(TinyHost(), exclude_first=exclude_first)
    mask = mask if padded else torch.ones_like(mask)
    report = measure(lens, tokens, degree=2, attention_mask=mask, batch_size=2, progress=False)
    base, _ = _by_definition(lens, tokens, mask, {})
    assert report.base_ce == pytest.approx(base, abs=1e-12)
    assert report.n_targets == int((mask[:, 1:] * mask[:, :-1]).sum())
    assert (report.degree, report.fitted_degree) == (2, 3)

    flags = Stream.of(tokens, mask).counted(exclude_first=exclude_first)
    outputs = {}

    def keep(layer):
        return lambda a: outputs.__setitem__(layer, a.y[flags].mean(0))

    with lens.host.observe({layer: keep(layer) for layer in lens.layers}):
        lens.host.run(tokens)

    for row in (*report, report.all_row):
        group = lens.layers if row.layer is None else (row.layer,)
        quadratics = {layer: lens[layer].truncate(2) for layer in group}
        swap = {layer: lambda a, p=quadratics[layer]: p(a.x) for layer in group}
        ce, kl = _by_definition(lens, tokens, mask, swap)
        assert row.delta_ce == pytest.approx(ce - base, abs=1e-12)
        assert row.kl == pytest.approx(kl, abs=1e-12)
        ablate = {layer: lambda a, m=outputs[layer]: m.expand_as(a.y) for layer in group}
        ablation = _by_definition(lens, tokens, mask, ablate)[0] - base
        assert row.ablation_delta_ce == pytest.approx(ablation, abs=1e-12)
        if ablation > 1e-6:
            assert row.loss_recovered == pytest.approx(1 - (ce - base) / ablation, abs=1e-9)
        else:
            assert row.loss_recovered is None
    assert report.all_row.r2 is None


def test_flattened_ablation_keeps_first_position_too(tokens):
    flat, whole = (
        measure(TinyLens(TinyHost(flat)), tokens, degree=1, batch_size=2, progress=False)
        for flat in (True, False)
    )
    for a, b in zip(flat, whole, strict=True):
        assert a.ablation_delta_ce == pytest.approx(b.ablation_delta_ce, abs=1e-12)


def test_subset_of_layers_and_single_layer(tokens):
    lens = TinyLens(TinyHost())
    full = measure(lens, tokens, progress=False)
    part = measure(lens, tokens, layers=[2, 0, 2], progress=False)
    assert [row.layer for row in part] == [0, 2]
    # the stream under layer 2 is another one without layer 1 replaced
    assert replace(part[2], r2_replaced=None) == replace(full[2], r2_replaced=None)
    assert part[2].r2_replaced != full[2].r2_replaced
    one = measure(lens, tokens, layers=1, progress=False)
    assert len(one) == 1
    assert one.all_row.delta_ce == one[1].delta_ce == full[1].delta_ce


def test_exact_polynomial_is_perfect_and_costs_nothing(tokens):
    lens = TinyLens(TinyHost())
    lens.host.model.weights = [
        polylens.MLPWeights(w.W_in, w.W_out, "identity", w.b_in, w.b_out)
        for w in lens.host.model.weights
    ]
    inputs = polylens.Gaussian.standard(D)
    lens.polynomials = [polylens.fit(w, inputs, 3) for w in lens.host.model.weights]
    report = measure(lens, tokens, progress=False)
    assert report[0].r2[1:] == pytest.approx((1, 1, 1), abs=1e-12)
    assert abs(report.all_row.delta_ce) < 1e-10
    assert abs(report.all_row.kl) < 1e-10


def test_harmless_ablation_and_constant_output(tokens):
    lens = TinyLens(TinyHost())
    w = lens.host.model.weights[1]
    dead = polylens.MLPWeights(w.W_in, torch.zeros_like(w.W_out), "gelu", w.b_in, w.b_out)
    lens.host.model.weights[1] = dead
    lens.polynomials[1] = polylens.fit(dead, lens[0].inputs, 3)
    report = measure(lens, tokens, progress=False)
    assert report[1].r2 == (1.0,) * 4
    assert report[1].loss_recovered is None
    assert any("layers 1 does not vary" in note for note in report.notes)
    assert "–" in str(report)
    assert Report.from_dict(json.loads(report.to_json())) == report
    report.plot()
    # the same layer with a polynomial that misses its constant
    shifted = polylens.MLPWeights(w.W_in, dead.W_out, "gelu", w.b_in, 2 * w.b_out)
    lens.polynomials[1] = polylens.fit(shifted, lens[0].inputs, 3)
    assert measure(lens, tokens, progress=False)[1].r2 == (0.0,) * 4


# ------------------------------------------------------------------ forms


@pytest.fixture
def report():
    rows = (
        LayerRow(0, (-0.02, 0.9913, 0.9987, 0.99999), -0.0001, 0.001, 0.5, 1.0002),
        LayerRow(3, (-0.01, -3.25, -250000.0, 0.94), 12.5, 11.0, 0.0, None),
    )
    return Report(
        model="tiny <model> & co",
        host="tiny",
        inputs="Gaussian, 40 tokens",
        degree=2,
        fitted_degree=3,
        n_tokens=4064,
        n_targets=4000,
        base_ce=3.063,
        rows=rows,
        all_row=LayerRow(None, None, 8.56, 9.1, 9.7, 1 - 8.56 / 9.7),
        refused={7: "SoLU <is> not elementwise"},
        notes=("position 0 excluded",),
    )


def test_text_shows_what_matters(report):
    text = str(report)
    for figure in ("0.9913", "0.9987", ">0.9999", "-3.2500", "-2.5e+05", "+12.5000", "100.0%"):
        assert figure in text
    for words in ("tiny <model>", "Gaussian, 40 tokens", "4,064", "3.0630", "all", "SoLU"):
        assert words in text
    assert "\x1b" not in text
    assert len({line.rstrip() == line for line in text.splitlines()}) == 1


@pytest.mark.parametrize("degree", [0, 1, 8])
def test_text_is_never_cut(degree):
    row = LayerRow(0, tuple(-123.4567 for _ in range(degree + 1)), 1.0, 1.0, 1.0, -9.87)
    text = str(Report("m", "h", "i", degree, degree, 9, 9, 1.0, (row,), row))
    assert "…" not in text
    assert text.count("-123.4567") == 2 * max(degree, 1)


def test_rich_and_html(report):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    assert "0.9987" in console.export_text()
    page = report._repr_html_()
    root = ElementTree.fromstring(page)
    assert len(root.findall(".//tbody/tr")) == 3
    widths = {len(row) for row in root.findall(".//tr")}
    assert widths == {len(root.findall(".//thead/tr/th"))}
    assert "tiny <model> & co" in "".join(root.itertext())
    assert "<model>" not in page
    assert "http" not in page


def test_json_round_trip(report, tmp_path):
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(text) == report.to_dict()
    assert report.to_dict()["schema"] == SCHEMA
    assert Report.from_dict(json.loads(text)) == report


def test_json_is_strict_with_infinite_losses(report):
    broken = Report.from_dict(report.to_dict())
    broken = Report(
        **{**broken.__dict__, "all_row": LayerRow(None, None, float("inf"), float("nan"))}
    )
    data = json.loads(broken.to_json(), parse_constant=pytest.fail)
    assert data["all_row"]["delta_ce"] is None
    assert "inf" in str(broken)
    broken.plot()


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"schema": "other/1"},
        {"schema": SCHEMA},
        {"schema": SCHEMA, "rows": 3, "all_row": None},
    ],
)
def test_from_dict_refuses_other_things(data):
    with pytest.raises(InvalidInputError, match="report"):
        Report.from_dict(data)


def test_access(report):
    assert report[3].label == "3"
    assert [row.layer for row in report] == [0, 3]
    assert len(report) == 2
    with pytest.raises(InvalidInputError, match=r"no layer 1 .* \[0, 3\]"):
        report[1]


# ----------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.rand(2, 5), "integer token ids, got torch.float32"),
        (torch.ones(2, 5, dtype=torch.bool), "integer"),
        (torch.zeros(5, dtype=torch.long), r"add the batch axis: tokens\[None\]"),
        (torch.zeros(2, 5, 3, dtype=torch.long), r"\[batch, pos\], got shape \(2, 5, 3\)"),
        (torch.zeros(0, 5, dtype=torch.long), "empty"),
        (torch.zeros(2, 0, dtype=torch.long), "empty"),
        (torch.zeros(3, 1, dtype=torch.long), "at least 2"),
        (torch.full((2, 5), -1), "from 0 to 10, got -1"),
        (torch.full((2, 5), D_VOCAB), "from 0 to 10, got 11"),
        ("some text", "polylens.tokenize"),
    ],
)
def test_unusable_tokens(bad, message):
    lens = TinyLens(TinyHost())
    lens.host.model.cfg = type("Config", (), {"d_vocab": D_VOCAB})
    with pytest.raises(InvalidInputError, match=message):
        measure(lens, bad, progress=False)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(5, 8), r"shape of the tokens, \(5, 9\), got \(5, 8\)"),
        (torch.zeros(5, 9), "0 everywhere"),
        (torch.full((5, 9), float("-inf")), "additive"),
    ],
)
def test_unusable_mask(tokens, bad, message):
    with pytest.raises(InvalidInputError, match=message):
        measure(TinyLens(TinyHost()), tokens, attention_mask=bad, progress=False)


def test_mask_that_leaves_nothing_to_measure(tokens):
    only_first = torch.zeros(5, 9)
    only_first[:, 0] = 1
    lens = TinyLens(TinyHost())
    with pytest.raises(InvalidInputError, match="fewer than 2 activations"):
        measure(lens, tokens, attention_mask=only_first, progress=False)
    lens.exclude_first = False
    with pytest.raises(InvalidInputError, match="no loss"):
        measure(lens, tokens, attention_mask=only_first, progress=False)


@pytest.mark.parametrize("degree", [-1, 4, True, 1.0])
def test_degree_out_of_range(tokens, degree):
    with pytest.raises(InvalidInputError, match="from 0 to 3"):
        measure(TinyLens(TinyHost()), tokens, degree=degree, progress=False)


def test_unknown_refused_and_no_layers(tokens):
    lens = TinyLens(TinyHost())
    with pytest.raises(InvalidInputError, match=r"no layer 5 .* \[0, 1, 2\]"):
        measure(lens, tokens, layers=[0, 5], progress=False)
    with pytest.raises(UnsupportedModel, match="SoLU"):
        measure(lens, tokens, layers=7, progress=False)
    with pytest.raises(InvalidInputError, match="empty"):
        measure(lens, tokens, layers=[], progress=False)
    for size in (0, -1, 2.0):
        with pytest.raises(InvalidInputError, match="batch_size"):
            measure(lens, tokens, batch_size=size, progress=False)


def test_activations_that_are_not_finite(tokens):
    lens = TinyLens(TinyHost())
    lens.host.model.embed = lens.host.model.embed.clone()
    lens.host.model.embed[tokens[0, 4]] = float("nan")
    with pytest.raises(InvalidInputError, match="layer 0: its outputs are not finite"):
        measure(lens, tokens, progress=False)
    lens = TinyLens(TinyHost())
    lens.polynomials[1].P[2:] = float("nan")
    with pytest.raises(InvalidInputError, match="layer 1: its polynomials of degree 2, degree 3"):
        measure(lens, tokens, progress=False)


def test_token_helpers(tokens, mask):
    ids, flags = validate_tokens(tokens.to(torch.uint8), mask.bool())
    assert ids.dtype == flags.dtype == torch.long
    assert torch.equal(ids, tokens)
    assert validate_tokens(tokens.tolist())[1] is None
    parts = list(batch_of((tokens,), {"attention_mask": mask}).split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.kwargs["attention_mask"] for part in parts]), mask)
    assert Stream.of(tokens).counted(exclude_first=False).all()
    counted = Stream.of(tokens, mask).counted(exclude_first=True)
    assert counted.sum(1).tolist() == [5, 8, 8, 4, 0]


def test_every_figure_of_a_row_has_a_row_in_the_table_of_columns(report):
    assert set(columns.BY_NAME) == {field.name for field in fields(LayerRow)}
    data = report.to_dict()
    data["rows"][0]["nonsense"] = 1.0
    with pytest.raises(InvalidInputError, match=r"unknown entries \['nonsense'\]"):
        Report.from_dict(data)
    del data["rows"][0]["nonsense"], data["rows"][0]["kl"]
    assert Report.from_dict(data)[0] == replace(report[0], kl=None)
