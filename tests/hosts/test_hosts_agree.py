"""The same weights give the same R2, to 1e-5, in every framework that takes them."""

import copy
import importlib.util

import pytest
import torch
from tests.hf_models import D_VOCAB, HYBRIDS, build, from_config
from tests.host_contract import TOKENS, attach, logits

import polylens

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")


def plain(model):
    return model


def bridge(model):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    name = type(model).__name__
    return build_bridge_from_module(model, name, hf_config=model.config, tokenizer=None)


def nnsight(model):
    return pytest.importorskip("nnsight", minversion="0.8").NNsight(model)


def hooked(model):
    if importlib.util.find_spec("transformer_lens.HookedTransformer") is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    sizes = dict(n_layers=2, d_model=24, n_heads=4, d_head=6, d_mlp=40, n_ctx=48, d_vocab=D_VOCAB)
    config = HookedTransformerConfig(**sizes, act_fn="gelu_new", normalization_type="LN")
    ours = HookedTransformer(config)
    ours.load_state_dict(convert_gpt2_weights(model, config), strict=False)
    return ours


def r2(model) -> torch.Tensor:
    with attach(model) as lens:
        report = lens.report(TOKENS.flip(0, 1), loss=False, progress=False)
    return torch.tensor([row.r2 for row in report])


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("gpt2", hooked),
        *((name, host) for name in ("gpt2", "llama", "opt", "bert") for host in (bridge, nnsight)),
    ],
)
def test_r2_is_that_of_the_plain_torch_model(name, host):
    model = build(name)
    expected = r2(copy.deepcopy(model))
    assert expected.shape == (2, 4)
    torch.testing.assert_close(r2(host(model)), expected, atol=1e-5, rtol=0)


@pytest.mark.more
@pytest.mark.parametrize("host", [bridge, nnsight])
@pytest.mark.parametrize("name", HYBRIDS)
def test_mlps_beside_other_things_than_attention_have_one_r2(name, host):
    model = from_config(*HYBRIDS[name])
    expected = r2(copy.deepcopy(model))
    assert expected.shape == (2, 4)
    torch.testing.assert_close(r2(host(model)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("host", [plain, bridge, nnsight])
def test_a_layer_on_another_device_as_accelerate_places_it(host):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = build("llama")
    expected, device = r2(copy.deepcopy(model)), "cuda" if torch.cuda.is_available() else "cpu"
    align = AlignDevicesHook(execution_device=device, io_same_device=True)
    add_hook_to_module(model.model.layers[1].mlp.to(device), align)
    model = host(model)
    reference = logits(model)
    torch.testing.assert_close(r2(model), expected, atol=1e-5, rtol=0)
    with attach(model) as lens:
        assert torch.equal(logits(model), reference)
        with lens.replaced():
            assert not torch.equal(logits(model), reference)


def test_other_weights_give_another_r2():
    model = build("gpt2")
    expected = r2(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.05)
    assert (r2(model) - expected).abs().max() > 1e-4
    assert polylens.attached(model) is None
