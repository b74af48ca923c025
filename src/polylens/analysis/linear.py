"""Singular features of the linear part."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polylens.analysis.arguments import check_polynomial
from polylens.analysis.figures import spectrum_figure
from polylens.analysis.metric import Metric, MetricLike, check_count, metric_of
from polylens.analysis.parts import FeaturePart, chosen, feature_part
from polylens.brief import Brief
from polylens.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class SingularFeatures(Brief):
    """L^T beta = sum_i values_i q_i outputs_i^T, L L^T the metric on inputs.

    Attributes:
        values: [k], falling.
        vectors: [d_in, k] reading directions: x beta = sum_i (x . vectors_i) values_i outputs_i
            on the support of the metric.
        patterns: [d_in, k], metric @ vectors; the vectors themselves under the plain metric.
        outputs: [d_out, k], orthonormal.
        share: [k] cumulative share of the sum of all squared singular values; under a covariance
            metric, of the variance of the linear part.
        polynomial, metric: where they come from.
    """

    values: Tensor
    vectors: Tensor
    patterns: Tensor
    outputs: Tensor
    share: Tensor
    polynomial: Any = field(repr=False)
    metric: Metric = field(repr=False)

    def __len__(self) -> int:
        return len(self.values)

    def part(self, features: int | Sequence[int] | None = None) -> FeaturePart:
        """What these features, all by default, add to the layer's output.

        x -> sum_i ((x - mean) . vectors_i) values_i outputs_i, a function of inputs [..., d_in]
        that `Edit` takes out, scales or adds.

        Raises:
            InvalidInputError: a feature that is not there.
        """
        which = chosen(features, len(self))
        outputs = self.values[which, None] * self.outputs[:, which].T
        return feature_part(self.metric, self.vectors[:, which], outputs, 1)

    def plot(
        self,
        shape: tuple[int, int] | None = None,
        n: int = 4,
        *,
        title: str = "Linear features of the output",
    ) -> "Figure":
        """Spectrum, and of images of this shape the first n patterns."""
        return spectrum_figure(
            self.values,
            self.patterns,
            float(self.share[-1]),
            shape,
            n,
            title=title,
            value="singular value",
            signed=False,
        )


@torch.no_grad()
def singular_features(
    polynomial: Any, k: int | None = None, *, metric: MetricLike = None
) -> SingularFeatures:
    """The k largest singular triples of beta, the linear map of the degree 1 optimum.

    Args:
        polynomial: of degree 1 or more.
        k: how many; all of non-zero value by default.
        metric: as in `eigenfeatures`. With "covariance" the values are standard deviations of
            the output, and outputs the principal components of the linear part.

    Raises:
        InvalidInputError: k above the rank, an indefinite metric, a linear part that is zero.

    Cost: one SVD of [d_in, d_out]. Source: Belrose & Rigg 2025.
    """
    check_polynomial(polynomial)
    beta, _ = polynomial.linear()
    in_metric = metric_of(polynomial, metric)
    weighted = in_metric.into(beta)
    Q, values, outputs = torch.linalg.svd(weighted, full_matrices=False)
    cutoff = values[0] * max(weighted.shape) * torch.finfo(torch.float64).eps
    rank = int((values > cutoff).sum())
    if not rank:
        raise InvalidInputError("the linear part is zero, so it has no singular features")
    k = check_count(rank if k is None else k, rank, "the rank of the linear part")
    share = values.square().cumsum(0) / values.square().sum()
    outputs = outputs[:k].T
    vectors = beta @ outputs / values[:k]
    patterns = in_metric.out_of(Q[:, :k])
    return SingularFeatures(
        values[:k], vectors, patterns, outputs, share[:k], polynomial, in_metric
    )
