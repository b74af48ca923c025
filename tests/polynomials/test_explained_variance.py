"""Closed-form explained variance against draws, quadrature and its own bounds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.oracles import (
    ACTIVATIONS,
    QUADRATIC,
    assert_r2,
    generator,
    nodes,
    random_gaussian,
    random_layer,
)

from polylens import InvalidInputError
from polylens.activations.recognition import activation
from polylens.fitting.fit import fit
from polylens.inputs.gaussian import Gaussian
from polylens.normal_forms import correlations
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials import explained_variance as quality
from polylens.polynomials.explained_variance import explained_variance

seeds = st.integers(0, 10_000)
kinds = st.sampled_from(["mlp", "glu"])


@given(seeds, kinds, st.sampled_from(ACTIVATIONS))
def test_agrees_with_quadrature(seed, kind, act):
    """Of parts, which are polynomials, exactly; of the layer as nearly as quadrature knows."""
    layer, inputs = random_layer(seed, kind, act), random_gaussian(seed, rank=3)
    poly = fit(layer, inputs, 4)
    result = explained_variance(layer, inputs, 4)
    found = []
    for n in (20, 30):
        x, w = nodes(inputs, n)

        def variance(values, w=w):
            return w @ (values - w @ values).square().sum(1)

        y = layer(x)
        parts = torch.stack([variance(poly.part(k)(x)) for k in range(5)])
        torch.testing.assert_close(parts, result.per_degree, rtol=1e-10, atol=1e-12)
        left = [w @ (y - f).square().sum(1) for f in poly.all_degrees(x)]
        found.append(torch.stack([variance(y), *left]))
    error = 3 * (found[1] - found[0]).abs().max() + result.total_error + 1e-9
    assert abs(found[1][0] - result.total) < error
    expected = 1 - found[1][1:] / found[1][0]
    assert ((expected - result.r2).abs() < 2 * error / result.total).all()


def test_agrees_with_draws_on_trained_weights():
    """A network trained on digits: correlated neurons, inputs of deficient rank."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    x, labels = torch.as_tensor(data) / 16, torch.as_tensor(labels)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10)
    ).double()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        optimiser.step()
    inputs = Gaussian.from_samples(x)
    first, last = net[0], net[2]
    layer = MLPWeights(first.weight.T.detach(), last.weight.T.detach(), "relu", first.bias.detach())
    result = explained_variance(layer, inputs, 3)
    assert result.total_error < 0.05 * result.total
    lower, upper = result.bounds()
    assert (lower <= result.r2).all()
    assert (result.r2 <= upper).all()
    assert_r2(fit(layer, inputs, 3), inputs.sample(20_000, generator(0)))


def test_centred_relu_is_exact_and_within_the_bound_of_its_series():
    inputs = random_gaussian(0, 4)
    inputs = Gaussian(torch.zeros(4), inputs.cov)
    layer = random_layer(0, "mlp", "relu", d_mlp=12, biases=False)
    exact = explained_variance(layer, inputs, 3)
    renamed = replace(activation("relu"), name="series")
    series = explained_variance(replace(layer, act=renamed), inputs, 3)
    assert exact.total_error == 0
    assert 0 < series.total_error < 0.05 * exact.total
    assert abs(series.total - exact.total) <= series.total_error
    torch.testing.assert_close(exact.per_degree, series.per_degree)
    # E[relu(a) relu(b)] by brute force in the plane, rho = 0.6
    t = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    a = torch.relu(t)[:, None]
    b = torch.relu(0.6 * t[:, None] + 0.8 * t)
    weight = torch.exp(-(t[:, None] ** 2 + t**2) / 2) / (2 * torch.pi)
    expected = torch.trapezoid(torch.trapezoid(a * b * weight, t, dim=1), t, dim=0)
    got = quality._arc_cosine(torch.tensor(0.6), torch.tensor(1.0))
    assert abs(float(got) - float(expected)) < 1e-5


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_bound_holds_for_strongly_correlated_neurons(kind):
    """Copies of one neuron that cancel: the variance is zero, and inside the interval."""
    layer = random_layer(0, kind, "relu", d_mlp=1)
    doubled = {
        name: getattr(layer, name).repeat(*([1] * (getattr(layer, name).dim() - 1)), 2)
        for name in ("W_in", "b_in", *(("W_gate", "b_gate") if kind == "glu" else ()))
    }
    twin = replace(layer, W_out=torch.cat([layer.W_out, -layer.W_out]), **doubled)
    result = explained_variance(twin, random_gaussian(0), 3)
    assert abs(result.total) <= result.total_error * (1 + 1e-9)
    assert result.per_degree.abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_exact_for_polynomial_activations(kind):
    result = explained_variance(random_layer(0, kind, QUADRATIC), random_gaussian(0), 4)
    assert result.total_error < 1e-10 * result.total
    torch.testing.assert_close(result.r2[3:], torch.ones(2).double(), rtol=0, atol=1e-12)
    assert result.r2[1] < 0.999


@given(seeds, kinds)
def test_blocks_do_not_matter(seed, kind):
    layer, inputs = random_layer(seed, kind, "silu"), random_gaussian(seed)
    whole = explained_variance(layer, inputs, 3)
    size = correlations.BLOCK
    try:
        correlations.BLOCK = 4
        blocks = explained_variance(layer, inputs, 3)
    finally:
        correlations.BLOCK = size
    torch.testing.assert_close(whole.per_degree, blocks.per_degree)
    assert blocks.total == pytest.approx(whole.total, rel=1e-12)
    assert blocks.total_error == pytest.approx(whole.total_error, rel=1e-9)


def test_narrow_and_wide_neurons():
    layer = random_layer(0, "glu", "silu", d_mlp=6)
    scales = torch.tensor([1e-6, 1e-3, 1.0, 30.0, 1e3, 0.0], dtype=torch.float64)
    layer = replace(layer, W_gate=layer.W_gate * scales)
    result = explained_variance(layer, random_gaussian(0), 5)
    assert torch.isfinite(result.per_degree).all()
    assert (result.per_degree >= 0).all()
    assert result.r2[-1] <= 1 + result.total_error / result.total


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_constant_output_has_r2_one(kind):
    layer = random_layer(0, kind)
    for constant, inputs in (
        (replace(layer, W_out=layer.W_out * 0), random_gaussian(0)),
        (layer, Gaussian(torch.ones(4), torch.zeros(4, 4))),
        (replace(layer, b_out=None), Gaussian(torch.ones(4), torch.zeros(4))),
    ):
        result = explained_variance(constant, inputs, 2)
        assert (result.total, result.total_error) == (0, 0)
        assert result.r2.tolist() == [1, 1, 1]


def test_polynomial_r2_is_cached_truncates_and_needs_inputs():
    layer, inputs = random_layer(0), random_gaussian(0)
    poly = fit(layer, inputs, 3)
    assert poly.r2 is poly.r2
    torch.testing.assert_close(poly.truncate(2).r2, poly.r2[:3])
    for without in (poly.part(2), type(poly)(layer, poly.m, poly.s, poly.P, None)):
        with pytest.raises(InvalidInputError, match="input model"):
            _ = without.r2


def test_bad_input():
    layer, inputs = random_layer(0), random_gaussian(0)
    with pytest.raises(InvalidInputError, match=r"0 \.\.\. 12"):
        explained_variance(layer, inputs, 13)
    with pytest.raises(InvalidInputError, match="reads 4 features"):
        explained_variance(layer, random_gaussian(0, 5), 2)
    with pytest.raises(InvalidInputError, match="needs Gaussian"):
        explained_variance(layer, torch.zeros(4), 2)


def test_one_feature_one_neuron():
    one = torch.ones(1, 1, dtype=torch.float64)
    for layer in (MLPWeights(one, one, "gelu"), GLUWeights(one, one, one, "gelu")):
        inputs = Gaussian(torch.zeros(1), torch.ones(1))
        assert_r2(fit(layer, inputs, 3), inputs.sample(50_000, generator(0)))


@pytest.mark.parametrize(
    ("act", "m", "s", "variance"),
    [  # by quadrature with 40 digits
        ("sigmoid", 25.0, 3.0, 1.21760144271e-14),
        ("tanh", 12.0, 2.0, 7.719574e-09),
        ("hardsigmoid", 5.0, 0.3, 1.329190e-15),
        ("relu6", 13.0, 1.0, 4.758434e-14),
        ("relu", -9.0, 1.0, 2.62871431947e-21),
    ],
)
def test_the_variance_of_a_saturated_neuron_is_not_that_of_rounding(act, m, s, variance):
    one = torch.ones(1, 1, dtype=torch.float64)
    layer = MLPWeights(s * one, one, act, b_in=m * one[0])
    result = explained_variance(layer, Gaussian.standard(1), 12)
    assert result.total == pytest.approx(variance, rel=2e-7, abs=0)
    glu = GLUWeights(0 * one, one, s * one, act, b_gate=m * one[0], b_in=one[0])
    assert explained_variance(glu, Gaussian.standard(1), 12).total == pytest.approx(
        variance, rel=1e-6, abs=0
    )
