"""What every estimator does: from inputs seen, batch by batch, to the polynomial of a layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from polylens.activations.activation import MAX_DEGREE
from polylens.errors import InvalidInputError
from polylens.normal_forms.weights import GLUWeights, MLPWeights, check_weights
from polylens.polynomials.ends import require_tails
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial
from polylens.ranks import Merge

# Inputs [n, d_in] and their weights [n], or None for equal ones.
Batch = tuple[Tensor, Tensor | None]


class Estimator(ABC):
    """Sums over the inputs of one layer; memory does not grow with their number.

    Args:
        weights: the layer.
        degree: of the fit, 0 ... 12.
        tails: where the polynomials end. None: nowhere. 0.0: at the lowest and highest
            preactivation of every neuron, beyond which it follows the asymptote of the
            activation (`Polynomial.with_ends`). A share below 0.5: further inside, so that so
            much of the layer's preactivations lies beyond, at the neurons and on the sides where
            that lowers the error most.

    Attributes:
        name: in words, as in summaries.
        default_tails: for fits that are to study the "true" stream, and for those on the
            "replaced" one.
        count: inputs seen so far.

    Raises:
        InvalidInputError: a degree or tails that cannot be.
    """

    name: ClassVar[str]
    default_tails: ClassVar[Mapping[str, float | None]]

    def __init__(
        self, weights: MLPWeights | GLUWeights, degree: int, tails: float | None = None
    ) -> None:
        require_degree(degree)
        self.check_tails(tails)
        self.weights, self.degree, self.tails = weights, degree, tails
        self.count = 0

    @abstractmethod
    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        """Add inputs [n, d_in], weighted by [n] > 0 or equally; what is kept of them is copied."""

    @abstractmethod
    def solve(self) -> Polynomial | JointPolynomial:
        """The fit to all inputs so far; InvalidInputError if they are NaN or too few."""

    def merge(self, by: Merge) -> None:
        """Let all sums become what `by` makes of them: those of no inputs, or of all ranks.

        What the inputs so far have decided (shifts, scales, ends) stays as it is, so that sums of
        estimators that saw the same first inputs can be added.

        Raises:
            InvalidInputError: an estimator that does not say how.
        """
        raise InvalidInputError(
            f"{type(self).__name__} does not say how its sums are added over ranks; define "
            "merge(by), which replaces each sum by by.total(sum), or leave out ranks="
        )

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:  # noqa: B027
        """Look at inputs that `update` gets afterwards; for those that can be read twice."""

    @classmethod
    def kept_bytes(cls, weights: MLPWeights | GLUWeights, degree: int) -> int:
        """Of the sums that it keeps of a layer, whatever the number of inputs."""
        return 0

    @classmethod
    def solving_bytes(cls, weights: MLPWeights | GLUWeights, degree: int) -> int:
        """What `solve` needs beside the sums."""
        return 0

    @classmethod
    def check_tails(cls, tails: float | None) -> None:
        """InvalidInputError for tails that this estimator does not know."""
        require_tails(tails)


def require_degree(degree: object) -> None:
    """InvalidInputError for a degree that cannot be fitted."""
    if isinstance(degree, bool) or not isinstance(degree, int) or not 0 <= degree <= MAX_DEGREE:
        raise InvalidInputError(
            f"degree must be an integer in 0 ... {MAX_DEGREE} (beyond, He_k and k! cancel more "
            f"digits than float64 has), got {degree!r}"
        )


def require_fit(
    weights: Any, inputs: Any, degree: int, kinds: type | tuple[type, ...], remedy: str
) -> None:
    """InvalidInputError unless a layer can be fitted under an input model of these kinds.

    Args:
        remedy: what else to pass or call for another type of inputs.
    """
    require_degree(degree)
    check_weights(weights)
    if not isinstance(inputs, kinds):
        names = [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
        raise InvalidInputError(
            f"inputs must be {' or '.join(names)}, got {type(inputs).__name__}; {remedy}"
        )
    d_in: int | None = inputs.d_in
    if d_in is not None and d_in != weights.d_in:
        raise InvalidInputError(
            f"the layer reads {weights.d_in} features, the input model has {d_in}"
        )
