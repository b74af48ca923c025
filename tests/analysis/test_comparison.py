"""Distances against Monte Carlo, what becomes of features against known changes of a layer."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tests.hf_models import build
from tests.oracles import generator, random_gaussian, random_layer

import polylens
from polylens import analysis, demo
from polylens.analysis.layer_tokens import input_moments
from polylens.errors import InvalidInputError, StalePolynomialError

TOKENS = torch.randint(3, 88, (16, 24), generator=generator(5))


@pytest.mark.parametrize("kind", ["mlp", "glu"])
@pytest.mark.parametrize(("first", "second"), [(3, 3), (2, 3), (3, 0)])
def test_distance_is_that_of_samples(kind, first, second):
    # of other neurons, activations, degrees and input models
    f = polylens.fit(random_layer(1, kind, "gelu"), random_gaussian(2), first)
    other = random_layer(7, kind, "silu", d_mlp=9, biases=second != 3)
    g = polylens.fit(other, random_gaussian(8), second)
    inputs = random_gaussian(4)
    found = analysis.distance(f, g, inputs)
    x = inputs.sample(200_000, generator(0))
    apart = (f(x) - g(x)).square().sum(1)
    error = float(apart.std() / math.sqrt(len(apart)))
    assert abs(float(found.sum()) - float(apart.mean())) < 5 * error
    # what is left when the mean is taken out
    mean = (f(x) - g(x)).mean(0)
    assert float(found[0]) == pytest.approx(float(mean.square().sum()), rel=0.05)
    torch.testing.assert_close(found, analysis.distance(g, f, inputs))


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_distance_is_exact_where_it_is_known(kind):
    layer, inputs = random_layer(1, kind), random_gaussian(2)
    f = polylens.fit(layer, inputs, 3)
    explained = polylens.explained_variance(layer, inputs, 3).per_degree
    nothing = analysis.distance(f, f, inputs)
    assert float(nothing.sum()) < 1e-20 * float(explained.sum()) + 1e-24
    # degrees that are left out are what is missing
    missing = analysis.distance(f, f.truncate(1), inputs)
    torch.testing.assert_close(missing[2:], explained[2:])
    # permuted neurons are the same polynomial
    order = torch.randperm(layer.d_mlp)
    roles = {n: t[..., order] for n, t in layer.tensors().items() if n not in ("W_out", "b_out")}
    permuted = replace(layer, **roles, W_out=layer.W_out[order])
    again = analysis.distance(f, polylens.fit(permuted, inputs, 3), inputs)
    assert float(again.sum()) < 1e-12 * float(explained.sum())


def test_features_appear_turn_and_vanish():
    eye, inputs = torch.eye(6, dtype=torch.float64), polylens.Gaussian.standard(6)

    def linear(columns):
        """x -> sum of value * x[read] into out."""
        matrix = torch.zeros(6, 6, dtype=torch.float64)
        for read, out, value in columns:
            matrix[read, out] = value
        return polylens.fit(polylens.MLPWeights(eye, matrix, "identity"), inputs, 1)

    first = linear([(0, 0, 5.0), (1, 1, 4.0), (2, 2, 3.0), (3, 3, 2.0)])
    second = linear([(0, 0, 4.5), (1, 5, 4.0), (4, 4, 2.5), (3, 3, -2.0)])
    changes = analysis.feature_changes(first, second, inputs, 4)
    by = {(change.fate, change.value): change for change in changes}
    assert by["kept", 5.0].other == pytest.approx(4.5)
    assert by["turned", 4.0].writing == pytest.approx(0)
    assert by["vanished", 3.0].other == 0
    assert by["turned", 2.0].writing == pytest.approx(-1)
    assert by["appeared", 2.5].reading == 0
    # features of equal values are arbitrary, and kept all the same
    turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    a = polylens.fit(polylens.MLPWeights(eye, turned, "identity"), inputs, 1)
    b = polylens.fit(polylens.MLPWeights(turned, eye, "identity"), inputs, 1)
    assert {change.fate for change in analysis.feature_changes(a, b, inputs, 6)} == {"kept"}


def test_eigenfeatures_appear_turn_and_vanish():
    eye, gaussian = torch.eye(4, dtype=torch.float64), random_gaussian(3)
    u = torch.ones(1, dtype=torch.float64)

    def squares(weights):
        """sum_i weights_i x_i^2"""
        column = torch.tensor(weights, dtype=torch.float64)[:, None]
        return polylens.fit(polylens.GLUWeights(eye, column, eye, "identity"), gaussian, 2)

    same = analysis.feature_changes(squares([4, -3, 2, 1]), squares([4, -3, 2, 1]), gaussian, 4, u)
    quadratic = [change for change in same if change.kind == "quadratic"]
    assert len(quadratic) == 8
    assert all(change.fate == "kept" for change in quadratic)
    assert all(change.other == pytest.approx(change.value) for change in quadratic)
    standard = polylens.Gaussian.standard(4)
    changes = analysis.feature_changes(
        squares([4.0, -3, 2, 1]), squares([4.0, 0.1, 2, -1]), standard, 4, u
    )
    found = {(c.value, c.fate) for c in changes if c.kind == "quadratic"}
    assert {(4.0, "kept"), (-3.0, "vanished"), (1.0, "turned"), (-1.0, "turned")} <= {
        (round(value, 9), fate) for value, fate in found
    }


@pytest.fixture(scope="module")
def models():
    base, tuned = build("llama"), build("llama")
    with torch.no_grad():  # layer 1 of the second model learned something
        tuned.model.layers[1].mlp.down_proj.weight[:, 3] += 2.0
    return base, tuned


def test_lenses_are_compared_layer_by_layer(models, tmp_path):
    base, tuned = models
    options = {"degree": 2, "progress": False}
    with (
        polylens.attach(base, TOKENS, **options) as a,
        polylens.attach(tuned, TOKENS, **options) as b,
    ):
        same, found = analysis.compare(a, a), analysis.compare(a, b, k=3)
        assert max(row.distance for row in same.rows) < 1e-12
        # layer 0 is the same layer on the same text
        assert found[0].distance < 1e-12
        assert found[1].distance > 0.05
        assert found[0].count("kept") == 6
        inputs = input_moments(a, 1)
        f, g = (lens[1].optimum().double() for lens in (a, b))
        x = inputs.sample(100_000, generator(1))
        expected = float((f(x) - g(x)).square().sum(1).mean() / f(x).var(0).sum())
        assert found[1].distance == pytest.approx(expected, rel=0.03)
        assert sum(found[1].by_degree) == pytest.approx(found[1].distance)
        linear = analysis.compare(a, b, layers=1, degree=1, u=torch.ones(24))
        assert len(linear[1].by_degree) == 2
        along = analysis.compare(a, b, layers=1, k=2, u={1: torch.ones(24)})
        assert sum(change.kind == "quadratic" for change in along[1].changes) == 4
        assert "gone" in found._repr_html_()
        assert found.to_dict()["rows"][1]["distance"] == found[1].distance
        found.plot().savefig(tmp_path / "distances.png")


def test_four_degrees_fit_80_columns():
    row = analysis.LayerDistance(29, 1.1e-5, (1.1e-5,) * 4)
    out = io.StringIO()
    Console(file=out, width=80).print(analysis.Comparison("f", "g", (row,)))
    assert "…" not in out.getvalue()
    assert out.getvalue().count("1.1e-05") == 5


def test_another_text_is_another_polynomial(models):
    options = {"degree": 2, "layers": 0, "progress": False}
    with polylens.attach(models[0], TOKENS, **options) as lens:
        pass
    with polylens.attach(models[0], (TOKENS * 7) % 85 + 3, **options) as other:
        assert analysis.compare(lens, other)[0].distance > 1e-6


def test_what_cannot_be_compared_is_refused(models):
    options = {"degree": 2, "progress": False}
    wide = demo.load_model()
    text = demo.batches("abcd efgh " * 100, 8, 64)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(200, 3)
    with (
        polylens.attach(models[0], TOKENS, **options) as a,
        polylens.attach(wide, text, layers=[0, 1], **options) as b,
        polylens.attach(network.eval(), x, **options) as c,
        polylens.attach(models[1], TOKENS, method=polylens.TrueStream("joint"), **options) as joint,
    ):
        poly = a[0]
        calls = {
            r"layer 0: polynomials of other shapes: GLUWeights from 24 to 24 and MLPWeights from "
            "128 to 128": lambda: analysis.compare(a, b),
            r"only one of the lenses has layers \[1\]": lambda: analysis.compare(a, c),
            "joint polynomial has no neurons": lambda: analysis.compare(a, joint),
            "lens must be": lambda: analysis.compare(a, poly),
            "from 0 to 2": lambda: analysis.compare(a, a, degree=3),
            "a Gaussian of 24 features": lambda: analysis.distance(
                poly, poly, polylens.Gaussian.standard(3)
            ),
            "such as lens": lambda: analysis.distance(a, poly, polylens.Gaussian.standard(24)),
            "is constant": lambda: analysis.compare(a, a, degree=0),
            "k must be": lambda: analysis.compare(a, a, k=0),
        }
        for message, call in calls.items():
            with pytest.raises(InvalidInputError, match=message):
                call()
        with pytest.raises(KeyError, match="no layer 9"):
            analysis.compare(a, a, k=1)[9]
    network[2].weight.data.mul_(2)
    with pytest.raises(StalePolynomialError):
        analysis.compare(c, c)
