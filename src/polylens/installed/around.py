"""A polynomial with the error that it made on some inputs."""

from torch import Tensor

from polylens.checks import Layer, label
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.hosts.base import Arrival
from polylens.polynomials.joint import Fitted


class Around:
    """f(x) + (y_0 - f(x_0)) of a layer, once (x_0, y_0) were recorded."""

    def __init__(self, layer: Layer, polynomial: Fitted) -> None:
        self._layer = layer
        self._polynomial = polynomial
        self._error: Tensor | None = None

    def record(self, arrival: Arrival) -> None:
        """Take this for (x_0, y_0); UnsupportedModel where that comes again."""
        if self._error is not None:
            raise UnsupportedModel(
                f"layer {label(self._layer)} is used several times in a pass, and has no one error"
            )
        self._error = arrival.y.detach() - self._polynomial(arrival.x).detach()

    def __call__(self, arrival: Arrival) -> Tensor:
        """What flows on; InvalidInputError for other inputs than those recorded."""
        error, shape = self._error, arrival.y.shape
        if error is None or error.shape != shape:
            was = "no input" if error is None else f"inputs of {list(error.shape)}"
            raise InvalidInputError(
                f"layer {label(self._layer)} has an error on {was}, and reads {list(shape)} now: "
                "replaced_around is of passes over the same inputs, in one batch, without a cache"
            )
        return self._polynomial(arrival.x) + error.to(arrival.y)
