"""Polynomials split among players, against all subsets of them."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from polylens.analysis.players import shapley_values, taylor_interactions

NEURONS = 7


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def games(n, degree, glu):
    """(y, P, z, Q) of random players, some of them alike or without any say."""
    y, P = random(n, NEURONS), random(degree + 1, NEURONS)
    if n > 2:
        y[1], y[2] = y[0], 0.0
    if not glu:
        return y, P, None, None
    return y, P, random(n, NEURONS), random(max(degree, 1), NEURONS)


def values_of_subsets(y: Tensor, P: Tensor, z: Tensor | None, Q: Tensor | None):
    """v of every subset, by its bits."""
    n = len(y)

    def v(players: list[int]) -> float:
        at = y[players].sum(0)
        value = sum(p * at**k for k, p in enumerate(P))
        if z is not None and Q is not None:
            value = value + z[players].sum(0) * sum(q * at**k for k, q in enumerate(Q))
        return float(value.sum())

    return [v([j for j in range(n) if s >> j & 1]) for s in range(1 << n)]


def without(n, *out):
    """(bits, size) of every subset of the others."""
    others = [j for j in range(n) if j not in out]
    for size in range(len(others) + 1):
        for chosen in itertools.combinations(others, size):
            yield sum(1 << j for j in chosen), size


def brute_force(v, n):
    """(Shapley values, Shapley-Taylor indices of pairs), by their definitions."""
    values, pairs = torch.zeros(n).double(), torch.zeros(n, n).double()
    for a in range(n):
        for s, size in without(n, a):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            values[a] += weight * (v[s | 1 << a] - v[s])
        for b in range(a):
            for s, size in without(n, a, b):
                together = v[s | 1 << a | 1 << b] - v[s | 1 << a] - v[s | 1 << b] + v[s]
                pairs[a, b] += 2 / n / math.comb(n - 1, size) * together
    return values, pairs + pairs.T


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("degree", range(7))
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_all_subsets_agree(n, degree, glu):
    game = games(n, degree, glu)
    v = values_of_subsets(*game)
    values, indices = brute_force(v, n)
    linear, pairs = taylor_interactions(*game)
    scale = dict(rtol=1e-10, atol=1e-10 * (1 + max(map(abs, v))))
    torch.testing.assert_close(shapley_values(*game), values, **scale)
    torch.testing.assert_close(pairs + pairs.T - 2 * pairs.diag().diag(), indices, **scale)
    alone = torch.tensor([v[1 << j] - v[0] for j in range(n)], dtype=torch.float64)
    torch.testing.assert_close(linear + pairs.diag(), alone, **scale)
    torch.testing.assert_close(linear + pairs.sum(1), values, **scale)
    total = float(linear.sum() + pairs.sum())
    assert total == pytest.approx(v[-1] - v[0], rel=1e-10, abs=1e-10)
    assert torch.equal(pairs, pairs.T)


@pytest.mark.parametrize("glu", [False, True])
def test_degree_two_has_no_more_than_pairs(glu):
    y, P, z, Q = games(5, 2, glu)
    linear, pairs = taylor_interactions(y, P, z, Q)
    first, second = y @ P[1], (y * P[2]) @ y.T
    if z is not None and Q is not None:
        first = first + z @ Q[0]
        second = second + ((y * Q[1]) @ z.T + (z * Q[1]) @ y.T) / 2
    torch.testing.assert_close(linear, first)
    torch.testing.assert_close(pairs, second)


@pytest.mark.parametrize("glu", [False, True])
def test_blocks_of_neurons_add_up(glu, monkeypatch):
    game = games(6, 4, glu)
    whole = (shapley_values(*game), *taylor_interactions(*game))
    monkeypatch.setattr("polylens.analysis.players.BLOCK", 12)
    parts = (shapley_values(*game), *taylor_interactions(*game))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
