"""Which layers and which degree a user asked for: checked once, said once."""

from collections.abc import Collection, Iterable, Mapping

from polylens.errors import InvalidInputError, UnsupportedModel


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


def check_layers(
    layers: Iterable[int] | int | None,
    there: Collection[int],
    refused: Mapping[int, str],
    where: str = "",
) -> list[int]:
    """The layers in order, each once; all that are there for None.

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
        raise InvalidInputError(f"layers is empty; there are {sorted(there)}")
    for layer in chosen:
        if layer in refused:
            raise UnsupportedModel(refused[layer])
        if isinstance(layer, bool) or layer not in there:
            raise InvalidInputError(f"no layer {layer!r}{where}; there are {sorted(there)}")
    return sorted(set(chosen))
