"""The one guard around polylens' own passes through a model, which must leave no trace."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from polylens.errors import UnsupportedModel
from polylens.hosts.offloaded import without_values


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
    if nowhere := without_values(model):
        raise UnsupportedModel(
            f"the model's weights are on the meta device ({nowhere[0]} and {len(nowhere) - 1} "
            "more); load them first"
        )
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


def require_as_is(module: object) -> None:
    """UnsupportedModel for compiled modules, which do not run hooks of later, and in autocast."""
    for path, part in module.named_modules() if isinstance(module, nn.Module) else ():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(
                f"{path or type(part).__name__} is compiled, and what was compiled does not run "
                "hooks that came later; attach to the model before it is compiled, for "
                "torch.compile(model) to the model itself"
            )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise UnsupportedModel(
            "within torch.autocast a model does not compute with the weights that it has; attach "
            "and measure outside of it (a replaced model may run within it)"
        )


def forget_compiled() -> None:
    """Have torch.compile look at its modules anew: graphs are shared between modules of a class,
    and do not notice that hooks have come or gone."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
