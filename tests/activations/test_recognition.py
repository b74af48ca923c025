"""Which functions, modules and saved activations are recognised, and which are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylens import ArtifactError, UnsupportedActivation
from polylens.activations.recognition import (
    PROBE,
    PROBE_OF_0_1,
    SAVED,
    activation,
    activation_of,
    activation_record,
)
from polylens.activations.table import TABLE, elu, leaky_relu, swish, xielu

PARAMETRISED = (leaky_relu(1 / 3), elu(0.7, 1.1), swish(1.3), xielu(0.8, 0.81, 0.5, -1e-6))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_row_is_recognised_by_its_values(name):
    found = activation(lambda y: TABLE[name].fn(y))
    assert torch.equal(found(PROBE), TABLE[name](PROBE))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.LeakyReLU(0.3), "leaky_relu(0.3)"),
        (nn.PReLU(), "leaky_relu(0.25)"),
        (nn.ELU(0.5), "elu(alpha=0.5, scale=1)"),
        (nn.SELU(), "selu"),
        (nn.GELU("tanh"), "gelu_new"),
        (nn.Hardtanh(0, 6), "relu6"),
    ],
)
def test_modules_are_recognised(module, name):
    assert activation(module).name == name


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: torch.relu(y).clamp(max=100),
        lambda y: torch.relu(y).clamp(max=5000),
        lambda y: F.silu(y) + 1e-3 * torch.exp(-(((y - 3.025) / 0.02) ** 2)),
        lambda y: torch.where(y < -80, y, F.gelu(y)),
    ],
)
def test_what_differs_far_away_or_between_the_grid_is_not_mistaken(fn):
    with pytest.raises(UnsupportedActivation, match="computes none of the known"):
        activation(fn)


def test_classes_and_functions_that_fail():
    with pytest.raises(UnsupportedActivation, match=r"ReLU is a class; .* an instance, ReLU\(\)"):
        activation(nn.ReLU)  # type: ignore[arg-type]

    def broken(y):
        raise ValueError

    for source in (broken, lambda y: 1 / 0, nn.PReLU(4)):
        with pytest.raises(UnsupportedActivation, match="computes none"):
            activation(source)


@pytest.mark.parametrize("act", [*TABLE.values(), *PARAMETRISED], ids=str)
def test_records_are_inverted_and_those_of_0_1_read(act):
    metadata, tensors = activation_record(act)
    again = activation_of(metadata, tensors)
    assert again.name == act.name
    assert torch.equal(again(PROBE), act(PROBE))
    old = activation_of(metadata, {"values": act(PROBE_OF_0_1)})
    assert torch.equal(old(PROBE), act(PROBE))


def test_a_saved_activation_is_compared_far_away_too():
    metadata, tensors = activation_record(TABLE["relu"])
    tensors["values"] = tensors["values"].clamp(max=100)
    with pytest.raises(ArtifactError, match="another function"):
        activation_of(metadata, tensors)


@pytest.mark.parametrize(
    ("metadata", "values"),
    [
        ({"name": "relu", "family": ["none", 1.0]}, SAVED),
        ({"name": "relu", "family": ["swish", "x"]}, SAVED),
        ({"name": "relu", "family": ["swish", -1.0]}, SAVED),
        ({"name": 3, "family": []}, SAVED),
        ({"name": "relu", "family": []}, SAVED[:7]),
        ({"name": "relu", "family": []}, torch.relu(SAVED).to(torch.complex64)),
        ({"name": "relu", "family": []}, torch.relu(SAVED) * torch.nan),
    ],
)
def test_forged_records_are_refused(metadata, values):
    with pytest.raises(ArtifactError):
        activation_of(metadata, {"values": values})


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: torch.relu(y) + torch.exp(-((y - 18) ** 2)),
        lambda y: torch.relu(y) + torch.exp(-(((y - 0.025) / 0.003) ** 2)),
        lambda y: torch.relu(y).clamp(max=100),
    ],
)
def test_a_function_that_differs_somewhere_is_not_the_known_one(fn):
    with pytest.raises(UnsupportedActivation):
        activation(fn)
