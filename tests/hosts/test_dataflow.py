"""Discovery by data flow: every architecture, every way to write an MLP, every refusal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.hf_models import (
    ARCHITECTURES,
    GEMMA,
    MOE,
    NUMBER_OF_BLOCKS,
    build,
    example,
    from_config,
)
from torch import nn

from polylens import Expert
from polylens.errors import UnsupportedModel
from polylens.hosts.torch.dataflow import find_blocks
from polylens.hosts.torch.host import TorchHost


def snapshot(model):
    hooks = {
        name: (list(m._forward_hooks), list(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    }
    return hooks, torch.get_rng_state().tolist()


def found(model, *inputs):
    """(in-projection, kind, activation, out-projection) of each block, and the refusals."""
    names = {module: name for name, module in model.named_modules()}
    blocks, refused = find_blocks(model, lambda: model(*inputs))
    assert [b.layer for b in blocks] == sorted({b.layer for b in blocks})
    return [
        (names[b.source.module], b.kind, b.activation.name, names[b.out.module]) for b in blocks
    ], refused


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_of_an_architecture_is_found_and_nothing_else(name):
    model, kind = build(name), ARCHITECTURES[name][3]
    before = snapshot(model)
    blocks, refused = find_blocks(model, lambda: model(**example(name)))
    assert snapshot(model) == before
    assert refused == {}
    n = NUMBER_OF_BLOCKS.get(name, 2)
    assert [b.layer for b in blocks] == list(range(n))
    assert {b.kind for b in blocks} == {kind}
    pairs = [(b.source.module, b.out.module) for b in blocks]
    assert len(set(pairs)) == n
    for block in blocks:
        assert block.error < 1e-5
        weights, tensors = block.weights(), block.tensors()
        assert weights.W_in.shape[0] == weights.W_out.shape[1]
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert {t.untyped_storage().data_ptr() for t in tensors.values()} <= storages


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "opt"])
def test_blocks_of_a_copy_read_the_weights_of_the_copy(name):
    model = build(name)
    block = find_blocks(model, lambda: model(**example(name)))[0][0]
    other, theirs = copy.deepcopy((model, block))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not any(t.any() for t in theirs.tensors().values())
    assert block.tensors()["W_in"].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = build("llama", dtype)
    blocks, refused = find_blocks(model, lambda: model(**example("llama")))
    assert (len(blocks), refused) == (2, {})


class Functional(nn.Module):
    def __init__(self, *acts):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(20, 30), nn.Linear(30, 31), nn.Linear(31, 5)
        self.acts = acts

    def forward(self, x):
        return self.fc3(self.acts[1](self.fc2(self.acts[0](self.fc1(x)))))


class Gated(nn.Module):
    def __init__(self, act, fused=False):
        super().__init__()
        self.fused, self.act = fused, act
        self.a = nn.Linear(20, 60 if fused else 30)
        self.b = None if fused else nn.Linear(20, 30)
        self.c = nn.Linear(30, 5)

    def forward(self, x):
        u, g = self.a(x).chunk(2, -1) if self.fused else (self.a(x), self.b(x))
        return self.c(u * self.act(g))


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("acts", "names"),
    [
        ((F.relu, F.gelu), ("relu", "gelu")),
        ((F.relu6, F.silu), ("relu6", "silu")),
        ((torch.tanh, tanh_gelu), ("tanh", "gelu_new")),
        ((torch.sigmoid, lambda x: F.relu(x).square()), ("sigmoid", "relu2")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations_called_as_functions(acts, names, dtype):
    model = Functional(*acts).to(dtype)
    blocks, refused = found(model, 2 * torch.randn(16, 20, dtype=dtype))
    assert blocks == [("fc1", "mlp", names[0], "fc2"), ("fc2", "mlp", names[1], "fc3")]
    assert refused == {}


@pytest.mark.parametrize("act", [F.silu, nn.SiLU()])
def test_gated_units_know_which_branch_is_activated(act):
    x = torch.randn(16, 20)
    assert found(Gated(act), x)[0] == [("b", "glu", "silu", "c")]
    fused = Gated(act, fused=True)
    assert found(fused, x)[0] == [("a", "glu", "silu", "c")]
    block = find_blocks(fused, lambda: fused(x))[0][0]
    assert block.source.part == 2
    assert torch.equal(block.tensors()["W_in"], fused.a.weight[:30].T)


def test_classifiers_have_one_block_per_hidden_layer():
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(20, 30),
        nn.ReLU(inplace=True),
        nn.Linear(30, 31),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(31, 32),
        nn.Tanh(),
        nn.Linear(32, 5),
    )
    blocks, _ = found(model, torch.randn(16, 4, 5))
    assert blocks == [
        ("1", "mlp", "relu", "3"),
        ("3", "mlp", "gelu", "6"),
        ("6", "mlp", "tanh", "8"),
    ]


def test_torchs_own_encoder_and_its_fast_path():
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, activation=F.gelu)
    model = nn.TransformerEncoder(layer, 2).eval()
    blocks, _ = found(model, torch.randn(2, 8, 24))
    assert blocks == [(f"layers.{i}.linear1", "mlp", "gelu", f"layers.{i}.linear2") for i in (0, 1)]


class SoLU(nn.Module):
    def forward(self, x):
        return x * x.softmax(-1)


class Adapted(nn.Linear):
    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.A, self.B = nn.Linear(d_in, 2, bias=False), nn.Linear(2, d_out, bias=False)

    def forward(self, x):
        return super().forward(x) + self.B(self.A(x))


class Packed(nn.Module):
    """A linear map whose weights are small integers; inputs are rounded to `levels`, if any."""

    def __init__(self, d_in, d_out, levels=None):
        super().__init__()
        self.levels = levels
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("qweight", torch.randint(-8, 8, (d_out, d_in), dtype=torch.int8))

    def forward(self, x):
        if self.levels is not None:
            step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / self.levels
            x = (x / step).round() * step
        return F.linear(x, self.qweight.to(x.dtype) / 8)


Packed.__name__ = "QuantLinear"


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Linear(20, 30), SoLU(), nn.Linear(30, 20)), "SoLU computes none of the known"),
        (
            (nn.Linear(20, 30), SoLU(), nn.LayerNorm(30), nn.Linear(30, 20)),
            "SoLU computes none of the known",
        ),
        ((Adapted(20, 30), nn.ReLU(), nn.Linear(30, 20)), "merge the adapter"),
        ((nn.Linear(20, 30), nn.ReLU(), Packed(30, 20, 7)), "more than inputs rounded to 8 bits"),
        ((nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 20)), "normalisation"),
    ],
)
def test_what_has_no_normal_form_is_refused_with_the_reason(layers, reason):
    blocks, refused = found(nn.Sequential(*layers), torch.randn(16, 20))
    assert blocks == []
    assert list(refused) == [0]
    assert reason in refused[0]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(20, 5),
        nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)),
        nn.Sequential(nn.Linear(20, 30), nn.Dropout(), nn.Identity(), nn.Linear(30, 20)),
        nn.Sequential(nn.ReLU(), nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 20)),
        Functional(lambda x: x, lambda x: x),
    ],
)
def test_no_mlp(model):
    model.eval()
    assert found(model, torch.randn(16, 20)) == ([], {})


def refusals(config, model, changes):
    sites, refused = TorchHost(from_config(config, model, changes)).sites()
    return {site.layer: site.path for site in sites}, refused


def test_gpt_oss_is_refused_by_name():
    changes = {**MOE, "head_dim": 8, "num_local_experts": 4}
    sites, refused = refusals("GptOssConfig", "GptOssForCausalLM", changes)
    assert sites == {}
    assert list(refused) == [0, 1]
    assert "GPT-OSS" in refused[0]
    assert "model.layers.0.mlp.experts" in refused[0]


def test_shared_experts_and_dense_layers_of_mixtures_are_ordinary_blocks():
    changes = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16}
    sites, refused = refusals("Qwen2MoeConfig", "Qwen2MoeForCausalLM", changes)
    path = "model.layers.{}.mlp."
    assert list(sites.items())[:3] == [
        (0, path.format(0) + "shared_expert"),
        (Expert(0, 0), path.format(0) + "experts[0]"),
        (Expert(0, 1), path.format(0) + "experts[1]"),
    ]
    assert [n for n in sites if isinstance(n, int)] == [0, 1]
    assert refused == {}


def test_sparse_layers_of_gemma3n_are_refused_and_its_routers_are_no_mlps():
    changes = {
        **GEMMA,
        "num_hidden_layers": 3,
        "intermediate_size": [40] * 3,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0],
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 90,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    }
    sites, refused = refusals("Gemma3nTextConfig", "Gemma3nForCausalLM", changes)
    assert sites == {2: "model.layers.2.mlp"}
    assert list(refused) == [0, 1]
    assert "top-k sparsity" in refused[0]


def test_everything_is_as_before_when_the_run_fails():
    model = build("gpt2").train()
    before = snapshot(model)

    def run():
        model(**example("gpt2"))
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        find_blocks(model, run)
    assert snapshot(model) == before


def test_meta_weights_are_refused():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to("meta")
    with pytest.raises(UnsupportedModel, match="meta device"):
        find_blocks(model, lambda: None)
