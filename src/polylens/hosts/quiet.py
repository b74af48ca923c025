"""The one guard around polylens' own passes through a model, which must leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from polylens.errors import UnsupportedModel


@contextmanager
def quiet(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Eval mode without gradients; training flags and the states of generators come back.

    Args:
        seed: for the default generators of the CPU and of every CUDA device that the model is
            on. Those of other devices are not touched.

    Raises:
        UnsupportedModel: weights on the meta device.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        raise UnsupportedModel("the model's weights are on the meta device; load them first")
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    training = [(m, m.training) for m in model.modules()]
    with torch.random.fork_rng(devices), torch.no_grad():
        if seed is not None:
            # torch.manual_seed would seed every device that there is
            generators = [torch.cuda.default_generators[index] for index in devices]
            for generator in (torch.default_generator, *generators):
                generator.manual_seed(seed)
        try:
            for module, _ in training:
                module.training = False
            yield
        finally:
            for module, flag in training:
                module.training = flag
