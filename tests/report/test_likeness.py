"""Cosines and norms of outputs, and the cosine of derivatives, against those of dense Jacobians."""

import pytest
import torch

import polylens
from polylens.report.likeness import DERIVATIVES, Likeness


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(kind, act="silu", d=6, h=30):
    W = {"W_in": normal(d, h), "W_out": normal(h, d, seed=1), "b_in": normal(h, seed=2)}
    if kind == "GLU":
        return polylens.GLUWeights(act=act, W_gate=normal(d, h, seed=3), **W)
    return polylens.MLPWeights(act=act, **W)


def likeness(weights, degree, x):
    poly = polylens.fit(weights, polylens.Gaussian.standard(weights.d_in), degree)
    found = Likeness(poly, poly)
    for i, rows in enumerate(x.split(DERIVATIVES)):
        found.update(rows, weights(rows), poly(rows), seed=i)
    return poly, found.columns()


@pytest.mark.parametrize("kind", ["MLP", "GLU"])
def test_against_dense_jacobians(kind):
    weights, x = layer(kind), normal(640, 6, seed=9)
    poly, found = likeness(weights, 2, x)
    y, f = weights(x), poly(x)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(y, f).mean()))
    assert found["norm_ratio"] == pytest.approx(float((f.norm(dim=1) / y.norm(dim=1)).mean()))
    true, own = (torch.vmap(torch.func.jacfwd(function))(x) for function in (weights, poly))
    expected = torch.cosine_similarity(true.flatten(), own.flatten(), dim=0)
    assert 0.5 < expected < 0.999
    assert found["jacobian_cosine"] == pytest.approx(float(expected), abs=0.02)


def test_a_polynomial_is_like_itself_and_a_constant_like_nothing():
    weights, x = layer("GLU", "identity"), normal(40, 6)
    assert list(likeness(weights, 2, x)[1].values()) == pytest.approx([1, 1, 1])
    dead = polylens.MLPWeights(normal(6, 4), torch.zeros(4, 3).double(), "relu")
    assert likeness(dead, 1, x)[1] == {"cosine": None, "norm_ratio": None}


def test_an_activation_without_a_derivative_has_the_other_figures():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sigmoid()

    weights = layer("MLP", polylens.Activation("own", Own.apply, right=(0.0, 1.0)))
    _, found = likeness(weights, 1, normal(40, 6))
    assert found["cosine"] is not None
    assert "jacobian_cosine" not in found
