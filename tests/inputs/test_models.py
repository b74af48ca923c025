"""What every input model knows: to compare itself, its record, how to measure an R2."""

import pytest
import torch
from tests.oracles import input_model, random_gaussian, random_layer

from polylens import Gaussian, GaussianMixture, InvalidInputError, Samples, fit, fit_joint
from polylens.inputs.model import InputModel, from_record


@pytest.mark.parametrize("name", ["gaussian", "mixture", "samples"])
def test_comparing_and_hashing_do_not_look_at_tensors(name):
    inputs, other = input_model(name, 1), input_model(name, 1)
    assert inputs == inputs
    assert inputs != other
    assert len({inputs, other}) == 2
    assert inputs != 3


@pytest.mark.parametrize("name", ["gaussian", "mixture", "samples"])
def test_a_record_is_inverted_or_says_that_nothing_is_kept(name):
    inputs = input_model(name, 1)
    metadata, tensors = inputs.record()
    again = from_record(metadata, tensors)
    if name == "samples":
        assert again is None
        return
    assert type(again) is type(inputs)
    for key, tensor in tensors.items():
        assert torch.equal(getattr(again, key), tensor)


def test_moments_of_each():
    gaussian, mixture = random_gaussian(0), input_model("mixture", 0)
    assert gaussian.mean_and_cov() == (gaussian.mean, gaussian.cov)
    assert torch.equal(mixture.mean_and_cov()[1], mixture.gaussian().cov)
    assert input_model("samples", 0).mean_and_cov() is None


def test_a_model_of_ones_own_is_one_class():
    class Two(InputModel):
        """One of two points."""

        def __init__(self, points):
            self.points = points

        @property
        def d_in(self):
            return self.points.shape[1]

        def r2(self, polynomial):
            return Samples(self.points).r2(polynomial)

        def record(self):
            return {"model": "Two"}, {"points": self.points}

        @classmethod
        def of_tensors(cls, tensors):
            return cls(**tensors)

    try:
        points = torch.randn(2, 4, dtype=torch.float64)
        again = from_record(*Two(points).record())
        assert isinstance(again, Two)
        polynomial = fit(random_layer(0), random_gaussian(0), 1)
        polynomial.inputs = again
        assert torch.equal(polynomial.r2, Samples(points).r2(polynomial))
    finally:
        del InputModel.models["Two"]


def test_a_joint_fit_has_no_closed_form():
    joint = fit_joint(random_layer(0), input_model("samples", 0), 2)
    for inputs in (random_gaussian(0), input_model("mixture", 0)):
        assert isinstance(inputs, Gaussian | GaussianMixture)
        with pytest.raises(InvalidInputError, match="a joint polynomial has no closed form"):
            inputs.r2(joint)


def test_draws_have_the_covariance_in_features_of_any_unit():
    units = torch.tensor([1.0, 1e-9, 1e6], dtype=torch.float64)
    correlation = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, -0.3], [0.2, -0.3, 1.0]]).double()
    gaussian = Gaussian(torch.zeros(3), units[:, None] * correlation * units)
    x = gaussian.sample(20_000, torch.Generator().manual_seed(0)) / units
    torch.testing.assert_close(x.T @ x / len(x), correlation, rtol=0, atol=0.04)
