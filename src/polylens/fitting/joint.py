"""Streamed least squares over the features of all neurons: the joint fit to samples."""

from collections.abc import Generator, Sequence
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from polylens.devices import numbers, require_room
from polylens.fitting.neuron_gram import NeuronGram, NeuronMoments
from polylens.fitting.samples import SampleEstimator
from polylens.inputs.samples import Flaws, joined, shaped
from polylens.normal_forms.preactivation import Shown, branches
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.ends import PreactivationRange
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import JointPolynomial, feature_count, features, readout
from polylens.ranks import Merge

linalg: Any = torch.linalg  # without types

# Ridge strengths, in units of a feature's mean square, and the one tried first.
STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
FIRST = STRENGTHS.index(0.3)
# Of every batch, the last fifth of the rows is held out to choose the strength; of batches that
# are too small for that, every fifth row.
HELD_OUT = 0.2
REMEDY = "fit neuron by neuron or a lower degree"
# Rows and columns of one block of a Gram matrix.
ROWS, COLUMNS = 2048, 1024


class JointEstimator(SampleEstimator):
    """Least squares over the inputs, with the features of all neurons for every output.

    Raises:
        OutOfMemory: too many features (the size).
    """

    name = "samples, jointly"

    def __init__(
        self, weights: MLPWeights | GLUWeights, degree: int, tails: float | None = None
    ) -> None:
        super().__init__(weights, degree, tails)
        size = feature_count(weights, degree)
        needed = self.kept_bytes(weights, degree) + self.solving_bytes(weights, degree)
        require_room(needed, weights.device, f"Gram matrices of {size:,} features", REMEDY)

    @classmethod
    def kept_bytes(cls, weights: MLPWeights | GLUWeights, degree: int) -> int:
        size = feature_count(weights, degree)
        return 8 * (weights.d_in**2 + 2 * size * (size + weights.d_out))

    @classmethod
    def solving_bytes(cls, weights: MLPWeights | GLUWeights, degree: int) -> int:
        return 16 * feature_count(weights, degree) ** 2  # the system and its Cholesky factor

    def _begun(
        self, seen: PreactivationRange | None, deciding: Sequence[Shown] | None
    ) -> "JointGram":
        if seen is not None and seen.inner is not None:
            seen.inner = seen.inner[-1]
        return JointGram(self.weights, self.degree, seen)


class JointGram:
    """Streamed normal equations of the least squares over all neurons' features.

    For every degree the fit minimises the mean of |f - base_n - Phi_n D|^2 + strength |D|^2
    (features at unit mean square); the strength is the one of least error on the last fifth of
    each batch, and D is then solved from all samples. One pass: features are standardised by the
    first block of samples. Memory is 2 features^2 float64, with features = 1 + d_in +
    (degree - 1) d_mlp (2 d_mlp for a GLU), whatever the number of samples.

    Args:
        weights: the layer.
        degree: of the fit.
        seen: gets the range of the preactivations, of samples with a positive weight. Where it
            has ends that lie further inside, the features that are not linear stop there, and
            what the activation gains beyond is not fitted.

    Attributes:
        dtype: of the products; sums are in float64.
    """

    def __init__(
        self, weights: MLPWeights | GLUWeights, degree: int, seen: PreactivationRange | None = None
    ) -> None:
        size = feature_count(weights, degree)
        self.dtype = torch.promote_types(weights.dtype, torch.float32)
        self._weights, self._degree = weights.to(self.dtype), degree
        self._neurons = NeuronGram(weights, degree, seen=seen, linear=True)
        self._ends = None if seen is None else seen.inner
        self._free = None if self._ends is None else NeuronGram(weights, degree)
        self._small, self._flaws = 0, Flaws()
        self._frame: tuple[Polynomial, Tensor, Tensor] | None = None
        self._train, self._test = (_Sums(size, weights.d_out, weights.device) for _ in range(2))

    @torch.no_grad()
    def update(self, x: Tensor, sample_weights: Tensor | None = None) -> None:
        """Add inputs x [..., d_in] of the layer, optionally weighted [...].

        Cost: O(features^2) per sample.
        """
        x, w = shaped(x, sample_weights, self._weights.d_in)
        self._flaws.note(x, w)
        cut = len(x) - self._held_out(len(x))
        for sums, rows in ((self._train, slice(0, cut)), (self._test, slice(cut, None))):
            block = x[rows], None if w is None else w[rows]
            sums.waiting.append(block)
            if sum(len(block) for block, _ in sums.waiting) >= ROWS:
                self._flush(sums)
            else:  # the caller may write to x, or free it
                sums.waiting[-1] = block[0].clone(), None if w is None else w[rows].clone()

    @torch.no_grad()
    def merge(self, by: Merge) -> None:
        """Let all sums become what `by` makes of them; of one frame, they can be added."""
        self._flaws.merge(by)
        for sums in (self._train, self._test):
            self._flush(sums)
            sums.merge(by)
        self._neurons.merge(by, beside=self._free)

    def _held_out(self, rows: int) -> int:
        """How many of a batch's rows are held out; of batches that are too small every fifth."""
        if rows >= 1 / HELD_OUT:
            return int(HELD_OUT * rows)
        before, self._small = self._small, self._small + rows
        return int(HELD_OUT * self._small) - int(HELD_OUT * before)

    def _flush(self, sums: "_Sums") -> None:
        """Add what is waiting."""
        waiting, sums.waiting = sums.waiting, []
        if not waiting:
            return
        x, w = joined(waiting)
        if self._frame is None:
            self._frame = self._standardised(x[:ROWS].to(self._weights.device, self.dtype))
        base, center, z_mean = self._frame
        self._neurons.update(x, w, beside=self._free)
        for i in range(0, len(x), ROWS):
            block = x[i : i + ROWS].to(self._weights.device, self.dtype)
            phi, beyond = features(base, center, z_mean, block, self._degree)
            roots = None if w is None else w[i : i + ROWS].to(phi).sqrt()
            out = self._weights(block)
            sums.add(phi, out if beyond is None else out - beyond @ self._weights.W_out, roots)

    def _standardised(self, x: Tensor) -> tuple[Polynomial, Tensor, Tensor]:
        """What `features` reads: m and s in a polynomial without coefficients, E[x], E[z]."""
        moments = NeuronMoments(self._weights)
        moments.update(x)
        m, s, _, _ = self._neurons.standardise = moments.standardise(fallback=1.0)
        if self._free is not None:
            self._free.standardise = self._neurons.standardise
        P = m.new_zeros(self._degree + 1, self._degree + 1, len(m))
        center, z_mean = x.double().mean(0), torch.zeros_like(m)
        _, _, V, b_V = branches(self._weights)
        if V is not None:
            z_mean = center @ V.double()
            z_mean = z_mean if b_V is None else z_mean + b_V.double()
        Q = None if V is None else P[:, : self._degree]
        frame = Polynomial(self._weights, m, s, P, Q)
        return frame if self._ends is None else frame.with_ends(self._ends), center, z_mean

    @torch.no_grad()
    def solve(self) -> JointPolynomial:
        """The fit to all samples so far, for every degree up to that of the sums.

        Raises:
            InvalidInputError: no samples with a positive weight, or sums that are not finite.
        """
        self._flaws.require_none()
        for sums in (self._train, self._test):
            self._flush(sums)
            sums.complete()
        base = self._neurons.solve()
        assert self._frame is not None
        _, center, z_mean = self._frame
        readouts = [readout(base, center, z_mean, n) for n in range(self._degree + 1)]
        errors, ridge = zip(*_chosen(self._train, self._test, readouts), strict=True)
        tested = float(self._test.count)
        held_out = tuple(error / tested if tested else nan for error in errors)
        every = self._train, self._test
        corrections = [
            _System(own, every, _scale(*every)).correction(strength)
            for own, strength in zip(readouts, ridge, strict=True)
        ]
        if self._free is not None:  # the readouts above are those of neurons without ends
            free = self._free.solve(wait=False)
            free.ridge = base.ridge
            base = free.with_replacement(base.P, base.Q)
        return JointPolynomial(base, center, z_mean, corrections, ridge, held_out)


class _Sums:
    """Phi^T Phi, Phi^T y and |y|^2 of features Phi and true outputs y, in float64.

    Attributes:
        waiting: batches (x, sample weights or None) that are too small to be added alone.
    """

    def __init__(self, size: int, d_out: int, device: torch.device) -> None:
        zeros: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(size, size, **zeros)  # right of the diagonal blocks, see `complete`
        self.cross = torch.zeros(size, d_out, **zeros)
        self.square: Tensor | float = 0.0
        self.count: Tensor | float = 0.0
        self.waiting: list[tuple[Tensor, Tensor | None]] = []

    def add(self, phi: Tensor, y: Tensor, roots: Tensor | None) -> None:
        """Add samples weighted by the squares of `roots`; overwrites phi."""
        if roots is not None:
            phi, y = phi.mul_(roots[:, None]), y * roots[:, None]
        for i in range(0, phi.shape[1], COLUMNS):
            self.gram[i : i + COLUMNS, i:] += phi[:, i : i + COLUMNS].T @ phi[:, i:]
        self.cross += phi.T @ y
        self.square = self.square + y.double().square().sum()
        own = len(phi) if roots is None else roots.double().square().sum()
        self.count = self.count + own

    def merge(self, by: Merge) -> None:
        """Let the sums become what `by` makes of them."""
        self.gram, self.cross = by.total(self.gram), by.total(self.cross)
        self.square, self.count = by.total(self.square), by.total(self.count)

    def complete(self) -> None:
        """Fill in what is left of the diagonal blocks."""
        for i in range(0, len(self.gram), COLUMNS):
            block = slice(i, i + COLUMNS)
            self.gram[i + COLUMNS :, block] = self.gram[block, i + COLUMNS :].T

    def error(self, readout: Tensor) -> Tensor:
        """Sum of |y - Phi readout|^2 over the first features."""
        size = len(readout)
        product = self.gram[:size, :size] @ readout - 2 * self.cross[:size]
        return self.square + torch.sum(readout * product)


def _chosen(train: _Sums, test: _Sums, bases: Sequence[Tensor]) -> list[tuple[float, float]]:
    """(held-out error, strength) of the correction to the readouts `bases` of every degree.

    An infinite strength keeps the base, where no correction has a smaller held-out error. All
    degrees try their next strength together, so that a GPU is waited for once for all of them.
    """
    best = [(error, inf) for error in numbers(torch.stack([test.error(b) for b in bases]))]
    if not (test.count > 0 and train.count > 0):
        return best
    scale = _scale(train, test)
    systems = [_System(base, [train], scale) for base in bases]
    walks = {n: _walk() for n in range(len(bases))}
    asked = {n: next(walk) for n, walk in walks.items()}
    while asked:
        tried = [systems[n].held_out(strength, test) for n, strength in asked.items()]
        for n, error in zip(list(asked), numbers(torch.stack(tried)), strict=True):
            try:
                asked[n] = walks[n].send(error)
            except StopIteration as end:
                best[n] = min(best[n], end.value)
                del asked[n]
    return best


def _scale(*sums: _Sums) -> Tensor:
    """[features, 1] what gives features a unit mean square in all of the sums."""
    total = torch.stack([each.gram.diagonal() for each in sums]).sum(0)
    square = total / sum(each.count for each in sums)
    return torch.where(square > 0, square, 1.0).rsqrt()[:, None]


class _System:
    """The normal equations of a correction to the readouts `base`, by some of the sums."""

    def __init__(self, base: Tensor, sums: Sequence[_Sums], scale: Tensor) -> None:
        size = len(base)
        self._base, self._scale = base, scale[:size]
        self._count = sum(each.count for each in sums)
        self._grams = [each.gram[:size, :size] for each in sums]
        left = sum(each.cross[:size] - each.gram[:size, :size] @ base for each in sums)
        self._right = left * self._scale / self._count

    def solved(self, strength: float) -> tuple[Tensor, Tensor]:
        """The correction, and whether strength I makes the system positive definite in float64."""
        system = self._grams[0] * self._scale
        for gram in self._grams[1:]:
            system.addcmul_(gram, self._scale)
        system *= self._scale.T / self._count
        system.diagonal().add_(strength)
        L, info = linalg.cholesky_ex(system)
        del system
        return torch.cholesky_solve(self._right, L) * self._scale, info == 0

    def held_out(self, strength: float, test: _Sums) -> Tensor:
        """Sum of squares on other samples."""
        correction, solvable = self.solved(strength)
        return torch.where(solvable, test.error(self._base + correction), inf)

    def correction(self, strength: float) -> Tensor:
        """[features, d_out], zero for an infinite strength."""
        if strength == inf:
            return torch.zeros_like(self._base)
        correction, solvable = self.solved(strength)
        return torch.where(solvable, correction, 0.0)


def _walk() -> Generator[float, float, tuple[float, float]]:
    """Asks for the error of strengths, from the first one on to where it rises again.

    Returns:
        (least error, its strength).
    """
    first = best = (yield STRENGTHS[FIRST]), STRENGTHS[FIRST]
    for others in (STRENGTHS[FIRST + 1 :], STRENGTHS[:FIRST][::-1]):
        for strength in others:
            found = (yield strength), strength
            if found[0] >= best[0]:
                break
            best = found
        if best != first:
            break
    return best
