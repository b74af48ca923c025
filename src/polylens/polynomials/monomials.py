"""Polynomials per neuron in powers of y, and as tensors over the inputs."""

import math

import torch
from torch import Tensor


def expanded_about(powers: Tensor, shift: Tensor) -> Tensor:
    """Coefficients of y^l, where `powers` are those of (y + shift)^j."""
    out = torch.zeros_like(powers)
    for j in range(len(powers)):
        for power in range(j + 1):
            out[power] += math.comb(j, power) * shift ** (j - power) * powers[j]
    return out


def outer_powers(readout: Tensor, columns: list[Tensor]) -> Tensor:
    """sum_i readout[i] (x) columns_1[:, i] (x) ... (x) columns_k[:, i], as [d_out, d_in, ...]."""
    if not columns:
        return readout.sum(0)
    product = readout.T
    for column in columns[:-1]:
        product = product.unsqueeze(-2) * column
    return product @ columns[-1].T
