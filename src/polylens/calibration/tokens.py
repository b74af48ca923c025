"""What users pass in for a model to run on: text made tokens, everything checked in one place."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from polylens.checks import Layer, check_at_least
from polylens.errors import InvalidInputError
from polylens.hosts.base import Host
from polylens.hosts.batch import DECODER, TOKENS, Batch, Inputs, plain
from polylens.hosts.direction import both_ways


def opened(inputs: Any, attention_mask: Any = None) -> tuple[Any, Any]:
    """(inputs, mask): a mapping as a dict of tensors, one tensor of a list of them.

    Raises:
        InvalidInputError: text, sequences of several lengths, or two masks.
    """
    if isinstance(inputs, Mapping):
        named: dict[str, Any] = plain(cast(Mapping[str, Any], inputs))
        # 0 for the first of BERT's two texts, which is what a model takes without them
        types = named.get("token_type_ids")
        if isinstance(types, Tensor) and not types.any():
            del named["token_type_ids"]
        if attention_mask is not None and "attention_mask" in named:
            raise InvalidInputError("attention_mask is given twice: among the tokens, and by name")
        return named, attention_mask
    several = list(cast(Sequence[Any], inputs)) if isinstance(inputs, list | tuple) else []
    if isinstance(inputs, str) or (several and all(isinstance(each, str) for each in several)):
        raise InvalidInputError(_TEXT)
    tensors = [each for each in several if isinstance(each, Tensor) and each.dim() > 1]
    if tensors and len(tensors) == len(several) and len({each.shape[1:] for each in tensors}) == 1:
        return torch.cat(tensors), attention_mask
    lengths = {len(cast(list[Any], each)) for each in several if isinstance(each, list | tuple)}
    if len(lengths) > 1:
        raise InvalidInputError(
            f"the sequences have {min(lengths)} to {max(lengths)} tokens; pad them, as "
            'tokenizer(texts, padding=True, return_tensors="pt") does, whose result can be given '
            "as it is"
        )
    return cast(Any, inputs), attention_mask


def tokenize(text: str | Sequence[str], tokenizer: Any, length: int = 128) -> Tensor:
    """Text as windows of token ids, int64 [n, length], for `attach` and `Lens.report`.

    Each window starts with the token that the tokenizer puts in front of texts, if it does; what
    does not fill a window at the end of a text is left out.

    Args:
        text: one or several, which share no window.
        tokenizer: of Hugging Face, or a model that has one as `model.tokenizer`.
        length: positions of each window.

    Raises:
        InvalidInputError: no tokenizer, length < 2, or no text that fills a window.

    >>> import polylens
    >>> model = polylens.demo.load_bridge()
    >>> polylens.tokenize("What does an MLP compute?", model, 8).shape
    torch.Size([3, 8])
    """
    tokenizer = _tokenizer(tokenizer)
    check_at_least("length", length, 2)
    texts: list[Any] = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(each, str) for each in texts):
        raise InvalidInputError(f"text must be a string or several, got {type(text).__name__}")
    found = [windows(tokenizer, ids_of(tokenizer, each), length) for each in texts]
    if not any(map(len, found)):
        longest = max((len(ids_of(tokenizer, each)) for each in texts), default=0)
        raise InvalidInputError(
            f"no text fills a window of {length} tokens, the longest has {longest}; give longer "
            "ones, or length="
        )
    return torch.cat(found)


def windows(tokenizer: Any, ids: list[int], length: int) -> Tensor:
    """int64 [n, length]: ids without special tokens cut into windows, a rest left out.

    Every window starts with the tokenizer's BOS token if it puts one in front of texts.
    """
    bos = leading_bos(tokenizer)
    fresh = length - len(bos)
    cut = torch.tensor(ids[: len(ids) // fresh * fresh], dtype=torch.long).reshape(-1, fresh)
    start = torch.tensor(bos, dtype=torch.long).expand(len(cut), -1)
    return torch.cat([start, cut], dim=1)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text of any length, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def leading_bos(tokenizer: Any) -> list[int]:
    """The token that is put in front of texts, if there is one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _tokenizer(value: Any) -> Any:
    found = value if callable(getattr(value, "decode", None)) else getattr(value, "tokenizer", None)
    if found is None:
        raise InvalidInputError(
            f"a {type(value).__name__} has no tokenizer; give one of Hugging Face, such as "
            "AutoTokenizer.from_pretrained(name)"
        )
    return found


def read(
    host: Host,
    inputs: Inputs | Batch,
    attention_mask: Tensor | None,
    layers: Iterable[Layer],
    *,
    exclude_first: bool,
) -> Batch:
    """What a model is run on, checked. Streams that these layers read both ways start nowhere.

    Args:
        inputs, attention_mask: as in `attach`; or what was read before.

    Raises:
        InvalidInputError: as `validate_tokens`; floats where token ids are read, or the other way
            round; a mapping that the model cannot be run on (what is missing, or not taken).
    """
    if isinstance(inputs, Batch):
        return inputs
    inputs, attention_mask = opened(inputs, attention_mask)
    if isinstance(inputs, Mapping):
        inputs = _checked(host, cast(dict[str, Any], inputs))
        if attention_mask is not None:
            attention_mask = _as_tensor("attention_mask", attention_mask)
            attention_mask = _validate_mask(attention_mask, tuple(attention_mask.shape))
    elif host.reads_tokens:
        inputs, attention_mask = validate_tokens(
            cast(Tensor, inputs),
            attention_mask,
            d_vocab=host.d_vocab,
            n_positions=host.n_positions,
        )
    else:
        inputs = _validated_floats(inputs, attention_mask)
    batch = host.given(inputs, attention_mask)
    return batch.without_starts(both_ways(host, batch, layers)) if exclude_first else batch


def _checked(host: Host, inputs: dict[str, Any]) -> dict[str, Any]:
    """The tokens and the mask in a mapping as `validate_tokens` has them."""
    if not inputs:
        raise InvalidInputError("inputs are an empty mapping; give what a forward pass takes")
    checked, mask = dict(inputs), inputs.get("attention_mask")
    for name in {TOKENS, DECODER} & inputs.keys():
        own = {"d_vocab": host.d_vocab, "n_positions": host.n_positions} if name == TOKENS else {}
        with _naming(name):
            checked[name], _ = validate_tokens(inputs[name], None, **own)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        like = checked.get(TOKENS, mask)
        checked["attention_mask"] = _validate_mask(mask, tuple(like.shape))
    return checked


@contextmanager
def _naming(name: str) -> Generator[None, None, None]:
    """Say in an error which of the inputs it is about."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}") from error


def _validated_floats(inputs: Any, attention_mask: Tensor | None) -> Tensor:
    inputs = _as_tensor("inputs", inputs)
    if not inputs.is_floating_point() or inputs.dim() < 2 or inputs.numel() == 0:
        raise InvalidInputError(
            "this model reads no token ids but floats [batch, ...] (images, features), got "
            f"{inputs.dtype} of shape {tuple(inputs.shape)}"
        )
    if attention_mask is not None:
        raise InvalidInputError(
            "attention_mask goes with token ids, and this model reads none; give a mapping of all "
            "that it takes"
        )
    return inputs


def validate_tokens(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    *,
    d_vocab: int | None = None,
    n_positions: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The tokens and mask as int64 [batch, pos] on the CPU, where what counts is decided.

    Args:
        tokens: [batch, pos] token ids of any integer dtype, at least two positions.
        attention_mask: [batch, pos] of 0 and 1 (any dtype), 0 at padding; None counts all.
        d_vocab: size of the vocabulary, when known.
        n_positions: longest sequence that the model has positions for, where there is one.

    Raises:
        InvalidInputError: another dtype or shape, no tokens, ids outside the vocabulary, longer
            sequences, or a mask of another shape, with other values, or of padding only.
    """
    tokens = _as_tensor("tokens", tokens)
    shape = tuple(tokens.shape)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InvalidInputError(
            f"tokens must be integer token ids, got {tokens.dtype}; pass what the tokenizer "
            "returns as input_ids"
        )
    if tokens.dim() != 2:
        hint = "; add the batch axis: tokens[None]" if tokens.dim() == 1 else ""
        raise InvalidInputError(f"tokens must be [batch, pos], got shape {shape}{hint}")
    if tokens.numel() == 0:
        raise InvalidInputError(f"tokens are empty (shape {shape}); give at least one sequence")
    if shape[1] < 2:
        raise InvalidInputError(
            f"tokens have {shape[1]} position per sequence; at least 2 are needed, one to "
            "predict the other"
        )
    if n_positions is not None and shape[1] > n_positions:
        raise InvalidInputError(
            f"tokens have {shape[1]} positions per sequence, the model has {n_positions}; cut them "
            "into shorter sequences"
        )
    tokens = tokens.cpu().long()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (d_vocab is not None and high >= d_vocab):
        size = "" if d_vocab is None else f" to {d_vocab - 1}"
        raise InvalidInputError(
            f"token ids must go from 0{size}, got {low} to {high}; mark padding with "
            "attention_mask, and use the tokenizer of this model"
        )
    return tokens, _validate_mask(attention_mask, shape)


def _validate_mask(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    mask = _as_tensor("attention_mask", mask)
    if tuple(mask.shape) != shape:
        raise InvalidInputError(
            f"attention_mask must have the shape of the tokens, {shape}, got {tuple(mask.shape)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InvalidInputError(
            "attention_mask must hold 1 at tokens and 0 at padding, got other values; an "
            "additive mask (0 and -inf) becomes one by mask == 0"
        )
    if not bool((mask == 1).any()):
        raise InvalidInputError("attention_mask is 0 everywhere: every position is padding")
    return mask.cpu().long()


def token_names(tokenizer: Any) -> Callable[[int], str]:
    """Token id -> its text in quotes; the id itself where there is no tokenizer (None)."""
    return str if tokenizer is None else names_by(tokenizer.decode)


def names_by(decode: Callable[[list[int]], str]) -> Callable[[int], str]:
    """Token id -> its text in quotes."""
    # Bytes that are no text of their own come escaped, and repr would do it again.
    return lambda token: repr(decode([token])).replace(2 * "\\", "\\")


_TEXT = (
    "tokens must be token ids, got text; polylens.tokenize(text, tokenizer) cuts it into windows, "
    'and what tokenizer(texts, padding=True, return_tensors="pt") returns can be given as it is'
)


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInputError(
            f"{name} must be a tensor [batch, pos], got {type(value).__name__}; pass the "
            'input_ids and attention_mask of tokenizer(texts, return_tensors="pt")'
        ) from None
    if found.is_meta:
        raise InvalidInputError(f"{name}: on the meta device, where tensors have no values")
    return found
