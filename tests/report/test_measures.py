"""What a report says of replaced models: every figure again by hand, on each host."""

import io
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tests.hf_models import DECODER, ENCODER, build, from_config
from tests.models import D_VOCAB, LLAMA, bridge, hooked
from tests.report.test_report import TinyHost, TinyLens

import polylens
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.hosts import host_for
from polylens.report.measure import measure
from polylens.report.report import SCHEMA, LayerRow, Report, WorstToken
from polylens.report.scores import lead_of

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

DEGREE = 2
LAYERS = [0, 1, 2]


def ids(n_seq, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (n_seq, 12), generator=generator)


TOKENS, HELD_OUT, MASK = ids(6, 0), ids(5, 1), torch.ones(5, 12, dtype=torch.long)
MASK[1, 7:] = 0
MASK[4, 2:] = 0

THREE = {"num_hidden_layers": 3}
HOSTS = {
    "HookedTransformer": lambda: hooked(torch.float64, n_layers=3),
    "TransformerBridge": lambda: bridge(
        "LlamaConfig", "LlamaForCausalLM", torch.float64, **{**LLAMA, **THREE}
    ),
    "Hugging Face": lambda: from_config(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", {**DECODER, **THREE}, torch.float64
    ),
}


@pytest.fixture(scope="module", params=HOSTS)
def measured(request):
    """(lens, report) on padded sequences in two batches, all that can be asked for."""
    with polylens.attach(HOSTS[request.param](), TOKENS, degree=3, progress=False) as lens:
        assert lens.host.name == request.param
        options = dict(attention_mask=MASK, batch_size=3, degree=DEGREE, progress=False)
        yield lens, lens.report(HELD_OUT, prefixes=True, worst=7, **options)


def passed(lens, layers):
    """Logits of the whole batch with these layers replaced; float64."""
    with torch.no_grad(), lens.replaced(degree=DEGREE, layers=layers):
        return lens.host.logits(HELD_OUT, MASK)


def true_logits(lens):
    with torch.no_grad():
        return lens.host.logits(HELD_OUT, MASK)


def cross_entropies(logits):
    """[batch, pos - 1], zero at padding."""
    ce = F.cross_entropy(logits[:, :-1].mT, HELD_OUT[:, 1:], reduction="none")
    return ce * MASK[:, 1:] * MASK[:, :-1]


def by_hand(lens, layers):
    """(ΔCE, its standard error, KL, agreement) of layers replaced together."""
    truth, logits, real = true_logits(lens), passed(lens, layers), MASK.bool()
    rises = (cross_entropies(logits) - cross_entropies(truth)).sum(1).numpy()
    counts = (MASK[:, 1:] * MASK[:, :-1]).sum(1).numpy()
    delta = rises.sum() / counts.sum()
    error = np.std(rises - delta * counts, ddof=1) * len(counts) ** 0.5 / counts.sum()
    p, q = truth.log_softmax(-1)[real], logits.log_softmax(-1)[real]
    return delta, error, (p.exp() * (p - q)).sum(-1).mean(), (p.argmax(1) == q.argmax(1)).float()


def at_points(lens):
    """{layer: (x, y, polynomial)} at the hook points while all layers are replaced."""
    seen = {layer: {} for layer in LAYERS}

    def keep(layer, name):
        return lambda module, args, out: seen[layer].update({name: out})

    with ExitStack() as hooks:
        for layer in LAYERS:
            for name in ("in", "out", "error"):
                path = f"{lens.sites[layer].path}.hook_poly_{name}"
                point = lens.host.module.get_submodule(path)
                hooks.callback(point.register_forward_hook(keep(layer, name)).remove)
        passed(lens, LAYERS)
    return {n: (s["in"], s["out"] + s["error"], s["out"]) for n, s in seen.items()}


def test_losses_agreement_and_errors(measured):
    lens, report = measured
    for row in (*report, report.all_row):
        layers = LAYERS if row.layer is None else [row.layer]
        delta, error, kl, agree = by_hand(lens, layers)
        assert row.delta_ce == pytest.approx(float(delta), abs=1e-10)
        assert row.delta_ce_se == pytest.approx(float(error), abs=1e-10)
        assert row.kl == pytest.approx(float(kl), abs=1e-10)
        assert row.agreement == pytest.approx(float(agree.mean()), abs=1e-6)
    assert report.all_row.agreement < 1
    assert report.all_row.delta_ce_se > 1e-4


def test_prefixes_run_from_the_first_layer_to_all(measured):
    lens, report = measured
    for row in report:
        delta, _, kl, _ = by_hand(lens, LAYERS[: row.layer + 1])
        assert row.prefix_delta_ce == pytest.approx(float(delta), abs=1e-10)
        assert row.prefix_kl == pytest.approx(float(kl), abs=1e-10)
    assert report[0].prefix_delta_ce == report[0].delta_ce
    assert report[2].prefix_delta_ce == report.all_row.delta_ce
    assert report[1].prefix_delta_ce != report[1].delta_ce


def test_prefixes_cost_a_pass_for_each_layer_between(measured):
    lens, _ = measured
    calls, logits = [], lens.host.logits
    lens.host.logits = lambda *args: calls.append(1) or logits(*args)
    try:
        counts = []
        for prefixes in (False, True):
            calls.clear()
            lens.report(HELD_OUT, prefixes=prefixes, progress=False)
            counts.append(len(calls))
    finally:
        del lens.host.logits
    both_ways = 2  # whether it reads both ways
    assert counts == [both_ways + 1 + 2 * 4, both_ways + 1 + 2 * 4 + 1]


def test_r2_on_the_replaced_stream(measured):
    lens, report = measured
    kept = MASK.bool().clone()
    kept[:, 0] = False
    for layer, (_, y, f) in at_points(lens).items():
        y, f = y[kept], f[kept]
        r2 = 1 - float((y - f).square().sum() / (y - y.mean(0)).square().sum())
        assert report[layer].r2_replaced == pytest.approx(r2, abs=1e-9)
    # nothing is replaced below the first layer
    assert report[0].r2_replaced == pytest.approx(report[0].r2_replacement, abs=1e-9)
    assert report[2].r2_replaced != pytest.approx(report[2].r2_replacement, abs=1e-6)
    assert report.all_row.r2_replaced is None


def test_r2_by_degree_is_of_optima_and_r2_with_ends_of_what_replaces(measured):
    lens, report = measured
    kept = MASK.bool().clone()
    kept[:, 0] = False
    inputs = {}
    observers = {n: lambda a, n=n: inputs.update({n: (a.x, a.y)}) for n in LAYERS}
    with lens.host.observe(observers), torch.no_grad():
        true_logits(lens)
    for layer, (x, y) in inputs.items():
        x, y = x[kept], y[kept].double()
        spread = (y - y.mean(0)).square().sum()
        for k, found in enumerate(report[layer].r2):
            f = lens[layer].optimum(k)(x)
            assert found == pytest.approx(1 - float((y - f).square().sum() / spread), abs=1e-6)
        replacing = lens[layer].truncate(DEGREE)
        r2 = 1 - float((y - replacing(x)).square().sum() / spread)
        assert report[layer].r2_replacement == pytest.approx(r2, abs=1e-6)
        assert report[layer].r2_replacement != pytest.approx(report[layer].r2[DEGREE], abs=1e-6)
        low, high = replacing.ends
        outside = lens[layer].weights.neurons(x)["y"]
        share = float(((outside < low) | (outside > high)).double().mean())
        assert report[layer].beyond == pytest.approx(share, abs=1e-9)
        assert 0 < share < 0.2


def test_worst_tokens_and_their_causes(measured):
    lens, report = measured
    true, changed = cross_entropies(true_logits(lens)), cross_entropies(passed(lens, LAYERS))
    order = (changed - true).flatten().argsort(descending=True)[:7].tolist()
    places = [divmod(i, 11) for i in order]
    assert [(w.sequence, w.position - 1) for w in report.worst] == places
    p, q = (f(lens).log_softmax(-1) for f in (true_logits, lambda lens: passed(lens, LAYERS)))
    seen = at_points(lens)
    for worst, (i, j) in zip(report.worst, places, strict=True):
        assert worst.token == HELD_OUT[i, j + 1]
        assert worst.text == str(worst.token)
        assert worst.context == " ".join(map(str, HELD_OUT[i, : j + 1].tolist()))
        assert worst.true_ce == pytest.approx(float(true[i, j]), abs=1e-10)
        assert worst.replaced_ce == pytest.approx(float(changed[i, j]), abs=1e-10)
        kl = (p[i, j].exp() * (p[i, j] - q[i, j])).sum()
        assert worst.kl == pytest.approx(float(kl), abs=1e-10)
        errors = [float((y[i, j] - f[i, j]).norm() / y[i, j].norm()) for _, y, f in seen.values()]
        assert worst.error == pytest.approx(max(errors), abs=1e-9)
        assert worst.layer == int(np.argmax(errors))
        polynomial = lens[worst.layer]
        with torch.no_grad():
            neurons = polynomial.weights.neurons(seen[worst.layer][0][i, j])["y"]
        t = (neurons - polynomial.m) / polynomial.s
        assert worst.neuron == int(t.abs().argmax())
        assert worst.deviation == pytest.approx(float(t[worst.neuron]), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gpt2"])
def test_models_that_see_what_follows_are_told_from_those_that_do_not(name, dtype):
    host = host_for(build(name, dtype))
    assert lead_of(host, host.given(HELD_OUT)) == (0 if "bert" in name else 1)


def test_a_masked_language_model_is_scored_on_each_token_itself():
    model = from_config("BertConfig", "BertForMaskedLM", {**ENCODER, **THREE}, torch.float64)
    with polylens.attach(model, TOKENS, degree=3, progress=False) as lens:
        report = lens.report(HELD_OUT, attention_mask=MASK, degree=DEGREE, progress=False)
        truth, logits = true_logits(lens), passed(lens, LAYERS)
    true, changed = (
        F.cross_entropy(x.mT, HELD_OUT, reduction="none") * MASK for x in (truth, logits)
    )
    n = int(MASK.sum())
    assert report.n_targets == n
    assert report.base_ce == pytest.approx(float(true.sum()) / n, abs=1e-10)
    assert report.all_row.delta_ce == pytest.approx(float((changed - true).sum()) / n, abs=1e-10)
    assert any("reads both ways" in note for note in report.notes)
    rises = (changed - true).flatten()
    places = [divmod(i, 12) for i in rises.argsort(descending=True).tolist() if rises[i] > 1e-6]
    assert [(w.sequence, w.position) for w in report.worst] == places[:10]
    assert all(w.token == HELD_OUT[w.sequence, w.position] for w in report.worst)


def test_a_model_without_a_head_has_no_losses():
    model = from_config("BertConfig", "BertModel", ENCODER)
    with polylens.attach(model, TOKENS, degree=2, progress=False) as lens:
        with pytest.raises(UnsupportedModel, match=r"no logits.*last_hidden_state.*loss=False"):
            lens.report(HELD_OUT, progress=False)
        assert lens.report(HELD_OUT, loss=False, progress=False)[0].r2[2] > 0.5


def test_exact_polynomials_cost_nothing_and_agree_everywhere():
    changes = dict(n_embd=24, n_layer=3, n_head=4, n_positions=48, activation_function="linear")
    model = bridge("GPT2Config", "GPT2LMHeadModel", torch.float64, **changes)
    with polylens.attach(model, TOKENS, degree=2, progress=False) as lens:
        report = lens.report(HELD_OUT, prefixes=True, progress=False)
    for row in (*report, report.all_row):
        assert row.agreement == 1
        assert abs(row.delta_ce) + row.delta_ce_se + abs(row.kl) < 1e-10
    for row in report:
        assert abs(row.prefix_delta_ce) + abs(row.prefix_kl) < 1e-10
        assert row.r2_replaced == pytest.approx(1, abs=1e-10)
    assert report.worst == ()


OUTLIER, NEURON, WRITTEN = 7, 5, 8


def planted():
    """A model in which one token's embedding has a direction that one neuron alone reads.

    What it writes, nothing but the unembedding reads.
    """
    model = hooked(torch.float64, n_layers=3, normalization_type=None, act_fn="relu")
    v = torch.zeros(24, dtype=torch.float64)
    v[3] = 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn.W_" in name and "W_O" not in name:
                parameter[:, 3] = 0  # [head, d_model, d_head]
            elif name.endswith("W_in"):
                parameter[3] = 0
            elif parameter.shape[-1] == 24:
                parameter[..., 3] = 0
        model.W_E[OUTLIER] = 8 * v
        model.blocks[1].mlp.W_in[3, NEURON] = 6
        model.blocks[1].mlp.W_out[NEURON] = torch.eye(24, dtype=torch.float64)[WRITTEN]
        model.blocks[2].mlp.W_in[WRITTEN] = 0
        for role in "QKV":
            getattr(model.blocks[2].attn, f"W_{role}")[:, WRITTEN] = 0
    return model


def test_a_planted_outlier_is_found_with_its_layer_and_neuron():
    calibration = torch.where(TOKENS == OUTLIER, 3, TOKENS)
    held_out = torch.where(HELD_OUT == OUTLIER, 3, HELD_OUT)
    held_out[2, 4] = OUTLIER
    model = planted()
    method = polylens.TrueStream(estimator="gaussian")  # without ends
    with polylens.attach(model, calibration, degree=3, method=method, progress=False) as lens:
        report = lens.report(held_out, decode=lambda tokens: f"<{tokens}>", progress=False)
    first = report.worst[0]
    assert (first.sequence, first.position, first.layer, first.neuron) == (2, 5, 1, NEURON)
    assert first.deviation > 10
    assert first.context == f"<{held_out[2, :5].tolist()}>"
    assert first.text == f"<[{held_out[2, 5]}]>"
    assert f"{first.deviation:+.1f}" in str(report)


def test_a_layer_is_named_at_every_position_the_first_included():
    model = from_config("BertConfig", "BertForMaskedLM", ENCODER)
    with polylens.attach(model, TOKENS, degree=1, progress=False) as lens:
        worst = lens.report(HELD_OUT, worst=1000, progress=False).worst
    assert {0, 1} < {token.position for token in worst}
    assert all(token.layer is not None for token in worst)


def test_one_sequence_has_no_standard_error_and_fewer_worst_tokens_can_be_asked_for():
    lens = TinyLens(TinyHost())
    tokens = torch.arange(9)[None] % 11
    report = measure(lens, tokens, worst=2, progress=False)
    assert report.all_row.delta_ce_se is None
    assert len(report.worst) == 2
    assert "±" not in str(report)
    none = measure(lens, tokens, worst=0, progress=False)
    assert none == replace(report, worst=())


def test_a_stream_that_diverges_is_reported():
    lens = TinyLens(TinyHost())
    lens.polynomials[0].P *= 1e100
    report = measure(lens, torch.arange(18).reshape(2, 9) % 11, prefixes=True, progress=False)
    assert report[1].r2_replaced == report[2].r2_replaced == -np.inf
    assert "-inf" in str(report)
    assert report.worst[0].layer in LAYERS
    report.plot()
    again = Report.from_dict(json.loads(report.to_json()))
    assert again[1].r2_replaced is None
    assert [w.sequence for w in again.worst] == [w.sequence for w in report.worst]


# ------------------------------------------------------------------ forms


@pytest.fixture
def full():
    """A report with every figure that there can be."""
    losses = (0.0123, 0.0456, 12.5, 0.999)
    rows = tuple(
        LayerRow(n, tuple(0.9 + 0.01 * k for k in range(9)), *losses, 99, 0.0017, 0.9125,
                 0.1 * n + 0.0111, 0.2, 0.8765 - 0.1 * n)
        for n in range(3)
    )  # fmt: skip
    worst = (
        WorstToken(12, 345, 678, "<b>[bold]\n", "x" * 200, 1.25, 9.75, 3.5, 2, 0.85, 932, 14.2),
        WorstToken(3, 1, 4, " the", "", 0.5, float("inf"), None),
    )
    all_row = LayerRow(None, None, *losses, None, 0.0022, 0.8125)
    return Report("m", "h", "i", 8, 8, 99, 99, 3.0, rows, all_row, worst=worst)


def printed(report, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 300])
def test_nothing_but_context_is_cut_at_any_width(full, width):
    text = printed(full, width)
    assert max(map(len, text.splitlines())) <= width
    for figure in ("0.0017", "91.2%", "+0.1111", "0.8765", "0.0022", "+14.2", "12:345", "932"):
        assert figure in text
    assert "'<b>[bold]\\n'" in text
    assert text.count("…") == (width < 300)
    assert ("recovered" in text) == ("prefix" in text) is True
    assert max(map(len, str(full).splitlines())) <= 100


def test_the_page_shows_them_too(full):
    root = ElementTree.fromstring(full._repr_html_())
    text = "".join(root.itertext())
    for figure in ("±", "top-1", "91.2%", "R² repl.", "+0.1111", "'<b>[bold]\\n'", "+14.2"):
        assert figure in text
    assert len(root.findall("table")) == 2


def test_the_figure_shows_both_streams_and_the_prefixes(full, tmp_path):
    figure = full.plot()
    left, right = figure.axes
    (dashed,) = [line for line in left.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed.get_ydata(), [1 - row.r2_replaced for row in full])
    (line,) = [line for line in right.lines if line.get_label() == "all up to this layer"]
    np.testing.assert_allclose(line.get_ydata(), [row.prefix_delta_ce for row in full])
    assert "replaced" in [text.get_text() for text in left.texts]
    figure.savefig(tmp_path / "figure.png")


def test_json_keeps_them(full):
    again = Report.from_dict(json.loads(full.to_json()))
    unfinished = (full.worst[0], replace(full.worst[1], replaced_ce=None))
    assert again == replace(full, worst=unfinished)


def test_reports_of_the_first_version_are_read():
    data = json.loads((Path(__file__).parent.parent / "data/report_1.json").read_text("utf-8"))
    assert data["schema"] == "polylens.report/1"
    report = Report.from_dict(data)
    assert report.worst == ()
    assert report[0].agreement is None
    text = str(report)
    assert "recovered" in text
    assert not any(title in text for title in ("top-1", "±", "repl.", "prefix"))
    assert report.to_dict()["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prefixes=True, loss=False), "prefixes=True measures losses"),
        (dict(worst=-1), "number of tokens, 0 for none, got -1"),
        (dict(worst=True), "got True"),
        (dict(decode=lambda ids: ids.reshape(-1)), r"decode fails on \[0\].*AttributeError"),
        (dict(decode=lambda ids: ids), "got list"),
        (dict(decode=3), "decode fails"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InvalidInputError, match=message):
        measure(
            TinyLens(TinyHost()), torch.arange(18).reshape(2, 9) % 11, progress=False, **options
        )


def test_zero_ablation_is_measured_where_it_is_asked_for(measured):
    lens, report = measured
    assert all(row.zero_delta_ce is None for row in report)
    options = dict(attention_mask=MASK, batch_size=3, degree=DEGREE, progress=False)
    report = lens.report(HELD_OUT, zero_ablation=True, **options)
    for row in (*report, report.all_row):
        layers = LAYERS if row.layer is None else [row.layer]

        def nothing(arrival):
            return torch.zeros_like(arrival.y)

        with torch.no_grad(), lens.host.substitute(dict.fromkeys(layers, nothing)):
            logits = lens.host.logits(HELD_OUT, MASK)
        rise = cross_entropies(logits) - cross_entropies(true_logits(lens))
        n = (MASK[:, 1:] * MASK[:, :-1]).sum()
        assert row.zero_delta_ce == pytest.approx(float(rise.sum() / n), abs=1e-10)
        assert row.ablation_delta_ce != row.zero_delta_ce
    assert "zeroed" in str(report)
