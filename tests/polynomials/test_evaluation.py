"""Polynomials as torch modules: what they refuse, and the transforms they go through."""

import pytest
import torch
from tests.oracles import FITS, generator, input_model, random_layer

from polylens import Gaussian, GLUWeights, InvalidInputError, MLPWeights, Samples, fit, fit_joint

fits = pytest.mark.parametrize(
    ("model", "scope"),
    [("gaussian", "neuron"), ("samples", "ends"), ("samples", "joint"), ("mixture", "global")],
)
both = pytest.mark.parametrize("kind", ["mlp", "glu"])
X = torch.randn(7, 4, generator=generator(3), dtype=torch.float64)


def fitted(model, scope, kind="glu", degree=3):
    if scope == "ends":
        return fit(random_layer(1, kind), input_model(model, 1), degree, tails=0.1)
    degree = 2 if scope == "global" else degree
    return FITS[scope](random_layer(1, kind), input_model(model, 1), degree)


@fits
@both
def test_function_transforms(model, scope, kind):
    poly = fitted(model, scope, kind)
    jacobian = torch.func.jacfwd(lambda x: poly(x))
    expected = torch.stack([torch.autograd.functional.jacobian(poly, x) for x in X])
    for found in (
        torch.stack([jacobian(x) for x in X]),
        torch.func.vmap(jacobian)(X),
        torch.func.vmap(torch.func.jacrev(lambda x: poly(x)))(X),
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.vmap(lambda x: poly(x))(X), poly(X))
    out, tangent = torch.func.jvp(lambda x: poly(x), (X,), (torch.ones_like(X),))
    torch.testing.assert_close(out, poly(X))
    torch.testing.assert_close(tangent, expected.sum(2))


@pytest.mark.parametrize(
    ("model", "scope", "kind"),
    [("gaussian", "neuron", "mlp"), ("samples", "ends", "glu"), ("mixture", "global", "mlp")],
)
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch.export of before"
)
@pytest.mark.filterwarnings("ignore")
def test_torch_export_and_what_is_kept_afterwards(model, scope, kind):
    poly, expected = fitted(model, scope, kind), fitted(model, scope, kind)(X)
    for strict in (False, True) if scope == "ends" else (False,):
        exported = torch.export.export(poly, (X,), strict=strict).module()
        torch.testing.assert_close(exported(X), expected)
    torch.testing.assert_close(poly(X), expected)


@fits
@both
def test_no_inputs_at_all(model, scope, kind):
    poly = fitted(model, scope, kind)
    for shape in ((0, 4), (2, 0, 4), (0, 3, 4)):
        x = torch.zeros(shape, dtype=torch.float64)
        assert poly(x).shape == (*shape[:-1], 3)
        assert poly.all_degrees(x).shape == (poly.degree + 1, *shape[:-1], 3)
        assert poly(x.requires_grad_()).shape == (*shape[:-1], 3)


@fits
def test_what_is_no_input_is_refused(model, scope):
    poly = fitted(model, scope)
    for bad in ([[1.0] * 4], X.numpy(), None, 1.0, X[:, :3], X.long(), X.to(torch.complex128)):
        with pytest.raises(InvalidInputError, match="x must be"):
            poly(bad)
    for u in ("u", None, X[0, :2], torch.full((3,), torch.nan), torch.ones(3) > 0, 1j * X[0, :3]):
        with pytest.raises(InvalidInputError, match="u must be"):
            poly.quadratic_form(u)


def test_neurons_say_what_they_need():
    glu, mlp = (
        fit(random_layer(1, kind), input_model("gaussian", 1), 2) for kind in ("glu", "mlp")
    )
    y = torch.randn(5, glu.d_mlp, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"z must be a tensor.*floating point.*NoneType"):
        glu.neurons(y)
    with pytest.raises(InvalidInputError, match=r"z must be .* as many as y; got \(4"):
        glu.neurons(y, y[:4])
    with pytest.raises(InvalidInputError, match="no linear branch"):
        mlp.neurons(y, y)
    for poly in (glu, mlp):
        with pytest.raises(InvalidInputError, match=r"y must be a tensor \[\.\.\., 6\]"):
            poly.neurons(y[:, 1:], y[:, 1:])
        with pytest.raises(InvalidInputError, match=r"y must be a tensor.*floating point.*int64"):
            poly.neurons(y.long())


@both
def test_a_quadratic_form_takes_what_fits(kind):
    form = fit(random_layer(1, kind), input_model("gaussian", 1), 2).quadratic_form(torch.ones(3))
    gamma = form.to_dense()
    torch.testing.assert_close(form @ X.T, gamma @ X.T)
    torch.testing.assert_close(form @ X[0], gamma @ X[0])
    assert (form @ X[:0].T).shape == (4, 0)
    assert form(X[:0]).shape == (0,)
    for bad in (X, X[None], torch.ones(()), [1.0] * 4, X.T * 1j):
        with pytest.raises(InvalidInputError, match=r"\[4"):
            _ = form @ bad
    for bad in (X.T, torch.ones(()), None, X * 1j):
        with pytest.raises(InvalidInputError, match=r"\[\.\.\., 4\]"):
            form(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "silu", "gelu"])
@both
def test_a_neuron_that_hardly_varies_spoils_nothing(kind, act, dtype):
    """Coefficients of its powers have 1 / s^k, beyond every dtype."""
    g = generator(0)
    W = torch.randn(8, 6, generator=g, dtype=torch.float64) / 8**0.5
    W_in, W_out = torch.randn(8, 6, generator=g), torch.randn(6, 3, generator=g)
    x = torch.randn(300, 8, generator=g)

    def error(s, degree, inputs, verb=fit):
        own, roles = W.clone(), {"W_out": W_out.to(dtype), "act": act}
        own[:, 0] *= s
        own = own.to(dtype)
        if kind == "glu":
            layer = GLUWeights(W_in=W_in.to(dtype), W_gate=own, **roles)
        else:
            layer = MLPWeights(W_in=own, **roles)
        poly = verb(layer, inputs, degree)
        out, true = poly(x.to(dtype)).double(), layer(x.to(dtype)).double()
        assert torch.isfinite(out).all()
        assert torch.isfinite(poly.linear()[0]).all()
        assert torch.isfinite(poly.quadratic_form(torch.ones(3)).to_dense()).all()
        assert torch.isfinite(poly.r2).all()
        return float((out - true).abs().max() / true.abs().max())

    normal = Gaussian.standard(8)
    for how in ((4, normal), (12, normal), (4, Samples(x)), (2, Samples(x), fit_joint)):
        without = error(0.0, *how)
        for s in (1e-6, 1e-10, 1e-42, 1e-300):
            assert error(s, *how) < 2 * without + 1e-3
