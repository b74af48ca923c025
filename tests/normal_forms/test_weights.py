"""Layers: what is refused, by name, and what they compare to."""

import pytest
import torch
from tests.oracles import random_gaussian, random_layer
from torch import nn

from polylens import ArtifactError, InvalidInputError, MLPWeights, explained_variance, fit
from polylens.normal_forms.weights import weights_of

ONE = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("W_in", "message"),
    [
        (None, "W_in must be a tensor, got NoneType"),
        ("text", "W_in must be a tensor, got str"),
        (nn.Linear(3, 4), r"weight.T"),
        (ONE.long(), "floating point .* torch.int64"),
        (ONE > 0, "torch.bool"),
        (ONE * 1j, "torch.complex64"),
        (ONE.to_sparse(), "sparse"),
        (ONE.to(torch.float8_e4m3fn), "float8"),
        (ONE[0], r"\[d_in, d_mlp\]"),
        (ONE[:0], "does not fit"),
        (ONE * torch.nan, "12 NaN"),
    ],
)
def test_bad_weights(W_in, message):
    with pytest.raises(InvalidInputError, match=message):
        MLPWeights(W_in=W_in, W_out=torch.ones(4, 2), act="relu")


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_bad_inputs_of_a_layer(kind):
    layer = random_layer(0, kind)
    for x in (None, "x", [[1.0] * 4], torch.ones(2, 5).double(), torch.ones(2, 4)):
        with pytest.raises(InvalidInputError, match=r"x must be a tensor \[..., 4\]"):
            layer(x)


def test_comparing_layers_does_not_look_at_tensors():
    layer, other = random_layer(0), random_layer(0)
    assert layer == layer
    assert layer != other
    assert len({layer, other}) == 2


def test_records_are_inverted_and_forged_ones_refused():
    layer = random_layer(0, "glu", "silu")
    metadata, tensors = layer.record()
    again = weights_of(metadata, tensors)
    assert type(again) is type(layer)
    assert all(torch.equal(again.tensors()[name], t) for name, t in layer.tensors().items())
    for changed, others in (
        ({**metadata, "form": "other"}, tensors),
        ({**metadata, "form": "mlp"}, tensors),
        (metadata, {name: t for name, t in tensors.items() if name != "W_gate"}),
        (metadata, {**tensors, "W_out": tensors["W_out"].T}),
        (metadata, {**tensors, "b_in": tensors["b_in"] * torch.nan}),
    ):
        with pytest.raises(ArtifactError):
            weights_of(changed, others)


def test_what_is_no_layer_is_named():
    for weights in (None, "x", ONE, 3):
        with pytest.raises(InvalidInputError, match="weights must be MLPWeights or GLUWeights"):
            explained_variance(weights, random_gaussian(0), 2)


def test_quadratic_forms_refuse_other_shapes():
    form = fit(random_layer(0), random_gaussian(0), 2).quadratic_form(torch.ones(3))
    for X in (torch.ones(3, 4), torch.ones(4, 2, 2), torch.tensor(1.0)):
        with pytest.raises(InvalidInputError, match="must be"):
            form @ X
    with pytest.raises(InvalidInputError, match="must be"):
        form(torch.ones(3))
    polynomial = fit(random_layer(0), random_gaussian(0), 2)
    for u in (None, "x", ["a"] * 3, torch.ones(3) * 1j, torch.ones(3, 1)):
        with pytest.raises(InvalidInputError, match="u must be"):
            polynomial.quadratic_form(u)
