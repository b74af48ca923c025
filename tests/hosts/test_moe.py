"""Experts as GLUs: found, verified, observed on their own tokens, replaced one by one."""

import copy
import json

import pytest
import torch
from tests.hf_models import D_VOCAB, MIXTURES, MOE, from_config
from tests.host_contract import module_snapshot
from tests.hosts.test_hosts_agree import bridge

import polylens
from polylens import Expert
from polylens.checks import check_layers, from_json, label, labelled, to_json
from polylens.cli.page import html_page
from polylens.hosts.moe import find_experts
from polylens.hosts.torch.host import TorchHost

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")

TOKENS = torch.randint(3, D_VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=MIXTURES)
def case(request):
    config, model, changes, layers = MIXTURES[request.param]
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
    assert [s.layer for s in sites] == [Expert(i, e) for i in layers for e in range(4)]
    assert all(s.kind == "glu" and s.activation.name == "silu" for s in sites)
    assert all(s.error < 1e-5 for s in sites)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for site in sites:
        assert {t.untyped_storage().data_ptr() for t in site.parameters().values()} <= storages


def test_each_expert_sees_the_tokens_routed_to_it(case):
    model, layers = case
    host, seen = TorchHost(model), {}
    sites = {site.layer: site for site in host.sites()[0] if isinstance(site.layer, Expert)}
    reference = logits(model)

    def observer(layer):
        return lambda a: seen.update({layer: (a.x, a.y, a.places)})

    with host.observe({layer: observer(layer) for layer in sites}):
        assert torch.equal(logits(model), reference)
    for layer in layers:
        counts = [len(places.rows) for n, (_, _, places) in seen.items() if n.layer == layer]
        assert sum(counts) == 2 * TOKENS.numel()
    for layer, (x, y, places) in seen.items():
        assert len(x) == len(y) == len(places.rows)
        assert int(places.rows.max()) < TOKENS.numel()
        torch.testing.assert_close(sites[layer].weights()(x), y, atol=1e-6, rtol=1e-5)


def test_replacing_an_expert_by_itself_changes_nothing_and_by_nothing_a_lot(case):
    model, layers = case
    host = TorchHost(model)
    sites = [site for site in host.sites()[0] if isinstance(site.layer, Expert)]
    reference = logits(model)
    with host.substitute({sites[0].layer: lambda a: sites[0].weights()(a.x)}):
        torch.testing.assert_close(logits(model), reference, atol=1e-5, rtol=1e-4)
    with host.substitute({site.layer: lambda a: 0 * a.y for site in sites}):
        zeroed = logits(model)
        with host.substitute({site.layer: lambda a: a.y for site in sites}):
            assert torch.equal(logits(model), reference)
    assert (zeroed - reference).abs().max() > 1e-3
    experts = [model.get_submodule(f"model.layers.{layer}.mlp.experts") for layer in layers]
    handles = [
        module.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        for module in experts
    ]
    torch.testing.assert_close(logits(model), zeroed, atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), reference)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_experts_of_a_copy_belong_to_the_copy():
    config, name, changes, _ = MIXTURES["mixtral"]
    model = from_config(config, name, changes)
    sites, _ = find(model)
    twin, theirs = copy.deepcopy((model, sites[0]))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not any(t.any() for t in theirs.parameters().values())
    assert all(t.any() for t in sites[0].parameters().values())


def test_gpt_oss_is_refused_by_name():
    changes = {**MOE, "head_dim": 8, "num_local_experts": 4}
    sites, refused = find(from_config("GptOssConfig", "GptOssForCausalLM", changes))
    assert sites == []
    assert all("GPT-OSS" in reason for reason in refused.values())
    assert list(refused) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]


MANY = torch.randint(3, D_VOCAB, (32, 24), generator=torch.Generator().manual_seed(4))
HELD_OUT = MANY.flip(0, 1)


def attach(model, tokens=MANY, **options):
    if tokens is not None:  # where tails begin is no matter of experts
        options = {"method": polylens.TrueStream(tails=None), **options}
    return polylens.attach(model, tokens, degree=3, progress=False, **options)


def test_a_stack_that_is_refused_beside_a_shared_expert_is_named():
    changes = {**MOE, "head_dim": 8, "num_local_experts": 4, "interleave_moe_layer_step": 1}
    lens = attach(from_config("Llama4TextConfig", "Llama4ForCausalLM", changes))
    assert lens.layers == (0, 1)
    for layer, reason in lens.refused.items():
        assert f"layer {layer}: model.layers.{layer}.feed_forward.experts (" in reason
    assert list(lens.refused) == [0, 1]
    assert str(lens.report(HELD_OUT, progress=False)).count("feed_forward.experts") == 2


def test_a_lens_calibrates_each_expert_on_the_tokens_it_sees(case):
    model, layers = case
    reference, before = logits(model), set(model.modules())
    lens = attach(model, batch_size=5)
    experts = [n for n in lens if isinstance(n, Expert)]
    assert experts == [Expert(i, e) for i in layers for e in range(4)]
    assert lens.refused == {}
    assert torch.equal(logits(model), reference)
    seen = {}

    def observer(layer):
        return lambda a: seen.update({layer: a.x[a.places.rows % MANY.shape[1] > 0].double()})

    with lens.host.observe({n: observer(n) for n in experts}), torch.no_grad():
        lens.host.run(MANY)
    for n in experts:
        torch.testing.assert_close(lens[n].inputs.mean, seen[n].mean(0), atol=1e-5, rtol=1e-4)
        covariance = torch.cov(seen[n].T, correction=0)
        torch.testing.assert_close(lens[n].inputs.cov, covariance, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        _, cache = lens.run_with_cache(TOKENS, layers=experts[0])
    value = cache["out", experts[0]]
    torch.testing.assert_close(value, lens[experts[0]](cache["in", experts[0]]))
    lens.detach()
    assert set(model.modules()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model), reference)


def test_experts_are_replaced(case):
    model, layers = case
    reference = logits(model)
    with attach(model, layers=layers[0]) as lens:
        assert {n if isinstance(n, int) else n.layer for n in lens} == {layers[0]}
        with lens.replaced(degree=0):
            constant = logits(model)
        with lens.replaced():
            cubic = logits(model)
        with lens.replaced(layers=[Expert(layers[0], 2)]):
            one = logits(model)
    assert not torch.equal(constant[:, 0], reference[:, 0])
    assert not torch.equal(one, reference)
    assert (cubic - reference).norm() < 0.2 * (constant - reference).norm()
    assert torch.equal(logits(model), reference)


# with a shared expert, and without
two = pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"], indirect=True)


@two
def test_a_report_has_a_row_with_the_tokens_of_each_expert(case):
    model, layers = case
    with attach(model) as lens:
        report = lens.report(HELD_OUT, progress=False)
        page = html_page(lens, report, layers=Expert(layers[-1], 3))
    assert f"<h3>Layer {layers[-1]}.3</h3>" in page
    rows = {row.layer: row for row in report}
    assert report.n_tokens == HELD_OUT[:, 1:].numel()
    for layer in layers:
        experts = [rows[Expert(layer, e)] for e in range(4)]
        assert sum(row.n_tokens for row in experts) == 2 * report.n_tokens
        for row in experts:
            assert row.r2[3] > 0.9
            assert row.delta_ce is None
        if layer in rows:  # the shared experts
            assert rows[layer].n_tokens == report.n_tokens
            assert rows[layer].delta_ce is not None
    assert abs(report.all_row.delta_ce) < abs(report.all_row.ablation_delta_ce)
    lines = [line.split() for line in str(report).splitlines()]
    label, tokens = f"{layers[-1]}.3", f"{rows[Expert(layers[-1], 3)].n_tokens:,}"
    assert any(line[:2] == [label, tokens] for line in lines)
    assert label in report._repr_html_()
    assert polylens.Report.from_dict(json.loads(report.to_json())) == report


@two
def test_prefixes_end_with_a_block_and_worst_tokens_name_experts(case):
    model, layers = case
    with attach(model) as lens:
        report = lens.report(HELD_OUT, prefixes=True, worst=5, progress=False)
        ends = {Expert(layer, 3) for layer in layers}
        for row in report:
            if isinstance(row.layer, int):
                ends |= {row.layer} - set(layers)
            assert row.r2_replaced > 0.5
        assert {row.layer for row in report if row.prefix_delta_ce is not None} == ends
        assert report[Expert(layers[-1], 3)].prefix_delta_ce == report.all_row.delta_ce
        with torch.no_grad(), lens.replaced():
            _, seen = lens.run_with_cache(HELD_OUT)
        for worst in report.worst:
            x, f, error = (
                seen[name, worst.layer].flatten(end_dim=-2) for name in ("in", "out", "error")
            )
            # which of an expert's inputs are the token's, the hook points do not say
            ratios = error.norm(dim=-1) / (f + error).norm(dim=-1)
            rows = torch.isclose(ratios, torch.tensor(worst.error), rtol=1e-3)
            polynomial = lens[worst.layer]
            t = (polynomial.weights.neurons(x[rows])["y"] - polynomial.m) / polynomial.s
            found = t.abs().argmax(-1) == worst.neuron
            assert torch.isclose(
                t[found, worst.neuron].float(), torch.tensor(worst.deviation)
            ).any()


def test_a_copy_made_while_replaced_is_the_true_model(case):
    model, _ = case
    true = logits(model)
    with attach(model) as lens, lens.replaced():
        twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin), true)


@pytest.mark.parametrize("case", ["qwen2_moe"], indirect=True)
def test_experts_of_a_bridge_are_those_of_the_model_in_it(case, tmp_path):
    model, _ = case
    options = {"loss": False, "progress": False}
    with attach(copy.deepcopy(model), layers=0) as lens:
        expected = lens.report(HELD_OUT[:8], **options)
        lens.save(tmp_path / "lens")
        with lens.replaced():
            replaced = logits(lens.host.module)
    model = bridge(model)
    with attach(model, layers=0) as lens:
        assert lens.refused == {}
        report = lens.report(HELD_OUT[:8], **options)
    assert [(r.layer, r.n_tokens) for r in report] == [(r.layer, r.n_tokens) for r in expected]
    r2, other = (torch.tensor([row.r2 for row in each]) for each in (report, expected))
    torch.testing.assert_close(r2, other, atol=1e-5, rtol=0)
    with polylens.load(tmp_path / "lens", model) as lens, lens.replaced(), torch.no_grad():
        torch.testing.assert_close(lens.host.logits(TOKENS), replaced, atol=1e-4, rtol=0)


def test_experts_of_a_bridge_without_a_normal_form_are_refused_by_name():
    changes = {**MOE, "head_dim": 8, "num_local_experts": 4}
    model = bridge(from_config("GptOssConfig", "GptOssForCausalLM", changes))
    with pytest.raises(polylens.UnsupportedModel, match=r"blocks\.0\.mlp\.experts.*GPT-OSS"):
        attach(model)


def test_experts_of_an_nnsight_model():
    nnsight = pytest.importorskip("nnsight", minversion="0.8")
    config, name, changes, _ = MIXTURES["qwen2_moe"]
    model = nnsight.NNsight(from_config(config, name, changes))
    before, reference = module_snapshot(model._module), logits(model._module)
    with attach(model) as lens:
        with torch.no_grad(), lens.replaced():
            out, cache = lens.run_with_cache(TOKENS, layers=Expert(1, 2), names=["out"])
        assert not torch.equal(out, reference)
        with model.trace(MANY):
            shared = model.model.layers[1].mlp.shared_expert.poly.output.save()
        assert shared.shape[-1] == cache["out", Expert(1, 2)].shape[-1] == 24
    assert module_snapshot(model._module) == before
    assert torch.equal(logits(model._module), reference)


def test_an_expert_that_saw_too_few_tokens_is_named_and_not_fitted():
    config, name, changes, _ = MIXTURES["mixtral"]
    model = from_config(config, name, changes)
    with torch.no_grad():  # the router of layer 0 shuns expert 1
        gate = model.model.layers[0].mlp.gate.weight
        gate.copy_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)))
        gate[1] = 0.9 * gate[0]
        gate[3] = -0.9 * gate[0]
    counts = {}
    host = TorchHost(model)
    host.sites()

    def observer(e):
        return lambda a: counts.update({e: len(a.x)})

    with host.observe({Expert(0, e): observer(e) for e in range(4)}), torch.no_grad():
        host.run(MANY)
    few = [e for e in range(4) if counts.get(e, 0) < 64]
    with attach(model, layers=0) as lens:
        assert [n.expert for n in lens] == [e for e in range(4) if e not in few]
        for e in few:
            with pytest.raises(polylens.UnsupportedModel, match=f"sent {counts.get(e, 0)} of"):
                lens[Expert(0, e)]
        with pytest.raises(polylens.InvalidInputError, match="mixture of experts"):
            lens[0]
    with pytest.raises(polylens.UnsupportedModel, match="give more tokens"):
        attach(model, TOKENS[:1], layers=0)


@pytest.mark.parametrize("options", [dict(method=polylens.FromNorm()), dict(layers=Expert(0, 9))])
def test_what_experts_cannot_do_is_said(options):
    config, name, changes, _ = MIXTURES["mixtral"]
    model = from_config(config, name, changes)
    tokens = None if "method" in options else MANY
    with pytest.raises((polylens.UnsupportedModel, polylens.InvalidInputError), match=r"router|9"):
        attach(model, tokens, **options)
    assert polylens.attached(model) is None


def test_an_expert_is_no_tuple_of_two_layers():
    there = [0, Expert(1, 0), Expert(1, 1), 2]
    assert check_layers((0, 1), there, {}) == [0, Expert(1, 0), Expert(1, 1)]
    assert check_layers(Expert(1, 1), there, {}) == [Expert(1, 1)]
    assert check_layers([2, Expert(1, 0)], there, {}) == [Expert(1, 0), 2]
    with pytest.raises(polylens.InvalidInputError, match="Expert"):
        check_layers([(1, 0)], there, {})
    for layer, text, value in ((3, "3", 3), (Expert(3, 7), "3.7", [3, 7])):
        assert (label(layer), to_json(layer)) == (text, value)
        assert labelled(text) == from_json(value) == layer
    assert sorted([Expert(2, 0), Expert(1, 5), Expert(1, 2)])[0] == Expert(1, 2)
