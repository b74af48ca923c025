"""Experts as GLUs: found, verified, observed on their own tokens, replaced one by one."""

import copy

import pytest
import torch

import polylens
from polylens.hosts.moe import find_experts, observe_experts, substitute_experts
from tests.hf_models import D_VOCAB, DECODER, from_config

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")

TOKENS = torch.randint(3, D_VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))
MOE = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = dict(
    n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8,
    q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
)  # fmt: skip
MODELS = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MOE, "num_local_experts": 4}, (0, 1)),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**MOE, "num_experts": 4}, (0, 1)),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**MOE, "num_experts": 4}, (0, 1)),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**MOE, "num_experts": 4, "num_local_experts": 4, "head_dim": 6}, (0, 1),
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**MOE, **DEEPSEEK}, (1,)),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    config, model, changes, layers = MODELS[request.param]
    return from_config(config, model, changes), layers


def find(model):
    return find_experts(model, lambda: model(TOKENS, use_cache=False))


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def test_every_expert_is_found_and_verified(case):
    model, layers = case
    sites, refused = find(model)
    assert refused == {}
    assert [(s.layer, s.expert) for s in sites] == [(i, e) for i in layers for e in range(4)]
    assert all(s.kind == "glu" and s.activation.name == "silu" for s in sites)
    assert all(s.error < 1e-5 for s in sites)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for site in sites:
        assert {t.untyped_storage().data_ptr() for t in site.tensors().values()} <= storages


def test_each_expert_sees_the_tokens_routed_to_it(case):
    model, layers = case
    sites, _ = find(model)
    seen = {}
    reference = logits(model)
    with observe_experts(sites, lambda site, x, y, rows: seen.update({site: (x, y, rows)})):
        assert torch.equal(logits(model), reference)
    for layer in layers:
        counts = [len(seen[s][2]) for s in sites if s.layer == layer and s in seen]
        assert sum(counts) == 2 * TOKENS.numel()
    for site, (x, y, rows) in seen.items():
        assert len(x) == len(y) == len(rows)
        assert int(rows.max()) < TOKENS.numel()
        torch.testing.assert_close(site.weights()(x), y, atol=1e-6, rtol=1e-5)


def test_replacing_an_expert_by_itself_changes_nothing_and_by_nothing_a_lot(case):
    model, _ = case
    sites, _ = find(model)
    reference = logits(model)
    with substitute_experts({sites[0]: lambda x, y: sites[0].weights()(x)}):
        torch.testing.assert_close(logits(model), reference, atol=1e-5, rtol=1e-4)
    with substitute_experts({site: lambda x, y: 0 * y for site in sites}):
        assert (logits(model) - reference).abs().max() > 1e-3
    assert torch.equal(logits(model), reference)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_cubic_fitted_to_an_experts_own_tokens_stands_in_for_it(case):
    model, _ = case
    sites, _ = find(model)
    reference = logits(model)
    inputs, polynomials = {}, {}
    with observe_experts(sites, lambda site, x, y, rows: inputs.update({site: x})):
        logits(model)
    for site, x in inputs.items():
        gaussian = polylens.Gaussian(x.double().mean(0), torch.cov(x.double().T))
        polynomials[site] = polylens.fit(site.weights(), gaussian, 3)
    cubic = {site: lambda x, y, p=p: p(x) for site, p in polynomials.items()}
    nothing = {site: lambda x, y: 0 * y for site in polynomials}
    with substitute_experts(cubic):
        near = (logits(model) - reference).square().mean()
    with substitute_experts(nothing):
        far = (logits(model) - reference).square().mean()
    assert near < 0.2 * far


def test_experts_of_a_copy_belong_to_the_copy():
    config, name, changes, _ = MODELS["mixtral"]
    model = from_config(config, name, changes)
    sites, _ = find(model)
    twin, theirs = copy.deepcopy((model, sites[0]))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not theirs.tensors()["W_in"].any()
    assert sites[0].tensors()["W_in"].any()


def test_gpt_oss_is_refused_by_name():
    changes = {**MOE, "head_dim": 8, "num_local_experts": 4}
    sites, refused = find(from_config("GptOssConfig", "GptOssForCausalLM", changes))
    assert sites == []
    assert all("GPT-OSS" in reason for reason in refused.values())
    assert list(refused) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
