"""Where polylens meets the frameworks: one file per host."""

from typing import Any

from polylens.errors import UnsupportedModel
from polylens.hosts.base import Host


def host_for(model: Any) -> Host:
    """The host adapter for a model.

    Raises:
        UnsupportedModel: what was got, and how to get it into a supported framework.
    """
    kinds = {cls.__name__ for cls in type(model).__mro__}
    if kinds & {"HookedTransformer", "TransformerBridge"}:
        from polylens.hosts.transformer_lens import TransformerLensHost

        return TransformerLensHost(model)
    raise UnsupportedModel(
        f"cannot attach to a {type(model).__module__}.{type(model).__name__}; supported are "
        "TransformerLens' HookedTransformer and TransformerBridge. For a Hugging Face model: "
        "transformer_lens.model_bridge.sources.build_bridge_from_module(model, "
        "type(model).__name__, hf_config=model.config, tokenizer=tokenizer)"
    )
