"""The analyses against dense computations."""

import dataclasses

import pytest
import torch

import polylens
from polylens import analysis
from polylens.analysis.eigensolver import extreme_eigenpairs
from polylens.analysis.metric import metric_of
from polylens.errors import ConvergenceError, InvalidInputError
from polylens.inputs.samples import Samples

D_IN, D_MLP, D_OUT = 12, 17, 5
EXACT = dict(rtol=1e-8, atol=1e-8)


def layer(kind, d_in=D_IN, d_mlp=D_MLP, d_out=D_OUT, dtype=torch.float64):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    roles = dict(
        W_in=random(d_in, d_mlp) / d_in**0.5,
        W_out=random(d_mlp, d_out),
        b_in=random(d_mlp),
        b_out=random(d_out),
    )
    if kind == "mlp":
        return polylens.MLPWeights(act="relu", **roles)
    gate = random(d_in, d_mlp) / d_in**0.5
    return polylens.GLUWeights(act="silu", W_gate=gate, b_gate=random(d_mlp), **roles)


def gaussian(d_in=D_IN, rank=None):
    root = torch.randn(d_in, rank or d_in, dtype=torch.float64) / d_in**0.5
    return polylens.Gaussian(torch.randn(d_in, dtype=torch.float64), root @ root.T)


def factor(cov):
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt()


@pytest.fixture(params=["mlp", "glu"])
def polynomial(request):
    return polylens.fit(layer(request.param), gaussian(), 3)


@pytest.fixture
def u():
    return torch.randn(D_OUT, dtype=torch.float64)


@pytest.mark.parametrize("method", ["dense", "iterative"])
@pytest.mark.parametrize("metric", [None, "covariance", "diagonal"])
def test_eigenfeatures_equal_a_dense_diagonalisation(polynomial, u, metric, method):
    cov = {
        None: torch.eye(D_IN, dtype=torch.float64),
        "covariance": polynomial.inputs.cov,
        "diagonal": torch.arange(1.0, D_IN + 1).double().diag(),
    }[metric]
    given = cov.diagonal() if metric == "diagonal" else metric
    features = analysis.eigenfeatures(polynomial, u, 7, metric=given, method=method)
    L = factor(cov)
    expected = torch.linalg.eigvalsh(L.T @ polynomial.quadratic_form(u).to_dense() @ L)
    order = expected.abs().argsort(descending=True)[:7]
    torch.testing.assert_close(features.values, expected[order], **EXACT)
    torch.testing.assert_close(features.patterns, cov @ features.vectors, **EXACT)
    gram = features.vectors.T @ cov @ features.vectors
    torch.testing.assert_close(gram, torch.eye(7, dtype=torch.float64), **EXACT)
    assert features.energy == pytest.approx(float(expected.square().sum()), rel=1e-10)


def test_all_eigenfeatures_restore_the_form_on_the_support(u):
    polynomial = polylens.fit(layer("glu"), gaussian(rank=6), 2)
    features = analysis.eigenfeatures(polynomial, u, 6, metric="covariance")
    x = polynomial.inputs.sample(20)
    offset = x - polynomial.inputs.mean
    summed = (offset @ features.vectors).square() @ features.values
    torch.testing.assert_close(summed, polynomial.quadratic_form(u)(offset), **EXACT)
    assert float(features.share[-1]) == pytest.approx(1)


@pytest.mark.parametrize("metric", [None, "covariance"])
def test_restricted_to_all_features_is_the_polynomial(polynomial, u, metric):
    x = polynomial.inputs.sample(30)
    restricted = analysis.eigenfeatures(polynomial, u, D_IN, metric=metric).restricted()
    torch.testing.assert_close(restricted(x), polynomial.truncate(2)(x) @ u, **EXACT)


def test_restricted_function_and_r2_by_hand(polynomial, u):
    x = polynomial.inputs.sample(500)
    features = analysis.eigenfeatures(polynomial, u, 4)
    restricted = features.restricted(3)
    # The full function less what the features beyond the third add about the mean.
    mean, cov = polynomial.inputs.mean, polynomial.inputs.cov
    values, vectors = torch.linalg.eigh(polynomial.quadratic_form(u).to_dense())
    cut = values.abs().argsort(descending=True)[3:]
    dropped = ((x - mean) @ vectors[:, cut]).square() @ values[cut]
    dropped = dropped - values[cut] @ (vectors[:, cut].T @ cov @ vectors[:, cut]).diagonal()
    expected = polynomial.truncate(2)(x) @ u - dropped
    torch.testing.assert_close(restricted(x), expected, **EXACT)
    target = polynomial.weights(x) @ u
    r2 = 1 - (target - expected).square().mean() / target.var(unbiased=False)
    assert restricted.r2(x) == pytest.approx(float(r2), rel=1e-9)
    assert restricted.r2(x, expected) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["mixture", "samples"])
def test_globally_fitted_polynomials_open_the_same_way(u, kind):
    x = torch.randn(600, D_IN, dtype=torch.float64)
    mixture = polylens.GaussianMixture.from_labels(x, torch.arange(600) % 2)
    if kind == "mixture":
        polynomial = polylens.fit_global(layer("mlp"), mixture, 2)
    else:
        polynomial = polylens.fit_joint(layer("mlp"), Samples(x), 2)
    restricted = analysis.eigenfeatures(polynomial, u, D_IN).restricted()
    torch.testing.assert_close(restricted(x), polynomial(x) @ u, **EXACT)
    found = analysis.interactions(polynomial, x[:4], u)
    assert found.total == pytest.approx(float(polynomial(x[:4].sum(0)[None])[0] @ u), abs=1e-8)


def test_energy_cut_is_half_the_squared_error_under_the_gaussian(polynomial, u):
    features = analysis.eigenfeatures(polynomial, u, 3, metric="covariance")
    cut = 2 * features.energy * (1 - float(features.share[-1]))
    x = polynomial.inputs.sample(200_000)
    error = features.restricted()(x) - polynomial.truncate(2)(x) @ u
    assert float(error.square().mean()) == pytest.approx(cut, rel=0.05)


@pytest.mark.parametrize("inputs", ["mixture", "samples", "none"])
def test_restricted_without_a_gaussian(u, inputs):
    x = torch.randn(400, D_IN, dtype=torch.float64)
    model = polylens.GaussianMixture.from_labels(x, torch.arange(400) % 3)
    if inputs == "samples":
        model = Samples(x)
    polynomial = polylens.fit(layer("mlp"), model, 2)
    if inputs == "none":
        polynomial.inputs = None
    restricted = analysis.eigenfeatures(polynomial, u, D_IN).restricted()
    torch.testing.assert_close(restricted(x), polynomial(x) @ u, **EXACT)


def test_float32_weights_are_read_in_double(u):
    weights = layer("mlp", dtype=torch.float32)
    inputs = gaussian()
    single, double = (
        analysis.eigenfeatures(polylens.fit(w, inputs, 2), u, 3)
        for w in (weights, weights.to(torch.float64))
    )
    torch.testing.assert_close(single.values, double.values, **EXACT)
    x = inputs.sample(10)
    torch.testing.assert_close(single.restricted()(x), double.restricted()(x), **EXACT)
    assert single.polynomial.W_in.dtype == torch.float32


def test_iterative_equals_dense_above_the_dense_size():
    polynomial = polylens.fit(layer("glu", 300, 500, 3), polylens.Gaussian.standard(300), 2)
    u = torch.ones(3)
    dense, iterative = (
        analysis.eigenfeatures(polynomial, u, 20, method=m) for m in ("dense", "iterative")
    )
    torch.testing.assert_close(iterative.values, dense.values, **EXACT)
    signs = (dense.vectors * iterative.vectors).sum(0).sign()
    torch.testing.assert_close(iterative.vectors * signs, dense.vectors, rtol=0, atol=1e-7)


@pytest.mark.parametrize("metric", [None, "covariance"])
@pytest.mark.parametrize(("tolerance", "off"), [(None, 1e-10), (1e-11, 1e-13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_below_float64_are_iterated_in_float32_and_finished_in_float64(
    dtype, tolerance, off, metric
):
    weights = layer("glu", 300, 500, 3, dtype=dtype)
    polynomial = polylens.fit(weights, gaussian(300), 2)
    u = torch.ones(3)
    dense = analysis.eigenfeatures(polynomial, u, 10, metric=metric, method="dense")
    assert dense.residuals.max() < 1e-13
    found = analysis.eigenfeatures(
        polynomial, u, 10, metric=metric, method="iterative", tolerance=tolerance
    )
    scale = dense.values.abs().max()
    torch.testing.assert_close(found.values, dense.values, rtol=0, atol=off * float(scale))
    # The recorded residuals are those of the dense matrix, and within what was asked for.
    gamma = polynomial.quadratic_form(u).to_dense()
    L = metric_of(polynomial, metric).out_of(torch.eye(300, dtype=torch.float64))
    q = torch.linalg.solve(L, found.patterns)
    true = torch.linalg.vector_norm(L.T @ gamma @ L @ q - q * found.values, dim=0) / scale
    torch.testing.assert_close(found.residuals, true, rtol=1e-2, atol=1e-13)
    assert found.residuals.max() <= (tolerance or 1e-6)


def test_rank_is_noticed_in_float32():
    weights = layer("mlp", 300, 500, 3, dtype=torch.float32)
    weights = dataclasses.replace(weights, W_in=weights.W_in * (torch.arange(500) < 9))
    polynomial = polylens.fit(weights, polylens.Gaussian.standard(300), 2)
    for method in ("dense", "iterative"):
        features = analysis.eigenfeatures(polynomial, torch.ones(3), 9, method=method)
        assert features.residuals.max() < 1e-6
        with pytest.raises(InvalidInputError, match="ask for k <= 9"):
            analysis.eigenfeatures(polynomial, torch.ones(3), 10, method=method)


def test_what_does_not_converge_is_an_error(monkeypatch):
    polynomial = polylens.fit(layer("mlp", 300, 500, 3), polylens.Gaussian.standard(300), 2)
    for tolerance in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidInputError, match="tolerance must be in"):
            analysis.eigenfeatures(polynomial, torch.ones(3), tolerance=tolerance)
    monkeypatch.setattr("polylens.analysis.eigensolver.MAX_STEPS", 3)
    with pytest.raises(ConvergenceError, match="did not converge in 3 blocks"):
        analysis.eigenfeatures(polynomial, torch.ones(3), method="iterative")


def test_eigensolver_finds_multiplicities_and_low_rank():
    Q = torch.linalg.qr(torch.randn(120, 120, dtype=torch.float64)).Q
    values = torch.zeros(120, dtype=torch.float64)
    values[:6] = torch.tensor([3.0, 3.0, 3.0, -3.0, -2.0, 1.0])
    found, vectors = extreme_eigenpairs(
        lambda z: Q @ (values[:, None] * (Q.T @ z)), 120, 6, torch.device("cpu")
    )
    torch.testing.assert_close(found.sort().values, values[:6].sort().values, **EXACT)
    torch.testing.assert_close((Q * values) @ Q.T @ vectors, vectors * found, **EXACT)


SPECTRA = {
    "sixteen decades": 10.0 ** -torch.linspace(0, 16, 400, dtype=torch.float64),
    "one value 37 times, then none": (torch.arange(400) < 37).double(),
    "one over i": 1 / torch.arange(1, 401, dtype=torch.float64),
    "one far above the rest": (torch.arange(400) < 1) + 1e-9 * torch.linspace(-1, 1, 400).double(),
    "hardly more than the block": torch.linspace(-1, 1, 20, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_eigensolver_keeps_its_basis_orthogonal(name):
    values, k = SPECTRA[name], 16
    size = len(values)
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    matrix = Q * values @ Q.T
    found, vectors = extreme_eigenpairs(
        lambda z: matrix @ z, size, k, torch.device("cpu"), tolerance=1e-12
    )
    expected = values.abs().sort(descending=True).values[:k]
    torch.testing.assert_close(found.abs(), expected, atol=1e-13, rtol=0)
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, eye, atol=1e-13, rtol=0)
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * found, dim=0)
    assert float(residuals.max()) < 1e-11


@pytest.mark.parametrize("metric", [None, "covariance"])
def test_singular_features_restore_beta(polynomial, metric):
    features = analysis.singular_features(polynomial, metric=metric)
    beta, _ = polynomial.linear()
    restored = (features.vectors * features.values) @ features.outputs.T
    torch.testing.assert_close(restored, beta, **EXACT)
    cov = polynomial.inputs.cov if metric else torch.eye(D_IN, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(beta.T @ cov @ beta).flip(0).sqrt()
    torch.testing.assert_close(features.values, expected, **EXACT)
    torch.testing.assert_close(features.patterns, cov @ features.vectors, **EXACT)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_degree_energies_sum_to_the_explained_variance(polynomial, degree):
    explained = polylens.explained_variance(polynomial.weights, polynomial.inputs, 3)
    energy = analysis.degree_energy(polynomial, degree)
    assert float(energy.trace()) == pytest.approx(float(explained.per_degree[degree]), rel=1e-9)
    directions = analysis.output_directions(polynomial, degree, k=2)
    assert float(directions.values.sum()) == pytest.approx(
        float(directions.share[-1] * energy.trace())
    )
    torch.testing.assert_close(
        (directions.vectors.T @ energy @ directions.vectors).diagonal(), directions.values, **EXACT
    )


def test_quadratic_energy_is_the_inner_product_of_the_dense_forms(polynomial, u):
    v = torch.randn(D_OUT, dtype=torch.float64)
    L = factor(polynomial.inputs.cov)
    a, b = (L.T @ polynomial.quadratic_form(d).to_dense() @ L for d in (u, v))
    energy = analysis.degree_energy(polynomial)
    assert float(u @ energy @ v) == pytest.approx(float(2 * (a * b).sum()), rel=1e-10)


def test_interactions_sum_to_the_polynomial(polynomial, u):
    writers = torch.randn(9, D_IN, dtype=torch.float64)
    names = [f"w{i}" for i in range(9)]
    whole = analysis.interactions(polynomial, writers, u, names)
    value = float(polynomial(writers.sum(0)[None])[0] @ u)
    assert whole.total == pytest.approx(value, abs=1e-8)
    assert whole.constant + float(whole.shapley.sum()) == pytest.approx(value, abs=1e-8)
    found = analysis.interactions(polynomial.truncate(2), writers, u, names)
    value = float(polynomial.truncate(2)(writers.sum(0)[None])[0] @ u)
    assert found.total == pytest.approx(value, abs=1e-8)
    gamma = polynomial.quadratic_form(u).to_dense()
    torch.testing.assert_close(found.pairs, writers @ gamma @ writers.T, **EXACT)
    sizes = [abs(value) for _, _, value in found.top(9 + 45)]
    assert len(sizes) == 9 + 45
    assert sizes == sorted(sizes, reverse=True)
    summed = found.constant + sum(value for _, _, value in found.top(9 + 45))
    assert summed == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize("centred", [True, False])
def test_writers_through_a_frozen_norm(centred):
    writers = torch.randn(4, D_IN, dtype=torch.float64)
    weight, bias = torch.randn(2, D_IN, dtype=torch.float64)
    x = writers.sum(0)
    x = x - x.mean() if centred else x
    scale = x.square().mean().sqrt()
    parts = analysis.through_norm(writers, scale, centred=centred, weight=weight, bias=bias)
    assert len(parts) == 5
    torch.testing.assert_close(parts.sum(0), x / scale * weight + bias)
    with pytest.raises(InvalidInputError, match="positive number"):
        analysis.through_norm(writers, 0.0, centred=centred)


@pytest.mark.parametrize("normalization", ["LN", "RMS"])
@pytest.mark.parametrize("heads", [True, False])
def test_residual_writers_of_a_hooked_transformer(normalization, heads):
    from tests.models import hooked

    model = hooked(torch.float64, normalization_type=normalization)
    tokens = torch.randint(0, 90, (4, 20))
    with polylens.attach(model, tokens, degree=2, progress=False) as lens:
        _, cache = model.run_with_cache(tokens)
        writers, names = analysis.residual_writers(lens, cache, 1, 5, batch=2, heads=heads)
        from_end = analysis.residual_writers(lens, cache, -1, -15, batch=2, heads=heads)
        assert torch.equal(from_end[0], writers)
        assert from_end[1] == names
        with pytest.raises(InvalidInputError, match="no position 20"):
            analysis.residual_writers(lens, cache, 1, 20)
        with pytest.raises(InvalidInputError, match="lacks"):
            analysis.residual_writers(lens, {}, 1, 0)
        with pytest.raises(InvalidInputError, match="no layer 7"):
            analysis.residual_writers(lens, cache, 7, 0)
        with pytest.raises(InvalidInputError, match="MLPs alone"):
            analysis.residual_writers(lens, lens.run_with_cache(tokens)[1], 1, 0)
        with pytest.raises(InvalidInputError, match="no layer 7"):
            analysis.logit_direction(lens, 7, 0)
    assert len(names) == len(set(names)) == len(writers)
    assert ("L1H3" in names) == heads
    u = torch.randn(24, dtype=torch.float64)
    found = analysis.interactions(lens[1], writers, u, names)
    assert found.total == pytest.approx(float(cache["poly_out", 1, "mlp"][2, 5] @ u), abs=1e-8)
    assert float(writers[-1].norm()) < 1e-6 * float(writers.sum(0).norm())


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize(
    "name",
    ["hooked-post_norm", "bridge-gemma2", "bridge-gemma3", "bridge-gpt2", "bridge-olmo2"],
)
def test_residual_writers_behind_norms_of_their_own(name, heads):
    from tests.models import HOSTS

    model, tokens = HOSTS[name](), torch.randint(0, 90, (3, 12))
    with polylens.attach(model, tokens, degree=2, progress=False) as lens:
        _, cache = model.run_with_cache(tokens)
        writers, names = analysis.residual_writers(lens, cache, 1, 5, batch=2, heads=heads)
        read = cache["poly_in", 1, "mlp"][2, 5].double()
    torch.testing.assert_close(writers.sum(0), read)
    assert len(names) == len(set(names)) == len(writers)
    assert float(writers[-1].norm()) < 1e-5 * float(read.norm())


def classifier():
    weights = dataclasses.replace(layer("mlp", 10, 40, 4), b_out=None)
    x = torch.randn(300, 10, dtype=torch.float64)
    return weights, polylens.fit(weights, polylens.Gaussian.from_samples(x), 2), x


def test_linear_attack_is_the_best_step_for_the_linear_part():
    _, polynomial, x = classifier()
    beta, _ = polynomial.linear()
    labels = torch.zeros(300, dtype=torch.long)
    delta = analysis.linear_attack(polynomial, x, labels, 0.7, target=2)
    torch.testing.assert_close(delta.norm(dim=1), torch.full((300,), 0.7).double())
    gain = delta[0] @ (beta[:, 2] - beta[:, 0])
    rivals = torch.randn(1000, 10, dtype=torch.float64)
    rivals = 0.7 * rivals / rivals.norm(dim=1, keepdim=True)
    assert gain > (rivals @ (beta[:, 2] - beta[:, 0])).max()
    own = analysis.linear_attack(polynomial, x, labels + 2, 0.7, target=2)
    assert not own.any()
    full = analysis.linear_attack(polynomial, x, labels, 0.7, target=2, rank=4)
    torch.testing.assert_close(full, delta)


def test_untargeted_attack_takes_the_best_class():
    _, polynomial, x = classifier()
    labels = torch.randint(0, 4, (300,))
    margins = []
    for delta in [analysis.linear_attack(polynomial, x, labels, 0.5)] + [
        analysis.linear_attack(polynomial, x, labels, 0.5, target=t) for t in range(4)
    ]:
        logits = polynomial.truncate(1)(x + delta)
        true = logits.gather(1, labels[:, None])[:, 0]
        margins.append(logits.scatter(1, labels[:, None], -torch.inf).max(1).values - true)
    assert (margins[0] >= torch.stack(margins[1:]).max(0).values - 1e-9).all()


def test_attacks_beat_random_directions_on_the_true_network():
    weights, polynomial, x = classifier()
    labels = weights(x).argmax(1)
    found = analysis.evaluate_attacks(weights, polynomial, x, labels, [1.0, 2.0])
    assert found.n_right == 300
    for norm in (1.0, 2.0):
        assert found.success("linear")[norm] > 2 * found.success("random")[norm]
        assert found.success("pgd")[norm] >= found.success("gradient")[norm] - 0.02
    assert len({row.attack for row in found.rows}) == 5
    targeted = analysis.evaluate_attacks(weights, polynomial, x, labels, [1.0], target=1)
    assert targeted.n_right == int((labels != 1).sum())
    success = analysis.transfer([weights] * 2, [polynomial] * 2, x, labels, 1.0)
    torch.testing.assert_close(success, success[:1, :1].expand(2, 2))


def test_readouts_through_the_norms():
    W_E, W_U = torch.randn(50, D_IN).double(), torch.randn(D_IN, 50).double()
    weight, bias = torch.randn(2, D_IN).double()
    vectors = torch.randn(D_IN, 3).double()
    normed = torch.nn.functional.layer_norm(W_E, (D_IN,), weight, bias)
    read = analysis.embedding_scores(vectors, W_E, centred=True, weight=weight, bias=bias)
    torch.testing.assert_close(read, normed @ vectors)
    # Logits of a layer norm are linear in the stream once its scale is frozen.
    x = torch.randn(D_IN).double()
    scale = x.std(unbiased=False)
    logits = ((vectors - vectors.mean(0)) / scale * weight[:, None]).T @ W_U
    written = analysis.unembedding_scores(vectors, W_U, centred=True, weight=weight)
    torch.testing.assert_close(written.T / scale, logits - logits.mean(1, keepdim=True))
    u = analysis.token_direction(W_U, 4, 7, centred=True, weight=weight)
    torch.testing.assert_close(vectors.T @ u, (written[4] - written[7]))
    u = analysis.token_direction(W_U, 4, centred=True, weight=weight)
    torch.testing.assert_close(vectors.T @ u, written[4])
    for centred in (True, False):
        there = analysis.behind_norm(vectors.T, centred=centred, weight=weight)
        back = analysis.before_norm(W_U.T, centred=centred, weight=weight)
        torch.testing.assert_close(there @ W_U, vectors.T @ back.T)
    high, low = analysis.top_tokens(read[:, 0], 2, lambda i: f"t{i}")
    assert high[0] == (f"t{int(read[:, 0].argmax())}", pytest.approx(float(read[:, 0].max())))
    assert low[0][0] == f"t{int(read[:, 0].argmin())}"
    assert analysis.single_token("x", lambda text: [9]) == 9


NETWORK = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
LENS = polylens.attach(NETWORK.eval(), torch.randn(20, 3), degree=2, progress=False)


def bad_calls():
    _, p, x = classifier()
    eye, labels = torch.eye(10, dtype=torch.float64), torch.zeros(300, dtype=torch.long)
    u = torch.ones(4)
    features = analysis.eigenfeatures(p, u, 3)
    flat = polylens.MLPWeights(W_in=torch.ones(10, 2), W_out=torch.ones(2, 4), act="relu")
    one = polylens.fit(flat, polylens.Gaussian.standard(10), 2)
    holed = x[:3].clone()
    holed[1, 2] = float("nan")
    return {
        "shape \\(4,\\)": lambda: analysis.eigenfeatures(p, torch.ones(5)),
        "zero vector": lambda: analysis.eigenfeatures(p, torch.zeros(4)),
        "NaN or infinite": lambda: analysis.eigenfeatures(p, u * float("nan")),
        "k must be an integer in 1 ... 10": lambda: analysis.eigenfeatures(p, u, 11),
        "k=2 is larger than the rank": lambda: analysis.eigenfeatures(one, u, 2),
        "not positive semidefinite": lambda: analysis.eigenfeatures(p, u, metric=-eye),
        "the metric is zero": lambda: analysis.eigenfeatures(p, u, metric=0 * eye),
        "metric must be \\[10, 10\\]": lambda: analysis.eigenfeatures(p, u, metric=eye[:3]),
        "metric='cov' is unknown": lambda: analysis.eigenfeatures(p, u, metric="cov"),
        "needs an input model": lambda: metric_of(p.part(2), "covariance"),
        "method must be": lambda: analysis.eigenfeatures(p, u, method="fast"),
        "degree of at least 2": lambda: analysis.eigenfeatures(p.truncate(1), u),
        "in 1 ... 3": lambda: features.restricted(4),
        "x must be floating": lambda: features.restricted()(x[:, :3]),
        "two inputs or more": lambda: features.restricted().r2(x[:1]),
        "constant on these": lambda: features.restricted().r2(x, torch.ones(300)),
        "rank of the linear part": lambda: analysis.singular_features(p, 5),
        "fitted to Gaussian": lambda: analysis.degree_energy(p.part(2)),
        "in 1 ... 2": lambda: analysis.degree_energy(p, 3),
        "writers must be": lambda: analysis.interactions(p, x[0], u),
        "2 names for 3 writers": lambda: analysis.interactions(p, x[:3], u, ["a", "b"]),
        "labels \\[n\\]": lambda: analysis.linear_attack(p, x, labels[:4], 1.0),
        "integers in 0 ... 3": lambda: analysis.linear_attack(p, x, labels + 4, 1.0),
        "target must be": lambda: analysis.linear_attack(p, x, labels, 1.0, target=9),
        "norm must be": lambda: analysis.linear_attack(p, x, labels, -1.0),
        "index must be an integer in 0 ... 2": lambda: analysis.singular_attack(
            p, x, labels, 1.0, 3
        ),
        "attacks must be some": lambda: analysis.evaluate_attacks(
            p, p, x, labels, [1.0], attacks=["magic"]
        ),
        "is 2 tokens": lambda: analysis.single_token("ab", lambda text: [1, 2]),
        "token must be an id": lambda: analysis.token_direction(eye, 10, centred=True),
        "against itself": lambda: analysis.token_direction(eye, 1, 1, centred=True),
        "to fit W_E": lambda: analysis.embedding_scores(x, eye, centred=True),
        "one direction": lambda: analysis.top_tokens(eye),
        "such as lens\\[0\\]": lambda: analysis.eigenfeatures(LENS, u),
        "polylens.fit\\(weights": lambda: analysis.singular_features(flat),
        "the module Linear": lambda: analysis.interactions(torch.nn.Linear(2, 2), x[:3], u),
        "got NoneType; lens": lambda: analysis.linear_attack(None, x, labels, 1.0),
        "got int; lens": lambda: analysis.output_directions(3),
        "lens must be": lambda: analysis.logit_direction(p, 1, 5),
        "cache must be .* second of": lambda: analysis.residual_writers(LENS, (1, {}), 0, 1),
        "u must be a tensor, got str": lambda: analysis.eigenfeatures(p, " the"),
        "u must be real": lambda: analysis.eigenfeatures(p, u.bool()),
        "tolerance must be": lambda: analysis.eigenfeatures(p, u, tolerance="1e-3"),
        "writers have 1 NaN": lambda: analysis.interactions(p, holed, u),
        "network must be a function": lambda: analysis.evaluate_attacks(None, p, x, labels, 1.0),
        "networks must be a list": lambda: analysis.transfer(p.weights, [p], x, labels, 1.0),
        "one polynomial per network": lambda: analysis.transfer([p], [], x, labels, 1.0),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input_is_refused(message):
    with pytest.raises(InvalidInputError, match=message):
        bad_calls()[message]()


def test_figures_draw_and_refuse(tmp_path):
    from polylens.analysis import figures

    weights, polynomial, x = classifier()
    labels = weights(x).argmax(1)
    features = analysis.eigenfeatures(polynomial, torch.ones(4), 6)
    attacks = analysis.evaluate_attacks(weights, polynomial, x, labels, [0.5], attacks=["random"])
    found = analysis.interactions(polynomial, x[:5], torch.ones(4))
    by_class = [(features.values, features.patterns)] * 2
    drawn = (features.plot((2, 5)), attacks.plot(), found.plot())
    for i, figure in enumerate((*drawn, figures.class_features_figure(by_class, (5, 2)))):
        figure.savefig(tmp_path / f"{i}.png")
    linear = analysis.singular_features(polynomial).plot((2, 5), title="what it is of")
    assert linear.get_suptitle() == "what it is of"
    assert len([panel for panel in linear.get_axes() if panel.images]) == 4  # no empty row
    assert "along u" in features.plot().get_suptitle()
    (panel,) = features.plot().axes
    assert all(float(place).is_integer() for place in panel.get_xticks())
    with pytest.raises(InvalidInputError, match="height"):
        features.plot((3, 3))
    with pytest.raises(InvalidInputError, match="nothing to draw"):
        analysis.Attacks((), 0, 0, 0.0).plot()
    with pytest.raises(InvalidInputError, match="heat map"):
        found.plot(0)
    with pytest.raises(InvalidInputError, match="per class"):
        figures.class_features_figure([], (2, 5))
