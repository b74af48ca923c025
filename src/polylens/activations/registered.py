"""Activations that a user registers: a function, where it has kinks, how it ends."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.activations.recognition import PROBE, called
from polylens.activations.table import TABLE, known_activations
from polylens.checks import real_numbers
from polylens.errors import InvalidInputError, NumericalWarning, UnsupportedActivation

linalg: Any = torch.linalg  # without types
# Panels around a kink end at these distances, 1/4 ... 4^9: smooth functions with features of
# order one are resolved near it, and algebraic tails, which are smooth in log y, far from it.
DISTANCES = tuple(4.0**j for j in range(-1, 10))
FAR = 2.0**20
# Gaussians narrower than a quarter of this are integrated without asymptotes, which near zero
# would cost the digits of a small fn.
WIDTH = 0.25
# Two node sets that differ by more than this say that a kink was not declared.
SUSPICIOUS = 1e-7
# fn is examined in pieces of this length, none of which ends at a round number, up to REACH,
# and in longer ones up to 2^10 times that.
PIECE, OFFSET, REACH = 0.5, 0.0137218, 1024.0
# Interpolation at DEGREE + 1 nodes; how much of fn's largest value, and of |y|, it may miss.
DEGREE, SMOOTH, ROUNDING = 16, 1e-9, 1e-13
# Rough pieces are cut here, down to SHORTEST. Those shorter than SHARP have features that panels
# do not resolve; at most PLACES are kept, and MANY at a time looked at.
CUT, SHORTEST, SHARP, PLACES, MANY = 0.4837, 1e-9, 0.1, 32, 4096
# Absolute floor of the error, in units of |m| + s (see the accuracy that fits promise).
FLOOR = 1e-15


@torch.no_grad()
def register_activation(
    name: str,
    fn: Callable[[Tensor], Tensor],
    kinks: Sequence[float] = (),
    slopes: tuple[float, float] | None = None,
) -> Activation:
    """Make an elementwise function usable as `act=name`, with accurate Hermite coefficients.

    fn minus its asymptotes is integrated on panels that grow geometrically away from every
    kink, so functions with algebraic tails (softsign, square-root units) are as accurate as
    those with exponential ones. fn must be smooth, with features of order one, between kinks,
    and grow at most linearly.

    Args:
        name: a new name.
        fn: torch operations on float64 tensors of any shape; each value depends on its own
            input only.
        kinks: points where fn or a derivative of it jumps.
        slopes: fn'(-inf), fn'(inf); found numerically when not given.

    Returns:
        The Activation. Its `accuracy` is the largest relative change of the coefficient vector
        (degree 0 ... 8, s from 1e-3 to 1e3, |m| / s up to 20 and m around every place where fn
        is not smooth) when every panel is halved and cut at those places.

    Raises:
        InvalidInputError: a name that exists, kinks that are not finite.
        UnsupportedActivation: fn is not elementwise, returns NaN or infinity, grows faster than
            linearly, or does not have the given slopes.

    Warns:
        NumericalWarning: accuracy worse than 1e-7, usually an undeclared kink.

    >>> import torch, polylens
    >>> act = polylens.register_activation("softsign", torch.nn.functional.softsign, kinks=[0.0])
    >>> act.accuracy < 1e-10
    True
    >>> layer = polylens.MLPWeights(torch.eye(2), torch.eye(2), act="softsign")
    """
    _require_arguments(name, fn, slopes)
    if name in known_activations():
        raise InvalidInputError(f"activation {name!r} exists already; choose another name")
    points = _finite_numbers("kinks", kinks)
    _require_elementwise(name, fn)
    left, right = (_asymptote(name, fn, side, slopes) for side in (-1, 1))
    split = points[len(points) // 2] if points else 0.0
    act = Activation(
        name,
        fn,
        left,
        right,
        split=split,
        # zero, too, where features are that are smooth
        edges=_panels(sorted({*points, 0.0}), split),
        kinks=tuple(points),
        width=WIDTH,
    )
    rough = _rough_places(name, fn, points)
    act = replace(act, accuracy=_accuracy(act, rough))
    if not act.accuracy <= SUSPICIOUS:
        places = ", ".join(f"{round(float(y), 6) + 0.0:g}" for y in rough[:, 1].sort().values[:5])
        where = f" (it is not smooth near {places})" if places else ""
        warnings.warn(
            f"the coefficients of {name!r} are accurate to {act.accuracy:.1g} only; declare all "
            f"points where it or a derivative jumps with kinks={where}; what oscillates for ever "
            "is accurate under narrow inputs only",
            NumericalWarning,
            stacklevel=3,
        )
    TABLE[name] = act
    return act


def _require_arguments(name: object, fn: object, slopes: object) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"an activation's name must be a non-empty string, got {name!r}")
    if not callable(fn) or isinstance(fn, type):
        raise UnsupportedActivation(f"fn must be a function of a tensor, got {fn!r}")
    if slopes is not None and len(_finite_numbers("slopes", slopes, unique=False)) != 2:
        raise InvalidInputError(f"slopes are (fn'(-inf), fn'(inf)), got {slopes!r}")


def _finite_numbers(name: str, values: Any, unique: bool = True) -> list[float]:
    if isinstance(values, Tensor):
        values = real_numbers(name, values)
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name} must be finite numbers, got {values!r}") from error
    if isinstance(values, str | set) or not all(map(math.isfinite, numbers)):
        raise InvalidInputError(f"{name} must be finite numbers in order, got {values!r}")
    return sorted(set(numbers)) if unique else numbers


def _require_elementwise(name: str, fn: Callable[[Tensor], Tensor]) -> None:
    probe = PROBE.double()
    order = torch.arange(len(probe)).roll(17).flip(0)

    def evaluate(y: Tensor) -> Tensor:
        try:
            value = called(fn, y.clone())
        except Exception as error:
            raise UnsupportedActivation(
                f"{name!r} failed on a float64 tensor {tuple(y.shape)}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.shape != y.shape or value.dtype != y.dtype:
            got = (
                f"{value.dtype} {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise UnsupportedActivation(
                f"{name!r} is not elementwise: float64 {tuple(y.shape)} in, {got} out"
            )
        return value

    values = evaluate(probe)
    if not torch.isfinite(values).all():
        bad = probe[~torch.isfinite(values)]
        raise UnsupportedActivation(
            f"{name!r} returns NaN or infinity at {len(bad)} of {len(probe)} points, first at "
            f"y = {float(bad[0]):g}"
        )
    tolerance = 1e-12 * (1 + values.abs())
    alone = torch.stack([evaluate(y.reshape(1, 1)).squeeze() for y in probe[::12]])
    # not a plain permutation only: a softmax is equivariant under those
    for other, expected, slack in (
        (evaluate(probe[order]), values[order], tolerance[order]),
        (evaluate(probe.reshape(25, 40)).flatten(), values, tolerance),
        (alone, values[::12], tolerance[::12]),
    ):
        if not bool(((other - expected).abs() <= slack).all()):
            raise UnsupportedActivation(
                f"{name!r} is not elementwise: a value changes with the other values in the tensor"
            )


def _asymptote(
    name: str, fn: Callable[[Tensor], Tensor], side: int, slopes: tuple[float, float] | None
) -> tuple[float, ...]:
    """(intercept, slope) of the line that fn approaches on one side.

    The panels reach everywhere, so a slowly reached intercept costs no accuracy.
    """
    y = side * FAR * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    f = fn(y)
    steps = [float(step) for step in (f[1:] - f[:-1]) / (y[1:] - y[:-1])]
    if not all(map(math.isfinite, steps)) or abs(steps[1] - steps[0]) > 1e-3 * (1 + abs(steps[0])):
        raise UnsupportedActivation(
            f"{name!r} is not asymptotically linear: its slope goes from {steps[0]:.4g} to "
            f"{steps[1]:.4g} near y = {float(y[1]):.3g}; only functions that grow at most linearly "
            "can be registered"
        )
    slope = round(steps[1], 6)
    if slopes is not None:
        given = float(slopes[(side + 1) // 2])
        if not abs(given - steps[1]) <= 1e-3 * (1 + abs(given)):
            raise UnsupportedActivation(
                f"{name!r} has slope {steps[1]:.6g} towards {side * math.inf}, not {given:g}"
            )
        slope = given
    intercept = float(f[2] - slope * y[2])
    # Rounding of slope * y, not an intercept.
    if abs(intercept) <= 1e-15 * float(y[2].abs()) * abs(slope):
        intercept = 0.0
    return (intercept, slope)


def _panels(points: list[float], split: float) -> tuple[float, ...]:
    """Edges from -inf to inf: every kink, and geometric distances from it up to its neighbours."""
    edges = {split, *points, -math.inf, math.inf}
    bounds = [-math.inf, *points, math.inf]
    for before, kink, after in zip(bounds, points, bounds[2:], strict=False):
        for distance in DISTANCES:
            # half way to the neighbour its own panels take over
            if distance <= (kink - before) / 2:
                edges.add(kink - distance)
            if distance <= (after - kink) / 2:
                edges.add(kink + distance)
    return tuple(sorted(edges))


def _accuracy(act: Activation, rough: Tensor) -> float:
    """Relative change of the coefficients when all panels are halved, and cut where fn is rough.

    Args:
        rough: [places, 3] from `_rough_places`.
    """
    s = torch.logspace(-3, 3, 13, dtype=torch.float64)[:, None]
    # irregular ratios, so that no panel edge falls on a symmetric place
    ratio = torch.tensor([-20.0, -7.3, -3.1, -1.7, -0.6, 0.0, 0.35, 1.1, 2.2, 5.9, 20.0]).double()
    near = torch.tensor([-2.3, -0.9, 0.0, 0.6, 1.7]).double()
    places = torch.cat([rough[:, 1], torch.tensor(act.kinks, dtype=torch.float64)])
    m = torch.cat([s * ratio, (places[:, None] + s[:, :, None] * near).flatten(1)], dim=1)
    m, s = m.flatten(), s.expand_as(m).flatten()
    edges = [e for e in act.edges if math.isfinite(e)]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    inner = tuple(sorted({*edges, *middles, *map(float, rough.flatten())}))
    finer = replace(act, edges=(-math.inf, *inner, math.inf), kinks=inner)
    coarse, fine = (a.hermite_coefficients(m, s, 8) for a in (act, finer))
    error: Tensor = linalg.vector_norm(coarse - fine, dim=0) - FLOOR * (m.abs() + s)
    size: Tensor = linalg.vector_norm(fine, dim=0)
    return float((error.clamp(min=0) / size.clamp(min=torch.finfo(size.dtype).tiny)).max())


def _rough_places(name: str, fn: Callable[[Tensor], Tensor], kinks: Sequence[float]) -> Tensor:
    """[places, 3]: lower end, middle and upper end of where fn is no polynomial on a short piece.

    Pieces between `kinks` on which interpolation at Chebyshev nodes misses fn are halved, until
    it does not or they are next to nothing. An undeclared kink is found wherever it lies; of
    many places, some are returned.
    """
    near = torch.arange(-REACH, REACH, PIECE, dtype=torch.float64) + OFFSET
    far = REACH * 2.0 ** torch.arange(1, 11, dtype=torch.float64) + OFFSET
    points = torch.tensor(kinks, dtype=torch.float64)
    ends = sorted({float(y) for y in torch.cat([near, far, -far, points])})
    edges = torch.tensor(ends, dtype=torch.float64)
    nodes, others, interpolate = _interpolation()
    pieces = torch.stack([edges[:-1], edges[1:]], dim=1)
    found: list[Tensor] = []
    parents = torch.zeros(len(pieces), dtype=torch.int64)
    before = pieces[:0]
    while True:
        middle, half = pieces.mean(1, keepdim=True), (pieces[:, 1:] - pieces[:, :1]) / 2
        y = middle + half * torch.cat([nodes, others])
        values = fn(y)
        if not torch.isfinite(values).all():
            first = float(y[~torch.isfinite(values)][0])
            raise UnsupportedActivation(f"{name!r} returns NaN or infinity at y = {first:g}")
        at_nodes, beside = values[:, : len(nodes)], values[:, len(nodes) :]
        missed = (at_nodes @ interpolate - beside).abs().amax(1)
        allowed = SMOOTH * values.abs().amax(1) + ROUNDING * y.abs().amax(1)
        bad = missed > allowed
        # the last pieces that are rough as a whole, and smooth in both halves
        rough = torch.ones(len(before), dtype=torch.bool)
        if len(before):
            rough[parents[bad]] = False
            found.append(before[rough])
        before = pieces[bad]
        short = before[:, 1] - before[:, 0] <= SHORTEST * (1 + before.abs().amax(1))
        found.append(before[short])
        before = before[~short]
        if not len(before) or len(before) > MANY:
            found.append(before[:PLACES])
            break
        cut = before[:, :1] + CUT * (before[:, 1:] - before[:, :1])
        pieces = torch.cat([torch.cat([before[:, :1], cut], 1), torch.cat([cut, before[:, 1:]], 1)])
        parents = torch.arange(len(before)).repeat(2)
    places = torch.cat(found)
    places = places[places[:, 1] - places[:, 0] < SHARP][:PLACES]
    return torch.stack([places[:, 0], places.mean(1), places[:, 1]], dim=1)


def _interpolation() -> tuple[Tensor, Tensor, Tensor]:
    """Chebyshev nodes on [-1, 1], places between them, and the matrix from one to the other."""
    angle = math.pi * (torch.arange(DEGREE + 1, dtype=torch.float64) + 0.5) / (DEGREE + 1)
    order = torch.arange(DEGREE + 1, dtype=torch.float64)[:, None]
    between = (angle[1:] + angle[:-1]) / 2
    between = torch.cat([angle[:1] * 0.3, between, math.pi - angle[:1] * 0.3])
    analysis = torch.cos(order * angle) * (2 / (DEGREE + 1))
    analysis[0] /= 2
    return angle.cos(), between.cos(), analysis.T @ torch.cos(order * between)
