"""Which layers, which degree and how many a user asked for: checked once, said once."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from polylens.errors import InvalidInputError, UnsupportedModel

if TYPE_CHECKING:
    from polylens.hosts.base import Layer


def check_degree(degree: int, fitted: int, remedy: str) -> int:
    """The degree itself.

    Args:
        remedy: what makes a higher degree possible: "attach" or "fit".

    Raises:
        InvalidInputError: not an integer in 0 ... fitted.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or not 0 <= degree <= fitted:
        hint = f"; {remedy} with degree={degree}" if type(degree) is int and degree > 0 else ""
        raise InvalidInputError(
            f"degree must be an integer from 0 to {fitted}, got {degree!r}: this is fitted to "
            f"degree {fitted}{hint}"
        )
    return degree


def check_at_least(name: str, value: int, least: int) -> None:
    """InvalidInputError for a number of that name that is no integer >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name} must be an integer >= {least}, got {value!r}")


def check_layers(
    layers: "Iterable[Layer] | int | None",
    there: "Collection[Layer]",
    refused: "Mapping[Layer, str]",
    where: str = "",
) -> "list[Layer]":
    """The layers in the order of `there`, each once; all that are there for None.

    A number stands for everything in that layer, (number, expert) for one expert.

    Args:
        where: what they are missing from, for the error.

    Raises:
        InvalidInputError: none, or one that is not there.
        UnsupportedModel: one that was refused (with the reason).
    """
    if layers is None:
        return list(there)
    chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen:
        raise InvalidInputError(f"layers is empty; there are {list(there)}")
    wanted: set[Layer] = set()
    for layer in chosen:
        members = {n for n in there if layer in (n, n[0] if isinstance(n, tuple) else n)}
        if not members and layer in refused:
            raise UnsupportedModel(refused[layer])
        if not members or isinstance(layer, bool):
            raise InvalidInputError(f"no layer {layer!r}{where}; there are {list(there)}")
        wanted |= members
    return [layer for layer in there if layer in wanted]


def label(layer: "Layer") -> str:
    """`3`, and `3.7` for expert 7 of layer 3."""
    return f"{layer[0]}.{layer[1]}" if isinstance(layer, tuple) else str(layer)


def labelled(text: str) -> "Layer":
    """The layer that has this label."""
    block, dot, expert = text.partition(".")
    return (int(block), int(expert)) if dot else int(block)


def block(layer: "Layer") -> int:
    """The number of the layer itself, or of the one that an expert is in."""
    return layer[0] if isinstance(layer, tuple) else layer
