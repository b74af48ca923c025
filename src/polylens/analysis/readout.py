"""Features of a language model's layer as tokens, on the side it reads and the side it writes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polylens.analysis.metric import check_count
from polylens.errors import InvalidInputError


@torch.no_grad()
def embedding_scores(
    vectors: Tensor,
    W_E: Tensor,
    *,
    centred: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """[d_vocab, k]: how much each token's embedding activates each reading direction.

    The norm in front of the layer is applied to the embedding alone, so the scale is the one
    that the layer would see if nothing else had been written: score = norm(e_token) . vector.

    Args:
        vectors: [d_model, k] or [d_model], such as `EigenFeatures.vectors`.
        W_E: [d_vocab, d_model].
        centred: True for LayerNorm, False for RMSNorm.
        weight, bias: [d_model] of that norm, None where folded into the layer.

    Raises:
        InvalidInputError: sizes that do not fit.
    """
    columns = _columns(vectors, W_E.shape[1], "W_E [d_vocab, d_model]")
    e = W_E.detach().double()
    if centred:
        e = e - e.mean(1, keepdim=True)
    e = e / (e.square().mean(1, keepdim=True) + eps).sqrt()
    if weight is not None:
        e = e * weight.detach().double()
    if bias is not None:
        e = e + bias.detach().double()
    return e @ columns


@torch.no_grad()
def unembedding_scores(
    vectors: Tensor, W_U: Tensor, *, centred: bool, weight: Tensor | None = None
) -> Tensor:
    """[d_vocab, k]: which logits each direction of the residual stream raises.

    The final norm is linearised at a frozen scale, which is left out: scores are logits up to
    one positive factor per position, and centred over the vocabulary, which softmax cannot see.

    Args:
        vectors: [d_model, k] or [d_model], such as `SingularFeatures.outputs`.
        W_U: [d_model, d_vocab].
        centred, weight: of the final norm, as in `embedding_scores`.

    Raises:
        InvalidInputError: sizes that do not fit.
    """
    columns = _columns(vectors, W_U.shape[0], "W_U [d_model, d_vocab]")
    columns = behind_norm(columns.T, centred=centred, weight=weight).T
    scores = W_U.detach().double().T @ columns
    return scores - scores.mean(0)


@torch.no_grad()
def token_direction(
    W_U: Tensor,
    token: int,
    against: int | None = None,
    *,
    centred: bool,
    weight: Tensor | None = None,
) -> Tensor:
    """[d_model] float64: the output direction that raises this token's logit.

    Against the mean of all tokens, or against one other; through the final norm at a frozen
    scale, as in `unembedding_scores`.

    Raises:
        InvalidInputError: a token outside the vocabulary, or against itself.
    """
    columns = W_U.detach().double()
    for value in (token, token if against is None else against):
        if isinstance(value, bool) or value not in range(columns.shape[1]):
            raise InvalidInputError(
                f"token must be an id in 0 ... {columns.shape[1] - 1}, got {value!r}; for text "
                "use single_token(text, tokenizer.encode)"
            )
    if token == against:
        raise InvalidInputError(f"token {token} against itself is the zero direction")
    base = columns.mean(1) if against is None else columns[:, against]
    return before_norm(columns[:, token] - base, centred=centred, weight=weight)


def behind_norm(vectors: Tensor, *, centred: bool, weight: Tensor | None = None) -> Tensor:
    """[..., d_model] float64: what a norm makes of vectors, up to its (positive) scale."""
    vectors = vectors.detach().double()
    if centred:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    return vectors if weight is None else vectors * weight.detach().double()


def before_norm(u: Tensor, *, centred: bool, weight: Tensor | None = None) -> Tensor:
    """[..., d_model] float64: the direction in front of a norm that moves u behind it.

    The transpose of `behind_norm`: v . behind_norm(x) = before_norm(v) . x.
    """
    u = u.detach().double()
    if weight is not None:
        u = u * weight.detach().double()
    return u - u.mean(-1, keepdim=True) if centred else u


def single_token(text: str, encode: Callable[[str], Sequence[int]]) -> int:
    """The id of a text that is exactly one token.

    Args:
        encode: text -> ids without special tokens, such as
            partial(tokenizer.encode, add_special_tokens=False).

    Raises:
        InvalidInputError: no token, or several (which).
    """
    ids = list(encode(text))
    if len(ids) != 1:
        raise InvalidInputError(
            f"{text!r} is {len(ids)} tokens {ids}, not one; many vocabularies have the word with "
            "a leading space only, and encode must add no special tokens"
        )
    return int(ids[0])


def top_tokens(
    scores: Tensor, k: int = 8, names: Callable[[int], str] = str
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(highest, lowest) k tokens of one column of scores [d_vocab], by name.

    Raises:
        InvalidInputError: scores of more than one direction, k above the vocabulary.
    """
    if scores.dim() != 1:
        raise InvalidInputError(f"scores must be of one direction [d_vocab], got {scores.shape}")
    check_count(k, len(scores), "the vocabulary")

    def ends(sign: int) -> list[tuple[str, float]]:
        chosen = (sign * scores).topk(k).indices.tolist()
        return [(names(i), float(scores[i])) for i in chosen]

    return ends(1), ends(-1)


def _columns(vectors: Tensor, d_model: int, matrix: str) -> Tensor:
    columns = vectors.detach().double()
    columns = columns[:, None] if columns.dim() == 1 else columns
    if columns.dim() != 2 or len(columns) != d_model:
        raise InvalidInputError(
            f"vectors must be [{d_model}, k] to fit {matrix}, got {tuple(vectors.shape)}"
        )
    return columns
