"""Shares of order one and two: they sum to the polynomial, and add up when parts are split."""

import pytest
import torch
from tests.oracles import generator, random_layer

from polylens.errors import InvalidInputError
from polylens.fitting.fit import fit, fit_joint
from polylens.fitting.global_optimum.fit import fit_global
from polylens.inputs.gaussian import Gaussian
from polylens.inputs.mixture import GaussianMixture
from polylens.inputs.samples import Samples


def draw(n: int, seed: int = 0):
    return torch.randn(n, 4, generator=generator(seed), dtype=torch.float64)


def fitted(kind: str, joint: bool, degree: int, act: str = "gelu"):
    """Over all degrees, with ends that a third of the inputs are beyond for some neuron."""
    layer = random_layer(3, kind, act)
    poly = (fit_joint if joint else fit)(layer, Samples(draw(200)), degree=degree, tails=0.2)
    assert poly.ends is not None
    return poly


def at_zero(poly, x, u):
    """[d_in]: the terms of degree one of the ordinary polynomial that it is around x, along u."""
    piece = poly.piece(x, u)
    P, Q = piece.about_zero()
    slope = piece.W.double() @ P[1] if len(P) > 1 else torch.zeros_like(x)
    slope = slope if piece.linear is None else slope + piece.linear
    return slope if Q is None else slope + piece.V.double() @ Q[0]


CASES = [(k, j, d) for k in ("mlp", "glu") for j in (False, True) for d in (1, 2, 3)]


@pytest.mark.parametrize(("kind", "joint", "degree"), CASES)
def test_the_shares_are_the_polynomial_with_ends(kind, joint, degree):
    poly, x = fitted(kind, joint, degree), draw(9, 1)
    shares = poly.shares(x)
    u = torch.randn(9, 3, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(shares.value(), poly(x), rtol=0, atol=1e-9)
    along = ((poly(x) - shares.constant) * u).sum(1)
    torch.testing.assert_close((x * shares.adjoint(u)).sum(1), along, rtol=0, atol=1e-9)
    for t in range(9):
        parts = torch.stack([x[t] - draw(2, t).sum(0), *draw(2, t)])
        first, form = parts @ shares.first(t, u[t]), shares.second(t, u[t]).to_dense()
        torch.testing.assert_close(first, parts @ at_zero(poly, x[t], u[t]), rtol=0, atol=1e-9)
        pairs = parts @ form @ parts.T
        torch.testing.assert_close(first.sum() + pairs.sum(), along[t], rtol=0, atol=1e-9)
        in_all = first + pairs.sum(1)
        torch.testing.assert_close(in_all, shares.forward(t, parts) @ u[t], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_they_are_integrated_gradients_of_the_piece_from_zero(kind):
    poly = fit(random_layer(5, kind), Gaussian.standard(4), degree=3)
    x, u = draw(1)[0], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    nodes = torch.linspace(0, 1, 2001, dtype=torch.float64)
    points = ((nodes[:-1] + nodes[1:]) / 2)[:, None] * x
    points.requires_grad_()
    (slopes,) = torch.autograd.grad((poly(points) @ u).sum(), points)
    expected = slopes.mean(0)
    torch.testing.assert_close(
        poly.shares(x[None]).adjoint(u[None])[0], expected, atol=1e-5, rtol=0
    )


def test_of_degree_two_gamma_is_the_quadratic_form():
    poly = fit(random_layer(5, "glu"), Gaussian.standard(4), degree=2)
    u = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gamma = poly.shares(draw(1)).second(0, u).to_dense()
    torch.testing.assert_close(gamma, poly.quadratic_form(u).to_dense())


def test_asymptotes_of_a_higher_degree_than_the_fit():
    """Of a GLU, whose asymptote y is followed: products y z on either side."""
    poly, x = fitted("glu", False, 1, "relu"), draw(9, 1) * 4
    torch.testing.assert_close(poly.shares(x).value(), poly(x), rtol=0, atol=1e-9)


def test_what_has_no_neurons_or_is_no_input_is_refused():
    layer = random_layer(3)
    mixture = GaussianMixture.from_labels(draw(60), torch.arange(60) % 2)
    with pytest.raises(InvalidInputError, match="not made of pieces"):
        fit_global(layer, mixture, degree=2).shares(draw(2))
    poly = fit(layer, Gaussian.standard(4), degree=2)
    for x in (draw(2)[0], draw(2)[:, :3], draw(2) / 0):
        with pytest.raises(InvalidInputError, match="finite inputs"):
            poly.shares(x)
