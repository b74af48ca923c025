"""The contract that every TransformerLens model must pass (design: observe, replace, restore)."""

import copy
import warnings

import pytest
import torch

import polylens
from polylens.hosts import host_for
from tests.host_contract import (
    HostContract,
    test_assert_close_fails_on_what_is_not,  # noqa: F401
    test_snapshot_notices_each_kind_of_leftover,  # noqa: F401
)
from tests.models import BRIDGES, D_VOCAB, HOSTS, bridge, hooked

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")

TOKENS = torch.randint(D_VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))
DEGREE = 3


@pytest.fixture(params=HOSTS)
def model(request):
    return settled(HOSTS[request.param]())


def settled(model):
    """After one cached run: bridges wire hooks of their own lazily."""
    with torch.no_grad():
        model.run_with_cache(TOKENS)
    return model


def attach(model, **options):
    return polylens.attach(model, TOKENS, progress=False, **{"degree": DEGREE, **options})


def logits(model):
    with torch.no_grad():
        return host_for(model).logits(TOKENS)


def snapshot(model):
    """Everything that must come back: modules, hooks, names, state.

    Hooks by number: TransformerLens registers its own anew in run_with_cache.
    """
    modules = dict(model.named_modules())
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in modules.items()
    }
    points = {name: id(point) for name, point in model.hook_dict.items()}
    state = list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    identities = {name: id(m) for name, m in modules.items()}
    return identities, hooks, list(points), points, state, parameters


def test_snapshot_notices_a_leftover_hook_and_a_leftover_module():
    model = BRIDGES["gpt2"]()
    before = snapshot(model)
    handle = model.blocks[0].mlp.register_forward_hook(lambda *args: None)
    assert snapshot(model) != before
    handle.remove()
    model.blocks[0].mlp.add_module("extra", torch.nn.Identity())
    assert snapshot(model) != before


def test_observing_changes_nothing_and_detach_restores_everything(model):
    before, reference = snapshot(model), logits(model)
    lens = attach(model)
    assert lens.layers == (0, 1)
    assert lens.refused == {}
    assert torch.equal(logits(model), reference)
    assert list(model.state_dict()) == before[4]
    with torch.no_grad():
        out, cache = model.run_with_cache(TOKENS)
    assert torch.equal(out, reference)
    assert cache["poly_out", 0, "mlp"].shape == (4, 12, 24)
    lens.detach()
    assert snapshot(model) == before
    assert torch.equal(logits(model), reference)


def test_parts_sum_to_out_and_out_plus_error_is_true(model):
    host = host_for(model)
    true = {}
    with (
        attach(model) as lens,
        torch.no_grad(),
        host.observe(
            {layer: lambda x, y, layer=layer: true.update({layer: y}) for layer in (0, 1)}
        ),
    ):
        _, cache = model.run_with_cache(TOKENS)
        assert lens.degree == DEGREE
    tolerance = 5e-2 if true[0].dtype == torch.bfloat16 else 1e-5
    for layer in (0, 1):
        out, error = cache["poly_out", layer, "mlp"], cache["poly_error", layer, "mlp"]
        parts = [cache[f"poly_degree_{k}", layer, "mlp"] for k in range(DEGREE + 1)]
        scale = float(true[layer].abs().max())
        assert float((sum(parts) - out).abs().max()) <= tolerance * scale
        assert float((out + error - true[layer]).abs().max()) <= tolerance * scale
        assert float(error.abs().max()) > 0


def test_the_cache_holds_the_polynomial_of_the_true_input(model):
    with attach(model) as lens, torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        expected = lens[1](cache["poly_in", 1, "mlp"])
    difference = (cache["poly_out", 1, "mlp"] - expected).abs().max()
    tolerance = 2e-2 if expected.dtype == torch.bfloat16 else 1e-5
    assert float(difference) <= tolerance * float(expected.abs().max())


def test_replaced_flows_on_nests_and_comes_back(model):
    reference = logits(model)
    with attach(model) as lens:
        with lens.replaced():
            both = logits(model)
            with lens.replaced(0, degree=1):
                assert not torch.equal(logits(model), both)
            assert torch.equal(logits(model), both)
        with lens.replaced(layers=[1]):
            one = logits(model)
        assert torch.equal(logits(model), reference)
        assert not torch.equal(both, reference)
        assert not torch.equal(one, both)


def test_position_zero_stays_true_by_default():
    model = BRIDGES["gpt2"]()
    reference = logits(model)
    with attach(model) as lens, lens.replaced(degree=0):
        assert torch.equal(logits(model)[:, 0], reference[:, 0])
    with attach(model, exclude_first=False) as lens, lens.replaced(degree=0):
        assert not torch.equal(logits(model)[:, 0], reference[:, 0])


def test_everything_comes_back_after_an_exception_at_each_hook(model):
    before, reference = snapshot(model), logits(model)

    def fail(value, hook):
        raise KeyError("injected")

    names = ("in", "out", "error", "degree_0", f"degree_{DEGREE}")
    lens = attach(model)
    for name in names:
        with pytest.raises(KeyError, match="injected"), lens.replaced(), torch.no_grad():
            model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.1.mlp.hook_poly_{name}", fail)])
        assert torch.equal(logits(model), reference)
    lens.detach()
    assert snapshot(model) == before
    with pytest.raises(KeyError, match="injected"), attach(model):
        raise KeyError("injected")
    assert snapshot(model) == before
    assert torch.equal(logits(model), reference)


def test_a_failing_install_leaves_nothing(model, monkeypatch):
    before = snapshot(model)
    original = type(host_for(model)).install
    calls = []

    def second_fails(self, site, emitter):
        calls.append(site)
        if len(calls) == 2:
            raise RuntimeError("injected")
        return original(self, site, emitter)

    monkeypatch.setattr(type(host_for(model)), "install", second_fails)
    with pytest.raises(RuntimeError, match="injected"):
        attach(model)
    assert snapshot(model) == before
    assert polylens.attached(model) is None


def test_hooks_on_polynomial_points_are_effective(model):
    def zero(value, hook):
        return torch.zeros_like(value)

    with attach(model) as lens, torch.no_grad(), lens.replaced():
        reference = logits(model)
        for name in ("out", "degree_1", "in"):
            changed = model.run_with_hooks(
                TOKENS, fwd_hooks=[(f"blocks.0.mlp.hook_poly_{name}", zero)]
            )
            assert not torch.equal(changed, reference), name


def test_gradients_flow_through_the_polynomial():
    model = BRIDGES["llama"]()
    with attach(model) as lens:
        grads = {}
        for replaced in (False, True):
            found = []

            def grab(value, hook, found=found):
                value.requires_grad_(True)
                value.register_hook(found.append)
                return value

            context = lens.replaced() if replaced else torch.enable_grad()
            with context, model.hooks(fwd_hooks=[("blocks.1.mlp.hook_in", grab)]):
                model(TOKENS).square().mean().backward()
            grads[replaced] = found[0]
    assert torch.isfinite(grads[True]).all()
    assert float(grads[True].abs().max()) > 0
    assert not torch.equal(grads[True], grads[False])


@pytest.mark.parametrize("name", ["hooked-layer_norm", "bridge-gpt2", "bridge-llama"])
def test_generate_and_deepcopy(name):
    model = HOSTS[name]()
    options = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    options |= dict(prepend_bos=False, return_type="tokens")
    plain = model.generate(TOKENS[:1], **options)
    reference = logits(model)
    with attach(model) as lens:
        assert torch.equal(model.generate(TOKENS[:1], **options), plain)
        with lens.replaced(degree=0):
            replaced = logits(model)
            assert model.generate(TOKENS[:1], **options).shape == plain.shape
            twin = copy.deepcopy(model)
    assert torch.equal(logits(model), reference)
    assert torch.allclose(logits(twin), replaced)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.allclose(logits(twin), replaced)


def test_user_edits_of_the_mlp_input_reach_the_polynomial():
    model = BRIDGES["llama"]()

    def zero(value, hook):
        return torch.zeros_like(value)

    with attach(model) as lens, torch.no_grad():
        seen = []
        model.run_with_hooks(
            TOKENS,
            fwd_hooks=[
                ("blocks.0.mlp.hook_in", zero),
                ("blocks.0.mlp.hook_poly_in", lambda value, hook: seen.append(value)),
            ],
        )
        assert float(seen[0].abs().max()) == 0
        assert lens.is_attached


@pytest.mark.parametrize("make", [lambda: hooked(act_fn="solu"), lambda: hooked(attn_only=True)])
def test_what_has_no_normal_form_is_refused(make):
    with pytest.raises(polylens.UnsupportedModel, match="layer 0"):
        attach(make())


def test_mixture_of_experts_is_refused_with_the_reason():
    model = bridge(
        "MixtralConfig",
        "MixtralForCausalLM",
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=2,
    )
    with pytest.raises(polylens.UnsupportedModel, match=r"blocks\.0\.mlp.*mixture of experts"):
        attach(model)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-layer_norm"])
def test_changed_weights_are_an_error(name):
    model = HOSTS[name]()
    lens = attach(model)
    if name.startswith("bridge"):
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_()
    with pytest.raises(polylens.StalePolynomialError, match="layer 0"), lens.replaced():
        pass
    with pytest.raises(polylens.StalePolynomialError, match="attach again"):
        lens.report(TOKENS, progress=False)
    lens.detach()


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-layer_norm"])
def test_weights_edited_under_a_replacement_are_an_error(name):
    model = HOSTS[name]()
    with attach(model) as lens, lens.replaced(), torch.no_grad():
        next(p for n, p in model.named_parameters() if "mlp" in n and p.dim() == 2).mul_(2)
        with pytest.raises(polylens.StalePolynomialError):
            logits(model)


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-layer_norm"])
def test_a_model_cast_after_attach_keeps_its_polynomials(name):
    model = HOSTS[name]()
    with attach(model) as lens, torch.no_grad():
        with lens.replaced():
            before = logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.to(torch.float64)
        with lens.replaced():
            assert torch.allclose(logits(model).float(), before, atol=1e-3)


def test_a_later_splice_of_the_output_point_is_noticed():
    model = BRIDGES["gpt2"]()
    with attach(model) as lens, lens.replaced():
        point = model.blocks[0].mlp.hook_out
        model.blocks[0].mlp._modules["hook_out"] = torch.nn.Identity()
        with pytest.raises(polylens.AttachmentError, match="replaced by another object"):
            logits(model)
        model.blocks[0].mlp._modules["hook_out"] = point


def test_both_hosts_of_the_same_weights_agree():
    pytest.importorskip("transformer_lens.pretrained.weight_conversions")
    gpt2 = BRIDGES["gpt2"]()
    ours = hooked(act_fn="gelu_new", d_mlp=96, normalization_type="LN")
    import transformers
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(gpt2.original_model.config).eval()
    state = convert_gpt2_weights(hf, ours.cfg)
    ours.load_state_dict(state, strict=False)
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    theirs = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config, tokenizer=None)
    reports = []
    for model in (ours, theirs):
        with attach(model) as lens:
            reports.append(lens.report(TOKENS, loss=False, progress=False))
    for layer in (0, 1):
        assert reports[0][layer].r2 == pytest.approx(reports[1][layer].r2, abs=1e-4)


class TestHost(HostContract):
    tokens = TOKENS

    @pytest.fixture(autouse=True, params=HOSTS)
    def _model(self, request):
        self._make = HOSTS[request.param]

    def make_model(self):
        return self._make()


def causal(name):
    return name != "bridge-bert"


@pytest.mark.parametrize("name", filter(causal, HOSTS))
def test_sampled_tokens_are_the_seeds_and_leave_the_generator_alone(name):
    host, state = host_for(HOSTS[name]()), torch.get_rng_state()
    first, again = host.sample_tokens(3, 9, seed=1), host.sample_tokens(3, 9, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (3, 9)
    assert torch.equal(first, again)
    assert not torch.equal(first, host.sample_tokens(3, 9, seed=2))


@pytest.mark.parametrize("rotary", [False, True])
def test_hooked_sampling_draws_from_the_model_itself(rotary, monkeypatch):
    kind = dict(positional_embedding_type="rotary", rotary_dim=6) if rotary else {}
    host = host_for(hooked(**kind))
    drawn = []

    def multinomial(p, n):
        drawn.append(p)
        return p.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    tokens = host.sample_tokens(2, 8, seed=0)
    with torch.no_grad():
        expected = host.logits(tokens)[:, :-1].softmax(-1)
    assert torch.allclose(torch.stack(drawn, 1), expected, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_norm_in_front_of_the_mlp(name):
    host = host_for(HOSTS[name]())
    site = host.sites()[0][1]
    if "olmo2" in name:
        with pytest.raises(polylens.UnsupportedModel, match="LayerNorm or RMSNorm"):
            host.norm(site)
        return
    seen = []
    with host.observe({1: lambda x, y: seen.append(x.detach().double())}):
        host.run(TOKENS)
    norm = host.norm(site)
    plain = seen[0] if norm.bias is None else seen[0] - norm.bias.double()
    plain = plain if norm.weight is None else plain / norm.weight.double()
    size = plain.square().mean(-1)
    assert torch.allclose(size, torch.ones_like(size), atol=3e-2)
    if norm.centred:
        assert float(plain.mean(-1).abs().max()) < 5e-2


def test_a_residual_inside_the_mlp_module_is_left_out():
    model = bridge("MptConfig", "MptForCausalLM", d_model=24, n_heads=4, n_layers=2, max_seq_len=48)
    sites, refused = host_for(model).sites()
    assert refused == {}
    assert max(site.error for site in sites) < 1e-4


def test_meta_weights_are_refused_by_layer():
    sites, refused = host_for(BRIDGES["llama"]().to("meta")).sites()
    assert sites == []
    assert set(refused) == {0, 1}
    assert "meta device" in refused[1]


def test_an_encoder_decoder_is_refused_with_the_reason():
    sizes = dict(d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    model = bridge("T5Config", "T5ForConditionalGeneration", **sizes)
    with pytest.raises(polylens.UnsupportedModel, match="encoder-decoder"):
        host_for(model).sites()
