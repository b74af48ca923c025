"""What differs between a CPU and a GPU: how much is done at once, and waiting for numbers."""

from typing import Any

import torch
from torch import Tensor

# Devices with a cache that blocks should fit into; others want plenty of work at once.
CACHED = {"cpu"}


def per_block(device: torch.device, cached: int, other: int) -> int:
    """How many numbers, rows or neurons to take at a time on this device."""
    return cached if device.type in CACHED else other


def numbers(*tensors: Tensor) -> list[Any]:
    """The entries of these tensors of one dtype, one after the other, as Python numbers.

    One copy however many there are. Each wait costs a GPU its queue, so nothing is read where it
    would be read again for more neurons, tokens or degrees.
    """
    flat: Any = torch.cat([t.detach().reshape(-1) for t in tensors])
    return flat.tolist()
