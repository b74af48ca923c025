"""Global optima under random mixtures: of small ones a few always, hundreds in `make laws`."""

import pytest
import torch
from tests.laws.mixtures import (
    KINDS,
    distance_to_least_squares,
    draws,
    fitted,
    layer_for,
    random_mixture_of,
)

FEW, MANY = range(27), range(27, 360)
LARGE = range(108)
seeds = pytest.mark.parametrize(
    "seed", [*FEW, *(pytest.param(seed, marks=pytest.mark.laws) for seed in MANY)]
)


def case(seed: int, d: int, act="silu"):
    mixture = random_mixture_of(KINDS[seed % len(KINDS)], seed, d)
    return mixture, layer_for(mixture, seed, ("mlp", "glu")[seed // len(KINDS) % 2], act)


@seeds
@pytest.mark.parametrize("solver", ["direct", "iterative"])
def test_the_optimum_is_that_of_dense_least_squares(seed, solver, monkeypatch):
    mixture, layer = case(seed, 2 + seed % 4, "cubic")
    polynomial, why = fitted(layer, mixture, solver, monkeypatch)
    assert not why
    tolerance = 1e-12 if solver == "direct" else 1e-8
    assert distance_to_least_squares(polynomial, mixture) < tolerance


@pytest.mark.laws
@pytest.mark.parametrize("seed", LARGE)
def test_solvers_agree_where_there_are_many_features(seed, monkeypatch):
    d = (6, 11, 17, 24, 36, 60)[seed // len(KINDS) % 6]
    mixture, layer = case(seed, d, ("silu", "relu", "gelu")[seed % 3])
    iterative, why = fitted(layer, mixture, "iterative", monkeypatch, 1e-8)
    assert not why
    assert iterative.residual <= 1e-8
    assert iterative.iterations < 300
    if d == 60:
        return
    direct, why = fitted(layer, mixture, "direct", monkeypatch)
    assert not why
    x = draws(mixture, 200, seed)
    f = layer(x)
    away = torch.linalg.vector_norm(iterative(x) - direct(x))
    # the residual's norm is not that of the error
    assert float(away / torch.linalg.vector_norm(f - f.mean(0))) < 1e-6
