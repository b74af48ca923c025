"""Sums of normal equations on GPUs in one kernel, where Triton is there.

`polylens.fitting.neuron_gram` says what is summed, and sums it elsewhere: there every feature of
every neuron and input is written to memory and read again.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polylens.polynomials.ends import Ends
from polylens.polynomials.evaluation import ENDS

# Neurons and inputs of one program; an accumulator for each pair of features, in registers.
TILE = 1, 32
HIGHEST = 4


def add_fused(
    gram: Tensor,
    y: Tensor,
    z: Tensor | None,
    act: Tensor,
    sample_weights: Tensor | None,
    standardise: tuple[Tensor, Tensor, Tensor, Tensor],
    ends: Ends | None,
    degree: int,
    linear: bool,
) -> bool:
    """Add to gram [d_mlp, size, size] what `NeuronGram` sums; False where it cannot be done here.

    Args:
        y, z: [d_mlp, n] preactivations; act: of y.
        sample_weights: [n].
        standardise, ends, degree, linear: see `NeuronGram`.
    """
    kernel = _kernel() if y.is_cuda and degree <= HIGHEST else None
    if kernel is None:
        return False
    m, s, z_mean, z_scale = standardise
    tables = {} if ends is None else ends.tables(None, torch.float64)
    rows = [m, torch.where(s > 0, 1 / s, 0.0), z_mean, 1 / z_scale]
    rows += [row for name in ENDS for row in tables.get(name, ())]
    y, act = y.contiguous(), act.contiguous()
    z = y if z is None else z.contiguous()
    w = None if sample_weights is None else sample_weights.double().contiguous()
    d, n = y.shape
    with torch.cuda.device(y.device):
        kernel[(-(-d // TILE[0]),)](
            y,
            z,
            act,
            y if w is None else w,
            torch.stack(rows),
            gram,
            d,
            n,
            DEGREE=degree,
            GLU=z is not y,
            WEIGHTED=w is not None,
            LINEAR=linear,
            **{f"N_{name}": len(tables.get(name, ())) for name in ENDS},
            D=TILE[0],
            N=TILE[1],
            num_warps=1,
        )
    return True


@lru_cache
def _kernel() -> Any:
    try:
        from polylens.fitting import gram_kernel
    except ImportError:
        return None
    module: Any = gram_kernel
    return module.gram_kernel
