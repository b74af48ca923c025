"""Inputs that were seen once and not kept, but for their mean and covariance."""

import torch
from torch import Tensor

from polylens.errors import InvalidInputError
from polylens.files.format import Record
from polylens.inputs.gaussian import Gaussian, Moments
from polylens.inputs.model import Fitted, InputModel


class Seen(InputModel):
    """What a fit to samples as they pass keeps of them: the metric of the inputs.

    Args:
        moments: a Gaussian with the mean and covariance of the inputs.
    """

    def __init__(self, moments: Gaussian) -> None:
        self._moments = moments

    @classmethod
    def of(cls, moments: Moments) -> "Seen":
        """From streamed sums, of which nothing is said when they are few: a fit is what warns."""
        return cls(moments.gaussian("the inputs", warn=False))

    @property
    def mean(self) -> Tensor:
        return self._moments.mean

    @property
    def cov(self) -> Tensor:
        return self._moments.cov

    @property
    def d_in(self) -> int:
        return self._moments.d_in

    def r2(self, polynomial: Fitted) -> Tensor:
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
        return Seen(self._moments.to(device))

    def __deepcopy__(self, memo: dict[int, object]) -> "Seen":
        return self

    def __repr__(self) -> str:
        return f"Seen(d_in={self.d_in})"
