"""Batches in step, and polynomials fitted on the stream of the replaced layers below."""

from contextlib import nullcontext

import pytest
import torch
from tests.hf_models import MIXTURES, build, from_config
from tests.host_contract import module_snapshot
from tests.hosts.test_hosts_agree import bridge, hooked, nnsight, plain

import polylens
from polylens import (
    InvalidInputError,
    Samples,
    Sequential,
    TrueStream,
    UnsupportedModel,
    demo,
)
from polylens.calibration.lockstep import in_step
from polylens.calibration.seen import visiting_order
from polylens.hosts import host_for

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

CALIBRATION = demo.batches(demo.texts()[0], 24, 64)
VISITED = CALIBRATION[visiting_order(len(CALIBRATION))]
HELD_OUT = demo.batches(demo.texts()[1], 8, 64)
SMALL = torch.arange(64).reshape(4, 16) * 7 % 50
HOSTS = (plain, bridge, nnsight, hooked)


@pytest.fixture(scope="module")
def model():
    return demo.load_bridge()


def attach(model, tokens=CALIBRATION, **options):
    options = {"method": Sequential(), "degree": 2, "progress": False, **options}
    return polylens.attach(model, tokens, **options)


def seen_inputs(host, layers, steps):
    """What each layer reads in ordinary passes."""
    seen = {layer: [] for layer in layers}
    observers = {n: (lambda a, n=n: seen[n].append(a.x.clone())) for n in layers}
    with torch.no_grad(), host.observe(observers):
        for step in steps:
            host.run(step)
    return seen


def true(arrival):
    return arrival.y


@pytest.mark.parametrize("make", HOSTS)
def test_in_step_every_batch_computes_what_it_computes_alone(make):
    host = host_for(make(build("gpt2")), None)
    layers = [site.layer for site in host.sites()[0]]
    steps = [host.given(part) for part in (SMALL[:2], SMALL[2:, :9], SMALL[1:2])]
    expected = seen_inputs(host, layers, steps)
    visited = []

    def visit(layer, arrivals):
        found = [(i, arrival.x.clone()) for i, arrival in arrivals]
        assert [i for i, _ in found] == [0, 1, 2]
        assert all(torch.equal(x, expected[layer][i]) for i, x in found)
        visited.append(layer)
        return true

    in_step(host, layers, steps, visit)
    assert visited == layers


@pytest.mark.parametrize("make", HOSTS)
def test_an_error_on_the_way_leaves_the_model_as_it_was(make):
    model = make(build("gpt2"))
    host = host_for(model, None)
    layers = [site.layer for site in host.sites()[0]]
    steps = [host.given(part) for part in (SMALL[:2], SMALL[2:])]
    before = host.logits(SMALL)
    snapshot = module_snapshot(host.module)

    def visit(layer, arrivals):
        next(arrivals)
        raise KeyError(layer)

    with pytest.raises(KeyError):
        in_step(host, layers, steps, visit)
    assert module_snapshot(host.module) == snapshot
    assert torch.equal(host.logits(SMALL), before)
    assert polylens.attached(model) is None


@pytest.mark.parametrize("estimator", ["samples", "gaussian", "joint"])
def test_each_layer_is_fitted_to_what_the_replaced_layers_below_produce(model, estimator):
    method = Sequential(estimator, tails=None, weighting="equal")
    with attach(model, method=method, batch_size=24) as lens:
        for layer in (0, 2, 3):
            with lens.replaced(layers=range(layer)) if layer else nullcontext():
                x = seen_inputs(lens.host, [layer], [VISITED])[layer][0]
            x = x[:, 1:].reshape(-1, x.shape[-1])
            given = polylens.Gaussian.from_samples(x) if estimator == "gaussian" else Samples([x])
            verb = polylens.fit_joint if estimator == "joint" else polylens.fit
            expected = verb(lens.sites[layer].weights(), given, 2)(x)
            assert (lens[layer](x) - expected).norm() < 2e-4 * expected.norm()


@pytest.mark.parametrize("estimator", ["samples", "gaussian", "joint"])
@pytest.mark.parametrize("stream", [Sequential, TrueStream])
def test_inputs_may_be_weighted_by_the_size_of_the_output(model, estimator, stream):
    method = stream(estimator, tails=0.0, weighting="output")
    with attach(model, method=method, batch_size=24, layers=[0]) as lens:
        x = seen_inputs(lens.host, [0], [VISITED])[0][0]
        x = x[:, 1:].reshape(-1, x.shape[-1])
        weights = lens.sites[0].weights()
        w = 1 / weights(x).double().norm(dim=1)
        if estimator == "gaussian":
            mean = w @ x.double() / w.sum()
            centred = x.double() - mean
            given = polylens.Gaussian(mean, centred.T @ (centred * w[:, None]) / w.sum())
        else:
            given = Samples([(x, w)])
        verb = polylens.fit_joint if estimator == "joint" else polylens.fit
        expected = verb(weights, given, 2)(x)
        assert (lens[0](x) - expected).norm() < 2e-4 * expected.norm()
        y = x @ weights.W_in + weights.b_in
        base = lens[0].base if estimator == "joint" else lens[0]
        assert torch.allclose(base.ends.float(), torch.stack([y.amin(0), y.amax(0)]), atol=1e-5)


def test_it_loses_less_than_fits_to_the_true_stream(model):
    losses = {}
    plain = {"tails": None, "weighting": "equal"}
    for method in (Sequential(**plain), TrueStream("samples", **plain), TrueStream(**plain)):
        with attach(model, method=method) as lens:
            losses[method] = lens.report(HELD_OUT, progress=False).all_row.delta_ce
    assert list(losses) == sorted(losses, key=losses.__getitem__)


def test_samples_are_the_default_and_the_report_says_so(model):
    with attach(model, layers=[0, 1]) as lens:
        assert lens.inputs_summary == (
            "samples per neuron, 1536 tokens, first positions excluded, weighted by 1 / |output|, "
            "ends with tails of 0.05, layer by layer"
        )
        assert "layer by layer" in str(lens.report(HELD_OUT, loss=False, progress=False))


def test_padding_is_left_out(model):
    mask = torch.ones_like(CALIBRATION)
    mask[:, 40:] = 0
    junk = torch.where(mask.bool(), CALIBRATION, 3)
    with attach(model, attention_mask=mask) as lens:
        first = lens[3].P
    with attach(model, junk, attention_mask=mask) as lens:
        assert torch.allclose(lens[3].P, first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "cauchy"}, "'gaussian', 'samples', 'joint'"),
        ({"estimator": "mixture"}, "polylens.fit"),
        ({"weighting": "input"}, "'equal', 'output'"),
        ({"estimator": "gaussian", "tails": 0.01}, 'estimator="samples"'),
        ({"tails": 0.5}, "below 0.5"),
        ({"tails": True}, "below 0.5"),
        ({"tails": "deflaut"}, "below 0.5"),
        ({"tails": float("nan")}, "below 0.5"),
    ],
)
@pytest.mark.parametrize("stream", [Sequential, TrueStream])
def test_options_that_there_are_not_are_refused(stream, options, message):
    with pytest.raises(InvalidInputError, match=message):
        stream(**options)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"calibration": "sequential"}, r"method=Sequential\(\)"),
        ({"inputs": "norm"}, r"FromNorm\(\)"),
        ({"clip": False}, r"method=Sequential\(tails="),
        ({"weighting": "output"}, r"method=TrueStream\(weighting="),
        ({"checkpoint": "file"}, r"method=Sequential\(checkpoint="),
        ({"offload": "cpu"}, r"method=Sequential\(offload="),
        ({"seed": 1}, r"sample_tokens\(model, seed="),
    ],
)
def test_an_old_option_names_the_new_one(model, old, new):
    with pytest.raises(InvalidInputError, match=f"no longer takes {next(iter(old))}=.*{new}"):
        attach(model, **old)
    assert polylens.attached(model) is None


def test_experts_are_refused():
    config, name, changes, _ = MIXTURES["mixtral"]
    model = from_config(config, name, changes)
    with pytest.raises(UnsupportedModel, match="routing"):
        attach(model, SMALL)
