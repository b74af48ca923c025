"""Streamed least squares, neuron by neuron: the per-neuron fit to samples."""

import warnings
from collections.abc import Iterable, Iterator
from math import factorial
from typing import Any

import torch
from torch import Tensor

from polylens.devices import per_block
from polylens.errors import InvalidInputError, NumericalWarning
from polylens.fitting.fused import add_fused
from polylens.fitting.nested import glu_tables, nested_solutions
from polylens.inputs.samples import Flaws, shaped
from polylens.normal_forms.preactivation import Shown, blocks
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.ends import Ends, PreactivationRange
from polylens.polynomials.factored import Polynomial
from polylens.ranks import Merge

linalg: Any = torch.linalg  # without types

# Float64 numbers in one block of features: a core's cache on a CPU, plenty of work on a GPU.
BLOCK = 1 << 18, 1 << 25
# Ridge relative to each feature's mean square, the pivot below which it is added, and how often
# what it leaves of the normal equations is solved for again: of an eigenvalue v of the scaled Gram
# matrix a share (RIDGE / (v + RIDGE))^(AGAIN + 1) stays unsolved.
RIDGE, PIVOT, AGAIN = 1e-12, 1e-12, 4
# A feature with less than this share of the mean square that it has under a Gaussian is what
# rounding leaves of zero: He_2 of what is -1 or 1, He_3 of what is 0 or the root of 3 either way.
NULL = 1e-14


class NeuronGram:
    """Streamed normal equations of every neuron's own least-squares polynomial.

    The basis of a neuron is 1, He_1(t), zeta, He_2(t), zeta He_1(t), ... (no zeta for an MLP)
    with t = (y - m) / s and zeta = (z - E[z]) / sd(z), its target act(y) z. Feed it the inputs
    of the layer, whole batches or as hooks deliver them; memory is (2 degree + 2)^2 float64 per
    neuron however many samples there are.

    Args:
        weights: the layer.
        degree: highest degree that `solve` will be asked for.
        standardise: (m, s, z mean, z deviation), each [d_mlp]; None takes those of the first
            batch. They only affect conditioning, so a first batch of a few hundred samples is
            enough.
        seen: gets the range of the preactivations. Where it
            has ends that lie further inside, t stops there in the basis, and the target is
            without what the activation gains beyond them.
        linear: t itself, k = 1, does not stop there.

    Attributes:
        standardise: as above; None before the first batch.
        size: number of features and the target.
    """

    def __init__(
        self,
        weights: MLPWeights | GLUWeights,
        degree: int,
        standardise: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        seen: PreactivationRange | None = None,
        linear: bool = False,
    ) -> None:
        self.weights, self.degree = weights, degree
        self.standardise = standardise
        self._rows: Tensor | int = 0
        self._flaws = Flaws()
        self._seen, self._linear = seen, linear
        inner = None if seen is None else seen.inner
        inner = inner if inner is None or inner.dim() == 2 else inner[degree]
        self._ends = None if inner is None else Ends(weights.act, inner)
        self._glu = isinstance(weights, GLUWeights)
        self.size = self.size_of(weights, degree)
        self._gram = torch.zeros(
            weights.d_mlp, self.size, self.size, dtype=torch.float64, device=weights.device
        )

    @staticmethod
    def size_of(weights: MLPWeights | GLUWeights, degree: int) -> int:
        """Features of a neuron, and the target."""
        return (2 * degree if isinstance(weights, GLUWeights) else degree) + 2

    @property
    def count(self) -> float:
        """Samples seen so far, or the sum of their weights."""
        return float(self._gram[0, 0, 0])

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        sample_weights: Tensor | None = None,
        beside: "NeuronGram | None" = None,
        shown: Iterable[Shown] | None = None,
    ) -> None:
        """Add inputs x [..., d_in] of the layer, optionally weighted [...].

        Preactivations are computed in the wider dtype of x and the weights, as the layer does,
        the sums in float64. Cost: O(d_mlp (d_in + degree^2)) per sample.

        Args:
            beside: other sums that get the same preactivations; they must be standardised.
            shown: `blocks` of x, where somebody has them.
        """
        x, sample_weights = shaped(x, sample_weights, self.weights.d_in)
        if not len(x):
            return
        self._flaws.note(x, sample_weights)
        some = len(x) if sample_weights is None else (sample_weights > 0).sum()
        self._rows = self._rows + some
        if beside is not None:
            beside._rows, beside._flaws = self._rows, self._flaws
        for y, z, w in blocks(self.weights, x, sample_weights) if shown is None else shown:
            target = self.weights.act(y)
            self._add(y, z, w, target)
            if beside is not None:
                beside._add(y, z, w, target)

    @torch.no_grad()
    def add(self, y: Tensor, z: Tensor | None, sample_weights: Tensor | None) -> None:
        """Add inputs by their preactivations [d_mlp, n], which are finite."""
        some = y.shape[1] if sample_weights is None else (sample_weights > 0).sum()
        self._rows = self._rows + some
        self._add(y, z, sample_weights, self.weights.act(y))

    def merge(self, by: Merge, beside: "NeuronGram | None" = None) -> None:
        """Let all sums become what `by` makes of them; standardised alike, they can be added.

        Args:
            beside: other sums, that were updated beside these.
        """
        self._gram, self._rows = by.total(self._gram), by.total(self._rows)
        self._flaws.merge(by)
        if beside is not None:
            beside._gram = by.total(beside._gram)
            beside._rows, beside._flaws = self._rows, self._flaws

    def _add(self, y: Tensor, z: Tensor | None, w: Tensor | None, target: Tensor) -> None:
        if self.standardise is None:
            moments = NeuronMoments(self.weights)
            moments.add(y, z, None)
            self.standardise = moments.standardise(fallback=1.0)
        if self._seen is not None:
            self._seen.add(y)
        own = self.standardise, self._ends, self.degree, self._linear
        if add_fused(self._gram, y, z, target, w, *own):
            return
        if self._ends is not None:
            more = self._ends.of(slice(None), y).gained(y)
            target = target if more is None else target - more
        root = None if w is None else w.double().sqrt()
        for rows in _row_blocks(y, self.size):
            features = self.features(rows, y[rows], None if z is None else z[rows], target[rows])
            if root is not None:
                features *= root
            self._gram[rows].baddbmm_(features, features.mT)

    def features(
        self, rows: slice | Tensor, y: Tensor, z: Tensor | None, act: Tensor, more: int = 0
    ) -> Tensor:
        """Basis and target [neurons, size + more, n] in float64 of these neurons.

        Args:
            y, z: [neurons, n]; act: of y, without what is gained beyond ends.
            more: rows that are left unset.
        """
        assert self.standardise is not None
        m, s, z_mean, z_scale = (each[rows, None] for each in self.standardise)
        last = self.size - 1
        out = y.new_empty(len(y), self.size + more, y.shape[1], dtype=torch.float64)
        if z is None:
            out[:, last] = act
        else:
            torch.mul(act, z, out=out[:, last])
        if not self.degree:
            out[:, 0] = 1.0
            return out
        # where: a constant neuron has t = 0
        inverse = torch.where(s > 0, 1 / s, 0.0)
        near = y if self._ends is None else self._ends.of(rows, y).clamp(y)
        t = torch.sub(y if self._linear else near, m, out=out[:, 1]).mul_(inverse)
        if z is not None:
            torch.sub(z, z_mean, out=out[:, 2]).div_(z_scale)
        bent = (near.double() - m) * inverse if self._linear and self._ends is not None else t
        fill_basis(out, self.degree, z is not None, bent)
        return out

    @torch.no_grad()
    def solve(self, degree: int | None = None, *, wait: bool = True) -> Polynomial:
        """The least-squares Polynomial of the samples so far, for every degree up to `degree`.

        Where features are collinear (fewer samples than features, a linear branch that is a
        function of the gate), a ridge of 1e-12 of their mean square makes the solution unique;
        it is recorded as `ridge` on the result, and warned of by a NumericalWarning.

        Args:
            wait: for the device, for what is refused and warned of; False where other sums of
                the same inputs say so.

        Raises:
            InvalidInputError: no samples, a degree above the one that sums were kept for.
        """
        n = self.degree if degree is None else degree
        if not 0 <= n <= self.degree:
            raise InvalidInputError(f"degree {n} was asked of sums kept for 0 ... {self.degree}")
        size, count = 2 * n + 1 if self._glu else n + 1, self._gram[0, 0, 0]
        if wait:
            self._require_sums(size)
        assert self.standardise is not None
        gram = self._gram[:, :size, :size] / count
        right = self._gram[:, :size, -1:] / count
        solutions, mended = solve_nested(gram, right, n, self._glu, self._rows < size, wait)
        collinear = int(mended.sum()) if wait else 0
        if collinear:
            warnings.warn(
                f"the features of {collinear} of {len(solutions[0])} neurons are collinear in "
                f"these samples; a ridge of {RIDGE:g} of their mean square was added to make the "
                "fit unique. More samples or a lower degree avoid it",
                NumericalWarning,
                stacklevel=3,
            )
        m, s, z_mean, z_scale = self.standardise
        if self._glu:
            solutions[:, :, 2::2] /= z_scale[:, None]
            tables = glu_tables(solutions, n, z_mean)
        else:
            tables = solutions.transpose(1, 2).contiguous(), None
        ridge = RIDGE if collinear else 0.0
        return Polynomial(self.weights, m, s, *tables, ridge=ridge)

    def _require_sums(self, size: int) -> None:
        """InvalidInputError unless there are sums of so many features to solve for."""
        self._flaws.require_none()
        if self.standardise is None or not self.count > 0:
            raise InvalidInputError("no samples with a positive weight, nothing to fit to")
        finite = torch.isfinite(self._gram[:, :, [*range(size), -1]][:, :size])
        if not finite.all():
            bad = int((~finite).any(2).any(1).sum())
            raise InvalidInputError(
                f"the sums of {bad} of {len(finite)} neurons are not finite: their preactivations "
                "overflow float64 in powers; fit a lower degree or inspect the inputs"
            )


def fill_basis(out: Tensor, degree: int, glu: bool, t: Tensor) -> None:
    """Fill in the rest of out [neurons, features, n], where t and zeta of a GLU stand in 1 and 2.

    t: what the higher features are of.
    """
    stride = 2 if glu else 1
    out[:, 0] = 1.0
    he = [out[:, 0], t, *(out[:, stride * (k - 1) + 1] for k in range(2, degree + 1))]
    for k in range(1, degree):
        torch.mul(t, he[k], out=he[k + 1]).sub_(he[k - 1], alpha=k)
        if glu:
            torch.mul(out[:, 2], he[k], out=out[:, 2 * k + 2])


def solve_nested(
    gram: Tensor, right: Tensor, n: int, glu: bool, few: Tensor | bool, wait: bool
) -> tuple[Tensor, Tensor]:
    """Coefficients [n + 1, d_mlp, features], and [d_mlp] which neurons needed a ridge.

    few: fewer samples than features.
    wait: for the device, to learn whether there is anything to mend; it is done in any case
        otherwise.
    """
    size = gram.shape[1]
    wait = wait or gram.device.type == "cpu"
    diagonal = gram.diagonal(dim1=1, dim2=2)
    unused = torch.zeros_like(diagonal, dtype=torch.bool)
    stride = 2 if glu else 1
    for k in range(2, n + 1):
        unused[:, stride * (k - 1) + 1] = diagonal[:, stride * (k - 1) + 1] <= NULL * factorial(k)
        if glu:
            least = NULL * factorial(k - 1) * diagonal[:, 2]
            unused[:, 2 * k] = diagonal[:, 2 * k] <= least
    if n:
        # A neuron whose t does not vary has no features beyond its constant (and zeta).
        variance = gram[:, 1, 1] - gram[:, 0, 1].square()
        dead = variance <= 1e-24 * (1 + gram[:, 1, 1])
        unused[:, 1] |= dead
        unused[:, 3 if glu else 2 :] |= dead[:, None]
    if not wait or unused.any():
        gram = gram.masked_fill(unused[:, :, None] | unused[:, None, :], 0.0)
        right = right.masked_fill(unused[:, :, None], 0.0)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    gram = gram * scale[:, :, None] * scale[:, None, :]
    gram.diagonal(dim1=1, dim2=2).masked_fill_(diagonal <= 0, 1.0)
    factor, info = linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2).square().amin(1)
    collinear = (info != 0) | ~(pivots > PIVOT) | few
    mending = not wait or bool(collinear.any())
    ridge = torch.where(collinear, RIDGE, 0.0)[:, None]
    if mending:
        gram.diagonal(dim1=1, dim2=2)[:] += ridge
        factor = linalg.cholesky(gram) if wait else linalg.cholesky_ex(gram)[0]
    right = right * scale[:, :, None]
    Qb = linalg.solve_triangular(factor, right, upper=False)
    sizes = range(1, size + 1, stride)
    found = nested_solutions(factor.mT, Qb, sizes)
    for solution, some in zip(found, sizes, strict=True) if mending else ():
        system, lower, part = gram[:, :some, :some], factor[:, :some, :some], solution[:, :some]
        for _ in range(AGAIN):
            left = right[:, :some] - system @ part + ridge[:, None] * part
            left = linalg.solve_triangular(lower, left, upper=False)
            more = linalg.solve_triangular(lower.mT, left, upper=True)
            part += torch.where(collinear[:, None, None], more, 0.0)
    return found.squeeze(3) * scale, collinear


def _row_blocks(y: Tensor, width: int) -> Iterator[slice]:
    """Some rows of y [d_mlp, n] at a time, for `width` numbers of each of its entries."""
    step = per_block(y.device, *BLOCK)
    step = max(1, step // (width * y.shape[1]))
    return (slice(i, i + step) for i in range(0, len(y), step))


class NeuronMoments:
    """Streamed mean and deviation of every neuron's y and z, about those of the first batch."""

    def __init__(self, weights: MLPWeights | GLUWeights) -> None:
        self.weights = weights
        self._shift: Tensor | None = None
        self._sums = torch.empty(0)
        self._count: Tensor | float = 0.0

    @torch.no_grad()
    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        """Add inputs x [n, d_in] of the layer, optionally weighted [n]."""
        for y, z, w in blocks(self.weights, x, sample_weights):
            self.add(y, z, w)

    def add(self, y: Tensor, z: Tensor | None, sample_weights: Tensor | None) -> None:
        """Add preactivations [d_mlp, n]."""
        present = [y] if z is None else [y, z]
        if self._shift is None:
            self._shift = torch.zeros(2, len(y), dtype=torch.float64, device=y.device)
            self._sums = self._shift.repeat(2, 1, 1)
            for shift, values in zip(self._shift, present, strict=False):
                torch.mean(values, 1, dtype=torch.float64, out=shift)
        w = self._shift.new_ones(y.shape[1]) if sample_weights is None else sample_weights.double()
        for k, branch in enumerate(present):
            for rows in _row_blocks(branch, 1):
                values = branch[rows] - self._shift[k, rows, None]
                self._sums[0, k, rows] += values @ w
                self._sums[1, k, rows] += values.square_() @ w
        self._count = self._count + w.sum()

    def standardise(self, fallback: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(m, s, z mean, z deviation); a constant y has s = fallback, a constant z 1."""
        if self._shift is None or not self._count > 0:
            raise InvalidInputError("no samples with a positive weight, nothing to fit to")
        delta, square = self._sums / self._count
        mean = self._shift + delta
        deviation = (square - delta.square()).clamp(min=0).sqrt()
        constant = deviation <= 1e-14 * mean.abs()
        s = torch.where(constant[0], fallback, deviation[0])
        return mean[0], s, mean[1], torch.where(constant[1], 1.0, deviation[1])
