"""A layer's preactivations: those of inputs, and their moments under a Gaussian."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polylens.devices import per_block
from polylens.inputs.gaussian import Gaussian
from polylens.normal_forms.weights import GLUWeights, MLPWeights

CHUNK = 4096
linalg: Any = torch.linalg  # without types
# (y, z, sample weights) of some inputs, [d_mlp, n] and [n].
Shown = tuple[Tensor, Tensor | None, Tensor | None]
# Inputs whose preactivations are held at a time.
ROWS = 1024, 4096
# Whether products of half precision can be given out in float32.
HALF_TO_FLOAT = torch.__version__ >= "2.8"


class Preactivations(NamedTuple):
    """Joint moments of the activated branch y and the linear branch z, each [d_mlp] float64.

    With t = (y - m) / s, z = z_mean + a t + r where r is independent of t. For an MLP the last
    three are zero.
    """

    m: Tensor
    s: Tensor
    z_mean: Tensor
    a: Tensor
    r_variance: Tensor


def branches(
    weights: MLPWeights | GLUWeights,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(W, b) of the activated branch and (V, b_V) of the linear one (None for an MLP)."""
    if isinstance(weights, GLUWeights):
        return weights.W_gate, weights.b_gate, weights.W_in, weights.b_in
    return weights.W_in, weights.b_in, None, None


def blocks(
    weights: MLPWeights | GLUWeights, x: Tensor, sample_weights: Tensor | None
) -> Iterator[Shown]:
    """(y, z, sample weights) of ROWS inputs at a time, on the layer's device."""
    step = per_block(weights.device, *ROWS)
    for i in range(0, len(x), step):
        w = None if sample_weights is None else sample_weights[i : i + step].to(weights.device)
        yield *_preactivations(weights, x[i : i + step].to(weights.device)), w


def _preactivations(weights: MLPWeights | GLUWeights, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """y [d_mlp, n] and z, in the wider dtype of x and the weights, at least float32."""
    W, b, V, b_V = branches(weights)
    y = _product(x, W, b)
    return y, None if V is None else _product(x, V, b_V)


def _product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """W^T x^T + b, [d_mlp, n]."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, W.dtype), torch.float32)
    if x.is_cuda and x.dtype == W.dtype != dtype and HALF_TO_FLOAT:
        # products of half precision are exact in float32, so this is as good and faster
        y = torch.mm(W.T, x.T, out_dtype=dtype)
    else:
        y = W.to(dtype).T @ x.to(dtype).T
    return y if b is None else y.add_(b.to(dtype)[:, None])


def preactivation_moments(
    inputs: Gaussian, weights: MLPWeights | GLUWeights, linear_variance: bool = False
) -> Preactivations:
    """m = mean W + b, s^2 = diag(W^T cov W), and for a GLU the moments of z and Cov(y, z) / s.

    Args:
        linear_variance: also compute Var(r), at the price of a second product with cov.

    Cost: one product cov @ W, O(d_in^2 d_mlp), in chunks of 4096 neurons.
    """
    W, b, V, b_V = branches(weights)
    deviations = inputs.variances().clamp(min=0).sqrt()  # rounding may be below zero
    columns: list[list[Tensor]] = [[], [], [], [], []]
    for i in range(0, W.shape[1], CHUNK):
        Wi = W[:, i : i + CHUNK].double()
        cov_W = inputs.cov_matmul(Wi)
        variance = linalg.vecdot(Wi, cov_W, dim=0)
        # A variance below the rounding of its own sum is that of a constant.
        rounding = 1e-15 * (deviations @ Wi.abs()).square()
        s = torch.where(variance > rounding, variance, 0.0).sqrt()
        columns[0].append(inputs.mean @ Wi)
        columns[1].append(s)
        if V is None:
            continue
        Vi = V[:, i : i + CHUNK].double()
        a = torch.where(s > 0, linalg.vecdot(Vi, cov_W, dim=0) / s, 0.0)
        columns[2].append(inputs.mean @ Vi)
        columns[3].append(a)
        if linear_variance:
            z_variance = linalg.vecdot(Vi, inputs.cov_matmul(Vi), dim=0)
            r_variance = z_variance - a * a
            columns[4].append(torch.where(r_variance > 1e-13 * z_variance, r_variance, 0.0))
    m, s = torch.cat(columns[0]), torch.cat(columns[1])
    z_mean, a, r_variance = (torch.cat(c) if c else torch.zeros_like(m) for c in columns[2:])
    if b is not None:
        m = m + b.double()
    if b_V is not None:
        z_mean = z_mean + b_V.double()
    return Preactivations(m, s, z_mean, a, r_variance)
