"""Where polylens meets the frameworks: one file per host."""

from typing import Any

from torch import nn

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
        f"cannot attach to a {type(model).__module__}.{type(model).__name__}; supported are "
        "TransformerLens' HookedTransformer and TransformerBridge, nnsight models, and any "
        "torch or Hugging Face module"
    )
