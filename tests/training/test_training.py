"""Tracing R2 over training: models, files, failures, callbacks, figure."""

import json
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from tests.hf_models import D_VOCAB, DECODER, from_config
from torch import nn

import polylens
from polylens import Expert
from polylens.errors import InvalidInputError
from polylens.training.tracer import (
    Trace,
    TraceData,
    Tracer,
    TraceRow,
    TraceWarning,
    trace_training,
)


def network(seed=0, deep=False):
    torch.manual_seed(seed)
    modules = [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 8)]
    if deep:
        modules += [nn.GELU(), nn.Linear(8, 3)]
    return nn.Sequential(*modules)


@pytest.fixture
def data():
    x = torch.randn(400, 6)
    return TraceData(x[:300], x[300:], torch.randint(0, 3, (100,)))


def test_rows_equal_a_fit_by_hand(data):
    net = network()
    trace = trace_training([(7, net)], data, 3, progress=False)
    (row,) = trace.rows
    polynomial = polylens.fit(
        polylens.MLPWeights(
            W_in=net[0].weight.T,
            W_out=net[2].weight.T,
            act="relu",
            b_in=net[0].bias,
            b_out=net[2].bias,
        ),
        polylens.Gaussian.from_samples(data.calibration),
        3,
    )
    y = net(data.held_out).detach()
    for k in range(4):
        error = (polynomial.truncate(k)(data.held_out) - y).square().sum()
        r2 = 1 - error / (y - y.mean(0)).square().sum()
        assert row.r2[k] == pytest.approx(float(r2), abs=1e-4)
    assert row.r2_model == pytest.approx(polynomial.r2.tolist())
    assert row.loss == pytest.approx(float(nn.functional.cross_entropy(y, data.labels)))
    assert (row.step, row.layer, row.inputs) == (7, 0, "gaussian")


def test_a_constant_output_is_explained_by_degree_0(data):
    net = network()
    with torch.no_grad():
        net[2].weight.zero_()
    (row,) = trace_training([(0, net)], data, 2, progress=False).rows
    assert row.r2 == row.r2_model == (1, 1, 1)


def test_deep_networks_have_a_row_per_layer_and_input_model(data):
    named = {
        "gaussian": polylens.Gaussian.from_samples(data.calibration),
        "standard": polylens.Gaussian.standard(6),
    }
    data = TraceData(data.calibration, data.held_out, data.labels, named)
    trace = trace_training([(1, network(deep=True))], data, 2, progress=False)
    assert [(r.layer, r.inputs) for r in trace.rows] == [
        (0, "gaussian"),
        (0, "standard"),
        (1, "gaussian"),
    ]
    assert trace.series(1).shape == (1, 3)
    assert trace.series(0, "standard", model=True).shape == (1, 3)
    with pytest.raises(InvalidInputError, match="no R2 of layer 5"):
        trace.series(5)


def test_training_flags_are_restored(data):
    net = network()
    net[1].eval()
    trace_training([(0, net)], data, 1, progress=False)
    assert [m.training for m in net.modules()] == [True, True, False, True]


def test_failed_checkpoints_are_recorded_and_the_trace_goes_on(data, tmp_path):
    def missing():
        raise OSError("no such revision")

    broken = network()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    path = tmp_path / "trace.jsonl"
    checkpoints = [(1, network), (2, missing), (3, broken), (4, network)]
    with pytest.warns(TraceWarning) as caught:
        trace = trace_training(checkpoints, data, 2, path=path, progress=False)
    assert len(caught) == 2
    assert trace.steps == [1, 4]
    assert "no such revision" in trace.errors[2]
    assert "NaN" in trace.errors[3]
    assert Trace.load(path) == trace
    trace.plot().savefig(tmp_path / "trace.png")
    *_, panel = Trace(trace.rows[:1]).plot().axes
    assert panel.get_xlim() == (0, 2)
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1"]
    page = ElementTree.fromstring(trace._repr_html_())
    assert "no such revision" in "".join(page.itertext())


def test_resuming_loads_only_what_is_missing(data, tmp_path):
    loaded = []

    def load(step):
        loaded.append(step)
        return network(step)

    def checkpoints(n):
        return [(s, lambda s=s: load(s)) for s in range(n)]

    path = tmp_path / "trace.jsonl"
    trace_training(checkpoints(2), data, 2, path=path, progress=False)
    with path.open("a") as file:  # a failed step, and a line cut short
        file.write(json.dumps({**TraceRow(2, error="gone").__dict__}) + "\n" + '{"step": 3, "la')
    trace = trace_training(checkpoints(4), data, 2, path=path, progress=False)
    assert loaded == [0, 1, 2, 3]
    assert trace.steps == [0, 1, 2, 3]
    assert trace.errors == {}
    assert Trace.load(path) == trace
    with pytest.raises(InvalidInputError, match="degree \\[2\\], not 3"):
        Tracer(data, 3, path=path)
    path.write_text('{"step": 3, "la\n' + path.read_text())
    with pytest.raises(InvalidInputError, match="line 1 is no row"):
        Trace.load(path)


def test_a_file_is_resumed_whole_or_left_alone(data, tmp_path, monkeypatch):
    path = tmp_path / "trace.jsonl"
    trace_training([(0, network())], data, 1, path=path, progress=False)
    before = path.read_text()

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        Tracer(data, 1, path=path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_gated_networks_and_images_need_no_reader():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.linear, self.out = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.out(nn.functional.silu(self.gate(x)) * self.linear(x))

    x, net = torch.randn(400, 2, 3), Gated()
    named = {"standard": polylens.Gaussian.standard(6)}
    data = TraceData(x[:300], x[300:], None, named)
    (row,) = trace_training([(0, net)], data, 2, progress=False).rows
    assert row.inputs == "standard"
    columns = {"W_in": net.linear, "W_gate": net.gate, "W_out": net.out}
    weights = {name: linear.weight.T for name, linear in columns.items()}
    weights |= {"b_in": net.linear.bias, "b_gate": net.gate.bias, "b_out": net.out.bias}
    fitted = polylens.fit(polylens.GLUWeights(**weights, act="silu"), named["standard"], 2)
    assert row.r2_model == pytest.approx(fitted.r2.tolist())


def test_callback_in_a_plain_loop(data):
    tracer, net = Tracer(data, 1), network()
    for step in range(10):
        tracer(step, net)
        tracer(step, net)
    assert tracer.trace.steps == [0, 1, 2, 4, 8]
    chosen = Tracer(data, 1, steps={3, 5})
    assert [step for step in range(10) if chosen(step, net)] == [3, 5]


def test_callback_of_a_trainer(data):
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

    tracer, net = Tracer(data, 1), network()
    handler = CallbackHandler([tracer], net, None, None, None)
    args, state, control = SimpleNamespace(), TrainerState(), TrainerControl()
    handler.on_train_begin(args, state, control)
    for step in range(1, 6):
        state.global_step = step
        handler.on_step_begin(args, state, control)
        handler.on_step_end(args, state, control)
    handler.on_log(args, state, control, {})
    handler.on_train_end(args, state, control)
    assert tracer.trace.steps == [0, 1, 2, 4]
    with pytest.raises(AttributeError):
        _ = tracer.nonsense


def test_language_models_go_through_a_lens():
    from tests.models import hooked

    model = hooked()
    tokens = torch.randint(0, 90, (8, 16))
    trace = trace_training([(0, model)], (tokens[:6], tokens[6:]), 2, progress=False)
    assert [row.layer for row in trace.rows] == [0, 1]
    method = polylens.TrueStream(estimator="gaussian")
    with polylens.attach(model, tokens[:6], degree=2, method=method, progress=False) as lens:
        report = lens.report(tokens[6:], loss=False, progress=False)
    assert trace.rows[1].r2 == pytest.approx(report[1].r2)
    logits = model(tokens[6:])[:, :-1].flatten(0, 1).detach()
    loss = nn.functional.cross_entropy(logits, tokens[6:, 1:].flatten())
    assert trace.rows[0].loss == pytest.approx(float(loss), rel=1e-4)


def test_bad_input_is_refused(data):
    x = data.calibration
    with pytest.raises(InvalidInputError, match="held_out must be a tensor"):
        TraceData(x, x[:0])
    with pytest.raises(InvalidInputError, match="both be inputs"):
        TraceData(x, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(InvalidInputError, match="3 labels for 300"):
        TraceData(x, x, torch.zeros(3))
    for labels, inputs, message in (
        ([0] * 300, {}, "labels must be a tensor"),
        (None, polylens.Gaussian.standard(6), "inputs must be input models by name"),
        (None, {"gaussian": "norm"}, "inputs must be input models by name"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            TraceData(x, x, labels, inputs)
    with pytest.raises(InvalidInputError, match="of one shape"):
        TraceData(x, x[:, :5])
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(InvalidInputError, match="of token ids"):
        TraceData(tokens, tokens, torch.zeros(2))
    with pytest.raises(InvalidInputError, match="data must be a TraceData"):
        trace_training([(0, network())], x, 1)
    for checkpoints in (nn.Linear(2, 2), [network()], 3):
        with pytest.raises(InvalidInputError, match="checkpoints must be pairs"):
            trace_training(checkpoints, data, 1, progress=False)
    with pytest.raises(InvalidInputError, match="steps must be"):
        Tracer(data, 1, steps=5)
    with pytest.raises(InvalidInputError, match="degree must be"):
        Tracer(data, -1)
    with pytest.raises(InvalidInputError, match="nothing to draw"):
        Trace(()).plot()
    with pytest.warns(TraceWarning, match="no layer to attach to"):
        trace_training([(0, nn.Linear(6, 3))], data, 1, progress=False)
    with pytest.raises(InvalidInputError, match="no longer takes layers="):
        Tracer(data, 1, layers=len)
    inputs = {"standard": polylens.Gaussian.standard(6)}
    behind = nn.Sequential(nn.LayerNorm(6), *network())
    with pytest.warns(TraceWarning, match="none does"):
        trace_training([(0, behind)], TraceData(x, x, None, inputs), 1, progress=False)


def test_many_layers_are_drawn_by_degree():
    rows = [
        TraceRow(step, layer, r2=(0.0, 0.9 - layer / 10, 0.99), loss=2.0)
        for step in (0, 1, 8)
        for layer in range(5)
    ]
    figure = Trace((*rows, TraceRow(4, error="lost"))).plot()
    first, second, *losses, bar = figure.axes
    assert [panel.get_title() for panel in (first, second)] == ["degree 1", "degree 2"]
    for layer, line in enumerate(first.lines):
        assert line.get_xdata().tolist() == [0, 1, 8]
        assert line.get_ydata().tolist() == pytest.approx([0.1 + layer / 10] * 3)
    assert len({line.get_color() for line in first.lines}) == 5
    assert all(len(panel.lines) == 2 for panel in losses)
    assert (first.get_xscale(), bar.get_ylabel()) == ("symlog", "layer")


@pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")
def test_experts_of_a_mixture_are_traced_and_come_back_from_the_file(tmp_path):
    experts = dict(num_experts_per_tok=2, moe_intermediate_size=16, num_local_experts=2)
    model = from_config("MixtralConfig", "MixtralForCausalLM", {**DECODER, **experts})
    tokens = torch.randint(3, D_VOCAB, (16, 16))
    path = tmp_path / "trace.jsonl"
    data = (tokens[:12], tokens[12:])
    trace = trace_training([(0, model), (1, model)], data, 1, path=path, progress=False)
    expected = [Expert(0, 0), Expert(0, 1), Expert(1, 0), Expert(1, 1)]
    assert [row.layer for row in trace.rows[:4]] == expected
    assert Trace.load(path) == trace
    assert trace.series(Expert(1, 0)).shape == (2, 2)
    first, *_ = trace.plot().axes
    assert len(first.lines) == 4
    # Two experts of one block share its colour.
    assert len({line.get_color() for line in first.lines}) == 2


def test_dense_layers_and_experts_are_drawn_together():
    rows = [TraceRow(0, n, r2=(0.0, 0.5)) for n in (0, Expert(1, 0), Expert(1, 1))]
    first, *_ = Trace(tuple(rows)).plot().axes
    assert len(first.lines) == 3
    title = Trace(tuple(rows[:2])).plot().axes[1].get_title()
    assert title == "layer 1.0, gaussian inputs"
