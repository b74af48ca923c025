"""Who wrote what an MLP reads: the residual stream of a TransformerLens cache, by name."""

from typing import Any

import torch
from torch import Tensor

from polylens.analysis.interactions import through_norm
from polylens.errors import InvalidInputError

# Rounding of the host's own forward pass, relative to what the MLP reads.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


@torch.no_grad()
def residual_writers(
    lens: Any, cache: Any, layer: int, position: int, batch: int = 0, *, heads: bool = True
) -> tuple[Tensor, tuple[str, ...]]:
    """(writers [n, d_model], names) whose sum is exactly what this layer's MLP read.

    Embeddings, each head (or attention layer) and each earlier MLP, through the layer's norm with
    its scale frozen; then attention biases, the norm's bias and the rounding of the host's own
    sum, as writers of their own.

    Args:
        lens: attached while the cache was recorded, so that `poly_in` is in it.
        cache: of `model.run_with_cache`.
        layer, position, batch: which input.
        heads: False splits attention by layer only.

    Raises:
        InvalidInputError: position out of range, a cache without what is needed (which), a layer
            that does not read a norm of the residual stream, such as one with a parallel
            attention or a second norm behind it.
    """
    names_of_points = (f"blocks.{layer}.ln2.hook_scale", f"blocks.{layer}.mlp.hook_poly_in")
    missing = [name for name in names_of_points if name not in cache]
    if missing:
        raise InvalidInputError(
            f"the cache lacks {', '.join(missing)}; record it by model.run_with_cache(tokens) with "
            "the lens attached, without names_filter"
        )
    scales, read = (cache[name] for name in names_of_points)
    if batch not in range(len(read)) or position not in range(read.shape[1]):
        raise InvalidInputError(
            f"no position {position} of sequence {batch}: the cache holds {tuple(read.shape[:2])}"
        )
    stack, names = cache.decompose_resid(
        layer,
        mlp_input=True,
        mode="mlp" if heads else "all",
        pos_slice=position,
        return_labels=True,
    )
    writers, names = [stack[:, batch]], list(names)
    if heads:
        for block in range(layer + 1):
            written = _heads(cache, block, position, batch)
            writers.append(written)
            names += [f"L{block}H{head}" for head in range(len(written))]
        bias = cache.model.accumulated_bias(layer, mlp_input=True, include_mlp_biases=False)
        writers.append(bias[None].to(read))
        names.append("attention biases")
    norm = lens.host.norm(lens.sites[layer])
    parts = through_norm(
        torch.cat([w.to(read) for w in writers]),
        scales[batch, position],
        centred=norm.centred,
        weight=norm.weight,
        bias=norm.bias,
    )
    if norm.bias is not None:
        names.append("norm bias")
    rounding = read[batch, position].double() - parts.sum(0)
    size = float(read[batch, position].double().norm())
    if float(rounding.norm()) > TOLERANCE.get(read.dtype, HALF_TOLERANCE) * size:
        raise InvalidInputError(
            f"layer {layer}: its writers sum to something {float(rounding.norm()) / size:.1%} "
            "away from what the MLP read, so this MLP does not read a plain norm of the residual "
            "stream; pass writers of your own to interactions()"
        )
    return torch.cat([parts, rounding[None]]), (*names, "rounding")


def _heads(cache: Any, block: int, position: int, batch: int) -> Tensor:
    """[n_heads, d_model] of one position; `stack_head_results` would fill the cache with all."""
    z = cache["z", block, "attn"][batch, position]
    return torch.einsum("hd,hdm->hm", z, cache.model.blocks[block].attn.W_O.to(z))
