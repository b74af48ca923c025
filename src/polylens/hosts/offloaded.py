"""Models of which accelerate keeps a part elsewhere than where it is computed with.

With `device_map=`, `cpu_offload` and `disk_offload` a module's parameters are on torch's "meta"
device, without values, but for the time of its own forward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from polylens.files.format import sha256
from polylens.hosts.quantised import unwrapped


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves what flows, or weights, between devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether the parameters of a module are brought in for its forward pass only."""
    return _hook(module) is not None


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module: itself, or where it is offloaded its values.

    These are on the device on which the module is computed.
    """
    value: Any = getattr(module, name)
    hook = _hook(module)
    if hook is None or not value.is_meta:
        return value.detach()
    return hook.weights_map[name].detach().to(torch.device(hook.execution_device), value.dtype)


def without_values(model: nn.Module) -> list[str]:
    """The parameters and buffers of a model that are nowhere."""
    return [
        f"{path}.{name}"
        for path, module, name, value in _own(model)
        if value.is_meta and name not in getattr(_hook(module), "weights_map", ())
    ]


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` holds, one plain tensor after the other, offloaded and packed ones too."""
    kept = set(model.state_dict())
    for path, module, name, value in _own(model):
        key = f"{path}.{name}" if path else name
        if key in kept:
            value = parameter(module, name) if value.is_meta else value.detach()
            yield from unwrapped(key, value).items()


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor of `state`, with its dtype and shape, by name."""
    return {
        name: sha256([(f"{tensor.dtype} {list(tensor.shape)}", tensor)])
        for name, tensor in state(model)
    }


def execution_device(model: nn.Module) -> torch.device:
    """Where the first module with parameters is computed; the CPU of a model without any."""
    for module in model.modules():
        hook = _hook(module)
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not value.is_meta or hook is None:
                return value.device
            return torch.device(hook.execution_device)
    return torch.device("cpu")


def _hook(module: nn.Module) -> Any:
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            return each
    return None


def _own(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    yield path, module, name, value
