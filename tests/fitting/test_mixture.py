"""Gaussian mixtures: the model itself, the per-neuron fit and the global optimum."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from tests.oracles import (
    FITS,
    assert_r2,
    assert_same_function,
    generator,
    random_gaussian,
    random_layer,
    random_mixture,
)

from polylens import InvalidInputError
from polylens.activations.activation import Activation
from polylens.errors import ConvergenceError
from polylens.fitting.fit import fit
from polylens.fitting.global_optimum import least_squares
from polylens.fitting.global_optimum.fit import fit_global
from polylens.fitting.global_optimum.quadratic_moments import (
    BlockJacobi,
    Component,
    MixtureMoments,
    Quadratic,
    common_basis,
)
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.inputs.samples import Samples
from polylens.normal_forms.weights import MLPWeights

both = pytest.mark.parametrize("kind", ["mlp", "glu"])


@pytest.fixture
def conjugate_gradients(monkeypatch):
    """Degree 2 by the iterative solver, however few the monomials."""
    monkeypatch.setattr(least_squares, "MAX_FEATURES", 0)


def test_moments_of_the_mixture():
    mixture = random_mixture(0)
    x = mixture.sample(200_000, generator(0))
    single = mixture.gaussian()
    torch.testing.assert_close(single.mean, x.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(single.cov, torch.cov(x.T), rtol=0, atol=0.05)


def test_shared_and_diagonal_covariances():
    full = random_mixture(0, d=3, k=2)
    shared = GaussianMixture(full.weights, full.means, full.covs[:1])
    same = GaussianMixture(full.weights, full.means, full.covs[:1].expand(2, 3, 3))
    torch.testing.assert_close(shared.gaussian().cov, same.gaussian().cov)
    diagonal = GaussianMixture(full.weights, full.means, torch.rand(2, 3).double())
    dense = GaussianMixture(full.weights, full.means, torch.diag_embed(diagonal.covs))
    layer = random_layer(0, "glu", d_in=3)
    for a, b in ((shared, same), (diagonal, dense)):
        for scope in ("neuron", "global"):
            fits = (FITS[scope](layer, mixture, 2) for mixture in (a, b))
            assert_same_function(*fits, full.sample(30, generator(0)))


def test_from_labels_and_samples():
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-6.0, 0.0], [6.0, 1.0]]),
        torch.eye(2).mul(0.5)[None],
    )
    x = mixture.sample(4000, generator(0))
    labels = (x[:, 0] > 0).long() * 7 - 2
    expected = GaussianMixture.from_labels(x, labels)
    torch.testing.assert_close(expected.means[0], x[labels < 0].mean(0))
    for method in ("kmeans", "em"):
        found = GaussianMixture.from_samples(x, 2, method, seed=0)
        order = found.means[:, 0].argsort()
        torch.testing.assert_close(found.means[order], expected.means, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.weights[order], expected.weights, rtol=1e-3, atol=1e-3)
    single = Gaussian.from_samples(x)
    torch.testing.assert_close(expected.gaussian().cov, single.cov)


@both
def test_neuron_fit_equals_least_squares_on_draws(kind):
    layer, mixture = random_layer(2, kind, "gelu"), random_mixture(2)
    x = mixture.sample(200_000, generator(0))
    closed, sampled = fit(layer, mixture, 3), fit(layer, Samples(x), 3)
    at = x[:200]
    scale = layer(at).std()
    assert float((closed(at) - sampled(at)).abs().mean() / scale) < 0.02
    assert_r2(closed, x[:40_000])


@both
def test_global_beats_neuron_beats_single_gaussian(kind):
    layer, mixture = random_layer(4, kind, "silu"), random_mixture(4)
    x = mixture.sample(20_000, generator(0))

    def error(poly):
        return float((poly(x) - layer(x)).square().sum(1).mean())

    global_, neuron = fit_global(layer, mixture, 2), fit(layer, mixture, 2)
    assert error(global_) < error(neuron) < error(fit(layer, mixture.gaussian(), 2))
    assert (global_.r2[1:] > neuron.r2[1:]).all()


@both
def test_conjugate_gradients_equal_least_squares(kind, monkeypatch):
    layer, mixture = random_layer(3, kind, "gelu", d_in=5), random_mixture(3, 5)
    direct = fit_global(layer, mixture, 2)
    assert direct.iterations is None
    monkeypatch.setattr(least_squares, "MAX_FEATURES", 0)
    iterative = fit_global(layer, mixture, 2, tolerance=1e-11)
    assert iterative.residual <= 1e-11
    assert 0 < iterative.iterations < 100
    assert_same_function(iterative, direct, mixture.sample(50, generator(0)), 1e-8)
    torch.testing.assert_close(iterative.r2, direct.r2)


def test_conjugate_gradients_on_deficient_supports(conjugate_gradients, monkeypatch):
    """Components of rank 1 in a common plane of rank 4 of 9 dimensions."""
    g = generator(0)
    plane = torch.randn(4, 9, generator=g, dtype=torch.float64)
    factors = torch.randn(3, 1, 4, generator=g, dtype=torch.float64) @ plane
    means = torch.randn(3, 4, generator=g, dtype=torch.float64) @ plane
    mixture = GaussianMixture(torch.ones(3) / 3, means, factors.mT @ factors)
    layer = random_layer(0, "glu", d_in=9)
    iterative = fit_global(layer, mixture, 2, tolerance=1e-10)
    monkeypatch.setattr(least_squares, "MAX_FEATURES", 1000)
    direct = fit_global(layer, mixture, 2)
    # the support is where the two must agree
    assert_same_function(iterative, direct, mixture.sample(50, generator(0)), 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_components_that_share_a_covariance_take_a_few_iterations(seed):
    """Where the first restart meets the rounding of all directions but a few."""
    g = generator(seed)
    spread = torch.diag(0.1 + torch.rand(50, generator=g, dtype=torch.float64))
    means = 0.5 * torch.randn(3, 50, generator=g, dtype=torch.float64)
    layer = random_layer(seed, act="relu", d_in=50, d_mlp=30, d_out=10)
    fitted = fit_global(layer, GaussianMixture(torch.ones(3) / 3, means, spread[None]), 2)
    assert fitted.residual <= 1e-8
    assert fitted.iterations < 10


def exact_optimum(weights, means, deviations, powers, degree):
    """R2 of the best polynomial for one of more powers, in rationals."""
    top = 2 * (len(powers) - 1)
    moments = [Fraction(0)] * (top + 1)
    for w, mu, s in zip(weights, means, deviations, strict=True):
        local = [Fraction(1), Fraction(mu)]
        for k in range(2, top + 1):
            local.append(mu * local[-1] + (k - 1) * Fraction(s) ** 2 * local[-2])
        moments = [total + Fraction(w) * m for total, m in zip(moments, local, strict=True)]
    a = [Fraction(power) for power in powers]
    right = [sum(c * moments[i + j] for j, c in enumerate(a)) for i in range(len(a))]
    rows = [[moments[i + j] for j in range(degree + 1)] + [right[i]] for i in range(degree + 1)]
    explained = Fraction(0)
    for i in range(degree + 1):  # of a positive definite matrix: no pivoting
        explained += rows[i][-1] ** 2 / rows[i][i]
        for below in rows[i + 1 :]:
            factor = below[i] / rows[i][i]
            below[i:] = [x - factor * y for x, y in zip(below[i:], rows[i][i:], strict=True)]
    mean_square = right[0] ** 2
    total = sum(c * r for c, r in zip(a, right, strict=True))
    return float((explained - mean_square) / (total - mean_square))


@pytest.mark.parametrize(
    ("weights", "means", "deviations"),
    [
        ([0.75, 0.25], [0, 3], [1, 2]),
        ([1 - 2**-10, 2**-10], [0, 0], [1, 100]),  # one in a thousand far out
        ([1 - 2**-20, 2**-20], [0, 1000], [1, 1]),
        ([0.5, 0.25, 0.25], [-1000, 0, 1000], [1, 2, 1]),
        ([0.5, 0.5], [2, 2], [1, 0.0009765625]),
    ],
)
def test_heavy_tails_and_far_components_reach_the_optimum(weights, means, deviations):
    powers = (0.125, 1.0, 0.25, -0.25, 0.0625, 0.015625, -0.00390625, 0.0009765625)
    act = Activation(
        "septic", lambda y: sum(c * y**k for k, c in enumerate(powers)), powers, powers
    )
    one = torch.ones(1, 1, dtype=torch.float64)
    mixture = GaussianMixture(
        torch.tensor(weights).double(),
        torch.tensor(means).double()[:, None],
        torch.tensor(deviations).double()[:, None, None] ** 2,
    )
    r2 = fit_global(MLPWeights(W_in=one, W_out=one, act=act), mixture, 6).r2
    for degree in range(1, 7):
        exact = exact_optimum(weights, means, deviations, powers, degree)
        assert float(r2[degree]) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("solver", ["direct", "iterative"])
@pytest.mark.parametrize("ratio", [1e-3, 1e-6, 1e-8, 1e8])
def test_units_of_a_feature_change_nothing(ratio, solver, monkeypatch):
    if solver == "iterative":
        monkeypatch.setattr(least_squares, "MAX_FEATURES", 0)
    layer, mixture = random_layer(0, "glu"), random_mixture(0)
    units = torch.tensor([ratio, 1.0, 1.0, 1.0], dtype=torch.float64)
    moved = replace(layer, W_in=layer.W_in / units[:, None], W_gate=layer.W_gate / units[:, None])
    there = GaussianMixture(
        mixture.weights, mixture.means * units, mixture.covs * units[:, None] * units
    )
    x = mixture.sample(50, generator(0))
    fits = [fit_global(layer, mixture, 2, tolerance=1e-11)]
    fits.append(fit_global(moved, there, 2, tolerance=1e-11))
    scale = float(fits[0](x).abs().max())
    assert float((fits[0](x) - fits[1](x * units)).abs().max()) < 1e-8 * scale
    torch.testing.assert_close(fits[0].r2, fits[1].r2)
    one, single = mixture.components[0], torch.ones(1, dtype=torch.float64)
    there = GaussianMixture(
        single, (one.mean * units)[None], (one.cov * units[:, None] * units)[None]
    )
    torch.testing.assert_close(
        fit_global(moved, there, 2, tolerance=1e-11).r2, fit(layer, one, 2).r2
    )


def test_not_converged_is_an_error(conjugate_gradients):
    layer, mixture = random_layer(0), random_mixture(0)
    with pytest.raises(ConvergenceError, match=r"relative residual of .* in 2 iterations"):
        fit_global(layer, mixture, 2, max_iterations=2)


def components_of(mixture):
    return [Component(w, c.mean, c.cov) for w, c in mixture.weighted_components()]


def random_quadratic(seed, r, outputs=2):
    g = generator(seed)
    C = torch.randn(outputs, r, r, generator=g, dtype=torch.float64)
    linear = torch.randn(outputs, r, generator=g, dtype=torch.float64)
    return Quadratic(torch.randn(outputs, generator=g).double(), linear, C + C.mT)


def test_moment_operator_is_that_of_draws():
    mixture, q = random_mixture(1, 3), random_quadratic(5, 3)
    x = mixture.sample(400_000, generator(5))
    value = q.constant + x @ q.linear.T + torch.einsum("oij,ni,nj->no", q.matrix, x, x)
    exact = MixtureMoments(components_of(mixture))(q)
    sampled = torch.einsum("no,ni,nj->oij", value, x, x) / len(x)
    assert float((exact.matrix - sampled).abs().max() / sampled.abs().max()) < 0.05
    torch.testing.assert_close(exact.linear, value.T @ x / len(x), rtol=0.05, atol=0.1)
    torch.testing.assert_close(exact.constant, value.mean(0), rtol=0.05, atol=0.1)


def test_thin_and_shared_covariances_change_nothing():
    """Rank 3 of 8 in factors, and two components with one covariance, against each on its own."""
    q = random_quadratic(2, 8)
    thin, full = random_gaussian(1, 8, rank=3), random_gaussian(2, 8)
    means = torch.randn(3, 8, generator=generator(3), dtype=torch.float64)
    shared = [Component(0.3, means[0], full.cov), Component(0.5, means[1], full.cov)]
    operator = MixtureMoments([*shared, Component(0.2, means[2], thin.cov)])
    assert [spread.factor is None for spread in operator.spreads] == [True, False]
    with_copies = [Component(c.weight, c.mean, c.cov.clone()) for c in shared]
    apart = [MixtureMoments([c])(q) for c in with_copies]
    # more than the rank that is worth a factor, less than nothing in value
    filled = thin.cov + 1e-13 * torch.eye(8, dtype=torch.float64)
    apart.append(MixtureMoments([Component(0.2, means[2], filled)])(q))
    for part, *others in zip(operator(q), *apart, strict=True):
        torch.testing.assert_close(part, sum(others))
    assert torch.equal(operator(q).matrix, operator(q).matrix.mT)


def test_the_preconditioner_inverts_what_it_claims_to():
    q = random_quadratic(4, 6)
    standard = [Component(1.0, torch.zeros(6).double(), torch.eye(6).double())]
    diagonal = torch.rand(2, 6, generator=generator(0), dtype=torch.float64)
    even = [Component(0.5, torch.zeros(6).double(), torch.diag(d)) for d in diagonal]
    for components in (standard, even):
        image = BlockJacobi(components)(MixtureMoments(components)(q))
        for part, back in zip(q, image, strict=True):
            torch.testing.assert_close(part, back)


def test_the_common_basis_diagonalises_what_can_be():
    V = torch.linalg.qr(torch.randn(9, 9, generator=generator(1), dtype=torch.float64)).Q
    spectra = torch.rand(3, 9, generator=generator(2), dtype=torch.float64)
    found = common_basis([Component(1 / 3, V[0], (V * d) @ V.T) for d in spectra])
    torch.testing.assert_close(found.T @ found, torch.eye(9, dtype=torch.float64))
    for d in spectra:
        cov = found.T @ (V * d) @ V.T @ found
        assert float((cov - torch.diag(cov.diagonal())).abs().max()) < 1e-4


def test_hermite_features_are_those_of_draws():
    gaussian = random_gaussian(3, 3)
    factor = torch.linalg.cholesky(gaussian.cov).T
    rows = least_squares.hermite_features(gaussian.mean, factor, 2)
    exact = rows.T @ rows  # products of features under the Gaussian
    x = gaussian.sample(400_000, generator(0))
    one, two = torch.ones_like(x[:, 0]), (x * x - 1) / 2**0.5
    a, b, c = x.T
    phi = torch.stack([one, a, b, c, two[:, 0], a * b, a * c, two[:, 1], b * c, two[:, 2]], 1)
    for i, column in enumerate(phi.T):
        sampled = column[:, None] * phi
        error = sampled.std(0) / len(x) ** 0.5
        assert ((exact[i] - sampled.mean(0)).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("solver", ["direct", "iterative"])
def test_chosen_outputs_are_those_of_all(solver, monkeypatch):
    if solver == "iterative":
        monkeypatch.setattr(least_squares, "MAX_FEATURES", 0)
    layer, mixture = random_layer(0), random_mixture(0)
    U = torch.randn(3, 2, generator=generator(0), dtype=torch.float64)
    x = mixture.sample(20, generator(0))
    every = fit_global(layer, mixture, 2, tolerance=1e-11)
    chosen = fit_global(layer, mixture, 2, outputs=U, tolerance=1e-11)
    assert chosen.d_out == 2
    torch.testing.assert_close(chosen(x), every(x) @ U)


@both
def test_zero_weights_duplicates_and_dead_neurons(kind):
    layer, one = random_layer(0, kind), random_gaussian(0)
    layer = replace(layer, **{
        name: getattr(layer, name) * torch.tensor([0.0, 1, 1, 1, 1, 1]).double()
        for name in ("W_in", *(("W_gate",) if kind == "glu" else ()))
    })  # fmt: skip
    mixture = GaussianMixture(
        torch.tensor([0.25, 0.75, 0.0]),
        torch.stack([one.mean, one.mean, one.mean + 100]),
        one.cov.expand(3, 4, 4),
    )
    x = one.sample(30, generator(0))
    for scope in ("neuron", "global"):
        assert_same_function(FITS[scope](layer, mixture, 3), fit(layer, one, 3), x)


@both
def test_one_feature_and_point_masses(kind):
    layer = random_layer(0, kind, d_in=1, d_mlp=1, d_out=1)
    points = GaussianMixture(
        torch.ones(3) / 3, torch.tensor([[-1.0], [0.0], [2.0]]), torch.zeros(3, 1)
    )
    x = points.means
    for scope in ("neuron", "global"):
        poly = FITS[scope](layer, points, 2)
        torch.testing.assert_close(poly(x), layer(x), rtol=1e-6, atol=1e-6)
        assert float(poly.r2[-1]) == pytest.approx(1, abs=1e-9)
    constant = GaussianMixture(torch.ones(1), x[:1], torch.zeros(1, 1))
    for scope in ("neuron", "global"):
        poly = FITS[scope](layer, constant, 2)
        torch.testing.assert_close(poly(x[:1]), layer(x[:1]))
        assert poly.r2.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "means", "covs", "message"),
    [
        ([0.5, 0.6], (2, 3), (2, 3, 3), "sum of 1.1"),
        ([1.5, -0.5], (2, 3), (2, 3, 3), ">= 0"),
        ([0.5, float("nan")], (2, 3), (2, 3, 3), "finite"),
        ([0.5, 0.5], (3, 3), (3, 3, 3), r"weights \[k\] and means"),
        ([0.5, 0.5], (2, 3), (2, 4, 4), r"covs must be \[2, 3, 3\]"),
        ([0.5, 0.5], (2, 3), "asymmetric", "component 1: cov is not symmetric"),
        ([0.5, 0.5], (2, 3), "indefinite", "component 1: .* lowest eigenvalue is -1"),
        ([0.5, 0.5], "nan", (2, 3, 3), "component 0: mean has 1 NaN"),
        ([0.5, 0.5], (2, 2), (2, 2), r"shared one is covs\[None\], diagonals are torch.diag_embed"),
        ([0.5, 0.5], (2, 3), (3, 3), r"shared one is covs\[None\]"),
    ],
)
def test_bad_mixtures(weights, means, covs, message):
    means = torch.zeros(2, 3) if means == "nan" else torch.zeros(means)
    if isinstance(covs, str):
        spoiled = torch.eye(3)
        if covs == "asymmetric":
            spoiled[0, 1] = 0.5
        else:
            spoiled[0, 0] = -1
        covs = torch.stack([torch.eye(3), spoiled])
    else:
        covs = torch.eye(covs[-1]).expand(covs).clone()
    if message.startswith("component 0"):
        means[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match=message):
        GaussianMixture(torch.tensor(weights), means, covs)


def test_bad_requests():
    layer, mixture = random_layer(0), random_mixture(0)
    with pytest.raises(InvalidInputError, match="reads 4 features"):
        fit(layer, random_mixture(0, 5), 2)
    with pytest.raises(InvalidInputError, match=r"finite columns \[3, k\]"):
        fit_global(layer, mixture, 2, outputs=torch.ones(4, 1))
    with pytest.raises(InvalidInputError, match="fit_global"):
        fit(layer, mixture, 2, outputs=torch.ones(3, 1))
    with pytest.raises(InvalidInputError, match="tolerance"):
        fit_global(layer, mixture, 2, tolerance=0.0)
    with pytest.raises(InvalidInputError, match="monomials"):
        fit_global(random_layer(0, d_in=30), random_mixture(0, 30), 3)
    with pytest.raises(InvalidInputError, match="degree must be"):
        fit(layer, mixture, 13)
    with pytest.raises(InvalidInputError, match="weights, inputs, degree by position; give tails="):
        fit(layer, mixture, 2, "global")
    with pytest.raises(InvalidInputError, match=r"scope=; use fit_joint.* or fit_global"):
        fit(layer, mixture, 2, scope="global")
    for other in (mixture.gaussian(), Samples(mixture.means)):
        with pytest.raises(InvalidInputError, match="must be GaussianMixture"):
            fit_global(layer, other, 2)
    with pytest.raises(InvalidInputError, match="kmeans"):
        GaussianMixture.from_samples(torch.randn(9, 2), 2, method="magic")
    with pytest.raises(InvalidInputError, match="1 <= k <= n"):
        GaussianMixture.from_samples(torch.randn(9, 2), 10)
    with pytest.raises(InvalidInputError, match="labels"):
        GaussianMixture.from_labels(torch.randn(9, 2), torch.zeros(8))
