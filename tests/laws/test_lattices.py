"""Samples that take few values: every neuron has the R2 of dense least squares."""

import warnings

import pytest
import torch
from tests.oracles import ACTIVATIONS, generator, random_layer
from torch import Tensor

from polylens import NumericalWarning, Samples, fit

KINDS = ("one-hot", "binary", "signs", "lattice", "two points", "three points", "repeated")
FEW, MANY = range(14), range(14, 280)


def points(kind: str, seed: int, d: int) -> Tensor:
    """[n, d] on few points, some of them more often than others."""
    g = generator(seed)
    n = 400
    if kind == "one-hot":
        return torch.eye(d, dtype=torch.float64)[torch.randint(0, d, (n,), generator=g)]
    if kind == "binary":
        return torch.randint(0, 2, (n, d), generator=g).double()
    if kind == "signs":
        # balanced: He_2 of them is zero but for rounding
        return (
            2 * torch.cartesian_prod(*[torch.arange(2)] * d).reshape(-1, d).double().repeat(8, 1)
            - 1
        )
    if kind == "lattice":
        return torch.randint(-3, 4, (n, d), generator=g).double() / 3
    if kind == "two points":
        ends = torch.randn(2, d, generator=g, dtype=torch.float64)
        return ends[torch.arange(n) % 2]
    if kind == "three points":
        step = torch.tensor([-(3**0.5), 0, 0, 0, 0, 3**0.5]).double().repeat(70)
        return step[:, None] * torch.randn(1, d, generator=g, dtype=torch.float64)
    return torch.randn(5, d, generator=g, dtype=torch.float64).repeat(60, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "seed", [*FEW, *(pytest.param(seed, marks=pytest.mark.laws) for seed in MANY)]
)
def test_every_neuron_reaches_least_squares(seed, dtype):
    kind, form = KINDS[seed % len(KINDS)], ("mlp", "glu")[seed // len(KINDS) % 2]
    d = 1 + seed // 3 % 5
    layer = random_layer(seed, form, ACTIVATIONS[seed % len(ACTIVATIONS)], d_in=d).to(dtype)
    x = points(kind, seed, d).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        poly = fit(layer, Samples(x), 4)
    wide = layer.to(torch.float64)
    parts = wide.neurons(x.double())
    y, z, h = parts["y"], parts.get("z"), parts["h"]
    exact = poly.over(wide)
    for degree in range(5):
        lower = exact.truncate(degree)
        got = lower.neurons(y, z)
        for i in range(layer.d_mlp):
            t = (y[:, i] - y[:, i].mean()) / (y[:, i].std() + 1e-300)
            columns = [t**k for k in range(degree + 1)]
            columns += [] if z is None else [z[:, i] * t**k for k in range(degree)]
            A = torch.stack(columns, 1)
            best = torch.linalg.lstsq(A, h[:, i, None], rcond=1e-10, driver="gelsd").solution
            error = float((A @ best - h[:, i, None]).square().mean())
            own = float((got[:, i] - h[:, i]).square().mean())
            size = float(h[:, i].square().mean()) + 1e-30
            assert own - error <= 1e-8 * size, (kind, form, degree, i)
