"""The ordinary polynomial around one input, and its split over the writers of that input."""

import pytest
import torch
from tests.polynomials.test_factored import D_IN, LAYERS, randn

import polylens
from polylens import Gaussian, InvalidInputError, Samples, analysis, fit, fit_joint
from polylens.analysis.players import shapley_values

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")


def value(piece, x):
    """[n] by the definition of a piece."""
    (y, z), (P, Q) = piece.read(x), piece.about_zero()
    out = sum(p * y**k for k, p in enumerate(P))
    if z is not None:
        out = out + z * sum(q * y**k for k, q in enumerate(Q))
    out = out.sum(-1) + piece.constant
    return out if piece.linear is None else out + x @ piece.linear


@pytest.mark.parametrize("kind", ["gaussian", "samples", "joint"])
@pytest.mark.parametrize("ends", ["none", "near", "values"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_piece_is_the_polynomial_around_its_input(layer, ends, kind):
    weights = LAYERS[layer]().to(torch.float64)
    x = 2 * randn(300, D_IN)
    poly = {
        "gaussian": lambda: fit(weights, Gaussian.from_samples(x), 4),
        "samples": lambda: fit(weights, Samples(x), 4),
        "joint": lambda: fit_joint(weights, Samples(x), 2),
    }[kind]()
    base = poly.base if kind == "joint" else poly
    if ends != "none":
        at = torch.stack([base.m - base.s, base.m + 0.5 * base.s])
        at[:, 0] = torch.tensor([-torch.inf, torch.inf])
        poly = poly.with_ends(at, ends == "near")
    u = randn(poly.d_out, seed=3)
    writers = randn(5, D_IN, seed=4)
    x = writers.sum(0)
    close = x + 1e-6 * randn(1, D_IN, seed=5)
    for degree in range(poly.degree + 1):
        own = poly.truncate(degree)
        piece = own.piece(x, u)
        assert bool(piece.beyond.any()) == (ends != "none")
        for at in (x[None], close):
            torch.testing.assert_close(value(piece, at), own(at) @ u, rtol=1e-9, atol=1e-9)
        found = analysis.interactions(own, writers, u)
        assert found.total == pytest.approx(float(own(x[None])[0] @ u), rel=1e-9, abs=1e-9)
        assert f"degree {degree}" in found.about
        assert ("with ends" in found.about) == (ends != "none")
        (y, z), (P, Q) = piece.read(writers), piece.about_zero()
        values = shapley_values(y, P, z, Q)
        values = values if piece.linear is None else values + writers @ piece.linear
        torch.testing.assert_close(found.shapley, values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tails", [None, 0.05])
@pytest.mark.parametrize("name", ["hooked-layer_norm", "hooked-gated"])
def test_interactions_sum_to_what_replaces_a_layer(name, tails):
    from tests.models import hooked

    changes = dict(gated_mlp=True, normalization_type="RMS", act_fn="silu")
    model = hooked(torch.float64, **(changes if name == "hooked-gated" else {}))
    tokens = torch.arange(96).reshape(4, 24) * 7 % 90
    method = polylens.TrueStream(estimator="samples", tails=tails)
    with polylens.attach(model, tokens, degree=4, method=method, progress=False) as lens:
        _, cache = model.run_with_cache(tokens)
        for position in (3, 17):
            writers, names = analysis.residual_writers(lens, cache, 1, position)
            u = randn(24, seed=6)
            for degree in range(1, 5):
                own = lens[1].truncate(degree)
                expected = float(own(cache["poly_in", 1, "mlp"][0, position])[None][0] @ u)
                found = analysis.interactions(own, writers, u, names)
                assert found.total == pytest.approx(expected, abs=1e-8)
    assert ("with ends" in found.about) == (tails is not None)


def test_what_has_no_pieces_is_refused():
    weights, u = LAYERS[next(iter(LAYERS))](), randn(4)
    poly = fit(weights, Gaussian.standard(D_IN), 3)
    with pytest.raises(InvalidInputError, match="one finite input"):
        poly.piece(randn(2, D_IN), randn(poly.d_out))
    with pytest.raises(InvalidInputError, match="u must be"):
        poly.piece(randn(D_IN), randn(poly.d_out + 1))
    x = randn(200, D_IN)
    mixture = polylens.GaussianMixture.from_labels(x, torch.arange(200) % 2)
    dense = polylens.fit_global(weights, mixture, 3)
    u = randn(dense.d_out)
    with pytest.raises(InvalidInputError, match="truncate"):
        analysis.interactions(dense, randn(3, D_IN), u)
    for degree in range(3):
        found = analysis.interactions(dense.truncate(degree), x[:3].double(), u)
        expected = dense.truncate(degree)(x[:3].double().sum(0)) @ u.double()
        assert found.total == pytest.approx(float(expected), abs=1e-8)
