"""Whether weights are those that a polynomial was fitted to, in whatever dtype they are now."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polylens.devices import numbers
from polylens.normal_forms.weights import GLUWeights, MLPWeights

# Three sums by role of the weight; see `fingerprint`.
Fingerprint = Mapping[str, Sequence[float]]


def fingerprint(weights: MLPWeights | GLUWeights) -> Fingerprint:
    """Sum, square sum and a position-dependent sum of each weight, in float64."""
    sums: list[Tensor] = []
    tensors = weights.tensors()
    for tensor in tensors.values():
        rows = tensor.detach().double().reshape(len(tensor), -1)
        pattern = [
            torch.cos(torch.arange(n, dtype=torch.float64, device=rows.device) + 1)
            for n in rows.shape
        ]
        sums += [rows.sum(), rows.square().sum(), pattern[0] @ rows @ pattern[1]]
    values = numbers(torch.stack(sums))
    return {name: tuple(values[3 * i : 3 * i + 3]) for i, name in enumerate(tensors)}


# Of sums in float64, which another device or number of threads adds up in another order.
ROUNDING = 1e-13


def same_weights(
    fitted: Fingerprint,
    now: Fingerprint,
    weights: MLPWeights | GLUWeights,
    dtype: torch.dtype,
) -> bool:
    """Whether two fingerprints can be those of the same weights.

    Of the same dtype they are the same to the rounding of the sums.

    Args:
        now: of `weights`.
        dtype: that the fitted ones had.
    """
    if fitted.keys() != now.keys():
        return False
    # Rounding to another dtype moves each sum by at most eps * norm * sqrt(size).
    eps = ROUNDING
    if weights.dtype != dtype:
        eps = max(torch.finfo(weights.dtype).eps, torch.finfo(dtype).eps)
    for name, (total, square, mixed) in now.items():
        before = fitted[name]
        scale = eps * (before[1] * getattr(weights, name).numel()) ** 0.5 + 1e-300
        if abs(total - before[0]) > scale or abs(mixed - before[2]) > scale:
            return False
        if abs(square - before[1]) > 4 * eps * before[1]:
            return False
    return True
