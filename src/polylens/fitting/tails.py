"""Where each neuron's polynomial ends, when a share of the preactivations may lie beyond."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from polylens.devices import per_block
from polylens.fitting.neuron_gram import NeuronGram, NeuronMoments
from polylens.inputs.samples import checked
from polylens.normal_forms.preactivation import Shown, blocks
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.ends import asymptotes

linalg: Any = torch.linalg  # without types

# Shares of a neuron's preactivations that may lie beyond one end; the large ones, of neurons that
# are on one side for nearly all inputs, are tried where the error is largest. Not zero, for one
# huge preactivation is fitted well by any polynomial that gives itself up for it.
SMALL, LARGE = (0.002, 0.01, 0.03, 0.07, 0.15), (0.4, 0.6, 0.8, 0.9, 0.97)
LARGEST, FEW = 8, 64
# Inputs that must remain for each feature of a neuron.
REMAINING = 10
# Relative to each feature's mean square.
RIDGE = 1e-12
# Float64 numbers in one block of features.
BLOCK = 1 << 20, 1 << 26


@torch.no_grad()
def best_tails(
    weights: MLPWeights | GLUWeights,
    x: Tensor,
    sample_weights: Tensor | None,
    degree: int,
    share: float,
    preactivations: Sequence[Shown] | None = None,
) -> Tensor:
    """[degree + 1, 2, d_mlp] float64: ends beyond which y follows an asymptote, of each degree.

    Far from zero SiLU and GELU are 0 or y, and a polynomial that follows them there bends
    everywhere else. Of all preactivations of the layer on inputs x [n, d_in] no more than `share`
    lie beyond an end, at the neurons and on the sides where that lowers the error most: the
    minimum over pairs of shares p_i below and q_i above, at least 0.002 (or share / 4) each, of

        sum_i err_i(p_i, q_i) + lambda (p_i + q_i)

    with err_i the squared error of neuron i's best polynomial between the ends that continues as
    in `Polynomial.with_ends`, times |W_out,i|^2, and lambda such that mean p_i + q_i <= share. A
    neuron that is on one side for all but a few inputs may so be beyond for most of them. Infinite
    where the inputs are too few to tell, and at degree 0.

    Cost: about one fit to x: the normal equations of every pair are sums over the same segments
    of sorted preactivations, and those of a lower degree their leading blocks.

    Args:
        preactivations: `blocks` of x, where somebody has them.
    """
    size = (2 if isinstance(weights, GLUWeights) else 1) * degree + 1
    most = min(0.99, 1 - REMAINING * size / max(1, len(x)))
    infinite = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64, device=weights.device)
    ends = infinite[:, None].repeat(degree + 1, 1, weights.d_mlp)
    small = (min(SMALL[0], share / 4), *SMALL[1:])
    few = [pair for pair in itertools.product(small, small) if sum(pair) <= most]
    sides = (LARGE, small), (small, LARGE)
    many = [pair for two in sides for pair in itertools.product(*two) if sum(pair) <= most]
    if len(few) < 2 or not degree:
        return ends
    x, w = checked(x, sample_weights, weights.d_in)
    sums = _Sums(weights, preactivations or list(blocks(weights, x, w)), w, degree)
    found = sums.choices(torch.arange(weights.d_mlp, device=weights.device), few)
    if many:
        best = found.errors[-1].amin(0)
        largest = best.topk(min(len(best), max(FEW, len(best) // LARGEST))).indices
        found = found.extended(largest, sums.choices(largest, many))
    # The least price at which the whole share is not spent, of each degree.
    high = found.errors[:, 0].sum(1) / SMALL[1]
    low = torch.zeros_like(high)
    for _ in range(40):  # on the layer's device, which nothing waits for
        middle = torch.where(low > 0, (low * high).sqrt(), high * 1e-15)
        too_much = found.spent[found.cheapest(middle)].mean((1, 2)) > share
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    for k, choice in enumerate(found.cheapest(high), 1):
        ends[k] = found.ends.gather(0, choice.expand(1, 2, -1))[0]
    return ends


class _Choices(NamedTuple):
    """What pairs of shares lead to.

    Attributes:
        errors: [degrees, pairs, d_mlp].
        ends: [pairs, 2, d_mlp].
        spent: [pairs, 1] share beyond the ends.
    """

    errors: Tensor
    ends: Tensor
    spent: Tensor

    def cheapest(self, price: Tensor) -> Tensor:
        """[degrees, d_mlp] index of the pair of least error + price [degrees] * share."""
        return (self.errors + price[:, None, None] * self.spent).min(1).indices

    def extended(self, neurons: Tensor, more: "_Choices") -> "_Choices":
        """With further pairs, of some neurons only."""
        degrees, _, d_mlp = self.errors.shape
        errors = self.errors.new_full((degrees, len(more.spent), d_mlp), torch.inf)
        errors[:, :, neurons] = more.errors
        ends = self.ends[:1].repeat(len(more.spent), 1, 1)
        ends[:, :, neurons] = more.ends
        return _Choices(
            torch.cat([self.errors, errors], 1),
            torch.cat([self.ends, ends]),
            torch.cat([self.spent, more.spent]),
        )


class _Sums:
    """Normal equations of neurons on some inputs, by segments of their sorted preactivations."""

    def __init__(
        self,
        weights: MLPWeights | GLUWeights,
        parts: Sequence[Shown],
        w: Tensor | None,
        degree: int,
    ) -> None:
        self._weights, moments = weights, NeuronMoments(weights)
        for y, z, _ in parts:
            moments.add(y, z, None)
        self._y, linear = torch.cat([y for y, _, _ in parts], 1), [z for _, z, _ in parts]
        self._z = None if linear[0] is None else torch.cat(linear, 1)  # type: ignore[arg-type]
        self._root = None if w is None else w.to(weights.device, torch.float64).sqrt()
        self._standardise = moments.standardise(fallback=1.0)
        self._gram = NeuronGram(weights, degree, self._standardise)

    def choices(self, neurons: Tensor, pairs: Sequence[tuple[float, float]]) -> _Choices:
        """What shares (below, above) lead to, of these neurons."""
        n, size = self._y.shape[1], self._gram.size
        counts = [(int(p * n), int(q * n)) for p, q in pairs]
        cuts = sorted({0, n, *(p for p, _ in counts), *(n - q for _, q in counts)})
        block = per_block(self._y.device, *BLOCK)
        step = max(1, block // ((size + 2) * n))
        parts = [self._segments(rows, cuts) for rows in torch.split(neurons, step)]
        sums, lowest, highest = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        begins = [cuts.index(p) for p, _ in counts]
        stops = [cuts.index(n - q) for _, q in counts]

        def over(segments: list[tuple[int, int]]) -> Tensor:
            """The sums over segments first ... last - 1 of each."""
            chosen = torch.zeros(len(segments), len(sums), dtype=sums.dtype)
            for row, (first, last) in zip(chosen, segments, strict=True):
                row[first:last] = 1
            return torch.einsum("rs,snij->rnij", chosen.to(sums.device), sums)

        # one for each share, not for each pair: half of the time otherwise
        lower, upper = sorted(set(begins)), sorted(set(stops))
        below = self._beyond(neurons, 0, lowest[lower], over([(0, i) for i in lower]))
        last = highest[[i - 1 for i in upper]]
        above = self._beyond(neurons, 1, last, over([(i, len(sums)) for i in upper]))
        grams = over(list(zip(begins, stops, strict=True)))[..., :size, :size]
        grams += below[[lower.index(i) for i in begins]]
        grams += above[[upper.index(i) for i in stops]]
        ends = torch.stack([lowest[begins], highest[[i - 1 for i in stops]]], 1)
        by = 1 if self._z is None else 2
        sizes = [by * k + 1 for k in range(1, self._gram.degree + 1)]
        errors = _least_squares(grams, sizes)
        errors *= self._weights.W_out[neurons].double().square().sum(1)
        spent = errors.new_tensor([[(p + q) / n] for p, q in counts])
        return _Choices(errors, ends, spent)

    def _segments(self, rows: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Gram matrices [segments, neurons, ., .] of features, target act z, and (act - A) z for
        the asymptote A on either side; and lowest and highest y of every segment."""
        order = _sorted(self._y[rows])
        y = self._y[rows].gather(1, order)
        z = None if self._z is None else self._z[rows].gather(1, order)
        act, size = self._weights.act(y), self._gram.size
        phi = self._gram.features(rows, y, z, act, more=2)
        for side, asymptote in enumerate(asymptotes(self._weights.act, y)):
            torch.sub(act, asymptote, out=phi[:, size + side])
            if z is not None:
                phi[:, size + side] *= z
        if self._root is not None:
            phi *= self._root[order][:, None]
        pieces = [phi[..., a:b] for a, b in itertools.pairwise(cuts)]
        sums = torch.stack([piece @ piece.mT for piece in pieces])
        return sums, y[:, cuts[:-1]].double().T, y[:, [c - 1 for c in cuts[1:]]].double().T

    def _beyond(self, rows: Tensor, side: int, end: Tensor, sums: Tensor) -> Tensor:
        """Gram matrices [ends, neurons, ., .] of features and target of the inputs beyond an end.

        There the features are those at the end, c, and the target is (act - A) z + A(c) z: both
        are linear in 1, zeta and (act - A) z, whose sums are known.

        Args:
            end: [ends, neurons]; sums: [ends, neurons, ., .].
        """
        z_mean, z_scale = (each[rows] for each in self._standardise[2:])
        known, size = [0] if self._z is None else [0, 2], self._gram.size
        z = None if self._z is None else torch.stack([z_mean, z_mean + z_scale], 1)
        z = None if z is None else z.repeat(1, len(end))
        y = end.T.repeat_interleave(len(known), 1)
        at = self._gram.features(rows, y, z, asymptotes(self._weights.act, y)[side])
        at = rearrange(at, "neuron f (end known) -> end neuron f known", end=len(end))
        if self._z is not None:
            at[..., 1] -= at[..., 0]
        by = F.pad(at, (0, 1))
        by[..., -1, -1] = 1
        known = [*known, size + side]
        return by @ sums[..., known, :][..., known] @ by.mT


def _sorted(y: Tensor) -> Tensor:
    """Indices that sort the rows."""
    if y.device.type != "cpu":
        return y.argsort(1)
    order = np.argsort(y.numpy(), 1)  # a third of torch's time
    return torch.from_numpy(order)  # pyright: ignore[reportUnknownMemberType]


def _least_squares(grams: Tensor, sizes: Sequence[int]) -> Tensor:
    """Least sums of squares [sizes, ...] by the first features.

    Args:
        grams: Gram matrices [..., n, n] of features and, last, a target.
    """
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    system = grams * scale[..., :, None] * scale[..., None, :]
    right = system[..., :-1, -1:]
    system = system[..., :-1, :-1]
    own = torch.where(diagonal > 0, RIDGE, 1.0)[..., :-1]
    L, info = linalg.cholesky_ex(system + torch.diag_embed(own))
    squares = linalg.solve_triangular(L, right, upper=False).square().squeeze(-1)
    explained = torch.stack([squares[..., :size].sum(-1) for size in sizes])
    errors = (1 - explained).clamp(min=0) * diagonal[..., -1]
    return torch.where((info == 0) & errors.isfinite(), errors, torch.inf)
