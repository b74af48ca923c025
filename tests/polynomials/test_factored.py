"""The Polynomial as a torch module, its algebra, and what fit refuses."""

import itertools

import pytest
import torch

import polylens
from polylens import Gaussian, GLUWeights, InvalidInputError, MLPWeights, fit

D_IN, D_MLP, D_OUT = 5, 9, 4


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def mlp(act="gelu", biases=True):
    return MLPWeights(
        randn(D_IN, D_MLP),
        randn(D_MLP, D_OUT),
        act,
        randn(D_MLP) if biases else None,
        randn(D_OUT) if biases else None,
    )


def glu(act="silu", biases=True):
    return GLUWeights(
        randn(D_IN, D_MLP),
        randn(D_MLP, D_OUT),
        randn(D_IN, D_MLP, seed=7),
        act,
        *((randn(D_MLP, seed=i) for i in (1, 2)) if biases else (None, None)),
        randn(D_OUT) if biases else None,
    )


def gaussian(rank=D_IN):
    factor = randn(D_IN, rank)
    return Gaussian(randn(D_IN), factor @ factor.T)


LAYERS = {"mlp": mlp, "glu": glu}
INPUTS = {
    "full": gaussian,
    "singular": lambda: gaussian(2),
    "diagonal": lambda: Gaussian(randn(D_IN), randn(D_IN).square()),
    "identity": lambda: Gaussian.standard(D_IN),
    "zero": lambda: Gaussian(randn(D_IN), torch.zeros(D_IN, D_IN, dtype=torch.float64)),
}
X = randn(3, 2, D_IN)


@pytest.fixture(params=itertools.product(LAYERS, INPUTS), ids="-".join)
def case(request):
    layer, inputs = request.param
    return LAYERS[layer](), INPUTS[inputs]()


def evaluate(tensors, x):
    """sum_k T_k(x, ..., x), by contraction from the last axis."""
    total = 0
    for k, tensor in enumerate(tensors):
        value = tensor.expand(*x.shape[:-1], *tensor.shape)
        for _ in range(k):
            shape = (*x.shape[:-1], *(1,) * (value.dim() - x.dim()), x.shape[-1])
            value = (value * x.reshape(shape)).sum(-1)
        total = total + value
    return total


@pytest.mark.parametrize("degree", range(9))
def test_truncation_equals_refitting(case, degree):
    weights, inputs = case
    best = fit(weights, inputs, 8)
    assert torch.allclose(best.truncate(degree)(X), fit(weights, inputs, degree)(X), rtol=1e-9)
    assert torch.allclose(best.all_degrees(X)[degree], best.truncate(degree)(X), rtol=1e-9)


def test_parts_sum_to_the_whole_and_dense_equals_factored(case):
    poly = fit(*case, 4)
    whole = poly(X)
    parts = torch.stack([poly.part(k)(X) for k in range(5)])
    assert torch.allclose(parts.sum(0), whole, rtol=1e-9)
    assert torch.allclose(evaluate(poly.to_dense(), X), whole, rtol=1e-8, atol=1e-9)


def test_linear_and_quadratic_form_are_the_dense_coefficients(case):
    weights, inputs = case
    poly = fit(weights, inputs, 4)
    alpha, beta = fit(weights, inputs, 1).to_dense()
    got_beta, got_alpha = poly.linear()
    assert torch.allclose(got_beta.T, beta, atol=1e-10)
    assert torch.allclose(got_alpha, alpha, atol=1e-10)
    u = randn(D_OUT)
    gamma = torch.einsum("o,oij->ij", u, fit(weights, inputs, 2).to_dense()[2])
    form = poly.quadratic_form(u)
    assert torch.allclose(form.to_dense(), gamma, atol=1e-10)
    assert torch.allclose(form @ X[0].T, gamma @ X[0].T, atol=1e-9)
    assert torch.allclose(form(X), torch.einsum("...i,ij,...j->...", X, gamma, X), atol=1e-9)
    assert torch.allclose(form.trace(), gamma.trace(), atol=1e-9)
    assert torch.equal(form.to_dense(), form.to_dense().T)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("degree", range(5))
def test_residual_is_uncorrelated_with_every_monomial(layer, degree):
    """The defining property of the optimum, to five standard errors of a Monte Carlo sample."""
    weights, inputs = LAYERS[layer](), gaussian(3)
    x = inputs.sample(200_000, torch.Generator().manual_seed(1))
    residual = weights(x) - fit(weights, inputs, degree)(x)
    monomials = [
        list(axes)
        for size in range(degree + 1)
        for axes in itertools.combinations_with_replacement(range(D_IN), size)
    ]
    sums, squares = 0, 0
    for part, r in zip(x.split(10_000), residual.split(10_000), strict=True):
        features = torch.stack([part[:, axes].prod(-1) for axes in monomials])
        features[1:] -= features[1:].mean(1, keepdim=True)
        sums, squares = sums + features @ r, squares + features.square() @ r.square()
    error = sums / (squares - sums.square() / len(x)).sqrt()
    assert float(error.abs().max()) < 5


@pytest.mark.parametrize(("act", "degree"), [("identity", 1), ("relu2", 2)])
def test_exact_when_the_activation_is_a_polynomial(act, degree):
    # relu2 is y^2 where every neuron is far above zero
    weights = mlp(act)
    weights = MLPWeights(weights.W_in, weights.W_out, act, weights.b_in + 500, weights.b_out)
    assert torch.allclose(fit(weights, gaussian(), degree)(X), weights(X), rtol=1e-9)


def test_a_glu_with_identity_gate_is_exactly_quadratic():
    weights = glu("identity")
    assert torch.allclose(fit(weights, gaussian(), 2)(X), weights(X), rtol=1e-9)


def test_dead_neurons_are_their_constant():
    weights = mlp()
    weights.W_in[:, 0] = 0
    inputs = gaussian()
    poly = fit(weights, inputs, 3)
    only_dead = MLPWeights(
        weights.W_in[:, :1], weights.W_out[:1], "gelu", weights.b_in[:1], weights.b_out
    )
    assert torch.allclose(fit(only_dead, inputs, 3)(X), only_dead(X), rtol=1e-12)
    assert torch.isfinite(poly(X)).all()


def test_batch_axes_dtype_and_state_dict():
    poly = fit(glu(), gaussian(), 3)
    whole = poly(X)
    assert whole.shape == (3, 2, D_OUT)
    assert torch.equal(poly(X[1, 0]), whole[1, 0]) or torch.allclose(poly(X[1, 0]), whole[1, 0])
    assert poly(X[:0]).shape == (0, 2, D_OUT)
    single = fit(glu().to(torch.float32), gaussian(), 3)
    assert single(X.float()).dtype == torch.float32
    assert single.P.dtype == torch.float64
    assert torch.allclose(single(X.float()).double(), whole, rtol=1e-3, atol=1e-3)
    half = fit(glu(), gaussian(), 3).to(torch.bfloat16)
    assert half.P.dtype == torch.float64
    assert torch.allclose(
        half(X.bfloat16()).double(), whole, rtol=0.1, atol=0.1 * whole.abs().max()
    )
    other = fit(glu("gelu"), Gaussian.standard(D_IN), 3)
    other.load_state_dict(poly.state_dict())
    assert torch.equal(other(X), whole)


def test_gradients_equal_those_of_the_dense_polynomial():
    poly = fit(glu(), gaussian(), 3)
    x = X.clone().requires_grad_(True)
    dense = X.clone().requires_grad_(True)
    poly(x).square().sum().backward()
    evaluate(poly.to_dense(), dense).square().sum().backward()
    assert torch.allclose(x.grad, dense.grad, rtol=1e-8)
    with torch.no_grad():
        assert torch.allclose(poly(X), poly(x))


def test_neurons_may_be_permuted_and_inputs_changed_affinely():
    weights, inputs = glu(), gaussian()
    order = torch.randperm(D_MLP, generator=torch.Generator().manual_seed(0))
    permuted = GLUWeights(
        weights.W_in[:, order],
        weights.W_out[order],
        weights.W_gate[:, order],
        "silu",
        weights.b_gate[order],
        weights.b_in[order],
        weights.b_out,
    )
    assert torch.allclose(fit(permuted, inputs, 3)(X), fit(weights, inputs, 3)(X))
    A, b = randn(D_IN, D_IN), randn(D_IN, seed=5)  # x = x' A + b
    moved = GLUWeights(
        A @ weights.W_in,
        weights.W_out,
        A @ weights.W_gate,
        "silu",
        weights.b_gate + b @ weights.W_gate,
        weights.b_in + b @ weights.W_in,
        weights.b_out,
    )
    inverse = torch.linalg.inv(A)
    there = Gaussian((inputs.mean - b) @ inverse, inverse.T @ inputs.cov @ inverse)
    assert torch.allclose(
        fit(moved, there, 3)((X - b) @ inverse), fit(weights, inputs, 3)(X), rtol=1e-7
    )


def test_gaussian_from_samples_streams():
    x = randn(500, D_IN) + 1000
    whole = Gaussian.from_samples(x)
    parts = Gaussian.from_samples(x.split(64))
    assert torch.allclose(whole.cov, parts.cov, rtol=1e-10)
    assert torch.allclose(whole.cov, torch.cov(x.T, correction=0), rtol=1e-10)
    with pytest.warns(polylens.NumericalWarning, match="rank at most 2"):
        Gaussian.from_samples(x[:3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(mlp(), gaussian(), -1), "degree"),
        (lambda: fit(mlp(), gaussian(), 13), r"0 \.\.\. 12"),
        (lambda: fit(mlp(), gaussian(), 1.0), "integer"),
        (lambda: fit(mlp(), Gaussian.standard(3), 1), "reads 5 features"),
        (lambda: fit(mlp(), gaussian(), 1, scope="layer"), "fit_joint"),
        (lambda: fit(mlp(), gaussian(), 2).truncate(3), "fitted to degree 2"),
        (lambda: fit(mlp(), gaussian(), 1).quadratic_form(randn(D_OUT)), "at least 2"),
        (lambda: fit(mlp(), gaussian(), 2).quadratic_form(randn(3)), r"shape \(4,\)"),
        (lambda: fit(mlp(), gaussian(), 4).to_dense(max_bytes=1000), "bytes"),
        (lambda: fit(mlp(), gaussian(), 2)(X[..., :3]), r"\[\.\.\., 5\]"),
        (lambda: fit(mlp(), gaussian(), 2)(X.float()), "float64"),
        (lambda: mlp("solu"), "unknown activation"),
        (lambda: MLPWeights(randn(5, 9), randn(8, 4), "relu"), "d_mlp is 8"),
        (lambda: MLPWeights(randn(5, 9), randn(9, 4).float(), "relu"), "float32"),
        (lambda: MLPWeights(randn(5, 9) / 0, randn(9, 4), "relu"), "NaN or infinite"),
        (lambda: Gaussian(randn(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "eigenvalue is -1"),
        (lambda: Gaussian(randn(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (lambda: Gaussian(randn(3), torch.eye(2)), r"\[3, 3\]"),
        (lambda: Gaussian(randn(2) / 0, torch.eye(2)), "NaN"),
        (lambda: Gaussian.from_samples([]), "no samples"),
        (lambda: Gaussian.from_samples(X / 0), "NaN or infinite"),
    ],
)
def test_bad_input_is_an_error_that_says_so(make, message):
    with pytest.raises((InvalidInputError, polylens.UnsupportedActivation), match=message):
        make()


def test_weights_are_finite_even_where_their_sum_is_not():
    large = torch.full((300, 300), 1000.0, dtype=torch.float16)
    assert MLPWeights(large, large, "relu").d_mlp == 300
    for bad in (float("nan"), float("inf")):
        broken = large.clone()
        broken[7, 8] = bad
        with pytest.raises(polylens.InvalidInputError, match="1 NaN or infinite"):
            MLPWeights(large, broken, "relu")
