"""What all estimators promise, the verbs that use them, and the errors of their old options."""

import inspect

import pytest
import torch
from tests.oracles import generator, random_layer, random_mixture

import polylens
from polylens import InvalidInputError, Samples, fit, fit_joint
from polylens.checks import renamed
from polylens.fitting.estimator import Estimator
from polylens.fitting.fit import ESTIMATORS, estimator

each = pytest.mark.parametrize("name", ESTIMATORS)
TAILS = {"gaussian": (None, 0.0), "samples": (None, 0.0, 0.1), "joint": (None, 0.0, 0.1)}


def batches(n: int = 6000, size: int = 250):
    x = random_mixture(1).sample(n, generator(1))
    return list(x.split(size)), list(torch.rand(n, generator=generator(2)).double().split(size))


@each
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_what_is_written_to_an_input_afterwards_does_not_matter(name, kind):
    """A model that works in place writes to what its layers have read."""
    layer = random_layer(1, kind, "silu")
    xs, ws = batches()
    for tails in TAILS[name]:
        found = []
        for spoil in (False, True):
            seen = ESTIMATORS[name](layer, 2, tails)
            for x, w in zip(xs, ws, strict=True):
                x, w = x.clone(), w.clone()
                seen.update(x, w)
                if spoil:
                    x.fill_(float("nan"))
                    w.fill_(float("nan"))
            assert seen.count == 6000
            found.append(seen.solve())
        assert torch.equal(*(poly(xs[0]) for poly in found)), tails


@pytest.mark.parametrize("tails", [None, 0.0, 0.1])
def test_verbs_and_estimators_are_one(tails):
    layer, (xs, ws) = random_layer(1, "glu", "silu"), batches()
    for verb, name in ((fit, "samples"), (fit_joint, "joint")):
        seen = estimator(name)(layer, 3, tails)
        for x, w in zip(xs, ws, strict=True):
            seen.update(x, w)
        streamed = verb(layer, Samples(iter(zip(xs, ws, strict=True))), tails=tails)
        assert torch.equal(streamed(xs[0]), seen.solve()(xs[0]))
        assert isinstance(streamed.inputs, Samples)


class Mine(Estimator):
    name = "mine"
    default_tails = {"true": None, "replaced": None}  # noqa: RUF012

    def update(self, x, sample_weights=None): ...

    def solve(self): ...


def test_an_estimator_of_ones_own_is_taken_and_others_are_refused():
    assert estimator(Mine) is Mine
    for unknown in ("cauchy", "mixture", int, None):
        with pytest.raises(InvalidInputError, match="'gaussian', 'samples', 'joint'"):
            estimator(unknown)
    with pytest.raises(TypeError, match="abstract"):
        Estimator(random_layer(1), 2)


@each
def test_a_degree_or_tails_that_cannot_be_are_refused(name):
    layer = random_layer(1)
    for wrong in (-1, 13, 2.0, True):
        with pytest.raises(InvalidInputError, match="degree must be"):
            ESTIMATORS[name](layer, wrong)
    for wrong in (0.5, -0.1, 1, True, "0.1"):
        with pytest.raises(InvalidInputError, match="tails="):
            ESTIMATORS[name](layer, 2, wrong)
    if name == "gaussian":
        with pytest.raises(InvalidInputError, match='estimator="samples"'):
            ESTIMATORS[name](layer, 2, 0.1)


def test_too_many_features_are_refused_before_any_input_is_seen():
    wide = polylens.MLPWeights(torch.zeros(9, 30_000), torch.zeros(30_000, 1), "relu")
    with pytest.raises(InvalidInputError, match="60,010 features"):
        ESTIMATORS["joint"](wide, 3, 0.1)


def test_cubic_is_the_default_and_types_are_one():
    layer, (xs, _) = random_layer(1), batches()
    assert fit(layer, random_mixture(1)).degree == fit(layer, Samples(xs)).degree == 3
    assert fit_joint(layer, Samples(xs)).degree == 3
    with pytest.raises(InvalidInputError, match="must be Samples, got GaussianMixture"):
        fit_joint(layer, random_mixture(1))
    with pytest.raises(InvalidInputError, match="weights must be MLPWeights"):
        fit(torch.nn.Linear(2, 2), random_mixture(1))
    with pytest.raises(InvalidInputError, match=r"clip=; use tails=None \(was False\)"):
        fit_joint(layer, Samples(xs), clip=True)
    with pytest.raises(InvalidInputError, match="for Samples: a GaussianMixture"):
        fit(layer, random_mixture(1), tails=0.0)


def test_renamed_options_are_answered_and_the_rest_is_as_it_was():
    class Owner:
        @renamed(old="new=")
        def method(self, a: int, *, new: int = 0) -> int:
            """What it does."""
            return a + new

    @renamed(old="new=")
    def free(*args: int, **kwargs: int) -> int:
        return sum(args) + sum(kwargs.values())

    owner = Owner()
    assert owner.method(1, new=2) == 3
    assert Owner.method.__doc__ == "What it does."
    assert list(inspect.signature(Owner.method).parameters) == ["self", "a", "new"]
    with pytest.raises(InvalidInputError, match=r"method\(\) no longer takes old=; use new="):
        owner.method(1, old=2)
    with pytest.raises(InvalidInputError, match=r"takes a by position; give new= by name \(got 2"):
        owner.method(1, 2)
    with pytest.raises(TypeError, match="takes no never="):
        owner.method(1, never=2)
    assert free(1, 2, 3, x=4) == 10
