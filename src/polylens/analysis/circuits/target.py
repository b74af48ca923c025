"""What a circuit is traced back from."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from polylens.analysis.readout import single_token
from polylens.brief import Brief
from polylens.calibration.tokens import opened, token_names, validate_tokens
from polylens.errors import InvalidInputError
from polylens.hosts.frozen import FrozenModel

TargetLike = int | str | Sequence[int | str] | Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class Target(Brief):
    """A number that is linear in the residual stream at one position.

    Attributes:
        label: as figures show it.
        tokens: the ids whose logits it is made of; empty for a direction.
        position: from 0.
        layer: it reads the stream in front of this block; the number of blocks for logits.
        direction: [d_model] float64.
        constant: what is added.
        probability: of the first token, by the model itself; 1 for a direction.
    """

    label: str
    tokens: tuple[int, ...]
    position: int
    layer: int
    direction: Tensor
    constant: float
    probability: float


def resolve(
    host: Any, frozen: FrozenModel, target: TargetLike, position: int, layer: int | None
) -> Target:
    """The target that was meant.

    Raises:
        InvalidInputError: no token (which), a token against itself, a position outside the
            prompt, a direction of another size or without its layer.
    """
    n, blocks = len(frozen.tokens), len(frozen.blocks)
    if type(position) is not int or not -n <= position < n:
        raise InvalidInputError(
            f"position must be an integer in {-n} ... {n - 1}, the prompt has {n} tokens; got "
            f"{position!r}"
        )
    position %= n
    if isinstance(target, Tensor) and target.dim():
        return _along(frozen, target, position, layer, blocks)
    if layer is not None:
        raise InvalidInputError(
            "layer= is where a direction target= [d_model] reads the stream; logits are read "
            "behind the last"
        )
    logits = frozen.logits[position]
    if target is None:
        target = int(logits.argmax())
    pair = target if isinstance(target, tuple | list) else (target,)
    if len(pair) not in (1, 2):
        raise InvalidInputError(f"target must be one token or (token, against), got {target!r}")
    tokens = tuple(_token(host, each, frozen.W_U.shape[1]) for each in pair)
    if len(set(tokens)) < len(tokens):
        raise InvalidInputError(f"target {target!r} is a token against itself: always zero")
    weights = logits.new_zeros(frozen.W_U.shape[1])
    for token, sign in zip(tokens, (1.0, -1.0), strict=False):
        weights[token] = sign
    direction, constant = frozen.tokens_of(weights, position)
    names = token_names(host.tokenizer)
    label = " - ".join(f"logit of {names(token)}" for token in tokens)
    label += " before the cap" if frozen.capped else ""
    probability = float(logits.softmax(-1)[tokens[0]])
    return Target(label, tokens, position, blocks, direction, constant, probability)


def _along(
    frozen: FrozenModel, target: Tensor, position: int, layer: int | None, blocks: int
) -> Target:
    size = frozen.embedding.shape[1]
    if tuple(target.shape) != (size,) or not target.isfinite().all() or not target.any():
        raise InvalidInputError(
            f"a direction must be a finite vector [{size}] that is not zero, got "
            f"{tuple(target.shape)}"
        )
    if type(layer) is not int or not 0 < layer <= blocks:
        raise InvalidInputError(
            f"a direction needs layer=, an integer in 1 ... {blocks}: it reads the stream in front "
            f"of that block ({blocks}: behind the last); got {layer!r}"
        )
    label = f"a direction in front of layer {layer}"
    direction = target.detach().to(frozen.embedding)
    return Target(label, (), position, layer, direction, 0.0, 1.0)


def _token(host: Any, value: object, d_vocab: int) -> int:
    if isinstance(value, str):
        if host.tokenizer is None:
            raise InvalidInputError(
                f"target {value!r} is text, and the model has no tokenizer; give the token's id"
            )
        value = single_token(value, partial(host.tokenizer.encode, add_special_tokens=False))
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        with suppress(TypeError):  # a tensor of one float
            value = index(value)
    if type(value) is not int or not 0 <= value < d_vocab:
        raise InvalidInputError(
            f"target {value!r} is no token: give an id in 0 ... {d_vocab - 1}, its text, a pair of "
            "them, or a direction [d_model] with layer="
        )
    return value


def prompt_of(host: Any, tokens: Any) -> Tensor:
    """[pos] token ids of one prompt.

    Raises:
        InvalidInputError: no token ids of the model, several prompts, fewer than two tokens.
    """
    if isinstance(tokens, str):
        if host.tokenizer is None:
            raise InvalidInputError("tokens are text, and the model has no tokenizer; give ids")
        tokens = torch.tensor(host.tokenizer(tokens)["input_ids"])
    numbers = isinstance(tokens, list | tuple) and all(type(each) is int for each in tokens)
    if numbers or getattr(tokens, "ndim", 0) == 1:
        tokens = torch.as_tensor(tokens, dtype=torch.int64 if numbers else None)
    tokens, mask = opened(tokens)
    if isinstance(tokens, dict):
        tokens, mask = tokens.get("input_ids"), tokens.get("attention_mask")
    tokens = tokens[None] if isinstance(tokens, Tensor) and tokens.dim() == 1 else tokens
    if isinstance(tokens, Tensor) and tokens.shape[-1] < 2:
        raise InvalidInputError(
            f"the prompt has {tokens.shape[-1]} token: a circuit needs two or more, or there is "
            "nothing that attention could move"
        )
    tokens, mask = validate_tokens(tokens, mask, d_vocab=host.d_vocab, n_positions=host.n_positions)
    if len(tokens) != 1 or (mask is not None and not mask.all()):
        raise InvalidInputError(
            f"tokens must be one prompt [pos] without padding, got {tuple(tokens.shape)}; "
            "circuits() traces several"
        )
    return tokens[0]
