"""Polynomials per neuron in powers of y, and as tensors over the inputs."""

import math

import torch
from torch import Tensor

# Neurons whose products are held at a time, if there are not more inputs.
NEURONS = 1024


def expanded_about(powers: Tensor, shift: Tensor) -> Tensor:
    """Coefficients of y^l, where `powers` are those of (y + shift)^j."""
    out = torch.zeros_like(powers)
    for j in range(len(powers)):
        for power in range(j + 1):
            out[power] += math.comb(j, power) * shift ** (j - power) * powers[j]
    return out


def outer_powers(readout: Tensor, columns: list[Tensor]) -> Tensor:
    """sum_i readout[i] (x) columns_1[:, i] (x) ... (x) columns_k[:, i], as [d_out, d_in, ...].

    Memory: where d_in >= NEURONS, twice the result beside it, however many neurons there are.
    """
    if not columns:
        return readout.sum(0)
    d_in, d_mlp = columns[0].shape
    total = readout.new_zeros(readout.shape[1], *[d_in] * len(columns))
    # so many neurons that their products are no larger than the sum
    step = max(d_in, NEURONS)
    for i in range(0, d_mlp, step):
        product = readout[i : i + step].T
        for column in columns[:-1]:
            product = product.unsqueeze(-2) * column[:, i : i + step]
        total += product @ columns[-1][:, i : i + step].T
    return total
