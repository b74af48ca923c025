"""A decoder with attention patterns and norm scales frozen is its own stream, or is refused."""

import pytest
import torch
from tests.hf_models import build
from tests.host_contract import module_snapshot
from tests.models import HOSTS

from polylens.errors import UnsupportedModel
from polylens.hosts import host_for
from polylens.hosts.freezing import freeze

TOKENS = torch.tensor([5, 7, 9, 3, 5, 7, 2])
MODELS = {
    **{name: HOSTS[name] for name in HOSTS if "bert" not in name},
    **{
        name: lambda name=name: build(name)
        for name in (
            *("gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "qwen2", "qwen3", "gemma", "gemma2"),
            *("phi", "phi3", "opt", "mpt", "olmo2", "cohere", "glm", "codegen", "gpt_bigcode"),
            # its configuration alone says how it attends; the stream is added inside; both ways
            *("falcon", "bloom", "eurobert"),
        )
    },
}
# bert has norms in the stream, and modernbert layers between it and the unembedding
REFUSED = ("bert", "distilbert", "modernbert")


def frozen(name):
    model = MODELS[name]()
    host = host_for(model)
    layers = [site.layer for site in host.sites()[0]]
    assert layers
    return model, host, layers


@pytest.mark.parametrize("name", MODELS)
def test_the_frozen_model_is_the_model(name):
    _, host, layers = frozen(name)
    before = module_snapshot(host.module)
    implementation = getattr(getattr(host.module, "config", None), "_attn_implementation", None)
    found = freeze(host, TOKENS, layers)
    assert module_snapshot(host.module) == before
    config = getattr(host.module, "config", None)
    assert getattr(config, "_attn_implementation", None) == implementation
    half = "bf16" in name
    assert found.rounding < (2e-2 if half else 1e-6)
    assert len(found.blocks) == 2
    assert all(block.read and block.attention is not None for block in found.blocks)
    with torch.no_grad():
        logits = host.logits(TOKENS[None])[0].double()
    torch.testing.assert_close(found.logits, logits, atol=2e-1 if half else 1e-5, rtol=0)
    weights = torch.randn(len(logits[0]), dtype=torch.float64)
    direction, constant = found.tokens_of(weights, 4)
    value = float(found.streams()[-1][4] @ direction) + constant
    assert found.capped == (name in ("cohere", "gemma2", "bridge-gemma2"))
    if not found.capped:
        expected = float(logits[4] @ weights)
        assert value == pytest.approx(expected, abs=1.0 if half else 1e-5)


@pytest.mark.parametrize("name", ["hooked-layer_norm", "hooked-post_norm", "gpt_bigcode", "gptj"])
def test_adjoints_are_transposes(name):
    _, host, layers = frozen(name)
    found = freeze(host, TOKENS, layers)
    x, g = torch.randn(2, 3, *found.embedding.shape, dtype=torch.float64)
    for block in found.blocks:
        attention = block.attention
        assert attention is not None
        forward, back = (attention.linear(x) * g).sum(), (x * attention.adjoint(g)).sum()
        torch.testing.assert_close(forward, back)
        # head by head and value by value, too
        parts, at = x[0, [1, 4]], torch.tensor([1, 4])
        by_head = attention.by_head(g[0])[:, at]
        read = attention.values(parts, at)[:, attention.group]
        alone = torch.zeros_like(x[0]).index_copy(0, at, parts)
        expected = (attention.linear(alone) * g[0]).sum()
        torch.testing.assert_close(torch.einsum("nhd,hnd->", read, by_head), expected)
        torch.testing.assert_close(attention.bias(), block.attend(torch.zeros_like(x[0])))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_frozen_is_refused_by_name(name):
    model = HOSTS[name]() if name in HOSTS else build(name)
    host = host_for(model)
    layers = [site.layer for site in host.sites()[0]]
    before = module_snapshot(host.module)
    with pytest.raises(UnsupportedModel, match=r"frozen|no linear map reads"):
        freeze(host, TOKENS, layers)
    assert module_snapshot(host.module) == before


def test_an_encoder_with_a_decoder_is_refused_by_name():
    host = host_for(build("t5"))
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder with"):
        freeze(host, TOKENS, [])


def test_a_multiplier_in_the_stream_is_noticed():
    """Granite multiplies what its layers write; with 1 it is llama."""
    for multiplier, fits in ((1.0, True), (0.5, False)):
        model = build("granite")
        for layer in model.model.layers:
            layer.residual_multiplier = multiplier
        host = host_for(model)
        layers = [site.layer for site in host.sites()[0]]
        if fits:
            assert freeze(host, TOKENS, layers).rounding < 1e-6
        else:
            with pytest.raises(UnsupportedModel, match="away from the model's own"):
                freeze(host, TOKENS, layers)


def test_sdpa_comes_back_after_an_error():
    model = build("llama")
    model.set_attn_implementation("sdpa")
    host = host_for(model)
    layers = [site.layer for site in host.sites()[0]]
    assert freeze(host, TOKENS, layers).rounding < 1e-6
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        freeze(host, TOKENS + 1000, layers)
    assert model.config._attn_implementation == "sdpa"
