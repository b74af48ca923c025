"""Whatever is given in place of an argument ends in an error of polylens, or is what was meant."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.oracles import generator, random_gaussian, random_layer, random_mixture
from torch import nn

import polylens
from polylens import Gaussian, GaussianMixture, GLUWeights, MLPWeights, Samples, analysis
from polylens.activations.recognition import activation
from polylens.activations.table import TABLE
from polylens.errors import PolylensError
from polylens.polynomials.explained_variance import explained_variance

NAN, INF = float("nan"), float("inf")

# Things of the wrong kind, whatever is asked for.
THINGS: dict[str, Any] = {
    "none": None,
    "text": "x",
    "nothing": "",
    "number": 3,
    "fraction": 0.5,
    "zero": 0,
    "negative": -1,
    "large": 10**4,
    "nan": NAN,
    "inf": INF,
    "bool": True,
    "numpy number": np.int64(2),
    "list": [1.0, 2.0],
    "nested": [[1.0, 2.0], [3.0]],
    "texts": ["a", "b"],
    "dict": {"a": 1},
    "set": {1, 2},
    "function": lambda: None,
    "function of one": lambda y: y,
    "class": nn.ReLU,
    "module": nn.Linear(3, 4),
    "gaussian": Gaussian.standard(7),
}
# And tensors of the right shape, as far as that is possible.
TENSORS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "integers": lambda shape: torch.ones(shape, dtype=torch.int64),
    "booleans": lambda shape: torch.ones(shape, dtype=torch.bool),
    "complex": lambda shape: torch.ones(shape, dtype=torch.complex64),
    "sparse": lambda shape: torch.ones(shape, dtype=torch.float64).to_sparse(),
    "eight bits": lambda shape: torch.ones(shape).to(torch.float8_e4m3fn),
    "meta": lambda shape: torch.ones(shape, dtype=torch.float64, device="meta"),
    "with nan": lambda shape: torch.full(shape, NAN, dtype=torch.float64),
    "with inf": lambda shape: torch.full(shape, INF, dtype=torch.float64),
    "empty": lambda shape: torch.ones(0, *shape[1:], dtype=torch.float64),
    "scalar": lambda shape: torch.tensor(1.0, dtype=torch.float64),
    "wide": lambda shape: torch.ones(*shape[:-1], 9, dtype=torch.float64),
    "deep": lambda shape: torch.ones(1, 1, *shape, dtype=torch.float64),
    "array of text": lambda shape: np.full(shape, "a"),
    "array of objects": lambda shape: np.full(shape, None),
}


def slots() -> dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]]:
    """Every argument: a call that puts a value there, and the shape that a tensor would have."""
    mlp = random_layer(1, "mlp", "silu", d_in=3, d_mlp=4, d_out=2)
    glu = random_layer(1, "glu", "silu", d_in=3, d_mlp=4, d_out=2)
    inputs, mixture = random_gaussian(1, 3), random_mixture(1, 3)
    x = inputs.sample(60, generator(0))
    labels = torch.arange(60) % 2
    poly, gated = polylens.fit(mlp, inputs, 3), polylens.fit(glu, inputs, 3)
    joint = polylens.fit_joint(mlp, Samples(x), 2)
    dense = polylens.fit_global(mlp, mixture, 2)
    u, eye = torch.ones(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    form, act = poly.quadratic_form(u), activation("silu")
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    means, covs = torch.zeros(2, 3, dtype=torch.float64), eye[None]
    W, V = mlp.W_in, mlp.W_out
    moments = torch.ones(4, dtype=torch.float64)
    weights = {
        "W_in": (lambda v: MLPWeights(v, V, "relu"), (3, 4)),
        "W_out": (lambda v: MLPWeights(W, v, "relu"), (4, 2)),
        "W_gate": (lambda v: GLUWeights(W, V, v, "relu"), (3, 4)),
        "b_in": (lambda v: MLPWeights(W, V, "relu", b_in=v), (4,)),
        "b_out": (lambda v: MLPWeights(W, V, "relu", b_out=v), (2,)),
        "act": (lambda v: MLPWeights(W, V, v), (4,)),
        "layer(x)": (mlp, (5, 3)),
        "fit weights": (lambda v: polylens.fit(v, inputs, 2), (3, 4)),
    }
    models = {
        "mean": (lambda v: Gaussian(v, eye), (3,)),
        "cov": (lambda v: Gaussian(eye[0], v), (3, 3)),
        "d_in": (lambda v: Gaussian.standard(v), (1,)),
        "draws": (lambda v: inputs.sample(v), (1,)),
        "from_samples": (lambda v: Gaussian.from_samples(v), (5, 3)),
        "mixture weights": (lambda v: GaussianMixture(v, means, covs), (2,)),
        "mixture means": (lambda v: GaussianMixture(half, v, covs), (2, 3)),
        "mixture covs": (lambda v: GaussianMixture(half, means, v), (1, 3, 3)),
        "labelled x": (lambda v: GaussianMixture.from_labels(v, labels), (60, 3)),
        "labels": (lambda v: GaussianMixture.from_labels(x, v), (60,)),
        "samples": (lambda v: polylens.fit(mlp, Samples(v), 2), (60, 3)),
        "joint samples": (lambda v: polylens.fit_joint(mlp, Samples(v), 2), (60, 3)),
        "sample weights": (lambda v: polylens.fit(mlp, Samples(x, v), 2), (60,)),
        "inputs": (lambda v: polylens.fit(mlp, v, 2), (60, 3)),
        "global inputs": (lambda v: polylens.fit_global(mlp, v, 2), (60, 3)),
        "joint inputs": (lambda v: polylens.fit_joint(mlp, v, 2), (60, 3)),
    }
    options = {
        "degree": (lambda v: polylens.fit(mlp, inputs, v), (1,)),
        "joint degree": (lambda v: polylens.fit_joint(mlp, Samples(x), v), (1,)),
        "global degree": (lambda v: polylens.fit_global(mlp, mixture, v), (1,)),
        "variance degree": (lambda v: explained_variance(mlp, inputs, v), (1,)),
        "tails": (lambda v: polylens.fit(mlp, Samples(x), 2, tails=v), (1,)),
        "tolerance": (lambda v: polylens.fit_global(mlp, mixture, 2, tolerance=v), (1,)),
        "outputs": (lambda v: polylens.fit_global(mlp, mixture, 2, outputs=v), (2, 1)),
        "hermite m": (lambda v: act.hermite_coefficients(v, moments, 3), (4,)),
        "hermite s": (lambda v: act.hermite_coefficients(moments, v, 3), (4,)),
        "hermite degree": (lambda v: act.hermite_coefficients(moments, moments, v), (1,)),
    }
    register = polylens.register_activation
    registered = {
        "name": (lambda v: register(v, torch.tanh), (1,)),
        "fn": (lambda v: register("fresh", v), (1,)),
        "kinks": (lambda v: register("fresh", torch.tanh, v), (2,)),
        "slopes": (lambda v: register("fresh", torch.tanh, (), v), (2,)),
    }
    polynomials = {
        f"{name}{method}": (call, shape)
        for name, each in {"poly": poly, "glu": gated, "joint": joint, "dense": dense}.items()
        for method, call, shape in (
            ("(x)", each, (5, 3)),
            (".all_degrees", each.all_degrees, (5, 3)),
            (".truncate", each.truncate, (1,)),
            (".quadratic_form", each.quadratic_form, (2,)),
        )
    }
    more = {
        "part": (poly.part, (1,)),
        "ends": (poly.with_ends, (2, 4)),
        "max_bytes": (lambda v: poly.to_dense(v), (1,)),
        "neurons y": (poly.neurons, (5, 4)),
        "neurons z": (lambda v: gated.neurons(torch.ones(5, 4).double(), v), (5, 4)),
        "piece x": (lambda v: poly.piece(v, u), (3,)),
        "shares x": (poly.shares, (5, 3)),
        "form(x)": (form, (5, 3)),
        "form @ X": (lambda v: form @ v, (3, 2)),
    }
    analyses = {
        "eigenfeatures": (lambda v: analysis.eigenfeatures(v, u, 1), (3,)),
        "eigenfeatures u": (lambda v: analysis.eigenfeatures(poly, v, 1), (2,)),
        "eigenfeatures k": (lambda v: analysis.eigenfeatures(poly, u, v), (1,)),
        "metric": (lambda v: analysis.eigenfeatures(poly, u, 1, metric=v), (3, 3)),
        "singular k": (lambda v: analysis.singular_features(poly, v), (1,)),
        "writers": (lambda v: analysis.interactions(poly, v, u), (5, 3)),
        "attack x": (lambda v: analysis.linear_attack(poly, v, labels, 1.0), (60, 3)),
        "attack labels": (lambda v: analysis.linear_attack(poly, x, v, 1.0), (60,)),
        "attack norm": (lambda v: analysis.linear_attack(poly, x, labels, v), (1,)),
        "attack target": (lambda v: analysis.linear_attack(poly, x, labels, 1.0, target=v), (1,)),
        "attack rank": (lambda v: analysis.linear_attack(poly, x, labels, 1.0, rank=v), (1,)),
        "attack index": (lambda v: analysis.singular_attack(poly, x, labels, 1.0, v), (1,)),
    }
    return weights | models | options | registered | polynomials | more | analyses


# What is meant by it is plain, or is the default.
DEGREES, BATCHES = {"number", "zero"}, {"deep", "empty", "with nan", "with inf"}
MEANT: dict[str, set[str]] = {
    **{f"{name}(x)": BATCHES for name in ("poly", "glu", "joint", "dense", "layer")},
    **{f"{name}.all_degrees": BATCHES for name in ("poly", "glu", "joint", "dense")},
    **{f"{name}.truncate": DEGREES for name in ("poly", "glu", "joint", "dense")},
    **{
        f"{name}.quadratic_form": {"list", "integers"} for name in ("glu", "poly", "dense", "joint")
    },
    **{name: DEGREES for name in ("degree", "joint degree", "global degree", "variance degree")},
    **{f"hermite {name}": {"fraction", "scalar", "deep"} for name in "ms"},
    "hermite degree": DEGREES,
    "part": DEGREES,
    "form(x)": {*BATCHES, "integers"},
    "form @ X": {"integers", "wide", "with nan", "with inf"},
    "neurons y": BATCHES,
    "neurons z": {"with nan", "with inf"},
    "piece x": {"integers"},
    "shares x": {"integers", "empty"},
    "ends": {"integers", "with inf"},
    "W_out": {"wide"},
    "b_in": {"none"},
    "b_out": {"none"},
    "act": {"function of one"},
    "fn": {"function of one"},
    "name": {"text"},
    "kinks": {"list", "integers", "empty", "wide"},
    "slopes": {"none"},
    "d_in": {"number", "large"},
    "draws": {"number", "zero", "large"},
    "max_bytes": {"large"},
    "from_samples": {"wide", "deep"},
    "samples": {"deep"},
    "joint samples": {"deep"},
    "sample weights": {"none", "integers", "booleans", "eight bits", "deep"},
    "labelled x": {"wide"},
    "labels": {"integers", "booleans"},
    "tails": {"none", "zero"},
    "tolerance": {"fraction"},
    "outputs": {"none", "wide"},
    "metric": {"none"},
    "singular k": {"none", "number"},
    "eigenfeatures k": {"number"},
    "eigenfeatures u": {"list", "integers"},
    "attack x": {"integers"},
    "attack labels": {"integers"},
    "attack norm": {"number", "fraction", "zero", "large"},
    "attack target": {"none", "zero"},
    "attack rank": {"none"},
    "attack index": {"zero"},
}
CASES = [(slot, value) for slot in sorted(slots()) for value in (*THINGS, *TENSORS)]


def outcome(call: Callable[[Any], Any], shape: tuple[int, ...], value: str) -> str:
    """ "refused", "accepted", or the error that should not have come."""
    given = THINGS[value] if value in THINGS else TENSORS[value](shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(given)
        except PolylensError as error:
            return "refused" if len(str(error)) > 15 else f"too short: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.laws)])
def test_bad_inputs_end_in_errors_of_polylens(step, monkeypatch):
    wrong = []
    there = slots()
    for slot, value in CASES[::step]:
        monkeypatch.setattr("polylens.activations.registered.TABLE", dict(TABLE))
        got = outcome(*there[slot], value)
        if got != "refused" and not (got == "accepted" and value in MEANT.get(slot, ())):
            wrong.append((slot, value, got))
    assert not wrong, "\n".join(map(str, wrong))
