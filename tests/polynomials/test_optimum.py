"""A fit with ends holds two objects, for every degree: what replaces the layer, and the optimum."""

import pytest
import torch
from tests.oracles import random_layer

import polylens
from polylens import JointPolynomial, Polynomial, Samples, fit, fit_joint
from polylens.analysis import interactions
from polylens.errors import InvalidInputError

DEGREES = (1, 2, 3, 4)


def heavy_tailed(n, d, seed=5):
    draws = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws**3


def fitted(degree, kind="glu", verb=fit, n=900):
    layer = random_layer(3, kind=kind)
    x = heavy_tailed(n, layer.d_in)
    return layer, x, verb(layer, Samples(x), degree, tails=0.05)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
@pytest.mark.parametrize("degree", DEGREES)
def test_optima_are_those_of_a_fit_without_ends(kind, degree):
    layer, x, poly = fitted(degree, kind)
    plain = fit(layer, Samples(x), degree)
    assert poly.ends is not None
    assert poly.optimum().ends is None
    for k in range(degree + 1):
        torch.testing.assert_close(poly.optimum(k)(x), plain.truncate(k)(x), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(poly.truncate(k).optimum()(x), poly.optimum(k)(x))
    beta, alpha = poly.linear()
    linear = x @ beta + alpha
    torch.testing.assert_close(linear, poly.optimum(1)(x), rtol=1e-9, atol=1e-9)
    centred = layer(x) - layer(x).mean(0)
    r2 = 1 - (layer(x) - linear).square().sum() / centred.square().sum()
    assert float(poly.r2[1]) == pytest.approx(float(r2), abs=1e-10)


@pytest.mark.parametrize("degree", DEGREES[1:])
def test_every_degree_has_ends_of_its_own_and_is_fitted_with_them(degree):
    layer, x, poly = fitted(degree)
    for k in range(1, degree):
        own = fit(layer, Samples(x), k, tails=0.05)
        errors = [(layer(x) - each(x)).square().sum() for each in (poly.truncate(k), own)]
        assert errors[0] < 1.1 * errors[1]
        torch.testing.assert_close(poly.all_degrees(x)[k], poly.truncate(k)(x))
    y = layer.neurons(x)["y"]
    outside = [(y < low) | (y > high) for low, high in poly.E]
    shares = torch.stack([each.double().mean() for each in outside])
    torch.testing.assert_close(poly.beyond, shares)
    assert (0 < poly.beyond[1:]).all()
    assert (poly.beyond <= 0.06).all()
    total = (layer(x) - layer(x).mean(0)).square().sum()
    r2 = 1 - (layer(x) - poly(x)).square().sum() / total
    assert float(poly.replacement_r2[-1]) == pytest.approx(float(r2), abs=1e-10)


@pytest.mark.parametrize("verb", [fit, fit_joint])
@pytest.mark.parametrize("degree", DEGREES)
def test_interactions_sum_to_the_replacement(degree, verb):
    layer, x, poly = fitted(degree, verb=verb, n=400)
    u = heavy_tailed(1, layer.d_out)[0]
    for scale in (1.0, 30.0):
        writers = scale * x[:3]
        found = interactions(poly, writers, u)
        total = found.constant + found.linear.sum() + found.pairs.sum()
        torch.testing.assert_close(total, poly(writers.sum(0)[None])[0] @ u, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("verb", "cls"), [(fit, Polynomial), (fit_joint, JointPolynomial)])
def test_both_and_what_is_known_of_them_are_saved(verb, cls, tmp_path):
    layer, x, poly = fitted(3, verb=verb, n=400)
    read = poly.r2, poly.replacement_r2, poly.beyond
    assert "replacement (with ends)" in repr(poly)
    poly.save(tmp_path / "x")
    again = cls.load(tmp_path / "x")
    assert all(map(torch.equal, read, (again.r2, again.replacement_r2, again.beyond)))
    assert torch.equal(again(x), poly(x))
    assert torch.equal(again.optimum()(x), poly.optimum()(x))
    u = x[0, : layer.d_out] if layer.d_out <= layer.d_in else heavy_tailed(1, layer.d_out)[0]
    assert torch.equal(again.quadratic_form(u).to_dense(), poly.quadratic_form(u).to_dense())
    assert torch.equal(again.linear()[0], poly.linear()[0])


def test_a_loaded_lens_gives_the_same_numbers_or_refuses(tmp_path):
    model = polylens.demo.load_model()
    tokens = polylens.demo.batches("A polynomial is a sum of products. " * 60, 8, 64)
    metric = {"metric": "covariance"}
    with polylens.attach(model, tokens, degree=2, layers="1-2", progress=False) as lens:
        poly = lens[1]
        text = repr(poly)
        assert "optima of degree 1 ... 2" in text
        assert "replacement (with ends): R²" in text
        values = polylens.analysis.singular_features(poly, 3, **metric).values
        beta = poly.linear()[0]
        lens.save(tmp_path / "without")
        lens.save(tmp_path / "with", moments=True)
    with polylens.load(tmp_path / "without", model) as lens:
        assert repr(lens[1]) == text
        assert torch.equal(lens[1].linear()[0], beta)
        for ask in (
            lambda: polylens.analysis.singular_features(lens[1], 3, **metric),
            lambda: polylens.analysis.layer_features(lens, 1, "a"),
            lambda: polylens.analysis.compare(lens, lens),
        ):
            with pytest.raises(InvalidInputError, match="moments=True"):
                ask()
    with polylens.load(tmp_path / "with", model) as lens:
        assert repr(lens[1]) == text
        assert torch.equal(polylens.analysis.singular_features(lens[1], 3, **metric).values, values)
