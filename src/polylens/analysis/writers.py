"""Who wrote what an MLP reads: the residual stream of a TransformerLens cache, by name."""

from typing import Any

import torch
from torch import Tensor

from polylens.analysis.interactions import through_norm
from polylens.errors import InvalidInputError, UnsupportedModel

# Rounding of the host's own forward pass, relative to what the MLP reads.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


@torch.no_grad()
def residual_writers(
    lens: Any, cache: Any, layer: int, position: int, batch: int = 0, *, heads: bool = True
) -> tuple[Tensor, tuple[str, ...]]:
    """(writers [n, d_model], names) whose sum is exactly what this layer's MLP read.

    Embeddings, each head (or attention layer) and each earlier MLP, through the layer's norm (and
    one behind the attention, as in Gemma) with its scale frozen; then attention biases, the norm's
    bias and the rounding of the host's own sum, as writers of their own.

    Args:
        lens: attached while the cache was recorded, so that `poly_in` is in it.
        cache: of `model.run_with_cache`.
        layer, position, batch: which input.
        heads: False splits attention by layer only.

    Raises:
        InvalidInputError: position out of range, a cache without what is needed (which), a layer
            that does not read a norm of the residual stream, such as one with a parallel
            attention.
    """
    try:
        norm = lens.host.norm(lens.sites[layer])
    except UnsupportedModel as error:
        raise InvalidInputError(
            f"layer {layer} reads the residual stream without a norm; pass writers of your own to "
            "interactions()"
        ) from error
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
        biases = torch.zeros_like(writers[0][:1])
        for block in range(layer + 1):
            written, bias = _attention(lens, cache, block, position, batch)
            writers.append(written)
            biases = biases + bias
            names += [f"L{block}H{head}" for head in range(len(written))]
        writers.append(biases)
        names.append("attention biases")
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


def _attention(
    lens: Any, cache: Any, block: int, position: int, batch: int
) -> tuple[Tensor, Tensor]:
    """What each head [n_heads, d_model] and the biases [d_model] of an attention layer write.

    At one position; `stack_head_results` would fill the cache with all.
    """
    attn = cache.model.blocks[block].attn
    z = cache["z", block, "attn"][batch, position]
    written = torch.einsum("hd,hdm->hm", z, attn.W_O.to(z))
    n_heads, b_O = len(written), getattr(attn, "b_O", None)
    bias = torch.zeros_like(written[0]) if b_O is None else b_O.to(written)
    written = torch.cat([written, bias[None]])
    scale = f"blocks.{block}.ln1_post.hook_scale"
    norm = lens.host.norm_behind(block, "attn") if scale in cache else None
    if norm is not None:
        written = through_norm(
            written,
            cache[scale][batch, position],
            centred=norm.centred,
            weight=norm.weight,
            bias=norm.bias,
        )
    return written[:n_heads], written[n_heads:].sum(0)
