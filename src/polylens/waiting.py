"""Numbers off a tensor: what a GPU is waited for, so it is done once for many."""

from typing import Any

import torch
from torch import Tensor


def numbers(*tensors: Tensor) -> list[Any]:
    """The entries of these tensors of one dtype, one after the other, as Python numbers.

    One copy however many there are. Each wait costs a GPU its queue, so nothing is read where it
    would be read again for more neurons, tokens or degrees.
    """
    flat: Any = torch.cat([t.detach().reshape(-1) for t in tensors])
    return flat.tolist()
