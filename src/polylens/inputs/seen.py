"""Inputs that were seen once and not kept, but for their mean and covariance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polylens.errors import InvalidInputError
from polylens.files.format import Record
from polylens.inputs.gaussian import Gaussian, Moments
from polylens.inputs.model import Fitted, InputModel, Layer
from polylens.inputs.samples import Samples, joined


class Seen(InputModel):
    """What a fit to samples as they pass keeps of them: the metric of the inputs.

    Args:
        moments: a Gaussian with the mean and covariance of the inputs.
        some: a few of the inputs, on which it is measured how good a fit is; files have none.
    """

    def __init__(self, moments: Gaussian, some: Samples | None = None) -> None:
        self._moments, self._some = moments, some
        self.measured = self.quick = some is not None

    @classmethod
    def of(cls, moments: Moments, some: Sequence[tuple[Tensor, Tensor | None]] = ()) -> "Seen":
        """From streamed sums, of which nothing is said when they are few: a fit is what warns."""
        return cls(
            moments.gaussian("the inputs", warn=False), Samples(*joined(some)) if some else None
        )

    @property
    def mean(self) -> Tensor:
        return self._moments.mean

    @property
    def cov(self) -> Tensor:
        return self._moments.cov

    @property
    def d_in(self) -> int:
        return self._moments.d_in

    def average(self, of: Callable[[Tensor], Tensor], layer: Layer) -> Tensor:
        return super().average(of, layer) if self._some is None else self._some.average(of, layer)

    def r2(self, polynomial: Fitted) -> Tensor:
        if self._some is not None:
            return self._some.r2(polynomial)
        raise InvalidInputError(
            "the samples that this was fitted to were not kept, so there is no R2 under them; "
            "measure it on data with lens.report(tokens), or fit(weights, Samples(x))"
        )

    def mean_and_cov(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.cov

    def record(self) -> Record:
        return {"model": "Seen"}, self._moments.record()[1]

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "Seen":
        return cls(Gaussian.of_tensors(tensors))

    def to(self, device: torch.device | str) -> "Seen":
        return Seen(self._moments.to(device), self._some)

    def __deepcopy__(self, memo: dict[int, object]) -> "Seen":
        return self


class LeftOut(InputModel):
    """An input model that a file of a lens was written without.

    Whoever needs its moments gets an error that says how to have them, never those of another one.

    Args:
        name: which model it was.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def d_in(self) -> int | None:
        return None

    def r2(self, polynomial: Fitted) -> Tensor:
        raise self._refusal("R² under the inputs")

    def mean_and_cov(self) -> tuple[Tensor, Tensor]:
        raise self._refusal("the mean and covariance of the inputs")

    def record(self) -> Record:
        return {"model": None, "left_out": self.name}, {}

    def _refusal(self, what: str) -> InvalidInputError:
        return InvalidInputError(
            f"this needs {what}, which were left out of the file that the lens was loaded from "
            "(8 d_in² bytes for each layer); lens.save(path, moments=True) keeps them, or give an "
            "input model such as Gaussian.from_samples(x), or attach anew"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "LeftOut":
        return self

    def __repr__(self) -> str:
        return f"LeftOut({self.name})"


def without_moments(model: InputModel) -> InputModel:
    """What stands for the model in a file that has not its moments."""
    if isinstance(model, LeftOut) or model.mean_and_cov() is None:
        return model
    return LeftOut(type(model).__name__)

    def __repr__(self) -> str:
        return f"Seen(d_in={self.d_in})"
