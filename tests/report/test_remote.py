"""A report of a model that is only there remotely, by nnsight's own simulation of one."""

import sys

import pytest
import torch
from tests.hf_models import D_VOCAB, DECODER, MIXTURES, build, from_config
from tests.hosts.test_nnsight import tokenizer

import polylens
from polylens.errors import AttachmentError, InvalidInputError, UnsupportedModel
from polylens.hosts.nnsight.remote import find_maps, register
from polylens.hosts.nnsight.remote_fit import RemoteFit

nnsight = pytest.importorskip("nnsight", minversion="0.8")

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")

TOKENS = torch.randint(3, D_VOCAB, (20, 12), generator=torch.Generator().manual_seed(3))
HELD_OUT = TOKENS.flip(1)


def model(name):
    return nnsight.TransformersModel(build(name), tokenizer=tokenizer())


def remote(model, tokens=TOKENS, **options):
    return polylens.remote_report(model, tokens, HELD_OUT, **{"remote": "local", **options})


def said(report):
    """How many bytes were sent."""
    return int(report.notes[0].partition("about ")[2].split()[0].replace(",", ""))


more = pytest.mark.more


@pytest.mark.parametrize(
    "name", ["phi3", *(pytest.param(name, marks=more) for name in ("gpt2", "llama", "opt"))]
)
def test_it_has_the_r2_of_a_report_here(name, monkeypatch):
    from nnsight.schema.request import RequestModel

    sent, serialize = [], RequestModel.serialize

    def serialized(*args, **options):
        sent.append(serialize(*args, **options))
        return sent[-1]

    monkeypatch.setattr(RequestModel, "serialize", serialized)
    report = remote(model(name))
    method = polylens.TrueStream("samples", tails=None)
    with polylens.attach(build(name), TOKENS, degree=3, method=method, progress=False) as lens:
        expected = lens.report(HELD_OUT, loss=False, progress=False)
    assert [row.layer for row in report] == [0, 1]
    assert report.n_tokens == expected.n_tokens
    found, here = (torch.tensor([row.r2 for row in each]) for each in (report, expected))
    torch.testing.assert_close(found, here, atol=1e-5, rtol=0)
    assert len(sent) == 1
    assert abs(len(sent[0]) - said(report)) < 0.15 * said(report)
    assert "remote='local'" in str(report)


def test_what_is_sent_does_not_grow_with_the_weights():
    large = {**DECODER, "hidden_size": 96, "intermediate_size": 400}
    modules = build("llama"), from_config("LlamaConfig", "LlamaForCausalLM", large)
    wrapped = (nnsight.TransformersModel(each, tokenizer=tokenizer()) for each in modules)
    few, many = (said(remote(each, layers=0, degree=1)) for each in wrapped)
    assert abs(many - few) < 100
    assert many < 50_000


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "opt", "gemma2"])
def test_mlps_are_found_without_weights(name):
    maps, _ = find_maps(build(name).to("meta"))
    sites = polylens.find_mlps(build(name))
    assert list(maps) == [site.layer for site in sites]
    assert [each.z is not None for each in maps.values()] == [s.kind == "glu" for s in sites]


def test_what_travels_needs_nothing_but_torch(monkeypatch):
    from nnsight.intervention.serialization import dumps, loads

    register()
    fit, kept = RemoteFit(2, (0, 0), (1, 0)), torch.ones(3, 40, dtype=torch.bool)
    payload = dumps(fit)
    y, z, h = torch.randn(3, 3, 40, 9, generator=torch.Generator().manual_seed(0))
    out = torch.nn.Linear(9, 5)

    def figures(fit):
        with torch.no_grad():
            fit.add([y, z], h, kept)
            fit.solve()
            fit.see([y, z], h, kept, out)
        return fit.figures()

    expected = figures(fit)
    with monkeypatch.context() as elsewhere:
        for name in [name for name in sys.modules if name.partition(".")[0] == "polylens"]:
            elsewhere.setitem(sys.modules, name, None)
        found = figures(loads(payload, {}))
    *rest, mse = found
    assert rest == list(expected[:-1])
    assert torch.equal(mse, expected[-1])


def test_what_it_cannot_do_is_said():
    wrapped = model("llama")
    with pytest.raises(InvalidInputError, match=r"tokens must be a tensor of token ids.*list"):
        remote(wrapped, [[1, 2]])
    with pytest.raises(InvalidInputError, match="fewer than 2 activations"):
        remote(wrapped, TOKENS[:1, :2])
    with pytest.raises(InvalidInputError, match="no layer 9"):
        remote(wrapped, layers=9)
    with pytest.raises(InvalidInputError, match="degree"):
        remote(wrapped, degree=-1)
    with pytest.raises(UnsupportedModel, match="NNsight does not run remotely"):
        remote(nnsight.NNsight(build("llama")))
    config, name, changes, _ = MIXTURES["mixtral"]
    mixture = from_config(config, name, changes)
    with pytest.raises(UnsupportedModel, match="no component that is an MLP or GLU"):
        remote(nnsight.TransformersModel(mixture, tokenizer=tokenizer()))
    with (
        polylens.attach(wrapped, TOKENS, degree=1, progress=False),
        pytest.raises(AttachmentError, match="detach"),
    ):
        remote(wrapped)
    with torch.no_grad():
        wrapped._module.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match=r"layer 1.*not finite"):
        remote(wrapped, degree=1)


def test_an_inline_function_replaces_a_layer_there():
    from nnsight.intervention.serialization import dumps

    wrapped = model("gpt2")
    with polylens.attach(wrapped, TOKENS, degree=2, progress=False) as lens:
        function = lens.inline(0)
        with lens.replaced(layers=0), torch.no_grad():
            expected = lens.host.logits(HELD_OUT)
    mlp = wrapped.transformer.h[0].mlp
    with torch.no_grad(), wrapped.trace(HELD_OUT, remote="local"):
        mlp.output = function(mlp.input)
        logits = wrapped.output.logits.save()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    # matrices, tables, and code that does not grow with them
    numbers = sum(t.numel() * t.element_size() for t in function.buffers())
    assert numbers < len(dumps(function)) < numbers + 20_000
