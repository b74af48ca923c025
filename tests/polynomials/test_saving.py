"""Saving and loading polynomials is the identity, bit for bit, or a clear error."""

import pytest
import torch
from tests.oracles import FITS, generator, input_model, random_gaussian, random_layer

import polylens
from polylens import (
    ArtifactError,
    DensePolynomial,
    Gaussian,
    GaussianMixture,
    InvalidInputError,
    Polynomial,
    fit,
    fit_global,
)
from polylens.activations.table import TABLE, elu, leaky_relu, swish, xielu
from polylens.files import format as storage
from polylens.inputs.model import from_record

# Parameters that a name printed to six digits would lose.
ACTS = {
    "gelu": "gelu",
    "selu": "selu",
    "swish": swish(1.1 + 1e-13),
    "leaky": leaky_relu(1 / 3),
    "elu": elu(0.7, 1 / 7),
    "xielu": xielu(0.8, 0.81, 0.5, -1e-6),
}
CASES = [
    ("gaussian", "neuron"),
    ("mixture", "neuron"),
    ("samples", "neuron"),
    ("mixture", "global"),
    ("samples", "joint"),
]
X = torch.randn(7, 4, dtype=torch.float64, generator=generator(5))


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_identical(loaded, saved):
    assert type(loaded) is type(saved)
    state, expected = loaded.state_dict(), saved.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert state[name].shape == tensor.shape, name
        assert torch.equal(bits(state[name]), bits(tensor)), name


def reload(polynomial, path):
    polynomial.save(path)
    return type(polynomial).load(path)


@pytest.mark.parametrize(("inputs", "scope"), CASES)
@pytest.mark.parametrize("kind", ["mlp", "glu"])
@pytest.mark.parametrize("biases", [True, False])
def test_save_and_load_are_the_identity(inputs, scope, kind, biases, tmp_path):
    layer = random_layer(3, kind, "silu", biases=biases)
    saved = FITS[scope](layer, input_model(inputs, 1), 3)
    loaded = reload(saved, tmp_path / "x")
    assert_identical(loaded, saved)
    assert torch.equal(loaded.all_degrees(X), saved.all_degrees(X))
    assert_identical(loaded.truncate(2), saved.truncate(2))
    assert torch.equal(loaded.weights(X), saved.weights(X))
    for name in ("ridge", "held_out", "iterations", "residual", "dtype"):
        assert getattr(loaded, name, None) == getattr(saved, name, None)
    reload(loaded, tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    if inputs != "samples":
        assert torch.equal(loaded.r2, saved.r2)


@pytest.mark.parametrize("name", ACTS)
def test_activations_keep_every_digit_of_their_parameters(name, tmp_path):
    saved = fit(random_layer(3, "glu", ACTS[name]), random_gaussian(1), 3)
    loaded = reload(saved, tmp_path / "x")
    y = torch.linspace(-60, 60, 1001, dtype=torch.float64)
    assert loaded.act.name == saved.act.name
    assert torch.equal(bits(loaded.act(y)), bits(saved.act(y)))
    assert torch.equal(fit(loaded.weights, loaded.inputs, 3).P, saved.P)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_parts(dtype, tmp_path):
    saved = fit(random_layer(3, "glu", "silu").to(dtype), random_gaussian(1), 3)
    assert_identical(reload(saved, tmp_path / "x"), saved)
    assert_identical(reload(saved.part(2), tmp_path / "x"), saved.part(2))
    mixture = fit_global(random_layer(3).to(dtype), input_model("mixture", 1), 2)
    loaded = reload(mixture, tmp_path / "x")
    assert loaded.dtype == dtype
    assert torch.equal(loaded(X), mixture(X))


def test_input_models_come_back_bit_for_bit(tmp_path):
    diagonal = Gaussian(torch.ones(4).double(), torch.rand(4, generator=generator(0)).double())
    shared = GaussianMixture(
        torch.tensor([0.1, 0.2, 0.7000001]), torch.randn(3, 4), random_gaussian(1).cov[None]
    )
    for inputs in (diagonal, random_gaussian(2, rank=2), shared, input_model("mixture", 3, 4)):
        loaded = reload(fit(random_layer(3), inputs, 2), tmp_path / "x").inputs
        assert type(loaded) is type(inputs)
        for name in ("mean", "cov", "weights", "means", "covs"):
            if hasattr(inputs, name):
                assert torch.equal(bits(getattr(loaded, name)), bits(getattr(inputs, name)))


def test_covariances_as_0_1_wrote_them():
    """One shared [d, d] for any other number of components, d diagonals [d, d] for d."""
    cov = random_gaussian(1).cov
    for k, covs, expected in (
        (3, cov, cov.expand(3, 4, 4)),
        (4, cov.abs(), torch.diag_embed(cov.abs())),
        (3, cov[:3].abs(), torch.diag_embed(cov[:3].abs())),
    ):
        weights, means = torch.ones(k).double() / k, torch.zeros(k, 4).double()
        tensors = {"weights": weights, "means": means, "covs": covs}
        loaded = from_record({"model": "GaussianMixture"}, tensors)
        assert isinstance(loaded, GaussianMixture)
        for component, wanted in zip(loaded.components, expected, strict=True):
            there = component.cov if component.cov.dim() == 2 else torch.diag(component.cov)
            assert torch.equal(there, wanted)


def test_forged_input_models_are_refused():
    cov = torch.eye(2).double()
    for name, tensors, message in (
        ("Gaussian", {"mean": torch.zeros(2).double(), "cov": -cov}, "positive semidefinite"),
        ("Gaussian", {"mean": torch.zeros(3).double(), "cov": cov}, "to fit mean"),
        ("Gaussian", {"cov": cov}, "mean"),
        ("GaussianMixture", {"means": cov, "covs": cov}, "weights"),
        ("GaussianMixture", {"weights": cov[0], "means": cov[0], "covs": cov}, "saved Gaussian"),
        ("Samples", {"x": cov}, "not kept"),
        ("Cauchy", {}, "not known here"),
    ):
        with pytest.raises(ArtifactError, match=message):
            from_record({"model": name}, tensors)


@pytest.mark.parametrize("scope", ["neuron", "joint"])
def test_samples_are_not_saved_but_their_r2_is_if_read(scope, tmp_path):
    saved = FITS[scope](random_layer(3), input_model("samples", 1), 2)
    with pytest.raises(InvalidInputError, match="samples are not saved"):
        _ = reload(saved, tmp_path / "x").r2
    r2 = saved.r2
    loaded = reload(saved, tmp_path / "x")
    assert torch.equal(loaded.r2, r2)
    assert torch.equal(loaded.truncate(1).r2, r2[:2])


@pytest.fixture
def custom():
    name = "bent"
    polylens.register_activation(name, lambda y: torch.sqrt(1 + y * y))
    yield name
    TABLE.pop(name, None)


def test_a_registered_activation_is_found_by_name(custom, tmp_path):
    saved = fit(random_layer(3, act=custom), random_gaussian(1), 2)
    assert_identical(reload(saved, tmp_path / "x"), saved)
    del TABLE[custom]
    with pytest.raises(ArtifactError, match=r"register the same function .*'bent'"):
        Polynomial.load(tmp_path / "x")
    polylens.register_activation(custom, lambda y: torch.sqrt(2 + y * y))
    with pytest.raises(ArtifactError, match=r"'bent' that is another function .* differ by 0"):
        Polynomial.load(tmp_path / "x")


def test_any_damage_of_a_saved_polynomial_is_refused(tmp_path):
    path = tmp_path / "x"
    fit(random_layer(3, "glu", "silu"), random_gaussian(1), 3).save(path)
    good = path.read_bytes()
    places = torch.randint(len(good), (400,), generator=generator(0)).tolist()
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 + place % 255
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            Polynomial.load(path)


def test_another_form_is_refused(tmp_path):
    fit_global(random_layer(3), input_model("mixture", 1), 2).save(tmp_path / "x")
    with pytest.raises(ArtifactError, match="holds a dense polynomial, not a polynomial"):
        Polynomial.load(tmp_path / "x")


def test_the_identity_check_notices_one_bit():
    a = fit(random_layer(3), random_gaussian(1), 2)
    b = fit(random_layer(3), random_gaussian(1), 2)
    assert_identical(a, b)
    b.P.view(torch.int64)[0, 0, 0] ^= 1
    with pytest.raises(AssertionError, match="P"):
        assert_identical(a, b)


FORGED = {
    "a NaN": lambda meta, t: t["P"].view(-1)[3].fill_(float("nan")),
    "negative s": lambda meta, t: t["s"].neg_(),
    "a permuted shape": lambda meta, t: t.update(P=t["P"].T.contiguous()),
    "a row less": lambda meta, t: t.update(P=t["P"][:-1].clone()),
    "single precision": lambda meta, t: t.update(m=t["m"].float()),
    "no m": lambda meta, t: t.pop("m"),
    "another degree": lambda meta, t: meta.update(degree=2),
    "no degree": lambda meta, t: meta.update(degree="three"),
    "no layer": lambda meta, t: meta.update(layer=None),
    "a layer of another size": lambda meta, t: t.update({"layer.W_in": t["layer.W_in"][:, 1:]}),
    "swapped ends": lambda meta, t: t.update(ends=t["ends"].flip(-2)),
    "a ridge of text": lambda meta, t: meta.update(ridge="0"),
    "no metadata": lambda meta, t: meta.clear(),
    "r2 of another degree": lambda meta, t: t.update(r2=torch.ones(2).double()),
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("scope", ["neuron", "joint"])
def test_a_forged_file_with_a_right_checksum_is_refused(scope, forged, tmp_path):
    saved = FITS[scope](random_layer(3), input_model("samples", 1), 3, tails=0.0)
    saved.save(tmp_path / "x")
    metadata, tensors = storage.read(tmp_path / "x", saved.kind)
    FORGED[forged](metadata, tensors)
    storage.write(tmp_path / "x", saved.kind, metadata, tensors)
    with pytest.raises(ArtifactError, match="x"):
        type(saved).load(tmp_path / "x")


@pytest.mark.parametrize("name", ["whiten", "T1_1", "T2_2", "explained"])
def test_a_forged_dense_polynomial_is_refused(name, tmp_path):
    saved = fit_global(random_layer(3), input_model("mixture", 1), 2)
    saved.save(tmp_path / "x")
    metadata, tensors = storage.read(tmp_path / "x", saved.kind)
    tensors[name] = tensors[name][..., 1:].contiguous()
    storage.write(tmp_path / "x", saved.kind, metadata, tensors)
    with pytest.raises(ArtifactError, match="must be float64"):
        DensePolynomial.load(tmp_path / "x")


def test_only_what_is_not_zero_by_definition_is_stored(tmp_path):
    saved = fit(random_layer(3, "glu"), input_model("samples", 1), 4)
    saved.save(tmp_path / "x")
    tensors = storage.read(tmp_path / "x", saved.kind)[1]
    assert [len(tensors[name]) for name in ("P", "Q")] == [15, 10]
