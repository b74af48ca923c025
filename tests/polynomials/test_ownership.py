"""A polynomial and the memory of its weights: whose it is, and what is derived from it."""

import copy
import pickle

import pytest
import torch
from tests.hf_models import build
from tests.oracles import FITS, generator, input_model, random_layer

import polylens
from polylens import Gaussian, MLPWeights, fit

fits = pytest.mark.parametrize(
    ("model", "scope"),
    [
        ("gaussian", "neuron"),
        ("mixture", "neuron"),
        ("samples", "neuron"),
        ("samples", "joint"),
        ("mixture", "global"),
    ],
)
X = torch.randn(9, 4, generator=generator(3), dtype=torch.float64)


@fits
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_weights_may_be_trained_after_the_fit(model, scope, kind):
    layer, inputs = random_layer(1, kind), input_model(model, 1)
    poly = FITS[scope](layer, inputs, 2)
    before, lower = poly(X), poly.truncate(1)(X)
    for tensor in layer.tensors().values():
        tensor.mul_(1.5).add_(1.0)
    assert torch.equal(poly(X), before)
    assert torch.equal(poly.truncate(1)(X), lower)
    assert torch.equal(copy.deepcopy(poly)(X), before)
    assert torch.equal(pickle.loads(pickle.dumps(poly.truncate(1)))(X), lower)


@fits
def test_a_state_that_is_loaded_is_all_that_counts_and_goes_nowhere_else(model, scope):
    if (model, scope) == ("mixture", "global"):
        pytest.skip("its state has other shapes")
    layers = [random_layer(seed, "glu") for seed in (1, 2)]
    a, b = (FITS[scope](layer, input_model(model, 1), 3, tails=None) for layer in layers)
    watching, lower = a.over(layers[0]), a.truncate(2)
    a_of_x, low, before = a(X), lower(X), {k: t.clone() for k, t in layers[0].tensors().items()}
    watching(X), watching.all_degrees(X), watching.r2 if watching.inputs else None
    watching.load_state_dict(b.state_dict())
    assert torch.equal(watching(X), b(X))
    assert torch.equal(watching.all_degrees(X), b.all_degrees(X))
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(X), b(X))
    assert not torch.equal(a(X), a_of_x)
    assert torch.equal(lower(X), low)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers[0].tensors().items())


def test_a_base_that_is_loaded_reaches_the_joint_polynomial():
    a, b = (FITS["joint"](random_layer(1), input_model("samples", seed), 2) for seed in (1, 2))
    a(X)
    a.base.load_state_dict(b.base.state_dict())
    fresh = copy.deepcopy(a)
    fresh._readouts = {}
    assert torch.equal(a(X), fresh(X))


def test_a_state_loaded_into_a_lens_leaves_the_model_alone():
    model = build("gpt2")
    tokens = torch.arange(64).reshape(4, 16) % 50
    with polylens.attach(model, tokens, degree=2, progress=False) as lens:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {name: torch.zeros_like(t) for name, t in lens[0].state_dict().items()}
        lens[0].load_state_dict(state)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@fits
@pytest.mark.parametrize("where", ["evaluated", "fitted"])
def test_inference_mode_poisons_no_later_gradient(model, scope, where):
    layer, inputs = random_layer(1, "glu"), input_model(model, 1)
    with torch.inference_mode(where == "fitted"):
        poly = FITS[scope](layer, inputs, 2)
    with torch.inference_mode():
        poly(X), poly.all_degrees(X)
    x = X.clone().requires_grad_()
    poly(x).sum().backward()
    poly.all_degrees(x).sum().backward()
    expected = X.clone().requires_grad_()
    other = FITS[scope](layer, inputs, 2)
    other(expected).sum().backward()
    other.all_degrees(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_parameters_of_a_model_are_left_without_a_graph():
    linear, out = torch.nn.Linear(4, 6).double(), torch.nn.Linear(6, 3).double()
    weights = MLPWeights(linear.weight.T, out.weight.T, "silu", linear.bias, out.bias)
    poly = fit(weights, Gaussian.standard(4), 2)
    assert not any(tensor.requires_grad for tensor in poly.state_dict().values())
    assert poly(X).grad_fn is None
