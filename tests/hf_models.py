"""Tiny random Hugging Face models of every architecture, built offline from their configs."""

from typing import Any

import torch
import transformers

D_VOCAB = 90
DECODER = dict(
    vocab_size=D_VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = dict(
    n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8,
    q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
)  # fmt: skip
# Configurations and models, and which layers are mixtures of four experts.
MIXTURES: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MOE, "num_local_experts": 4}, (0, 1)),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**MOE, "num_experts": 4}, (0, 1)),
    "qwen2_moe": (
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40}, (0, 1),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**MOE, "num_experts": 4, "num_local_experts": 4, "head_dim": 6}, (0, 1),
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**MOE, **DEEPSEEK}, (1,)),
}  # fmt: skip
# Where something else than attention is beside some MLPs, or all.
MAMBA = {**DECODER, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 4, "mamba_n_groups": 1}
HYBRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bamba": ("BambaConfig", "BambaForCausalLM", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "FalconH1Config", "FalconH1ForCausalLM", {**MAMBA, "mamba_d_ssm": 48, "head_dim": 6},
    ),
    "lfm2": (
        "Lfm2Config", "Lfm2ForCausalLM",
        {**DECODER, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
}  # fmt: skip
ENCODER = {**DECODER, "max_position_embeddings": 64}
ENCODER.pop("num_key_value_heads")
GPT = dict(
    vocab_size=D_VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=48, n_inner=40,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
HEADS3 = {**DECODER, "num_attention_heads": 3, "num_key_value_heads": 3}
GEMMA = {**DECODER, "head_dim": 6}
SEQ2SEQ = dict(
    vocab_size=D_VOCAB, d_model=24, d_ff=40, d_kv=6, num_layers=2, num_decoder_layers=2,
    num_heads=4, decoder_start_token_id=0,
)  # fmt: skip
BART = dict(
    vocab_size=D_VOCAB, d_model=24, encoder_ffn_dim=40, decoder_ffn_dim=40, encoder_layers=2,
    decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    max_position_embeddings=48, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    decoder_start_token_id=2, forced_eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    image_size=16, patch_size=8,
)  # fmt: skip

# name: (config class, model class, config, kinds of the blocks in order of execution)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, "mlp"),
    "gpt_neo": (
        "GPTNeoConfig", "GPTNeoForCausalLM",
        {**DECODER, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, "mlp",
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER, "mlp"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, "mlp"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, "glu"),
    "llama_bias": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "mlp_bias": True}, "glu"),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER, "glu"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER, "glu"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GEMMA, "glu"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GEMMA, "glu"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA, "glu"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA, "glu"),
    "phi": ("PhiConfig", "PhiForCausalLM", HEADS3, "mlp"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER, "glu"),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        {**DECODER, "ffn_dim": 40, "word_embed_proj_dim": 24}, "mlp",
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**DECODER, "ffn_hidden_size": 40}, "mlp"),
    "bloom": (
        "BloomConfig", "BloomForCausalLM",
        dict(vocab_size=D_VOCAB, hidden_size=24, n_layer=2, n_head=4), "mlp",
    ),
    "mpt": (
        "MptConfig", "MptForCausalLM",
        dict(vocab_size=D_VOCAB, d_model=24, n_layers=2, n_heads=4, max_seq_len=48), "mlp",
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", DECODER, "glu"),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", DECODER, "mlp"),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", DECODER, "glu"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", DECODER, "glu"),
    "cohere": ("CohereConfig", "CohereForCausalLM", DECODER, "glu"),
    "granite": ("GraniteConfig", "GraniteForCausalLM", DECODER, "glu"),
    "glm": ("GlmConfig", "GlmForCausalLM", {**DECODER, "head_dim": 6}, "glu"),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", DECODER, "mlp"),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", HEADS3, "mlp"),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, "mlp"),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT, "mlp"),
    "biogpt": ("BioGptConfig", "BioGptForCausalLM", DECODER, "mlp"),
    "xglm": (
        "XGLMConfig", "XGLMForCausalLM",
        dict(vocab_size=D_VOCAB, d_model=24, ffn_dim=40, num_layers=2, attention_heads=4), "mlp",
    ),
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER, "mlp"),
    "bert_pooler": ("BertConfig", "BertForSequenceClassification", ENCODER, "mlp"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER, "mlp"),
    "distilbert": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        dict(vocab_size=D_VOCAB, dim=24, hidden_dim=40, n_layers=2, n_heads=4), "mlp",
    ),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**ENCODER, "embedding_size": 24}, "mlp"),
    "electra": ("ElectraConfig", "ElectraForPreTraining", {**ENCODER, "embedding_size": 24}, "mlp"),
    "mobilebert": (
        "MobileBertConfig",
        "MobileBertModel",
        {**ENCODER, "embedding_size": 24, "intra_bottleneck_size": 16},
        "mlp",
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION, "mlp"),
    "clip": (
        "CLIPConfig", "CLIPModel",
        dict(text_config={**ENCODER, "projection_dim": 8}, vision_config=VISION, projection_dim=8),
        "mlp",
    ),
    "modernbert": (
        "ModernBertConfig", "ModernBertForMaskedLM",
        {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}, "glu",
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", SEQ2SEQ, "mlp"),
    "t5_gated": (
        "T5Config", "T5ForConditionalGeneration",
        {**SEQ2SEQ, "feed_forward_proj": "gated-gelu"}, "glu",
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART, "mlp"),
    "whisper": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 48}, "mlp",
    ),
    "vaultgemma": ("VaultGemmaConfig", "VaultGemmaForCausalLM", GEMMA, "glu"),
    "recurrent_gemma": (
        "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM",
        {
            **GEMMA, "lru_width": 24, "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
        },
        "glu",
    ),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", DECODER, "mlp"),
    "lfm2": (
        "Lfm2Config", "Lfm2ForCausalLM",
        {
            **DECODER, "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        "glu",
    ),
    "rwkv": (
        "RwkvConfig", "RwkvForCausalLM",
        dict(
            vocab_size=D_VOCAB, hidden_size=24, attention_hidden_size=24, intermediate_size=40,
            num_hidden_layers=2,
        ),
        "mlp",
    ),
    "deberta_v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", ENCODER, "mlp"),
    "eurobert": ("EuroBertConfig", "EuroBertForMaskedLM", DECODER, "glu"),
    "dinov2_swiglu": (
        "Dinov2Config", "Dinov2ForImageClassification", {**VISION, "use_swiglu_ffn": True}, "glu",
    ),
    "swin": (
        "SwinConfig", "SwinForImageClassification",
        dict(
            image_size=16, patch_size=2, embed_dim=24, depths=[1, 1], num_heads=[2, 2],
            window_size=4,
        ),
        "mlp",
    ),
}  # fmt: skip
NUMBER_OF_BLOCKS = {
    "albert": 1,
    "mobilebert": 8,
    "clip": 4,
    "t5": 4,
    "t5_gated": 4,
    "bart": 4,
    "whisper": 4,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model in eval mode, with noise on all weights so that no bias is zero."""
    config, model, changes, _ = ARCHITECTURES[name]
    return from_config(config, model, changes, dtype)


def from_config(config: str, model: str, changes: dict, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    hf = getattr(transformers, model)(getattr(transformers, config)(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    return hf.to(dtype).eval()


def example(name: str) -> dict[str, Any]:
    """Inputs for one small forward pass, without anything of polylens."""
    ids = (torch.arange(16).reshape(2, 8) * 37 + 11) % (D_VOCAB - 3) + 3
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if name in ("vit", "dinov2_swiglu", "swin"):
        return {"pixel_values": pixels}
    if name == "clip":
        return {"pixel_values": pixels, "input_ids": ids}
    if name in ("t5", "t5_gated"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids}
    return {"input_ids": ids}
