"""nnsight: the polynomial as a traceable child, exact detach, and what may travel."""

import copy
import subprocess
import sys
from functools import cache

import pytest
import torch
from tests.hf_models import D_VOCAB, build
from tests.host_contract import (
    TOKENS,
    HostContract,
    Specimen,
    attach,
    logits,
    module_snapshot,
)

import polylens
from polylens.errors import AttachmentError, UnsupportedModel

nnsight = pytest.importorskip("nnsight", minversion="0.8")

from polylens.hosts.nnsight.host import NNsightHost  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

# an ordinary mlp module; none; one that spans two modules; a residual inside; a shared one
MODELS = ["gpt2", "llama", "phi3", "opt", "bert", "bloom", "albert"]


class TestHost(HostContract):
    @pytest.fixture(scope="class", params=[*MODELS, "llama in bfloat16"])
    def specimen(self, request):
        name, _, bfloat16 = request.param.partition(" in ")
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        return Specimen(name, lambda: nnsight.NNsight(build(name, dtype)))

    def snapshot(self, model):
        return *module_snapshot(model._module), envoy_snapshot(model)

    def point(self, lens, layer, name):
        path = f"{lens.sites[layer].path}.poly"
        label = {"out": "", "in": ".x"}.get(name, f".{name}")
        return lens.host.module.get_submodule(path + label)


def envoy_snapshot(model):
    return [
        (e.path, id(e), id(e._module), list(e._child_map), [id(c) for c in e._children])
        for e in model.modules()
    ]


@pytest.fixture(params=MODELS)
def model(request):
    return nnsight.NNsight(build(request.param))


@cache
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(D_VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def language_model():
    return nnsight.TransformersModel(build("gpt2"), tokenizer=tokenizer())


def envoys(model, lens, layer=0):
    """(where the true output is, where the child `poly` is)"""
    end = lens.host._end(lens.host._blocks[layer])
    by_module = {e._module: e for e in model.modules()}
    return by_module[end], by_module[lens.host._blocks[layer].owner]


def test_a_trace_of_an_attached_model_is_the_true_one(model):
    reference = logits(model)
    lens = attach(model)
    with model.trace(TOKENS):
        out = model.output.logits.save()
    assert torch.equal(out, reference)
    lens.detach()
    assert not any(hasattr(e, "poly") for e in model.modules())


def test_a_trace_reads_the_true_output_and_the_polynomial(model):
    lens = attach(model, degree=2)
    end, owner = envoys(model, lens)
    with model.trace(TOKENS):
        true = end.output.save()
        x = owner.poly.x.output.save()
        degrees = nnsight.save([])
        degrees.append(owner.poly.degree_0.output)
        degrees.append(owner.poly.degree_1.output)
        degrees.append(owner.poly.degree_2.output)
        poly = owner.poly.output.save()
        error = owner.poly.error.output.save()
    torch.testing.assert_close(sum(degrees), poly, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lens[0](x), poly, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((poly + error).reshape(true.shape), true, atol=1e-5, rtol=1e-4)


def test_replaced_decides_what_flows_on_and_the_true_output_stays_readable(model):
    lens = attach(model)
    end, owner = envoys(model, lens)
    reference = logits(model)
    with model.trace(TOKENS):
        true = end.output.save()
    with lens.replaced():
        flowing = logits(model)
        with model.trace(TOKENS):
            still = end.output.save()
            owner.poly.output.save()
            out = model.output.logits.save()
        with model.trace(TOKENS):
            owner.poly.output = torch.zeros(4, 12, 24)
            zeroed = model.output.logits.save()
    assert torch.equal(still, true)
    assert not torch.equal(flowing, reference)
    torch.testing.assert_close(out, flowing, atol=1e-5, rtol=1e-4)
    assert (zeroed - flowing).abs().max() > 1e-3
    assert torch.equal(logits(model), reference)


def test_the_polynomial_is_computed_only_when_a_trace_asks_for_it():
    model = nnsight.NNsight(build("gpt2"))
    lens = attach(model)
    calls = []
    for layer in lens:
        lens[layer].register_forward_hook(lambda *args: calls.append(1))
        lens._emitters[layer]._sum_of_parts = lambda x, *args: calls.append(1) or x
    model._module(TOKENS)
    with model.trace(TOKENS):
        model.transformer.h[0].mlp.output.save()
    assert calls == []
    with model.trace(TOKENS):
        model.transformer.h[1].mlp.poly.output.save()
    assert len(calls) == 1


def test_tracer_cache_records_the_points():
    model = nnsight.NNsight(build("llama"))
    lens = attach(model)
    with model.trace(TOKENS) as tracer:
        cached = tracer.cache()
    path = "model.model.layers.1.mlp"
    poly = cached[f"{path}.poly"].output
    torch.testing.assert_close(lens[1](cached[f"{path}.poly.x"].output), poly)
    error = cached[f"{path}.poly.error"].output
    torch.testing.assert_close(poly + error, cached[path].output)


def test_a_scan_has_the_shapes_of_all_that_flows():
    model = language_model()
    layers, text = model.transformer.h, "w5 w6 w7"
    with attach(model) as lens:
        for flow in (lens.suspended, lambda: lens.replaced(degree=2)):
            with flow():
                with model.scan(text):
                    x = nnsight.save(layers[1].mlp.poly.x.output.shape)
                    part = nnsight.save(layers[1].mlp.poly.degree_1.output.shape)
                    poly = nnsight.save(layers[1].mlp.poly.output.shape)
                    error = nnsight.save(layers[1].mlp.poly.error.output.shape)
                    out = nnsight.save(model.output.logits.shape)
                assert x == part == poly == error == (1, 3, 24)
                assert out == (1, 3, D_VOCAB)
                with model.trace(text):  # values again, of what scans were the first to ask for
                    poly = layers[1].mlp.poly.output.save()
                assert poly.isfinite().all()


def test_gradients_reach_the_polynomial_inside_a_trace():
    model = nnsight.NNsight(build("gpt2"))
    lens = attach(model)
    with lens.replaced():
        with model.trace(TOKENS):
            poly = model.transformer.h[0].mlp.poly.output
            loss = model.output.logits.square().sum()
            with loss.backward():
                gradient = poly.grad.save()
        out, cached = lens.run_with_cache(TOKENS, layers=0, names=["out"])
        expected = torch.autograd.grad(out.square().sum(), cached["out", 0])[0]
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_several_invokes_see_their_own_rows():
    model = language_model()
    lens = attach(model)
    with model.trace() as tracer:
        with tracer.invoke("w5 w6 w7"):
            first = model.transformer.h[0].mlp.poly.output.save()
        with tracer.invoke("w8 w9 w10"):
            second = model.transformer.h[0].mlp.poly.output.save()
    assert len(first) == len(second) == 1
    assert not torch.equal(first, second)
    lens.detach()


def test_generation_is_replaced_at_every_step():
    model = language_model()
    with attach(model) as lens:
        with lens.replaced():
            with model.generate("w5 w6 w7 w8", max_new_tokens=3, do_sample=False) as tracer:
                shapes = nnsight.save([])
                for _ in tracer.iter[:3]:
                    shapes.append(model.transformer.h[1].mlp.poly.output.shape)
    assert [shape[1] for shape in shapes] == [4, 1, 1]


def test_models_without_weights_are_dispatched_first(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = nnsight.TransformersModel(str(tmp_path), task="text-generation", tokenizer=tokenizer())
    assert not model.dispatched
    lens = attach(model)
    assert model.dispatched
    with model.trace("w5 w6 w7"):
        poly = model.transformer.h[0].mlp.poly.output.save()
    assert poly.shape == (1, 3, 24)
    lens.detach()


def test_remote_traces_are_refused_while_attached():
    from nnsight.intervention.serialization import dumps

    model = nnsight.NNsight(build("gpt2"))
    lens = attach(model)
    with pytest.raises(AttachmentError, match="detach"):
        dumps(model)
    copy.deepcopy(model._module)
    lens.detach()
    assert dumps(model)


ELSEWHERE = """
import sys
sys.modules["polylens"] = None  # not installed here
import nnsight, torch, transformers
from nnsight.intervention.serialization import loads
for folder, path in zip(sys.argv[1::2], sys.argv[2::2]):
    function, tokens = loads(open(f"{folder}/payload", "rb").read())
    model = nnsight.NNsight(transformers.AutoModelForCausalLM.from_pretrained(folder))
    mlp = model.get(path)
    with model.trace(tokens):
        mlp.output = function(mlp.input)
        out = model.output.logits.save()
    torch.save(out.detach(), f"{folder}/out")
"""


@pytest.mark.more
def test_the_inline_function_travels_to_where_polylens_is_not_installed(tmp_path):
    from nnsight.intervention.serialization import dumps

    script, expected = tmp_path / "elsewhere.py", {}
    command = [sys.executable, str(script)]
    for name, path, degree in (
        ("gpt2", "transformer.h.0.mlp", 2),
        ("llama", "model.layers.0.mlp", 1),
    ):
        model, folder = nnsight.NNsight(build(name)), tmp_path / name
        with attach(model) as lens:
            function = lens.inline(0, degree=degree)
            with lens.replaced(layers=0, degree=degree):
                expected[folder] = logits(model)
        model._module.save_pretrained(folder)
        (folder / "payload").write_bytes(dumps((function, TOKENS)))
        command += [str(folder), path]
    script.write_text(ELSEWHERE)
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    for folder, values in expected.items():
        torch.testing.assert_close(torch.load(folder / "out"), values, atol=1e-5, rtol=1e-4)


def test_only_what_can_trace_remotely_has_an_inline_function():
    lens = polylens.attach(build("gpt2"), TOKENS, progress=False)
    with pytest.raises(AttachmentError, match="no remote traces"):
        lens.inline(0)


def test_a_name_that_is_taken_is_refused_and_nothing_stays_attached():
    model = nnsight.NNsight(build("gpt2"))
    model._module.transformer.h[1].mlp.poly = torch.nn.Identity()
    before = module_snapshot(model._module), envoy_snapshot(model)
    with pytest.raises(AttachmentError, match="'poly'"):
        attach(model)
    assert (module_snapshot(model._module), envoy_snapshot(model)) == before


def test_a_lens_from_another_host_on_the_same_module_is_refused():
    module = build("gpt2")
    with attach(module), pytest.raises(AttachmentError, match="already"):
        attach(nnsight.NNsight(module))


def test_a_part_of_a_model_is_refused():
    model = nnsight.NNsight(build("gpt2"))
    with pytest.raises(UnsupportedModel, match="give the model itself"):
        NNsightHost(model.transformer)
