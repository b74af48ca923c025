"""What the analyses are given: the right kind of thing, or an error that says which."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from polylens.checks import Layer, from_the_end
from polylens.errors import InvalidInputError
from polylens.installed.installation import Installation
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.base import Approximation


def check_polynomial(value: Any) -> None:
    """InvalidInputError for anything but a polynomial."""
    if isinstance(value, Approximation):
        return
    if isinstance(value, Installation):
        layer = next(iter(value.layers))
        got = f"a lens, which holds one for each layer; give one of them, such as lens[{layer}]"
    elif isinstance(value, MLPWeights | GLUWeights):
        got = "a layer's weights; polylens.fit(weights, inputs) makes a polynomial of them"
    elif isinstance(value, nn.Module):
        got = f"the module {type(value).__name__}; polylens.attach(model, tokens) makes them"
    else:
        got = f"{type(value).__name__}; lens[layer] and polylens.fit(...) are polynomials"
    raise InvalidInputError(f"polynomial must be one, got {got}")


def check_lens(value: Any) -> None:
    """InvalidInputError for anything but a lens."""
    if not isinstance(value, Installation):
        raise InvalidInputError(
            "lens must be what polylens.attach(model, tokens) returns, got "
            f"{type(value).__name__}; of a single polynomial there are eigenfeatures, "
            "singular_features and interactions"
        )


def check_layer(lens: Any, layer: Any) -> Layer:
    """The layer of this lens; -1 is its last one.

    Raises:
        InvalidInputError: no lens, or one without this layer.
    """
    check_lens(lens)
    lens[layer]  # refuses one that is not attached
    return from_the_end(layer, lens.layers)


def check_functions(values: Any, name: str) -> list[Any]:
    """InvalidInputError for anything but functions, several of them."""
    several = list(values) if isinstance(values, Iterable) else []
    if not several or not all(callable(value) for value in several):
        raise InvalidInputError(
            f"{name} must be a list of functions from inputs [n, d_in] to logits [n, classes], "
            f"got {type(values).__name__}"
        )
    return several
