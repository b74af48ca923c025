"""Evaluating a polynomial per neuron, P(v) + z Q(v), by Horner's rule."""

import torch
from torch import Tensor

# Elements of one elementwise block on a CPU: many for the cost of a call, few for a cache.
BLOCK = 1 << 18

Coefficients = tuple[Tensor, ...]  # [d_mlp] each, of v^0, v^1, ...
Range = tuple[Tensor, Tensor]  # [d_mlp] each, lowest and highest v


def evaluate(
    p: Coefficients,
    q: Coefficients | None,
    v: Tensor,
    z: Tensor | None,
    mean: Tensor | None = None,
    clip: Range | None = None,
    reuse: bool = False,
) -> Tensor:
    """P(v) + z Q(v), [..., d_mlp] in v's dtype; of v - mean where there is one.

    Args:
        p, q: in the dtype of evaluation.
        clip: v - mean beyond this range is taken to be at its end.
        reuse: may overwrite v, unless autograd needs it.
    """
    if len(p) == 1:
        return p[0].to(v.dtype).expand_as(v)
    needs_graph = torch.is_grad_enabled() and (
        v.requires_grad or (z is not None and z.requires_grad)
    )
    if needs_graph:
        centred = v if mean is None else v - mean
        centred = centred if clip is None else centred.clamp(*clip)
        h = _horner(p, centred)
        h = h if q is None or z is None else torch.addcmul(h, _horner(q, centred), z)
        return h.to(v.dtype)
    flat = v.reshape(-1, v.shape[-1])
    flat_z = None if z is None else z.reshape(flat.shape)
    target = flat if reuse else flat.new_empty(flat.shape)
    direct = not reuse and target.dtype == p[0].dtype
    rows = max(1, BLOCK // flat.shape[-1]) if v.device.type == "cpu" else max(1, len(flat))
    for i in range(0, len(flat), rows):
        block, into = flat[i : i + rows], target[i : i + rows]
        block = block if mean is None else block - mean
        if clip is not None:
            block = torch.clamp(block, *clip, out=block if reuse or mean is not None else None)
        h = _horner_inplace(p, block, into if direct else None)
        if q is not None and flat_z is not None:
            h = torch.addcmul(h, _horner_inplace(q, block), flat_z[i : i + rows], out=h)
        if h is not into:
            into.copy_(h)
    return target.reshape(v.shape)


def _horner(coefficients: Coefficients, v: Tensor) -> Tensor:
    value = coefficients[-1].expand_as(v)
    for a in reversed(coefficients[:-1]):
        value = torch.addcmul(a, value, v)
    return value


def _horner_inplace(coefficients: Coefficients, v: Tensor, out: Tensor | None = None) -> Tensor:
    if len(coefficients) == 1:
        return coefficients[0].expand_as(v)
    value = torch.addcmul(coefficients[-2], coefficients[-1], v, out=out)
    for a in reversed(coefficients[:-2]):
        torch.addcmul(a, value, v, out=value)
    return value
