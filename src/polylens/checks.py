"""Which layers, degree and options a user asked for: checked once, said once."""

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from polylens.errors import InvalidInputError, UnsupportedModel


@dataclass(frozen=True, order=True, repr=False)
class Expert:
    """One expert of a mixture: `lens[Expert(3, 7)]` is expert 7 of layer 3.

    Attributes:
        layer: number of the block.
        expert: its number among the block's experts.
    """

    layer: int
    expert: int

    def __repr__(self) -> str:
        return f"Expert({self.layer}, {self.expert})"

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}"


# What tells sites apart: the number of a block, or an expert in it.
Layer = int | Expert
# Several: numbers, or text such as "0-5,10".
Layers = Iterable[Layer] | Layer | str

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**hints: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function answer to options that it no longer has with an error that names the new.

    Options by position that are given by name only get a readable error, too.

    Args:
        hints: for each old name what to use instead.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        by_position = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        known = {p.name for p in parameters}
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        name = function.__name__
        name = function.__qualname__.partition(".")[0] if name == "__init__" else name
        own = by_position[1:] if by_position[:1] in (["self"], ["cls"]) else by_position

        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in hints.keys() & kwargs.keys():
                raise InvalidInputError(f"{name}() no longer takes {old}=; use {hints[old]}")
            for unknown in () if any_name else kwargs.keys() - known:
                near = difflib.get_close_matches(unknown, known, 1)
                hint = f"did you mean {near[0]}=?" if near else f"there are {', '.join(by_name)}"
                raise TypeError(f"{name}() takes no {unknown}=; {hint}")
            if len(args) > len(by_position) and not any_number:
                extra = args[len(by_position) :]
                raise InvalidInputError(
                    f"{name}() takes {', '.join(own) or 'nothing'} by position; give "
                    f"{', '.join(f'{each}=' for each in by_name) or 'nothing else'} by name (got "
                    f"{', '.join(map(_brief, extra))})"
                )
            return function(*args, **kwargs)

        return called

    return decorated


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


# What torch computes with everywhere.
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def as_tensor(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """A tensor, an array or nested lists as a tensor; a tensor that is there already is itself.

    Raises:
        InvalidInputError: anything else.
    """
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(value).__name__
        raise InvalidInputError(f"{name} must be a tensor, got {got}: {error}") from error


def real_numbers(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """A tensor, an array or nested lists as a detached tensor of real numbers, integers too.

    Raises:
        InvalidInputError: anything else: complex, boolean, sparse ones, those of eight bits, or
            without values.
    """
    tensor = as_tensor(name, value)
    real = not tensor.is_floating_point() or tensor.dtype in FLOATING
    real = real and not tensor.is_complex() and tensor.dtype != torch.bool
    if real and not tensor.is_meta and tensor.layout == torch.strided:
        return tensor.detach().to(device or tensor.device)
    raise InvalidInputError(
        f"{name} must be real numbers in a dense tensor, got {_described(tensor)} on "
        f"{tensor.device}"
    )


def floating(name: str, value: object, *, meta: bool = False) -> Tensor:
    """A tensor, an array or nested lists as a floating-point tensor; a tensor is itself.

    Args:
        meta: whether it may be one without values.

    Raises:
        InvalidInputError: no numbers, or integers, booleans, complex or sparse ones.
    """
    if isinstance(value, torch.nn.Module):
        raise InvalidInputError(
            f"{name} must be a tensor, got a {type(value).__name__}: give its weight, of an "
            "nn.Linear transposed (weight.T), since polylens computes x @ W"
        )
    tensor = as_tensor(name, value)
    if tensor.dtype not in FLOATING or tensor.layout != torch.strided:
        raise InvalidInputError(
            f"{name} must be floating point (and dense), got {_described(tensor)}"
        )
    if tensor.is_meta and not meta:
        raise InvalidInputError(f"{name} is on the meta device, where tensors have no values")
    return tensor


def check_features(
    x: object,
    d_in: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    *,
    name: str = "x",
    remedy: str = "",
) -> Tensor:
    """x itself.

    Raises:
        InvalidInputError: no dense floating-point tensor [..., d_in] (of this dtype, on this
            device, where they are given).
    """
    if isinstance(x, Tensor):
        good = x.shape[-1:] == (d_in,) and x.dtype in FLOATING and x.layout == torch.strided
        if good and dtype in (None, x.dtype) and device in (None, x.device):
            return x
    wanted = "floating point" if dtype is None else f"of {dtype}"
    wanted += "" if device is None else f" on {device}"
    got = f"{_described(x)} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise InvalidInputError(f"{name} must be a tensor [..., {d_in}] {wanted}, got {got}{remedy}")


def _described(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype} {list(tensor.shape)}{layout}"


def check_degree(degree: int, fitted: int, remedy: str) -> int:
    """The degree itself.

    Args:
        remedy: what makes a higher degree possible: "attach" or "fit".

    Raises:
        InvalidInputError: not an integer in 0 ... fitted.
    """
    if type(degree) is not int or not 0 <= degree <= fitted:
        hint = f"; {remedy} with degree={degree}" if type(degree) is int and degree > 0 else ""
        raise InvalidInputError(
            f"degree must be an integer from 0 to {fitted}, got {degree!r}: this is fitted to "
            f"degree {fitted}{hint}"
        )
    return degree


def check_at_least(name: str, value: int, least: int) -> None:
    """InvalidInputError for a number of that name that is no integer >= least."""
    if type(value) is not int or value < least:
        raise InvalidInputError(f"{name} must be an integer >= {least}, got {value!r}")


def layers_in(text: str) -> list[int]:
    """ "0-5,10" -> [0, 1, 2, 3, 4, 5, 10].

    Raises:
        InvalidInputError: anything else.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InvalidInputError(
                f"layers {text!r}: {part.strip()!r} is neither a layer nor a rising range; "
                "write them such as 0-5,10, or all"
            )
        layers.update(range(first, last + 1))
    return sorted(layers)


def check_layers(
    layers: Layers | None,
    there: Collection[Layer],
    refused: Mapping[Layer, str],
    where: str = "",
) -> list[Layer]:
    """The layers in the order of `there`, each once; all that are there for None or "all".

    A number stands for everything in that layer, a negative one counts from the last, an Expert
    stands for one expert, and text such as "0-5,10" for the numbers in it.

    Args:
        where: what they are missing from, for the error.

    Raises:
        InvalidInputError: none, or one that is not there.
        UnsupportedModel: one that was refused (with the reason).
    """
    if layers is None or layers == "all":
        return list(there)
    if isinstance(layers, str):
        layers = layers_in(layers)
    try:
        chosen = [layers] if isinstance(layers, Layer) else list(layers)
    except TypeError:
        raise InvalidInputError(
            f"layers must be numbers, or text such as '0-5,10', got {layers!r}"
        ) from None
    if not chosen:
        raise InvalidInputError(f"layers is empty; there are {list(there)}")
    wanted: set[Layer] = set()
    for layer in chosen:
        layer = from_the_end(layer, {*there, *refused})
        if isinstance(layer, tuple):
            raise InvalidInputError(
                f"no layer {layer!r}{where}: an expert is polylens.Expert(layer, expert), several "
                "layers are several entries"
            )
        members = {n for n in there if layer in (n, block(n))}
        if not members and layer in refused:
            raise UnsupportedModel(refused[layer])
        if not members or isinstance(layer, bool):
            raise InvalidInputError(f"no layer {layer!r}{where}; there are {list(there)}")
        wanted |= members
    return [layer for layer in there if layer in wanted]


def from_the_end(layer: Layer, there: Collection[Layer]) -> Layer:
    """Of a negative number the layer that it counts to, -1 being the last; others as they are."""
    numbers = sorted({block(each) for each in there})
    if isinstance(layer, int) and -len(numbers) <= layer < 0:
        return numbers[layer]
    return layer


def label(layer: Layer) -> str:
    """`3`, and `3.7` for expert 7 of layer 3."""
    return str(layer)


def labelled(text: str) -> Layer:
    """The layer that has this label."""
    number, dot, expert = text.partition(".")
    return Expert(int(number), int(expert)) if dot else int(number)


def block(layer: Layer) -> int:
    """The number of the layer itself, or of the one that an expert is in."""
    return layer.layer if isinstance(layer, Expert) else layer


def to_json(layer: Layer | None) -> list[int] | int | None:
    """As reports and traces keep it: `3`, and `[3, 7]` for expert 7 of layer 3."""
    return [layer.layer, layer.expert] if isinstance(layer, Expert) else layer


def from_json(value: list[int] | int | None) -> Layer | None:
    """The layer that `to_json` made this of."""
    return Expert(*value) if isinstance(value, list) else value
