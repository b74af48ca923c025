"""Where polylens meets the frameworks: the host of a model; a folder per framework."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from polylens.errors import UnsupportedModel
from polylens.hosts.base import Host


def host_for(model: Any, example_inputs: Any = None) -> Host:
    """The host adapter for a model.

    Args:
        example_inputs: what the model is called with, for a torch module whose inputs cannot be
            guessed; TransformerLens models take tokens.

    Raises:
        UnsupportedModel: what was got, and what is supported.
    """
    kinds = {cls.__name__ for cls in type(model).__mro__}
    if kinds & {"HookedTransformer", "TransformerBridge"}:
        from polylens.hosts.transformer_lens.host import TransformerLensHost

        return TransformerLensHost(model)
    if "Envoy" in kinds:
        from polylens.hosts.nnsight.host import NNsightHost

        return NNsightHost(model, example_inputs)
    if isinstance(model, nn.Module):
        from polylens.hosts.torch.host import TorchHost

        return TorchHost(model, example_inputs)
    raise UnsupportedModel(
        f"cannot attach to a {type(model).__module__}.{type(model).__name__}{_instead(model)}; "
        "supported are TransformerLens' HookedTransformer and TransformerBridge, nnsight models, "
        "and any torch or Hugging Face module"
    )


def _instead(value: Any) -> str:
    """What somebody who gave this may have meant."""
    if isinstance(value, str):
        return (
            f": load the model first, TransformerBridge.boot_transformers({value!r}) or "
            f"AutoModelForCausalLM.from_pretrained({value!r})"
        )
    if isinstance(value, Tensor):
        return ": the model comes first, then the tokens"
    if isinstance(value, Mapping):
        return ": weights by name do not say what is computed with them; load them into a model"
    if isinstance(getattr(value, "model", None), nn.Module):
        return ": give its .model"
    if isinstance(value, tuple | list) and value and isinstance(value[0], nn.Module):
        return ": give the model in it alone"
    return ""
