"""Tiny random models of every kind of MLP that the TransformerLens hosts meet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

try:
    from transformer_lens.config import HookedTransformerConfig
    from transformer_lens.HookedTransformer import HookedTransformer
except ImportError:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        HookedTransformer = None

D_VOCAB = 90


def hooked(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A HookedTransformer with non-zero biases; skips where TransformerLens has none."""
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    config = dict(
        n_layers=2,
        d_model=24,
        n_ctx=48,
        d_head=6,
        n_heads=4,
        d_mlp=40,
        d_vocab=D_VOCAB,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
        dtype=dtype,
    )
    model = HookedTransformer(HookedTransformerConfig(**{**config, **changes}))
    return _randomise(model).eval()


def bridge(config: str, model: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A TransformerBridge over a tiny Hugging Face model, built offline."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(0)
    hf_config = getattr(transformers, config)(**{"vocab_size": D_VOCAB, **changes})
    hf = getattr(transformers, model)._from_config(hf_config, attn_implementation="eager")
    hf = _randomise(hf).to(dtype).eval()
    return build_bridge_from_module(hf, model, hf_config=hf_config, tokenizer=None)


def _randomise(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


LLAMA = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=48,
    pad_token_id=0,
)
GEMMA = {**LLAMA, "head_dim": 6}
GPT2 = dict(n_embd=24, n_layer=2, n_head=4, n_positions=48)

BRIDGES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: bridge("GPT2Config", "GPT2LMHeadModel", **GPT2),
    "gptj": lambda: bridge("GPTJConfig", "GPTJForCausalLM", **GPT2, rotary_dim=4),
    "neox": lambda: bridge(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    ),
    "llama": lambda: bridge("LlamaConfig", "LlamaForCausalLM", **LLAMA, mlp_bias=True),
    "llama_bf16": lambda: bridge("LlamaConfig", "LlamaForCausalLM", torch.bfloat16, **LLAMA),
    "qwen2": lambda: bridge("Qwen2Config", "Qwen2ForCausalLM", **LLAMA),
    "phi3": lambda: bridge("Phi3Config", "Phi3ForCausalLM", **LLAMA),
    "gemma2": lambda: bridge("Gemma2Config", "Gemma2ForCausalLM", **GEMMA),
    "gemma3": lambda: bridge("Gemma3TextConfig", "Gemma3ForCausalLM", **GEMMA),
    "olmo2": lambda: bridge("Olmo2Config", "Olmo2ForCausalLM", **LLAMA),
    "opt": lambda: bridge(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=24,
        word_embed_proj_dim=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    ),
    "bloom": lambda: bridge("BloomConfig", "BloomForCausalLM", hidden_size=24, n_layer=2, n_head=4),
    "bert": lambda: bridge(
        "BertConfig",
        "BertForMaskedLM",
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    ),
}


def compatible(name: str) -> Any:
    model = BRIDGES[name]()
    model.enable_compatibility_mode(disable_warnings=True)
    return model


def folded() -> Any:
    model = hooked()
    model.process_weights_()
    return model


HOOKED: dict[str, Callable[[], Any]] = {
    "layer_norm": hooked,
    "gated": lambda: hooked(gated_mlp=True, normalization_type="RMS", act_fn="silu"),
    "parallel": lambda: hooked(parallel_attn_mlp=True, act_fn="relu"),
    "post_norm": lambda: hooked(
        gated_mlp=True,
        normalization_type="RMS",
        act_fn="gelu_pytorch_tanh",
        use_normalization_before_and_after=True,
    ),
    "folded": folded,
    "bf16": lambda: hooked(torch.bfloat16, act_fn="gelu_new"),
}

HOSTS: dict[str, Callable[[], Any]] = {
    **{f"hooked-{name}": make for name, make in HOOKED.items()},
    **{f"bridge-{name}": make for name, make in BRIDGES.items()},
    "bridge-gpt2_compatible": lambda: compatible("gpt2"),
    "bridge-llama_compatible": lambda: compatible("llama"),
}
