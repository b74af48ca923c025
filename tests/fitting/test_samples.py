"""Samples as the input model: streaming, weights, degenerate data, the joint fit."""

from dataclasses import replace

import pytest
import torch
from tests.oracles import FITS, assert_same_function, generator, random_layer, random_mixture

from polylens import InvalidInputError, NumericalWarning
from polylens.fitting.fit import fit, fit_joint
from polylens.fitting.neuron_gram import NeuronGram
from polylens.fitting.samples import SamplesEstimator
from polylens.inputs.samples import Samples
from polylens.normal_forms import preactivation
from polylens.polynomials.joint import features

both = pytest.mark.parametrize("kind", ["mlp", "glu"])


def heavy(seed: int = 0, n: int = 3000, d: int = 4):
    """Draws with heavier tails than a Gaussian's."""
    g = generator(seed)
    x = random_mixture(seed, d).sample(n, g)
    return x * (0.3 + torch.rand(n, 1, generator=g, dtype=torch.float64).square() * 3)


@both
def test_equals_dense_least_squares_per_neuron(kind):
    x = heavy()
    layer = random_layer(0, kind, "silu", d_mlp=5, d_out=5)
    layer = replace(layer, W_out=torch.eye(5).double(), b_out=None)
    poly = fit(layer, Samples(x), 3)
    W, b = (layer.W_in, layer.b_in) if kind == "mlp" else (layer.W_gate, layer.b_gate)
    y, z = x @ W + b, x @ layer.W_in + layer.b_in
    target, predicted = layer(x), poly(x)
    for i in range(5):
        columns = [y[:, i] ** k for k in range(4)]
        if kind == "glu":
            columns += [z[:, i] * y[:, i] ** k for k in range(3)]
        A = torch.stack(columns, 1)
        solution = torch.linalg.lstsq(A, target[:, i : i + 1]).solution
        torch.testing.assert_close(predicted[:, i], (A @ solution)[:, 0], rtol=1e-7, atol=1e-7)


@both
def test_every_way_of_passing_samples_agrees(kind):
    x = heavy()
    layer = random_layer(0, kind)
    batches = list(x.split(700))
    reference = fit(layer, Samples(x), 3)
    for samples in (
        Samples(x.reshape(30, 100, 4)),
        Samples(batches),
        Samples(lambda: iter(batches)),
        Samples(iter(batches)),
    ):
        assert_same_function(fit(layer, samples, 3), reference, x[:50], 1e-8)
    gram = NeuronGram(layer, 4)
    for batch in batches:
        gram.update(batch)
    assert gram.count == 3000
    assert_same_function(gram.solve(3), reference, x[:50], 1e-8)


def test_weights_are_repetitions():
    x, layer = heavy(n=500), random_layer(0, "glu")
    repeats = torch.randint(0, 3, (500,), generator=generator(0))
    repeated = fit(layer, Samples(x.repeat_interleave(repeats, 0)), 2)
    weighted = fit(layer, Samples(x, repeats), 2)
    batches = list(zip(x.split(100), repeats.split(100), strict=True))
    for poly in (weighted, fit(layer, Samples(batches), 2)):
        assert_same_function(poly, repeated, x[:50])
        torch.testing.assert_close(poly.r2, repeated.r2)
    assert_same_function(
        fit_joint(layer, Samples(x, torch.full((500,), 0.5)), 2),
        fit_joint(layer, Samples(x), 2),
        x[:50],
        1e-6,
    )


def test_gram_of_a_model_stream_in_its_own_dtype():
    layer = random_layer(0, "glu", "silu").to(torch.float32)
    x = heavy().float().reshape(30, 100, 4)
    poly = fit(layer, Samples(x), 3)
    assert poly.P.dtype == torch.float64
    assert poly(x).dtype == torch.float32
    assert poly.r2[-1] > 0.9


@both
def test_joint_fit_is_at_least_as_good(kind):
    x, fresh = heavy(n=8000).chunk(2)
    layer = random_layer(1, kind, "silu", d_mlp=8)
    neuron, joint = (FITS[scope](layer, Samples(x), 3) for scope in ("neuron", "joint"))
    assert (joint.r2 > neuron.r2 - 1e-9).all()
    assert joint.r2[2] > neuron.r2[2] + 1e-3
    error = [(p.all_degrees(fresh)[2] - layer(fresh)).square().mean() for p in (neuron, joint)]
    assert error[1] < error[0]
    assert len(joint.ridge) == len(joint.held_out) == 4
    assert min(joint.ridge[2:]) < float("inf")
    for n in range(4):  # one product evaluates the base and the correction
        phi = features(joint.base, joint.center, joint.z_mean, fresh, n)[0]
        apart = joint.base.truncate(n)(fresh) + phi @ getattr(joint, f"D{n}")
        torch.testing.assert_close(joint.all_degrees(fresh)[n], apart)
    half = fit_joint(layer.to(torch.bfloat16), Samples(x), 3)
    assert half(fresh.bfloat16()).dtype == torch.bfloat16
    assert half.r2[3] > 0.9 * joint.r2[3]
    torch.testing.assert_close(joint.truncate(2)(x), joint.all_degrees(x)[2])
    torch.testing.assert_close(joint.truncate(2).r2, joint.r2[:3])


@both
def test_the_joint_fit_solves_its_ridge_regression(kind):
    layer, x = random_layer(2, kind, "silu", d_mlp=6), heavy(n=5000)
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(0)).double()
    batches = [(x[:700], w[:700]), (x[700:701], w[700:701]), (x[701:], w[701:])]
    joint = fit_joint(layer, Samples(iter(batches)), 3)
    for n in range(4):
        phi = features(joint.base, joint.center, joint.z_mean, x, n)[0]
        left = layer(x) - joint.base.truncate(n)(x)
        gram, right = (phi.T @ (a * w[:, None]) / w.sum() for a in (phi, left))
        if joint.ridge[n] == float("inf"):
            assert not joint.corrections[n].any()
            continue
        gram += joint.ridge[n] * torch.diag(gram.diagonal())
        expected = torch.linalg.solve(gram, right)
        torch.testing.assert_close(phi @ joint.corrections[n], phi @ expected)
    assert min(joint.ridge[2:]) < float("inf")


@both
def test_one_sample_and_collinear_samples(kind):
    layer = random_layer(0, kind)
    x = heavy(n=1)
    with pytest.warns(NumericalWarning, match="ridge of 1e-12"):
        one = fit(layer, Samples(x), 2)
    assert one.ridge == 1e-12
    torch.testing.assert_close(one(x), layer(x), rtol=1e-9, atol=1e-9)
    assert one.r2.tolist() == [1, 1, 1]
    line = torch.linspace(-1, 1, 3).double()[:, None] * torch.ones(4).double()
    with pytest.warns(NumericalWarning, match="collinear"):
        few = fit(layer, Samples(line), 4)
    assert torch.isfinite(few.P).all()
    torch.testing.assert_close(few(line), layer(line), rtol=1e-8, atol=1e-8)
    assert fit(layer, Samples(heavy()), 2).ridge == 0


@both
def test_constant_neurons_and_one_feature(kind):
    layer = random_layer(0, kind, d_in=1, d_mlp=2, d_out=1)
    dead = torch.tensor([0.0, 1.0]).double()
    name = "W_in" if kind == "mlp" else "W_gate"
    layer = replace(layer, **{name: getattr(layer, name) * dead})
    x = heavy(d=1)
    if kind == "mlp":
        poly = fit(layer, Samples(x), 3)
        assert poly.ridge == 0
    else:  # z is a function of y
        with pytest.warns(NumericalWarning, match="collinear"):
            poly = fit(layer, Samples(x), 3)
    assert poly.r2[-1] > 0.9
    constant = Samples(torch.ones(50, 1).double())
    poly = fit(layer, constant, 2)
    torch.testing.assert_close(poly(torch.ones(1).double()), layer(torch.ones(1).double()))
    assert poly.r2.tolist() == [1, 1, 1]


def test_memory_does_not_grow_with_samples():
    layer = random_layer(0, "glu")
    gram = NeuronGram(layer, 3)
    gram.update(heavy(n=100))
    size = gram._gram.numel()
    for _ in range(5):
        gram.update(heavy(n=1000))
    assert gram._gram.numel() == size == 6 * 8 * 8


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (lambda: Samples(iter([])), "empty"),
        (lambda: Samples([torch.zeros(0, 4).double()]), "empty"),
        (lambda: Samples(torch.zeros(3, 5)), "reads 4 features"),
        (lambda: Samples([torch.zeros(3, 4), torch.zeros(3, 5)]), "5 features, 4"),
        (lambda: Samples(torch.full((3, 4), float("nan"))), "3 of 3 samples"),
        (lambda: Samples(torch.zeros(3, 4, dtype=torch.long)), "floating point"),
        (lambda: Samples(torch.ones(3, 4), torch.ones(2)), "3 samples but 2"),
        (lambda: Samples(torch.ones(3, 4), -torch.ones(3)), ">= 0"),
        (lambda: Samples(torch.ones(3, 4), torch.zeros(3)), "positive weight"),
        (lambda: Samples(["text"]), "got str"),
        (lambda: Samples(3), "got int"),
        (lambda: Samples([torch.ones(3, 4)], torch.ones(3)), r"\(x, weights\)"),
    ],
)
def test_bad_samples(samples, message):
    with pytest.raises(InvalidInputError, match=message):
        fit(random_layer(0), samples(), 2)


def test_iterators_are_used_once():
    layer = random_layer(0)
    jointly = (fit_joint(layer, Samples(x), 2) for x in (iter([heavy()]), [heavy()]))
    assert torch.equal(*(poly(heavy()) for poly in jointly))
    poly = fit(layer, Samples(iter([heavy()])), 2)
    with pytest.raises(InvalidInputError, match="used up"):
        _ = poly.r2
    with pytest.raises(InvalidInputError, match="kept for 0"):
        NeuronGram(layer, 2).solve(3)
    with pytest.raises(InvalidInputError, match="no samples"):
        NeuronGram(layer, 2).solve()


LATTICES = {
    "0 or 1": ([0.0, 1.0], [1, 1]),
    "0.1 or 0.7": ([0.1, 0.7], [1, 1]),
    "0 or 1, unevenly": ([0.0, 1.0], [2, 3]),
    "roots of He_3": ([-(3**0.5), 0.0, 3**0.5], [1, 4, 1]),
    "five points": ([0.0, 1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1, 1]),
}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")
def test_features_that_samples_cannot_tell_apart(kind, lattice, dtype):
    """He_2(-1) and He_2(1) are zero up to rounding, which is no feature."""
    points, often = LATTICES[lattice]
    x = (
        torch.tensor(points, dtype=dtype)
        .repeat_interleave(torch.tensor(often))
        .repeat(120)[:, None]
    )
    x = x[torch.randperm(len(x), generator=generator(0))]
    layer = random_layer(1, kind, "silu", d_in=1).to(dtype)
    exact = {"rtol": 0, "atol": 1e-8 if dtype == torch.float64 else 1e-5}
    for samples in (Samples(x), Samples(iter(x.split(100)))):
        poly = fit(layer, samples, 4)
        for degree in range(len(points) - 1, 5):
            torch.testing.assert_close(poly.truncate(degree)(x), layer(x), **exact)
    joint = fit_joint(layer, Samples(x), 4)
    assert joint.r2[len(points) - 1 :].min() > 1 - 10 * exact["atol"]


@pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")
@pytest.mark.parametrize("seed", range(3))
def test_nearly_collinear_features_are_fitted_as_functions(seed):
    """Eleven features of ten points: the ridge that makes them unique moves no output."""
    x = torch.eye(10, dtype=torch.float64)[torch.randint(10, (400,), generator=generator(seed))]
    layer = random_layer(seed, "glu", "relu", d_in=10)
    poly, parts = fit(layer, Samples(x), 5), layer.neurons(x)
    y, z, h = parts["y"], parts["z"], parts["h"]
    found = poly.neurons(y, z)
    for i in range(layer.d_mlp):
        t = (y[:, i] - y[:, i].mean()) / y[:, i].std()
        powers = t[:, None] ** torch.arange(6)
        A = torch.cat([powers, z[:, i, None] * powers[:, :5]], 1)
        best = A @ torch.linalg.lstsq(A, h[:, i], rcond=1e-13, driver="gelsd").solution
        assert (found[:, i] - best).norm() < 1e-7 * h[:, i].norm()


@both
@pytest.mark.parametrize("scope", ["neuron", "joint"])
@pytest.mark.parametrize("tails", [None, 0.0, 0.05])
def test_samples_of_weight_zero_decide_nothing(kind, scope, tails):
    layer, x = random_layer(2, kind, "silu"), heavy(n=3000)
    w = torch.rand(3000, generator=generator(4)).double()
    far, none = torch.full((50, 4), 1e4).double(), torch.zeros(50).double()
    both = torch.cat([far, x[:100]]), torch.cat([none, w[:100]])
    batches = [(x[i : i + 100], w[i : i + 100]) for i in range(0, 3000, 100)]
    for read in (iter, list):
        expected = FITS[scope](layer, Samples(read(batches)), 2, tails=tails)
        found = FITS[scope](layer, Samples(read([both, *batches[1:]])), 2, tails=tails)
        assert_same_function(found, expected, x, 1e-9)
        assert tails is None or torch.equal(found.ends, expected.ends)


@pytest.mark.more
@both
def test_joint_fits_from_small_batches_hold_some_out(kind):
    layer, x = random_layer(1, kind, "silu", d_mlp=8), heavy(n=1500)
    r2 = {n: float(fit_joint(layer, Samples(x.split(n)), 2).r2[2]) for n in (1, 3, 4, 500)}
    per_neuron = float(fit(layer, Samples(x), 2).r2[2])
    for n in (1, 3, 4):
        assert r2[n] - per_neuron > 0.5 * (r2[500] - per_neuron) > 1e-3


def test_preactivations_are_computed_once(monkeypatch):
    weights, x = random_layer(0, "glu", "silu"), heavy(n=1500)
    rows, product = [], preactivation._product

    def counted(x, W, b):
        rows.append(len(x))
        return product(x, W, b)

    monkeypatch.setattr(preactivation, "_product", counted)
    estimator = SamplesEstimator(weights, 3, tails=0.05)
    estimator.update(x)
    estimator.solve()
    assert sum(rows) == 2 * len(x)  # of the gate and of the linear branch
