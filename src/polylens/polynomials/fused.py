"""Evaluation of polynomials on GPUs in one kernel, where Triton is there.

Operation by operation it is some fifteen passes over memory; here every number is read and
written once. `polylens.polynomials.evaluation` says what is computed, and computes it elsewhere.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polylens.polynomials.evaluation import NAMES, Rows, is_traced

# Rows and columns of one program.
TILE = 32, 64


def evaluate_fused(
    tables: dict[str, Rows],
    stacked: Tensor,
    v: Tensor,
    z: Tensor | None,
    less_mean: bool,
    reuse: bool,
) -> Tensor | None:
    """`evaluation.evaluate` in one kernel; None where it cannot be.

    It cannot on CPUs, without Triton, or where autograd, a compiler or torch.func follows.

    Args:
        stacked: the rows of the tables and, last, the mean, [rows, d_mlp].
        less_mean: evaluate at v - mean.
    """
    kernel = _kernel() if v.is_cuda else None
    if kernel is None or is_traced(v, z) or not v.numel():
        return None
    given = v.reshape(-1, v.shape[-1])
    given_z = given if z is None else z.reshape(given.shape)
    if given.stride(1) != 1 or given_z.stride(1) != 1:
        return None
    n, d = given.shape
    out = given if reuse else torch.empty_like(given, memory_format=torch.contiguous_format)
    with torch.cuda.device(v.device):
        kernel[-(-n // TILE[0]), -(-d // TILE[1])](
            given,
            given_z,
            out,
            stacked,
            n,
            d,
            given.stride(0),
            given_z.stride(0),
            out.stride(0),
            GLU=z is not None,
            MEAN=less_mean,
            **{f"N_{name}": len(tables.get(name, ())) for name in NAMES},
            N=TILE[0],
            D=TILE[1],
        )
    return out.reshape(v.shape)


@lru_cache
def _kernel() -> Any:
    try:
        from polylens.polynomials import evaluate_kernel
    except ImportError:
        return None
    module: Any = evaluate_kernel
    return module.evaluate_kernel
