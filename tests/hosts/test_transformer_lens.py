"""The contract that every TransformerLens model must pass (design: observe, replace, restore)."""

import warnings

import pytest
import torch
from tests.hf_models import MIXTURES
from tests.host_contract import (
    POINTS,
    TOKENS,
    HostContract,
    Specimen,
    assert_close,
    attach,
    logits,
    module_snapshot,
)
from tests.models import BRIDGES, HOSTS, bridge, hooked
from transformers import DynamicCache

import polylens
from polylens import TrueStream, analysis
from polylens.hosts import host_for

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")

OPTIONS = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
OPTIONS |= dict(prepend_bos=False, return_type="tokens")


def settled(model):
    """After one cached run: bridges wire hooks of their own lazily."""
    with torch.no_grad():
        model.run_with_cache(TOKENS)
    return model


BEHIND = {
    "hooked-post_norm": lambda model: model.blocks[1].ln2_post.w,
    "bridge-gemma2": lambda model: 1 + _norm_behind(model).weight,
    "bridge-gemma3": lambda model: 1 + _norm_behind(model).weight,
    "bridge-olmo2": lambda model: _norm_behind(model).weight,
}


def _norm_behind(model):
    return model.original_model.model.layers[1].post_feedforward_layernorm


# The rest are in the tests on the newest TransformerLens, which has bridges alone.
FEW = ("bridge-gpt2", "bridge-llama", "bridge-gemma2", "bridge-bert")


def cache_of_an_unchanged_run(model):
    reference = logits(model)
    with torch.no_grad():
        out, cache = model.run_with_cache(TOKENS)
    assert torch.equal(out, reference)
    return cache


class TestHost(HostContract):
    @pytest.fixture(
        scope="class",
        params=[
            name
            if name in FEW or not name.startswith("bridge")
            else pytest.param(name, marks=pytest.mark.more)
            for name in HOSTS
        ],
    )
    def specimen(self, request):
        return Specimen(request.param, lambda: settled(HOSTS[request.param]()))

    def snapshot(self, model):
        points = [(name, id(point)) for name, point in model.hook_dict.items()]
        return *module_snapshot(model), points

    def generate(self, model):
        if hasattr(model, "original_model") and not model.original_model.can_generate():
            pytest.skip("an encoder")
        return model.generate(TOKENS[:1], **OPTIONS)

    def in_parts(self, model, sizes):
        parts, take = TOKENS[:1].split(sizes, 1), {"return_type": "logits"}
        if hasattr(model, "original_model"):
            hf = model.original_model
            # TransformerLens tells OPT nothing of what is in the cache
            if not hf.can_generate() or hf.config.model_type == "opt":
                return None
            take |= {"past_key_values": DynamicCache(), "use_cache": True}
        else:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 1)
            take |= {"past_kv_cache": cache}
        return torch.cat([model(p, attention_mask=torch.ones_like(p), **take)[0] for p in parts])

    def test_the_points_are_in_the_cache_of_an_unchanged_run(self, attached):
        model, lens = attached
        cache = cache_of_an_unchanged_run(model)
        for layer in lens:
            x = cache["poly_in", layer, "mlp"]
            for name in POINTS:
                assert cache[f"poly_{name}", layer, "mlp"].shape == (4, 12, 24)
            assert_close(cache["poly_out", layer, "mlp"], lens[layer](x))

    def test_hooks_on_polynomial_points_are_effective(self, attached):
        model, lens = attached

        def zero(value, hook):
            return torch.zeros_like(value)

        with torch.no_grad(), lens.replaced():
            reference = logits(model)
            for name in (
                "mlp.hook_poly_out",
                "mlp.hook_poly_degree_1",
                "mlp.hook_poly_in",
                "hook_mlp_out",
            ):
                changed = model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.0.{name}", zero)])
                assert not torch.equal(changed, reference), name

    def test_norm_behind_the_mlp(self, specimen):
        model, lens = specimen.attached()
        with lens.replaced():
            norm = lens.host.norms_behind([1], "mlp").get(1)
        if specimen.name not in BEHIND:
            assert norm is None
            return
        assert not norm.centred
        assert torch.equal(norm.weight, BEHIND[specimen.name](model))

    def test_sampled_tokens_are_the_seeds_and_leave_the_generator_alone(self, specimen):
        if specimen.name == "bridge-bert":
            pytest.skip("an encoder")
        host, state = host_for(specimen.bare()), torch.get_rng_state()
        first, again = host.sample_tokens(3, 9, seed=1), host.sample_tokens(3, 9, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        assert first.shape == (3, 9)
        assert torch.equal(first, again)
        assert not torch.equal(first, host.sample_tokens(3, 9, seed=2))

    def test_norm_in_front_of_the_mlp(self, specimen):
        host = host_for(specimen.bare())
        site = host.sites()[0][1]
        if "olmo2" in specimen.name:
            with pytest.raises(polylens.UnsupportedModel, match="LayerNorm or RMSNorm"):
                host.norm(site)
            return
        seen = []
        with host.observe({1: lambda a: seen.append(a.x.detach().double())}):
            host.run(TOKENS)
        norm = host.norm(site)
        plain = seen[0] if norm.bias is None else seen[0] - norm.bias.double()
        plain = plain if norm.weight is None else plain / norm.weight.double()
        size = plain.square().mean(-1)
        assert torch.allclose(size, torch.ones_like(size), atol=3e-2)
        if norm.centred:
            assert float(plain.mean(-1).abs().max()) < 5e-2


@pytest.mark.more
class TestMixture(TestHost):
    """What holds of a layer holds of every expert, without a shared one and beside it."""

    @pytest.fixture(scope="class", params=["mixtral", "qwen2_moe"])
    def specimen(self, request):
        config, model, changes, _ = MIXTURES[request.param]
        return Specimen(request.param, lambda: settled(bridge(config, model, **changes)))

    @pytest.fixture(autouse=True)
    def _few_tokens(self, monkeypatch):
        monkeypatch.setattr("polylens.calibration.true_stream.FEW_TOKENS", 4)

    def test_the_points_are_in_the_cache_of_an_unchanged_run(self, attached):
        model, lens = attached
        cache = cache_of_an_unchanged_run(model)
        for layer in lens:
            x, value = (cache[self.point(lens, layer, name).name] for name in ("in", "out"))
            assert_close(value, lens[layer](x))
        assert "blocks.1.mlp.experts.expert_3.hook_poly_error" in cache

    def test_hooks_on_polynomial_points_are_effective(self, attached):
        model, lens = attached
        with torch.no_grad(), lens.replaced():
            reference = logits(model)
            hooks = [("blocks.0.mlp.experts.expert_2.hook_poly_out", lambda value, hook: 0 * value)]
            changed = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
            assert not torch.equal(changed, reference)

    def test_norm_in_front_of_the_mlp(self, specimen):
        host = host_for(specimen.bare())
        for site in host.sites()[0]:
            if isinstance(site.layer, int):
                assert host.norm(site).weight is not None
            else:
                with pytest.raises(polylens.UnsupportedModel, match="router"):
                    host.norm(site)


@pytest.mark.parametrize("exclude_first", [True, False])
def test_position_zero_is_replaced_like_the_others(exclude_first):
    model = BRIDGES["gpt2"]()
    reference = logits(model)
    with attach(model, exclude_first=exclude_first) as lens, lens.replaced(degree=0):
        assert not torch.equal(logits(model)[:, 0], reference[:, 0])


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


def test_features_go_through_the_norm_behind_the_layer():
    model = BRIDGES["gemma2"]()
    with polylens.attach(model, TOKENS, degree=2, layers=1, progress=False) as lens:
        found = analysis.layer_features(lens, 1, 4, against=7, k=3).features
        inner = model.original_model.model
        u = (model.W_U[:, 4] - model.W_U[:, 7]).double() * (1 + inner.norm.weight.double())
        u = u * (1 + _norm_behind(model).weight.double())
        torch.testing.assert_close(analysis.logit_direction(lens, 1, 4, 7), u.detach())
        expected = analysis.eigenfeatures(lens[1], u.detach(), 3, metric="covariance")
    torch.testing.assert_close(found.values, expected.values)


def test_features_need_the_moments_that_they_are_measured_by(tmp_path):
    model = BRIDGES["llama"]()
    weight = model.original_model.model.layers[1].post_attention_layernorm.weight.detach()
    implied = polylens.Gaussian(torch.zeros(len(weight)), weight.square())
    options = {"degree": 2, "layers": 1, "method": TrueStream("samples"), "progress": False}
    with polylens.attach(model, TOKENS, **options) as lens:
        own = analysis.layer_features(lens, 1, 4, against=7, k=3)
        for moments in (False, True):
            lens.save(tmp_path / f"{moments}", moments=moments)
    with polylens.load(tmp_path / "True", model) as lens:
        assert analysis.layer_features(lens, 1, 4, against=7, k=3).to_dict() == own.to_dict()
    with polylens.load(tmp_path / "False", model) as lens:
        with pytest.raises(polylens.InvalidInputError, match="moments=True"):
            analysis.layer_features(lens, 1, 4, against=7, k=3)
        by_norm = analysis.eigenfeatures(lens[1], model.W_U[:, 4].detach(), 3, metric=implied)
        assert torch.isfinite(by_norm.values).all()


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
