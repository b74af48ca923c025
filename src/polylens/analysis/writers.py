"""Who wrote what an MLP reads: the residual stream of a TransformerLens cache, by name."""

from typing import Any, cast

import torch
from einops import einsum
from torch import Tensor

from polylens.analysis.arguments import check_lens
from polylens.analysis.dictionaries import hook_of, sae_writers
from polylens.analysis.interactions import through_norm
from polylens.checks import from_the_end
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.hosts.base import Norm, Values

# Rounding of the host's own forward pass, relative to what the MLP reads.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


@torch.no_grad()
def residual_writers(
    lens: Any,
    cache: Any,
    layer: int,
    position: int,
    batch: int = 0,
    *,
    heads: bool = True,
    sae: Any = None,
) -> tuple[Tensor, tuple[str, ...]]:
    """(writers [n, d_model], names) whose sum is exactly what this layer's MLP read.

    Embeddings, each head (or attention layer) and each earlier MLP, through the layer's norm, if it
    has one, and the one behind the attention, if there is one, with their scales frozen; then
    attention biases, the norm's bias and the rounding of the host's own sum, as writers of their
    own. With an SAE its active features at this position instead (`sae_writers`), and what was
    written elsewhere than at its hook point: so `interactions` says which pairs of SAE features
    interact through this MLP.

    Args:
        lens: attached while the cache was recorded, so that `poly_in` is in it.
        cache: of `model.run_with_cache`.
        layer, position, batch: which input; -1 is the last layer, and the last position.
        heads: False splits attention by layer only.
        sae: of SAELens, or with `encode`, `decode` and `cfg.hook_name`; trained at what this MLP
            reads, or at the residual stream in front of it (`hook_resid_pre`, `_mid`, `_post`).

    Raises:
        InvalidInputError: position out of range, a cache without what is needed (which), a layer
            that is not attached, or one that reads neither the residual stream nor a norm of it,
            such as one with a parallel attention; an SAE of another width or place.
    """
    check_lens(lens)
    if not hasattr(cache, "decompose_resid") and cache != {}:
        hint = "; give the second of (logits, cache)" if isinstance(cache, tuple) else ""
        if isinstance(cache, Values):
            hint = (
                " of lens.run_with_cache, which has the MLPs alone: attach to a TransformerBridge"
            )
        raise InvalidInputError(
            "cache must be that of TransformerLens' model.run_with_cache(tokens), got "
            f"{type(cache).__name__}{hint}"
        )
    lens[layer]  # refuses one that is not attached
    layer = cast(int, from_the_end(layer, lens.layers))
    try:
        norm = lens.host.norm(lens.sites[layer])
    except UnsupportedModel:  # it may read the stream itself; the sum is checked below
        norm = None
    point, scale = f"blocks.{layer}.mlp.hook_poly_in", f"blocks.{layer}.ln2.hook_scale"
    needed = [point] if norm is None else [point, scale]
    if missing := [name for name in needed if name not in cache]:
        raise InvalidInputError(
            f"the cache lacks {', '.join(missing)}; record it by model.run_with_cache(tokens) with "
            "the lens attached, without names_filter"
        )
    read = cache[point]
    if -read.shape[1] <= position < 0:
        position += read.shape[1]
    if batch not in range(len(read)) or position not in range(read.shape[1]):
        raise InvalidInputError(
            f"no position {position} of sequence {batch}: the cache holds {tuple(read.shape[:2])}"
        )
    stack, names = cache.decompose_resid(
        layer,
        mlp_input=True,
        mode="mlp" if heads and sae is None else "all",
        pos_slice=position,
        return_labels=True,
    )
    writers, names = [stack[:, batch]], list(names)
    own = None if sae is None else _sae_at(sae, cache, layer, position, batch, read)
    if heads and sae is None:
        biases = torch.zeros_like(writers[0][:1])
        behind = _norms_behind(lens, cache, layer, norm)
        for block in range(layer + 1):
            written, bias = _attention(cache, block, position, batch, behind.get(block))
            writers.append(written)
            biases = biases + bias
            names += [f"L{block}H{head}" for head in range(len(written))]
        writers.append(biases)
        names.append("attention biases")
    parts = torch.cat([w.to(read) for w in writers])
    if own is not None:
        activation, (features, names), direct = own
        if direct:
            rounding = read[batch, position].double() - features.sum(0)
            return torch.cat([features, rounding[None]]), (*names, "rounding")
        elsewhere = parts.double().sum(0) - activation.double()
        parts, names = torch.cat([features, elsewhere[None]]), [*names, "elsewhere"]
    if norm is None:
        parts = parts.double()
    else:
        parts = _behind(norm, parts, cache[scale][batch, position])
        names += [] if norm.bias is None else ["norm bias"]
    rounding = read[batch, position].double() - parts.sum(0)
    size = float(read[batch, position].double().norm())
    if float(rounding.norm()) > TOLERANCE.get(read.dtype, HALF_TOLERANCE) * size:
        raise InvalidInputError(
            f"layer {layer}: its writers sum to something {float(rounding.norm()) / size:.1%} "
            "away from what the MLP read, so this MLP does not read a plain norm of the residual "
            "stream; pass writers of your own to interactions()"
        )
    return torch.cat([parts, rounding[None]]), (*names, "rounding")


def _sae_at(
    sae: Any, cache: Any, layer: int, position: int, batch: int, read: Tensor
) -> tuple[Tensor, tuple[Tensor, tuple[str, ...]], bool]:
    """The activation at an SAE's hook point, its writers, and whether the MLP reads it itself."""
    hook = hook_of(sae)
    if hook not in cache:
        raise InvalidInputError(f"the cache lacks {hook}, where this SAE was trained")
    activation = cache[hook]
    if activation.shape[:2] == read.shape[:2] and activation.shape[2:] == read.shape[2:]:
        activation, x = activation[batch, position], read[batch, position]
        tolerance = TOLERANCE.get(read.dtype, HALF_TOLERANCE)
        if float((activation - x).norm()) <= tolerance * float(x.norm()):
            return activation, sae_writers(sae, activation), True
        block, _, point = hook.removeprefix("blocks.").partition(".")
        last = {"hook_resid_pre": layer, "hook_resid_mid": layer, "hook_resid_post": layer - 1}
        if point in last and block.isdigit() and int(block) <= last[point]:
            return activation, sae_writers(sae, activation), False
    raise InvalidInputError(
        f"an SAE trained at {hook} is not about what the MLP of layer {layer} reads: that is the "
        "residual stream in front of it, or the norm of it"
    )


def _norms_behind(
    lens: Any, cache: Any, layer: int, front: Norm | None
) -> dict[int, tuple[Norm, Tensor]]:
    """Of blocks up to this layer that have one, the norm behind the attention and its scales."""
    # OLMo 2 has no norm in front, and TransformerLens 3.9 calls the one behind ln1
    names = ("ln1_post", "ln1") if front is None else ("ln1_post",)
    scales: dict[int, Tensor] = {}
    for block in range(layer + 1):
        points = (f"blocks.{block}.{name}.hook_scale" for name in names)
        if point := next((point for point in points if point in cache), None):
            scales[block] = cache[point]
    norms = lens.host.norms_behind(scales, "attn") if scales else {}
    return {block: (norm, scales[block]) for block, norm in norms.items()}


def _attention(
    cache: Any, block: int, position: int, batch: int, behind: tuple[Norm, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """What each head [n_heads, d_model] and the biases [d_model] of an attention layer write.

    At one position; `stack_head_results` would fill the cache with all.
    """
    attn = cache.model.blocks[block].attn
    z = cache["z", block, "attn"][batch, position]
    written = einsum(z, attn.W_O.to(z), "head d_head, head d_head d_model -> head d_model")
    n_heads, b_O = len(written), getattr(attn, "b_O", None)
    bias = torch.zeros_like(written[0]) if b_O is None else b_O.to(written)
    written = torch.cat([written, bias[None]])
    if behind is not None:
        norm, scales = behind
        written = _behind(norm, written, scales[batch, position])
    return written[:n_heads], written[n_heads:].sum(0)


def _behind(norm: Norm, writers: Tensor, scale: Tensor) -> Tensor:
    return through_norm(writers, scale, centred=norm.centred, weight=norm.weight, bias=norm.bias)
