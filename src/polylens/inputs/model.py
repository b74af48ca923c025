"""What every model of a layer's inputs knows, whatever it consists of."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from polylens.errors import ArtifactError, InvalidInputError
from polylens.files.format import Record


class Layer(Protocol):
    """What an input model asks of a layer: to be evaluated, and on what."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, x: Tensor, /) -> Tensor: ...


class Fitted(Protocol):
    """What an input model asks of a polynomial to say how well it does.

    `optimum_r2` and `r2_under` are closed forms; a polynomial without one refuses.
    """

    @property
    def weights(self) -> Layer: ...
    def all_degrees(self, x: Tensor) -> Tensor: ...
    def optimum_r2(self, gaussian: Any) -> Tensor: ...
    def r2_under(self, components: list[tuple[float, Any]]) -> Tensor: ...


class InputModel(ABC):
    """A distribution of what a layer reads.

    A new one is one file with a subclass: what fits to it is its own estimator's affair, whatever
    else polylens asks of it is here. Its name in files is that of the class.
    """

    models: ClassVar[dict[str, type["InputModel"]]] = {}
    # Whether figures are averages over inputs, and whether over few enough to take them any time.
    measured: bool = False
    quick: bool = False

    def __init_subclass__(cls) -> None:
        InputModel.models[cls.__name__] = cls

    @property
    @abstractmethod
    def d_in(self) -> int | None:
        """Number of features; None while it is not known."""

    @abstractmethod
    def r2(self, polynomial: Fitted) -> Tensor:
        """[degree + 1] share of the layer's variance that the polynomial explains under this."""

    def average(self, of: Callable[[Tensor], Tensor], layer: Layer) -> Tensor:
        """Mean over inputs of of(x [n, d_in]) [..., n], where it is `measured`."""
        raise InvalidInputError(f"a {type(self).__name__} has no inputs to take averages over")

    def mean_and_cov(self) -> tuple[Tensor, Tensor] | None:
        """Mean [d_in] and covariance [d_in, d_in] or its diagonal; None where they are not kept."""
        return None

    def record(self) -> Record:
        """What a file keeps of it, nothing by default; `of_tensors` is the inverse."""
        return {"model": None}, {}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "InputModel":
        """The model that had these tensors in its record.

        Raises:
            InvalidInputError: tensors that it cannot have.
        """
        raise InvalidInputError(f"{cls.__name__} are not kept in files")


def from_record(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> InputModel | None:
    """The input model of a record, bit for bit; None where it was not kept.

    Raises:
        ArtifactError: a model that is unknown here, or tensors that it cannot have.
    """
    if "left_out" in metadata:
        return InputModel.models["LeftOut"](str(metadata["left_out"]))  # pyright: ignore
    name = metadata.get("model")
    if name is None:
        return None
    if name not in InputModel.models:
        raise ArtifactError(
            f"this was saved with the input model {name!r}, which is not known here; import what "
            "defines it and load again"
        )
    try:
        return InputModel.models[name].of_tensors(tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the saved {name} is none: {error}") from error
