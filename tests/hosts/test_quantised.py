"""Quantised models: the normal form is of the weights that the format stands for."""

import pytest
import torch
from tests.hf_models import D_VOCAB, DECODER, build, from_config
from tests.host_contract import TOKENS, attach, logits
from tests.hosts.test_dataflow import Packed
from torch import nn
from torch.utils._pytree import tree_map

import polylens
from polylens.errors import InvalidInputError

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Int8(torch.Tensor):
    """A matrix in integers with a scale for each row that dequantises itself, as torchao has it."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    def __tensor_flatten__(self):
        return ["q", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["q"], inner["scale"])

    def dequantize(self):
        return self.q * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].q, args[0].scale)
        plain = tree_map(
            lambda t: t.dequantize() if isinstance(t, cls) else t, (args, kwargs or {})
        )
        return function(*plain[0], **plain[1])


def packed(d_out, d_in, levels):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(d_in)
        return Packed(d_in, d_out, levels)


def quantised(kind):
    model = build("llama")
    for layer in model.model.layers:
        for name in PROJECTIONS:
            weight = getattr(layer.mlp, name).weight.detach()
            if kind == "tensor":
                scale = weight.abs().amax(1, keepdim=True) / 127
                weight = Int8((weight / scale).round().to(torch.int8), scale)
                getattr(layer.mlp, name).weight = nn.Parameter(weight, requires_grad=False)
            else:
                levels = 127 if kind == "module that rounds" else None
                setattr(layer.mlp, name, packed(*weight.shape, levels))
    return model


def plain(model):
    """The same with the weights that its format stands for."""
    twin = build("llama")
    for layer, its in zip(model.model.layers, twin.model.layers, strict=True):
        for name in PROJECTIONS:
            own, it = getattr(layer.mlp, name), getattr(its.mlp, name)
            packed = isinstance(own, Packed)
            it.weight.data = own.qweight.float() / 8 if packed else own.weight.dequantize()
    return twin


@pytest.mark.parametrize("kind", ["tensor", "module", "module that rounds"])
def test_a_quantised_model_has_the_polynomials_of_its_dequantised_weights(kind, tmp_path):
    model = quantised(kind)
    true, twin = logits(model), plain(model)
    with attach(model) as lens, attach(twin) as its:
        assert torch.equal(logits(model), true)
        assert lens.layers == (0, 1)
        for layer in lens:
            got, expected = lens[layer].weights.tensors(), its[layer].weights.tensors()
            for role in expected:
                torch.testing.assert_close(got[role], expected[role], atol=1e-6, rtol=1e-6)
        report, its_report = (each.report(TOKENS, progress=False) for each in (lens, its))
        assert ("Int8" if kind == "tensor" else "QuantLinear") in lens.sites[0].dequantised
        assert any(lens.sites[0].dequantised in note for note in report.notes)
        assert not any("quantised" in note for note in its_report.notes)
        rounds = kind == "module that rounds"
        assert ("rounds its inputs to 8 bits" in lens.sites[0].dequantised) is rounds
        assert lens.sites[0].error < (3e-2 if rounds else 1e-5)
        assert (lens.sites[0].error > 1e-4) is rounds
        for row, other in zip(report, its_report, strict=True):
            assert abs(row.r2[3] - other.r2[3]) < (1e-2 if rounds else 1e-5)
        with lens.replaced():
            replaced = logits(model)
        lens.save(tmp_path / "lens")
        with pytest.raises(InvalidInputError, match="quantised"):
            lens[0].double()
        assert lens[0].own_weights().double().dtype == torch.float64
    assert torch.equal(logits(model), true)
    with polylens.load(tmp_path / "lens", model) as lens, lens.replaced():
        assert torch.equal(logits(model), replaced)


def test_packed_weights_that_change_are_noticed():
    model = quantised("module")
    with attach(model) as lens:
        model.model.layers[1].mlp.up_proj.qweight += 1
        with pytest.raises(polylens.StalePolynomialError, match="layer 1"), lens.replaced():
            logits(model)


def test_a_checkpoint_knows_packed_weights(tmp_path):
    method = polylens.Sequential(checkpoint=tmp_path / "checkpoint")
    model = quantised("tensor")
    attach(model, method=method).detach()
    attach(quantised("tensor"), method=method).detach()
    model.model.layers[1].mlp.up_proj.weight.q.add_(1)
    with pytest.raises(polylens.ArtifactError, match="other weights"):
        attach(model, method=method)


WIDE = {**DECODER, "hidden_size": 64, "intermediate_size": 128}
FORMATS = {
    "torchao int8": ("torchao.quantization", "Int8WeightOnlyConfig", False),
    "torchao int8 of inputs too": (
        "torchao.quantization", "Int8DynamicActivationInt8WeightConfig", True,
    ),
    "torchao float8": ("torchao.quantization", "Float8WeightOnlyConfig", False),
    "quanto int4": ("optimum.quanto", "int4", False),
    "bitsandbytes 8": ("bitsandbytes", {"load_in_8bit": True}, True),
    "bitsandbytes 4": ("bitsandbytes", {"load_in_4bit": True}, None),
}  # fmt: skip


@pytest.mark.more
@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_libraries(name, tmp_path):
    import transformers

    library, which, rounds = FORMATS[name]
    module = pytest.importorskip(library)
    if library == "bitsandbytes":
        config = transformers.BitsAndBytesConfig(**which)
    elif library == "optimum.quanto":
        config = transformers.QuantoConfig(weights=which)
    else:
        config = transformers.TorchAoConfig(getattr(module, which)())
    from_config("LlamaConfig", "LlamaForCausalLM", WIDE).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu").eval()
    tokens = torch.randint(3, D_VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens)  # bitsandbytes packs its weights anew in the first pass
        true = model(tokens).logits
        with polylens.attach(model, tokens, progress=False) as lens:
            assert torch.equal(model(tokens).logits, true)
            assert lens.layers == (0, 1)
            assert lens.sites[0].error < 4e-2
            if rounds is not None:
                assert ("8 bits" in lens.sites[0].dequantised) is rounds
            report = lens.report(tokens.flip(0, 1), progress=False)
            assert all(row.r2[3] > 0.9 for row in report)
            assert not any("both ways" in note for note in report.notes)
        assert torch.equal(model(tokens).logits, true)
