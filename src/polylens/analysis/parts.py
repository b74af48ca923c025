"""What features of a layer write, as a function of what it reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.analysis.metric import Metric, check_inputs
from polylens.brief import Brief
from polylens.errors import InvalidInputError


@dataclass(frozen=True, eq=False, repr=False)
class FeaturePart(Brief):
    """x -> sum_i (((x - center) . vectors_i)^power - means_i) outputs_i, in float64.

    What these features add to the layer's output beyond their mean under the inputs.

    Attributes:
        center: [d_in], the mean of the inputs; zero where it is not known.
        vectors: [d_in, k] reading directions; outputs: [k, d_out] what is written for each.
        means: [k], of the powers; zero where the inputs are not known.
        power: 1 of linear features, 2 of quadratic ones.
    """

    center: Tensor
    vectors: Tensor
    means: Tensor
    outputs: Tensor
    power: int

    def activations(self, x: Tensor) -> Tensor:
        """[..., k]: (x - center) . vectors, in float64."""
        x = check_inputs(x, len(self.center), self.center.device)
        return (x - self.center) @ self.vectors

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        return (self.activations(x) ** self.power - self.means) @ self.outputs


def chosen(features: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of `count` features; None for all.

    Raises:
        InvalidInputError: none, or one that is not there.
    """
    if features is None:
        return list(range(count))
    wanted = [features] if isinstance(features, int) else list(features)
    if not wanted or any(type(i) is not int or not 0 <= i < count for i in wanted):
        raise InvalidInputError(f"features must be some of 0 ... {count - 1}, got {features!r}")
    return wanted


def feature_part(metric: Metric, vectors: Tensor, outputs: Tensor, power: int) -> FeaturePart:
    """Of features that are read by vectors [d_in, k] and write outputs [k, d_out]."""
    means = metric.variance(vectors) if power == 2 else torch.zeros_like(vectors[0])
    return FeaturePart(metric.center().to(vectors), vectors, means, outputs, power)
