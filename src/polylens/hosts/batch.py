"""What a model is run on, rows of all of it together; where sequences start, what counts, what is
scored: nothing else decides it.

Language models park attention on the start of a sequence, where the MLPs' inputs are far from
all others. With `exclude_first` the first position that is no padding is left out of what is
fitted and of R2 (`Stream.counted`). Nothing here decides what flows in a replaced model: there an
input is covered by a polynomial or lies beyond its ends, wherever in a call it stands.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from polylens.errors import InvalidInputError

Inputs = Tensor | Mapping[str, Any]

# Names of the tokens that a model reads, and of those that the decoder beside an encoder reads.
TOKENS, DECODER = "input_ids", "decoder_input_ids"
# The label of what is not scored, as in torch.nn.CrossEntropyLoss.
IGNORED = -100
# What a tokenizer returns to say which tokens are special: these are not scored.
UNSCORED = "special_tokens_mask"
# In the names of integers that are no tokens.
_NO_TOKENS = ("mask", "position", "type", "label", "decoder", "length", "grid", "size", "offset")


@dataclass(frozen=True, eq=False)
class Stream:
    """Sequences of tokens that flow through a model, or through one of its parts.

    Attributes:
        there: [batch, pos] of bool, False at padding.
        starts: [batch, pos] of bool, True where a sequence starts.
        ids: [batch, pos], the tokens; None where the model is given something else.
    """

    there: Tensor
    starts: Tensor
    ids: Tensor | None = None

    @classmethod
    def of(
        cls, like: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> "Stream":
        """Of tokens [batch, pos], or what is there in their place [batch, pos, ...].

        Args:
            mask: [batch, pos], 0 or False at padding.
            positions: [batch, pos]; where they do not go up, another sequence starts.
        """
        there = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        if mask is not None:
            there = mask.to(like.device) != 0
        starts = there & (there.long().cumsum(-1) == 1)
        if positions is not None and positions.shape[-1] == there.shape[-1] and positions.dim() < 3:
            again = (positions.diff(dim=-1) <= 0).to(like.device)
            starts[:, 1:] |= again & there[:, 1:] & there[:, :-1]
        is_ids = like.dim() == 2 and not (like.is_floating_point() or like.dtype == torch.bool)
        return cls(there, starts, like if is_ids else None)

    def counted(self, *, exclude_first: bool) -> Tensor:
        """[batch, pos] of bool: True where an activation counts.

        Never at padding; with exclude_first not where a sequence starts either, which is position
        0 unless it is padded on the left or behind another one.
        """
        return self.there & ~self.starts if exclude_first else self.there

    def targets(self, lead: int) -> Tensor:
        """[batch, pos - lead] of bool: where a position predicts the one `lead` further on."""
        first = self.there[:, : self.there.shape[1] - lead]
        last = self.there & ~self.starts if lead else self.there
        return first & last[:, lead:]

    def rows(self, index: Any) -> "Stream":
        ids = None if self.ids is None else self.ids[index]
        return Stream(self.there[index], self.starts[index], ids)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of what a model is run on, and what of it counts and is scored.

    Attributes:
        args, kwargs: what the model is called with. Tensors have a row for each sequence (image,
            ...), or one for all.
        streams: by the name of its tokens (or other inputs) where some of it may not count.
        about: the name of the stream whose positions have logits.
        targets: [batch, pos] ids whose prediction can be scored, IGNORED where it is not; None
            where there are none.
        lead: how far in front of a target the logits are that predict it; None where the model
            decides, see `report.scores.lead_of`.
        size: how many rows.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    streams: Mapping[str, Stream]
    about: str
    targets: Tensor | None
    lead: int | None
    size: int

    def __len__(self) -> int:
        return self.size

    def rows(self, index: Any) -> "Batch":
        """Some of the rows: a slice or indices, of everything."""

        def part(name: str, value: Any) -> Any:
            is_rows = isinstance(value, Tensor) and value.dim() and len(value) == self.size
            return value[_on(index, value)] if is_rows else value

        streams = {name: s.rows(_on(index, s.there)) for name, s in self.streams.items()}
        targets = None if self.targets is None else self.targets[_on(index, self.targets)]
        args, kwargs = _mapped(part, self.args), _mapped(part, self.kwargs)
        size = len(torch.arange(self.size)[index])
        found = replace(self, args=args, kwargs=kwargs, streams=streams, targets=targets)
        return replace(found, size=size)

    def split(self, size: int) -> Iterator["Batch"]:
        """`size` rows at a time, as views; the last may be smaller."""
        for start in range(0, self.size, size):
            yield self.rows(slice(start, start + size))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Batch":
        """What the model is called with, on this device, its floats of this dtype."""

        def moved(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        return replace(self, args=_mapped(moved, self.args), kwargs=_mapped(moved, self.kwargs))

    def with_ids(self, name: str, ids: Tensor) -> "Batch":
        """The same with other tokens [batch, pos] in a stream that has some."""
        old = self.streams[name].ids

        def changed(key: str, value: Any) -> Any:
            is_old = (key == DECODER) == (name == DECODER) and isinstance(value, Tensor)
            return ids if is_old and old is not None and torch.equal(value, old) else value

        return replace(
            self,
            args=_mapped(changed, self.args),
            kwargs=_mapped(changed, self.kwargs),
            streams={**self.streams, name: replace(self.streams[name], ids=ids)},
        )

    def without_starts(self, names: Collection[str]) -> "Batch":
        """The same, where sequences of these streams start nowhere."""
        kept = {
            name: replace(s, starts=torch.zeros_like(s.starts)) if name in names else s
            for name, s in self.streams.items()
        }
        return replace(self, streams=kept)

    def counted(self, name: str, *, exclude_first: bool) -> Tensor | None:
        """[batch, pos] of bool, which positions of a stream count; None for all."""
        if name not in self.streams:
            return None
        flags = self.streams[name].counted(exclude_first=exclude_first)
        return None if bool(flags.all()) else flags

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name; those of nested mappings by their own."""
        yield from _leaves("inputs", self.args)
        yield from _leaves("inputs", self.kwargs)


def bare(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """Arguments of which nothing is counted or split."""
    return Batch(args, kwargs, {}, TOKENS, None, None, 1)


def batch_of(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    unscored: Tensor | None = None,
) -> Batch:
    """What these arguments say of themselves.

    The tokens are `input_ids`, else the first integers [batch, pos] whose name is not that of
    something else (mask, position, type, ...). Padding is where `attention_mask` is 0, or where
    another `...padding_mask` of bool is True, as torch has it.

    Args:
        attention_mask: [batch, pos], 0 at padding, in place of the one among the arguments.
        labels: [batch, pos] ids that are scored in place of the tokens.
        unscored: [batch, pos], not 0 at tokens that are not scored.

    Raises:
        InvalidInputError: tensors of which some have another number of rows.
    """
    leaves = [*_leaves("inputs", args), *_leaves("inputs", kwargs)]
    named = dict(reversed(leaves))
    size = _size(leaves)
    streams: dict[str, Stream] = {}
    ids = named.get(TOKENS, next(_integers(leaves), None))
    like, name = _main(ids, named, leaves)
    mask = _mask(attention_mask, named)
    if like is not None and (ids is not None or name == TOKENS or mask is not None):
        shape = like if mask is None or ids is not None or name == TOKENS else mask
        streams[name] = Stream.of(shape, mask, named.get("position_ids"))
    about, targets, lead = name, ids, None
    if DECODER in named or "decoder_inputs_embeds" in named:
        like = targets = named.get(DECODER)
        like = named["decoder_inputs_embeds"] if like is None else like
        behind = named.get("decoder_attention_mask")
        if behind is None and labels is not None:  # padded behind the last one that is scored
            behind = (labels != IGNORED).flip(1).cumsum(1).flip(1)
        streams[DECODER] = Stream.of(like, behind, named.get("decoder_position_ids"))
        about, lead = DECODER, 1 if labels is None else 0
    there = streams[about].there if about in streams else None
    if labels is not None and there is not None and labels.shape == there.shape:
        targets = labels
    if targets is not None and there is not None:
        left_out = ~there if unscored is None else ~there | (unscored != 0)
        targets = targets.masked_fill(left_out.to(targets.device), IGNORED)
    return Batch(args, kwargs, streams, about, targets, lead, size)


def accepted(module: nn.Module) -> set[str]:
    """Names of the arguments that the module's forward takes."""
    return set(inspect.signature(module.forward).parameters)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward takes an argument of this name.

    Models of Hugging Face swallow any name, and make nothing of those that they do not list.
    """
    parameters = inspect.signature(module.forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (passes_on and not is_pretrained(module))


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is one of Hugging Face's own classes, and none that wraps one."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def require_taken(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """InvalidInputError for tensors that the module's forward does not take."""
    unknown = [n for n, value in kwargs.items() if isinstance(value, Tensor | Mapping)]
    unknown = [name for name in unknown if not takes(module, name)]
    if unknown:
        raise InvalidInputError(
            f"{type(module).__name__} takes no {', '.join(unknown)}; it takes "
            f"{', '.join(accepted(module))}. Leave out what is not for the model"
        )


def plain(value: Any, name: str = "inputs") -> Any:
    """A mapping, also in mappings, as dicts, with tensors in place of arrays and lists.

    Raises:
        InvalidInputError: lists of rows of different lengths.
    """
    if isinstance(value, Mapping):
        return {key: plain(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple) or hasattr(value, "__array__"):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"{name} is no tensor, and rows of it cannot be made one ({error}); let the "
                'tokenizer or processor pad them and return_tensors="pt"'
            ) from error
    return value


def _mapped(function: Callable[[str, Any], Any], value: Any, name: str = "inputs") -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(function, each, key) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(function, each, name) for each in value)
    return function(name, value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | tuple):
        parts: Iterable[tuple[str, Any]] = (
            value.items() if isinstance(value, Mapping) else ((name, each) for each in value)
        )
        for key, each in parts:
            yield from _leaves(str(key), each)


def _integers(leaves: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    for name, t in leaves:
        whole = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
        if whole and t.dim() == 2 and not any(word in name for word in _NO_TOKENS):
            yield t


def _main(
    ids: Tensor | None, named: Mapping[str, Tensor], leaves: list[tuple[str, Tensor]]
) -> tuple[Tensor | None, str]:
    """The tokens, their embeddings or the first tensor, and the name of its stream."""
    if ids is not None:
        return ids, TOKENS
    if "inputs_embeds" in named:
        return named["inputs_embeds"], TOKENS
    return (leaves[0][1], leaves[0][0]) if leaves else (None, TOKENS)


def _mask(given: Tensor | None, named: Mapping[str, Tensor]) -> Tensor | None:
    """[batch, pos], not 0 where something is there; masks of more axes say who sees what."""
    mask = named.get("attention_mask") if given is None else given
    if mask is None:
        paddings = (t for name, t in named.items() if name.endswith("padding_mask"))
        padding = next((t for t in paddings if t.dtype == torch.bool), None)
        mask = None if padding is None else ~padding
    return mask if mask is not None and mask.dim() == 2 else None


def _size(leaves: list[tuple[str, Tensor]]) -> int:
    sizes = {name: len(t) for name, t in leaves if t.dim()}
    size = next((n for n in sizes.values() if n != 1), 1)
    for name, n in sizes.items():
        if n not in (1, size):
            raise InvalidInputError(
                f"{name} has {n} rows where others have {size} ({_shapes(leaves)}): inputs are "
                "batched along their first axis, a row for each sequence (image, ...)"
            )
    return size


def _shapes(leaves: Iterable[tuple[str, Tensor]]) -> str:
    return ", ".join(f"{name} {list(t.shape)}" for name, t in leaves)


def _on(index: Any, value: Tensor) -> Any:
    return index.to(value.device) if isinstance(index, Tensor) else index
