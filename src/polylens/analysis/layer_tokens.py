"""What a layer reads and writes, as tokens: through the norms around it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polylens.analysis.arguments import check_layer, check_lens
from polylens.analysis.metric import gaussian_of
from polylens.analysis.readout import (
    before_norm,
    behind_norm,
    embedding_scores,
    single_token,
    token_direction,
    top_tokens,
    unembedding_scores,
)
from polylens.calibration.given import norm_inputs
from polylens.checks import Layer
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.hosts.base import Norm
from polylens.inputs.gaussian import Gaussian

TokenScores = list[tuple[str, float]]


@torch.no_grad()
def logit_direction(
    lens: Any, layer: Layer, token: int | str, against: int | str | None = None
) -> Tensor:
    """[d_out] float64: u such that a layer's output f raises a token's logit by f . u / scales.

    `token_direction` through the final norm and, where there is one (Gemma, OLMo 2), the norm
    behind the layer, their scales frozen: `scales` is the product of what the two divide by. What
    later layers make of f is not in it; `logit_gradient` has it.

    Args:
        lens: of a language model.
        layer: an attached layer.
        token: id, or text that is one token; `against` another, or None for the mean of all.

    Raises:
        InvalidInputError: no such layer or token, or a token against itself.
        UnsupportedModel: a model without an unembedding that polylens knows, or whose tokens are
            no directions of what its layers write.
    """
    last, own = _norms_behind(lens, layer)
    ids = token_id(lens, token), None if against is None else token_id(lens, against)
    u = token_direction(lens.host.unembedding, *ids, centred=last.centred, weight=last.weight)
    return u if own is None else before_norm(u, centred=own.centred, weight=own.weight)


@torch.no_grad()
def embedding_activations(
    lens: Any, layer: Layer, vectors: Tensor, center: Tensor, ids: Tensor | None = None
) -> Tensor:
    """[d_vocab, k]: each token's embedding alone, through the norm in front of the layer, less
    `center`, along reading directions [d_in, k]. Of these token ids only, where they are given.

    Raises:
        UnsupportedModel: a model without an embedding that polylens knows, or whose embedding is
            not what its layers read; a layer that does not read a norm's output.
    """
    check_lens(lens)
    W_E, norm = lens.host.embedding, lens.host.norm(lens.sites[layer])
    try:
        scores = embedding_scores(
            vectors,
            W_E if ids is None else W_E[ids.to(W_E.device)],
            centred=norm.centred,
            weight=norm.weight,
            bias=norm.bias,
        )
    except InvalidInputError as error:
        raise UnsupportedModel(f"layer {layer} reads no embeddings: {error}") from error
    return scores - center.to(scores) @ vectors.to(scores)


def input_moments(lens: Any, layer: Layer) -> Gaussian:
    """Mean and covariance of a layer's inputs, under what its polynomial was fitted to.

    An input model without moments: those that the norm in front of the layer implies.

    Raises:
        InvalidInputError: a lens loaded from a file without moments.
        UnsupportedModel: neither; the layer does not read a norm's output.
    """
    own = gaussian_of(lens[layer].inputs)
    return own or norm_inputs(lens.host, {layer: lens.sites[layer]})[layer]


@torch.no_grad()
def written_tokens(
    lens: Any, layer: Layer, u: Tensor, n_tokens: int, names: Callable[[int], str]
) -> tuple[TokenScores, TokenScores]:
    """(raised most, lowered most) when a layer writes u, through the norms behind it.

    Raises:
        UnsupportedModel: as `logit_direction`.
    """
    last, own = _norms_behind(lens, layer)
    u = u if own is None else behind_norm(u, centred=own.centred, weight=own.weight)
    scores = unembedding_scores(u, lens.host.unembedding, centred=last.centred, weight=last.weight)
    return top_tokens(scores[:, 0], n_tokens, names)


def token_id(lens: Any, token: int | str) -> int:
    """The id of a token that is given as such, or as its text.

    Raises:
        InvalidInputError: a text that is not one token, or a model without a tokenizer.
    """
    if not isinstance(token, str):
        return token
    check_lens(lens)
    tokenizer = lens.host.tokenizer
    if tokenizer is None:
        raise InvalidInputError(f"token {token!r}: this model has no tokenizer; give its id")
    return single_token(token, partial(tokenizer.encode, add_special_tokens=False))


def _norms_behind(lens: Any, layer: Layer) -> tuple[Norm, Norm | None]:
    """The final norm, and what the layer's output passes before the residual stream, if any."""
    layer = check_layer(lens, layer)
    return lens.host.final_norm(), lens.host.norms_behind([layer], "mlp").get(layer)
