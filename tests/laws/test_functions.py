"""Registered activations with kinks anywhere: accurate to what they state, or with a warning."""

import warnings

import pytest
import torch
from tests.laws.functions import coefficients, random_function
from tests.oracles import generator

from polylens import NumericalWarning
from polylens.activations.registered import register_activation
from polylens.activations.table import TABLE


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.laws) for seed in range(6, 200))]
)
def test_registered_activations_are_as_accurate_as_they_say(seed, monkeypatch):
    monkeypatch.setattr("polylens.activations.registered.TABLE", dict(TABLE))
    rough, g = random_function(seed), generator(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericalWarning)
        act = register_activation("rough", rough.fn, rough.declared)
    if set(rough.places) == set(rough.declared) and not rough.oscillates:
        assert act.accuracy < 1e-5
    for i in range(12):
        s = float(10 ** (6 * torch.rand((), generator=g) - 3))
        if i % 2 or not rough.places:
            m = float(40 * torch.rand((), generator=g) - 20) * s
        else:
            m = rough.places[i % len(rough.places)] + float(torch.randn((), generator=g)) * s
        true = coefficients(rough, m, s)
        at = torch.tensor([[m], [s]], dtype=torch.float64)
        got = act.hermite_coefficients(*at, 8)
        error = float((got[:, 0] - true).norm() / true.norm())
        # measured on a grid, which a kink may lie a little off
        assert error <= 10 * max(act.accuracy, 1e-12) or caught, (m, s, act.accuracy)
