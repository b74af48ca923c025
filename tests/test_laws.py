"""The laws that every fit obeys (linearity, orthogonality, invariance, least squares)."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polylens.activations.table import leaky_relu
from polylens.fitting.fit import fit
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.inputs.samples import Samples
from tests.oracles import (
    ACTIVATIONS,
    CUBIC,
    FITS,
    QUADRATIC,
    assert_r2,
    assert_same_function,
    assert_uncorrelated,
    assert_within_confidence,
    draws,
    generator,
    input_model,
    random_gaussian,
    random_layer,
    random_mixture,
)

seeds = st.integers(0, 10_000)
kinds = st.sampled_from(["mlp", "glu"])
acts = st.sampled_from(ACTIVATIONS)
models = st.sampled_from(["gaussian", "mixture", "samples"])
fits = pytest.mark.parametrize(
    ("model", "scope"),
    [
        ("gaussian", "neuron"),
        ("mixture", "neuron"),
        ("mixture", "global"),
        ("samples", "neuron"),
        ("samples", "joint"),
    ],
)


@given(seeds, kinds, models, st.floats(0.05, 0.9), st.integers(1, 4))
def test_linear_in_the_activation(seed, kind, model, slope, degree):
    layer, inputs = random_layer(seed, kind), input_model(model, seed)
    P = {}
    for act in ("identity", "relu", leaky_relu(slope)):
        poly = fit(replace(layer, act=act), inputs, degree)
        P[poly.act.name] = poly.all_degrees(draws(inputs, 50, seed)) - layer.b_out
    mixed = slope * P["identity"] + (1 - slope) * P["relu"]
    torch.testing.assert_close(P[f"leaky_relu({slope:g})"], mixed, rtol=1e-8, atol=1e-8)


@fits
@given(seeds, kinds, st.sampled_from([QUADRATIC, CUBIC]))
def test_exact_for_polynomial_activations(model, scope, seed, kind, act):
    layer, inputs = random_layer(seed, kind, act, d_in=2), input_model(model, seed, 2)
    degree = (2 if act is QUADRATIC else 3) + (kind == "glu")
    poly = FITS[scope](layer, inputs, degree)
    x = draws(inputs, 100, seed)
    torch.testing.assert_close(poly(x), layer(x), rtol=1e-6, atol=1e-6)
    assert abs(float(poly.r2[-1]) - 1) < 1e-9


@fits
@given(seeds, kinds, acts)
def test_truncation_is_refitting(model, scope, seed, kind, act):
    layer, inputs = random_layer(seed, kind, act, d_in=2), input_model(model, seed, 2)
    poly = FITS[scope](layer, inputs, 4)
    assert -1e-9 < poly.r2[0] < 1e-9
    assert poly.r2[-1] <= 1 + 1e-9
    x = draws(inputs, 50, seed)
    for degree in range(5):
        again = FITS[scope](layer, inputs, degree)
        assert poly.truncate(degree).degree == degree
        tolerance = 1e-4 if (model, scope) == ("samples", "joint") else 1e-7
        assert_same_function(poly.truncate(degree), again, x, tolerance)


@given(seeds, kinds, acts)
def test_r2_of_the_optima_over_nested_spaces_never_falls(seed, kind, act):
    """All polynomials in x, or those of one neuron; the neurons' own optima need not add up."""
    layer = random_layer(seed, kind, act, d_in=2)
    single = random_layer(seed, kind, act, d_in=2, d_mlp=1)
    for model, scope, weights in (
        ("gaussian", "neuron", layer),
        ("mixture", "global", layer),
        ("mixture", "neuron", single),
        ("samples", "neuron", single),
    ):
        r2 = FITS[scope](weights, input_model(model, seed, 2), 4).r2
        assert (r2.diff() > -1e-9).all(), (model, scope)


@given(seeds, kinds, acts)
def test_a_joint_fit_explains_no_less_than_the_neurons(seed, kind, act):
    layer, inputs = random_layer(seed, kind, act, d_in=2), input_model("samples", seed, 2)
    assert (FITS["joint"](layer, inputs, 3).r2 >= fit(layer, inputs, 3).r2 - 1e-7).all()


@given(seeds, kinds, acts)
def test_residual_is_uncorrelated_with_monomials(seed, kind, act):
    layer = random_layer(seed, kind, act, d_in=3)
    for inputs, scope in (
        (random_gaussian(seed, 3), "neuron"),
        (random_mixture(seed, 3), "global"),
    ):
        poly = FITS[scope](layer, inputs, 2)
        assert_uncorrelated(layer, poly, 2, inputs)


@given(seeds, kinds, acts)
def test_residual_on_samples_is_orthogonal_exactly(seed, kind, act):
    """Per neuron, to the features of that neuron; one neuron read out as it is."""
    layer = replace(
        random_layer(seed, kind, act, d_mlp=1, d_out=1), W_out=torch.ones(1, 1).double()
    )
    x = random_mixture(seed).sample(300, generator(seed))
    poly = fit(layer, Samples(x), 3)
    residual = layer(x) - poly(x)
    W, b = (layer.W_in, layer.b_in) if kind == "mlp" else (layer.W_gate, layer.b_gate)
    y = x @ W + b
    z = x @ layer.W_in + layer.b_in
    features = [y**k for k in range(4)]
    if kind == "glu":
        features += [z * y**k for k in range(3)]
    for feature in features:
        overlap = (residual * feature).mean() / feature.square().mean().sqrt()
        assert abs(float(overlap)) < 1e-8


@fits
@given(seeds, kinds)
def test_order_of_neurons_does_not_matter(model, scope, seed, kind):
    layer, inputs = random_layer(seed, kind, "silu", d_in=2), input_model(model, seed, 2)
    order = torch.randperm(layer.d_mlp, generator=generator(seed))
    changes = {"W_in": layer.W_in[:, order], "W_out": layer.W_out[order], "b_in": layer.b_in[order]}
    if kind == "glu":
        changes |= {"W_gate": layer.W_gate[:, order], "b_gate": layer.b_gate[order]}
    permuted = replace(layer, **changes)
    a, b = (FITS[scope](w, inputs, 3) for w in (layer, permuted))
    tolerance = 1e-4 if (model, scope) == ("samples", "joint") else 1e-9
    assert_same_function(a, b, draws(inputs, 50, seed), tolerance)
    torch.testing.assert_close(a.r2, b.r2, rtol=1e-6, atol=1e-8)


@given(seeds, st.floats(0.01, 100.0), models)
def test_relu_may_be_rescaled(seed, scale, model):
    layer, inputs = random_layer(seed, "mlp", "relu"), input_model(model, seed)
    scaled = replace(
        layer, W_in=layer.W_in * scale, b_in=layer.b_in * scale, W_out=layer.W_out / scale
    )
    a, b = (fit(w, inputs, 3) for w in (layer, scaled))
    assert_same_function(a, b, draws(inputs, 50, seed))


@given(seeds, kinds, models)
def test_affine_change_of_inputs(seed, kind, model):
    """x -> x A + c with the weights changed to undo it."""
    layer, g = random_layer(seed, kind, "gelu"), generator(seed)
    A = torch.eye(4).double() + 0.3 * torch.randn(4, 4, generator=g, dtype=torch.float64)
    c = torch.randn(4, generator=g, dtype=torch.float64)
    inverse = torch.linalg.inv(A)
    changes = {"W_in": inverse @ layer.W_in, "b_in": layer.b_in - c @ inverse @ layer.W_in}
    if kind == "glu":
        changes["W_gate"] = inverse @ layer.W_gate
        changes["b_gate"] = layer.b_gate - c @ inverse @ layer.W_gate
    inputs = input_model(model, seed)
    x = draws(inputs, 60, seed)
    if model == "gaussian":
        moved = Gaussian(inputs.mean @ A + c, A.T @ inputs.cov @ A)
    elif model == "mixture":
        moved = GaussianMixture(inputs.weights, inputs.means @ A + c, A.T @ inputs.covs @ A)
    else:
        moved = Samples(x @ A + c)
    a = fit(layer, inputs, 3).all_degrees(x)
    b = fit(replace(layer, **changes), moved, 3).all_degrees(x @ A + c)
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@given(seeds, kinds, acts)
def test_scopes_coincide_for_a_gaussian(seed, kind, act):
    layer, inputs = random_layer(seed, kind, act, d_in=3), random_gaussian(seed, 3, rank=2)
    one = GaussianMixture(torch.ones(1), inputs.mean[None], inputs.cov[None])
    poly = fit(layer, inputs, 3)
    x = inputs.sample(50, generator(seed))
    for scope in ("neuron", "global"):
        mixture = FITS[scope](layer, one, 3)
        assert_same_function(mixture, poly, x, 1e-8)
        torch.testing.assert_close(mixture.r2, poly.r2, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_within_the_interval_of_least_squares(kind, act):
    layer = random_layer(7, kind, act, d_in=3)
    for inputs, scope in ((random_gaussian(3, 3), "neuron"), (random_mixture(3, 3), "global")):
        x, at = inputs.sample(5_000, generator(1)), inputs.sample(8, generator(2))
        for degree in (1, 2, 3):
            poly = FITS[scope](layer, inputs, degree)
            assert_within_confidence(poly(at), x, layer(x), degree, at)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_dense_equals_factored(kind):
    layer, inputs = random_layer(1, kind, "silu"), random_mixture(1)
    for poly in (fit(layer, inputs, 3), fit(layer, random_gaussian(2), 3)):
        x = inputs.sample(20, generator(0))
        tensors = poly.to_dense()
        value = tensors[0] + x @ tensors[1].T
        value = value + torch.einsum("oij,ni,nj->no", tensors[2], x, x)
        value = value + torch.einsum("oijk,ni,nj,nk->no", tensors[3], x, x, x)
        torch.testing.assert_close(value, poly(x))


@fits
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_linear_and_quadratic_parts_are_those_of_the_function(model, scope, kind):
    layer, inputs = random_layer(1, kind, "silu", d_in=3), input_model(model, 1, 3)
    poly = FITS[scope](layer, inputs, 2)
    x = draws(inputs, 20, 0)
    beta, alpha = poly.linear()
    torch.testing.assert_close(x @ beta + alpha, poly.truncate(1)(x))
    u = torch.randn(3, generator=generator(0), dtype=torch.float64)
    # the second difference of a quadratic along any direction
    step = torch.randn(3, generator=generator(1), dtype=torch.float64)
    second = (poly(x + step) + poly(x - step) - 2 * poly(x)) @ u / 2
    torch.testing.assert_close(second, poly.quadratic_form(u)(step).expand(len(x)))


@fits
def test_module_behaviour(model, scope):
    layer, inputs = random_layer(1, "glu", "silu", d_in=3), input_model(model, 1, 3)
    poly = FITS[scope](layer, inputs, 3)
    x = draws(inputs, 24, 0)[:24]
    torch.testing.assert_close(poly(x.reshape(2, 3, 4, 3)).reshape(24, 3), poly(x))
    torch.testing.assert_close(copy.deepcopy(poly)(x), poly(x), rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(poly.state_dict(), buffer)
    buffer.seek(0)
    other = FITS[scope](layer, input_model(model, 2, 3), 3)
    if model != "mixture" or scope != "global":
        other.load_state_dict(torch.load(buffer))
        torch.testing.assert_close(other(x), poly(x), rtol=0, atol=0)
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(poly, (x[:2],))
    single = copy.deepcopy(poly).float()
    torch.testing.assert_close(single(x.float()).double(), poly(x), rtol=1e-3, atol=1e-3)
    assert single(x.float()).dtype == torch.float32


@fits
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_r2_agrees_with_draws(model, scope, kind):
    layer, inputs = random_layer(5, kind, "gelu", d_in=3), input_model(model, 5, 3)
    poly = FITS[scope](layer, inputs, 3)
    assert_r2(poly, draws(inputs, 20_000, 0), slack=1e-3)


def test_helpers_fail_when_they_should():
    layer, inputs = random_layer(1, "mlp", "gelu", d_in=2), random_gaussian(1, 2)
    x = inputs.sample(5_000, generator(0))
    poly, y = fit(layer, inputs, 2), layer(x)
    wrong = poly.truncate(1)
    with pytest.raises(AssertionError, match="correlates"):
        assert_uncorrelated(layer, wrong, 2, inputs)
    with pytest.raises(AssertionError, match="outside ordinary least squares"):
        assert_within_confidence(wrong(x[:8]), x, y, 2, x[:8])
    with pytest.raises(AssertionError, match="functions differ"):
        assert_same_function(poly, fit(layer, random_gaussian(2, 2), 2), x[:10])
    elsewhere = random_gaussian(9, 2).sample(5_000, generator(0))
    with pytest.raises(AssertionError, match="r2 is"):
        assert_r2(poly, elsewhere)
