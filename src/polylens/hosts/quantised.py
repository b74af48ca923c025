"""Linear maps of which a quantisation library keeps the matrix packed: what it stands for.

No format is known by name. A packed tensor that dequantises itself is asked to; any other module
is run on the unit vectors, each of which every format rounds to itself. What the module then
computes says whether its inputs are rounded too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from polylens.checks import FLOATING

# Unit vectors run at once.
_ROWS = 1024
# Inputs in integers of 8 bits are off by less than the first, of the largest of a row; in floating
# point of 8 bits, which has 3 for the mantissa, by less than the second, of each.
_INTEGER, _FLOAT = 1 / 127, 1 / 16


def is_packed(module: nn.Module) -> bool:
    """Whether a module without children keeps its matrix otherwise than in a plain tensor."""
    if any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight):
        return type(weight).dequantize is not Tensor.dequantize
    return any(t.dtype not in FLOATING and t.numel() > 1 for _, t in _own(module))


def packed(module: nn.Module) -> dict[str, Tensor]:
    """By name, the plain tensors in which a module keeps its matrix."""
    found: dict[str, Tensor] = {}
    for name, tensor in _own(module):
        if name != "bias":
            found |= unwrapped(name, tensor)
    return found


def format_of(module: nn.Module) -> str:
    """What the packed matrix is called where it comes from."""
    weight = getattr(module, "weight", None)
    kind = type(module)
    if isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight):
        kind = type(weight)
    return f"{kind.__name__} of {kind.__module__.split('.')[0]}"


def dequantised(module: nn.Module, d_in: int, d_out: int, dtype: torch.dtype) -> Tensor:
    """[d_in, d_out] that a module multiplies its inputs by, in a tensor of its own.

    Cost: where its weight does not dequantise itself, a forward pass of the module for d_in rows.
    """
    weight = getattr(module, "weight", None)
    with torch.no_grad():
        if isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight):
            return weight.dequantize().to(dtype).T
        bias = getattr(module, "bias", None)
        device = next(tensor.device for _, tensor in _own(module))
        matrix = torch.empty(d_in, d_out, dtype=dtype, device=device)
        for start in range(0, d_in, _ROWS):
            rows = matrix[start : start + _ROWS]
            unit = torch.zeros(len(rows), d_in, dtype=dtype, device=device)
            unit.diagonal(start).fill_(1)
            # not a call: hooks are of what flows in the model
            rows.copy_(module.forward(unit))
            if isinstance(bias, Tensor):
                rows.sub_(bias)
    return matrix


def rounds_its_inputs(x: Tensor, y: Tensor, matrix: Tensor, bias: Tensor | None) -> float:
    """How far y is from x @ matrix + bias, over what inputs rounded to 8 bits explain.

    Errors of inputs are independent of each other, and below the largest that rounding makes, so
    that the mean square of those of a row of outputs is below theirs times the squared entries.

    Args:
        x: [n, d_in]; y: [n, d_out] that a module made of it.

    Returns:
        The largest over the rows; at most 1 where rounding explains it.
    """
    x, y = x.float(), y.float()
    error = y - x @ matrix.float() - (0 if bias is None else bias.float())
    step = torch.maximum(x.abs().amax(-1, keepdim=True) * _INTEGER, x.abs() * _FLOAT)
    allowed = step.square() @ matrix.float().square().mean(-1)
    return float((error.square().mean(-1) / allowed.clamp(min=1e-30)).sqrt().max())


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def unwrapped(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that one is made of, itself if it is plain."""
    if not is_traceable_wrapper_subclass(tensor):
        return {name: tensor}
    found: dict[str, Tensor] = {}
    for inner in tensor.__tensor_flatten__()[0]:
        found |= unwrapped(f"{name}.{inner}", getattr(tensor, inner))
    return found
