"""Polynomials that end where a preactivation leaves a range, and follow asymptotes beyond."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.hf_models import build
from tests.hosts.test_hosts_agree import bridge, hooked, nnsight, plain
from tests.polynomials.test_factored import D_IN, LAYERS, randn

import polylens
import polylens.analysis
from polylens import Gaussian, InvalidInputError, Samples, Sequential, TrueStream, fit, fit_joint
from polylens.calibration.seen import visiting_order
from polylens.fitting import tails
from polylens.fitting.joint import JointGram
from polylens.fitting.neuron_gram import NeuronGram
from polylens.hosts.nnsight.inline import InlinePolynomial
from polylens.normal_forms.preactivation import blocks
from polylens.polynomials.ends import Ends, PreactivationRange
from polylens.polynomials.joint import features

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")
X = 3 * randn(40, D_IN, seed=5)
TOKENS = torch.arange(64).reshape(4, 16) * 7 % 50


def preactivations(weights, x):
    """(y, z) of the layer; z of an MLP is None."""
    roles = ("gate", "in") if isinstance(weights, polylens.GLUWeights) else ("in",)
    found = []
    for role in roles:
        b = getattr(weights, f"b_{role}")
        found.append(x @ getattr(weights, f"W_{role}") + (0 if b is None else b))
    return found[0], found[1] if len(found) > 1 else None


def powers(coefficients, y):
    return sum((c * y**p for p, c in enumerate(coefficients)), torch.zeros_like(y))


def beyond(act, y, ends):
    """What the polynomials that act approaches gain from the ends of a range on."""
    (low, high), split = ends, act.split
    low, high = low.clamp(max=split), high.clamp(min=split)
    below = powers(act.left, y.minimum(low)) - powers(act.left, low)
    above = powers(act.right, y.maximum(high)) - powers(act.right, high)
    return below.where(low.isfinite(), 0.0) + above.where(high.isfinite(), 0.0)


@pytest.fixture(params=itertools.product(LAYERS, (True, False)), ids=str)
def ended(request):
    layer, asymptotes = request.param
    weights = LAYERS[layer]()
    poly = fit(weights, Gaussian.standard(D_IN), 3)
    ends = torch.stack([poly.m - poly.s, poly.m + 0.5 * poly.s])
    return poly, poly.with_ends(ends, asymptotes), ends


def test_beyond_a_range_the_end_goes_on_along_the_asymptote(ended):
    poly, limited, ends = ended
    y, z = preactivations(poly.weights, X)
    assert ((y < ends[0]) | (y > ends[1])).any(1).all()
    more = beyond(poly.act, y, ends) * (1 if z is None else z) * limited.asymptotes
    assert more.any() == limited.asymptotes
    for degree in range(4):
        inside = poly.truncate(degree).neurons(y.clamp(*ends), z) + more
        expected = inside @ poly.W_out + poly.b_out
        found = limited.truncate(degree)
        assert torch.allclose(found(X), expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(found.neurons(y, z), inside, rtol=1e-12, atol=1e-12)
        assert torch.allclose(limited.all_degrees(X)[degree], expected, rtol=1e-12, atol=1e-12)
    parts = torch.stack([limited.part(k)(X) for k in range(4)]).sum(0)
    assert torch.allclose(parts, limited(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", polylens.known_activations())
def test_what_is_gained_is_what_the_activation_gains_far_out(name):
    act = polylens.activation(name)
    low = torch.tensor([-300.0, -90.0, -45.0, -math.inf], dtype=torch.float64)
    high = torch.tensor([50.0, 45.0, 700.0, math.inf], dtype=torch.float64)
    y = torch.linspace(-900, 900, 61, dtype=torch.float64)[:, None].expand(-1, 4)
    found = Ends(act, torch.stack([low, high])).gained(y)
    found = torch.zeros_like(y) if found is None else found
    assert torch.allclose(found, act(y) - act(y.clamp(low, high)), rtol=1e-9, atol=1e-9)
    if name in ("relu", "relu2"):
        low, high = torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-0.5, 2.0, 0.4, 0.0]]).double()
        found = Ends(act, torch.stack([low, high])).gained(y)
        assert torch.allclose(found, act(y) - act(y.clamp(low, high)), rtol=1e-12)


def test_within_the_range_and_without_one_nothing_changes(ended):
    poly, limited, _ = ended
    y, _ = preactivations(poly.weights, X)
    wide = poly.with_ends(torch.stack([y.amin(0), y.amax(0)]))
    assert torch.allclose(wide(X), poly(X), rtol=1e-12, atol=1e-12)
    assert torch.equal(limited.optimum()(X), poly(X))
    assert torch.equal(limited.linear()[0], poly.linear()[0])


def test_inputs_are_left_as_they_were_and_gradients_beyond_are_those_of_the_asymptote(ended):
    poly, limited, ends = ended
    y, z = preactivations(poly.weights, X)
    before = y.clone()
    values = limited.neurons(y, z)
    assert torch.equal(y, before)
    y.requires_grad_()
    found = limited.neurons(y, z)
    assert torch.allclose(found, values, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    outside = (before < ends[0]) | (before > ends[1])
    line = before.clone().requires_grad_()
    (beyond(poly.act, line, ends) * (1 if z is None else z)).sum().backward()
    assert torch.allclose(y.grad[outside], line.grad[outside] * limited.asymptotes, atol=1e-12)
    assert (y.grad[~outside] != 0).any()


def test_a_range_travels_with_the_polynomial(ended, tmp_path):
    poly, limited, _ = ended
    limited.save(tmp_path / "layer")
    loaded = polylens.Polynomial.load(tmp_path / "layer")
    moved = limited.over(limited.weights)
    assert torch.equal(loaded(X), limited(X))
    assert torch.equal(moved(X), limited(X))
    single = limited.to(torch.float32)
    assert single.ends.dtype == torch.float64
    again = poly.with_ends(single.ends, limited.asymptotes)
    assert torch.allclose(single(X.float()).double(), again.double()(X), rtol=1e-4, atol=1e-4)
    limited = limited.double()
    sent = InlinePolynomial(limited.weights.tensors(), limited.evaluation_tables())
    assert torch.allclose(sent(X), limited(X), rtol=1e-10)


@pytest.mark.parametrize("bad", [torch.zeros(3, 9), torch.ones(2, 9) * float("nan"), "swapped"])
def test_a_range_that_is_none_is_refused(bad):
    poly = fit(LAYERS["mlp"](), Gaussian.standard(D_IN), 1)
    bad = torch.stack([poly.m + 1, poly.m - 1]) if isinstance(bad, str) else bad
    with pytest.raises(InvalidInputError, match="lowest and highest"):
        poly.with_ends(bad)


@pytest.mark.parametrize("make", [plain, bridge, nnsight, hooked])
def test_every_host_computes_the_polynomial_with_ends(make, tmp_path):
    method = TrueStream("samples", tails=0.0)
    options = {"method": method, "exclude_first": False, "progress": False}
    model, far = make(build("gpt2")), TOKENS.flip(1) % 13
    with polylens.attach(model, TOKENS[:1, :6], degree=3, **options) as lens:
        weights = lens.sites[1].weights()
        seen = []
        with lens.host.observe({1: lambda a: seen.append(a.x.clone())}), torch.no_grad():
            lens.host.logits(far)
        x = seen[0].reshape(-1, weights.d_in)
        y, _ = preactivations(weights, x)
        low, high = lens[1].ends.to(y)
        assert ((y < low) | (y > high)).any()
        with lens.replaced(layers=1), torch.no_grad():
            logits = lens.host.logits(far)
        free = lens[1].optimum()
        h = free.neurons(y.clamp(low, high)) + beyond(weights.act, y, (low, high))
        out = h @ free.W_out + free.b_out
        with torch.no_grad(), lens.host.substitute({1: lambda a: out.view_as(a.y)}):
            expected = lens.host.logits(far)
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
        lens.save(tmp_path / "lens")
    with polylens.load(tmp_path / "lens", model) as lens, lens.replaced(layers=1), torch.no_grad():
        assert torch.equal(lens.host.logits(far), logits)


def test_an_exported_model_has_ends_too(tmp_path):
    model, far = build("llama"), TOKENS.flip(1) % 13
    method = TrueStream("samples", tails=0.0)
    options = {"method": method, "exclude_first": False, "progress": False}
    with polylens.attach(model, TOKENS[:1, :6], degree=3, **options) as lens:
        exported = lens.export()
        with lens.replaced(), torch.no_grad():
            expected = model(far).logits
    with torch.no_grad():
        assert torch.equal(exported(far).logits, expected)
        exported.save_pretrained(tmp_path)
        assert torch.equal(polylens.load_exported(tmp_path)(far).logits, expected)
        for module in exported.modules():
            if hasattr(module, "clip"):
                module.clip = None
        assert not torch.allclose(exported(far).logits, expected)
        exported = polylens.load_exported(tmp_path)
        for module in exported.modules():
            if hasattr(module, "above"):
                module.above = None
        assert not torch.allclose(exported(far).logits, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_joint_polynomial_ends_what_is_not_linear(layer):
    weights, X = LAYERS[layer](), randn(400, D_IN) ** 3
    joint = fit_joint(weights, Samples(X), 2)
    assert float(joint.ridge[2]) < float("inf")
    y, _ = preactivations(weights, X)
    expected = joint(X)
    joint = joint.with_ends(torch.stack([y.amin(0), y.amax(0)]))
    assert torch.allclose(joint(X), expected, rtol=1e-12, atol=1e-12)
    beta, alpha = joint.linear()
    low, high = joint.base.ends
    y, z = preactivations(weights, 100 * X)
    more = beyond(weights.act, y, (low, high)) * (1 if z is None else z) @ weights.W_out
    far = joint.truncate(1)(100 * X)
    assert torch.allclose(far, 100 * X @ beta + alpha + more, rtol=1e-9)
    y = y.clamp(low, high)
    t, zeta = (y - joint.base.m) / joint.base.s, None if z is None else z - joint.z_mean
    columns = [torch.ones(400, 1), 100 * X - joint.center, t**2 - 1]
    columns += [] if zeta is None else [zeta * t]
    expected = torch.cat(columns, 1) @ joint._readout(2)
    assert torch.allclose(joint(100 * X), expected + more, rtol=1e-9)
    assert torch.allclose(joint.with_ends(joint.base.ends, False)(100 * X), expected, rtol=1e-9)


def tail_ends(weights, x, below, above):
    """[2, d_mlp] such that these shares of the y of x lie beyond."""
    y, _ = preactivations(weights, x)
    y = y.sort(0).values
    return torch.stack([y[int(below * len(y))], y[-1 - int(above * len(y))]])


def tailed(gram, weights, x, degree, below, above, sample_weights=None):
    """The fit to samples with tails of these shares."""
    seen = PreactivationRange(weights, tail_ends(weights, x, below, above))
    sums = gram(weights, degree, seen=seen)
    sums.update(x, sample_weights)
    return sums.solve().with_ends(seen.ends)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_fit_with_tails_is_the_optimum_of_what_is_evaluated(layer):
    weights, X = LAYERS[layer](), randn(400, D_IN, seed=6) ** 3
    w = randn(400, seed=7).exp()
    poly = tailed(NeuronGram, weights, X, 3, 0.05, 0.03, w)
    (y, z), (low, high) = preactivations(weights, X), poly.ends
    assert ((y < low - 1e-9).sum(0) == 20).all()
    assert ((y > high + 1e-9).sum(0) == 12).all()
    far, more = y, beyond(weights.act, y, (low, high)) * (1 if z is None else z)
    target = weights.act(y) * (1 if z is None else z) - more
    y = y.clamp(low, high)
    for i in range(weights.d_mlp):
        powers = torch.stack([((y[:, i] - poly.m[i]) / poly.s[i]) ** k for k in range(4)], 1)
        columns = powers if z is None else torch.cat([powers, z[:, i, None] * powers[:, :3]], 1)
        root = w.sqrt()[:, None]
        solution = torch.linalg.lstsq(root * columns, root * target[:, i, None]).solution
        expected = (columns @ solution).squeeze(1) + more[:, i]
        found = poly.neurons(far, z)[:, i]
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_joint_fit_with_tails_is_the_ridge_optimum_of_what_is_evaluated(layer):
    weights, X = LAYERS[layer](), randn(400, D_IN, seed=6) ** 3
    joint = tailed(JointGram, weights, X, 2, 0.05, 0.03)
    assert joint.ridge[2] < float("inf")
    assert torch.equal(joint.base.ends, tail_ends(weights, X, 0.05, 0.03))
    phi, _ = features(joint.base, joint.center, joint.z_mean, X, 2)
    scale = phi.square().mean(0).rsqrt()
    residual = weights(X) - joint(X)
    gradient = scale[:, None] * (phi.T @ residual) / len(X)
    penalty = joint.ridge[2] * joint.corrections[2] / scale[:, None]
    assert torch.allclose(gradient, penalty, atol=1e-9 * float(weights(X).abs().max()))
    # The base is every neuron's own least squares, where t itself does not stop either.
    base = joint.base
    y, z = preactivations(weights, X)
    t, near = ((v - base.m) / base.s for v in (y, y.clamp(*base.ends)))
    columns = [torch.ones_like(t), t, near**2 - 1]
    P = base.P[2] if z is None else base.P[2] + joint.z_mean * F.pad(base.Q[2], (0, 0, 0, 1))
    own = torch.stack(columns) * P[:, None]
    if z is not None:
        columns += [z - joint.z_mean, (z - joint.z_mean) * near]
        own = torch.cat([own, torch.stack(columns[3:]) * base.Q[2, :, None]])
    more = beyond(weights.act, y, base.ends)
    residual = (weights.act(y) - more) * (1 if z is None else z) - own.sum(0)
    for column in columns:
        assert (column * residual).sum(0).abs().max() < 1e-9 * (column * own.sum(0)).abs().sum()


def test_a_neuron_that_does_not_vary_has_a_tail_and_a_fit():
    W_gate = randn(D_IN, 7)
    W_gate[:, 3] = 0
    weights = polylens.GLUWeights(randn(D_IN, 7), randn(7, 3), W_gate, "silu")
    poly = tailed(NeuronGram, weights, X, 3, 0.1, 0.05)
    assert torch.isfinite(poly(X)).all()
    assert (poly(X) - weights(X)).norm() < weights(X).norm()


def left_over(weights, X, w, degree, ends):
    """[d_mlp] weighted squared error of each neuron's best polynomial between ends, read out."""
    y, z = preactivations(weights, X)
    factor, root = 1 if z is None else z, w.sqrt()[:, None]
    target = (weights.act(y) - beyond(weights.act, y, ends)) * factor
    y, found = y.clamp(*ends), []
    for i in range(weights.d_mlp):
        t = (y[:, i] - y[:, i].mean()) / y[:, i].std()
        columns = torch.stack([t**k for k in range(degree + 1)], 1)
        if z is not None:
            columns = torch.cat([columns, z[:, i, None] * columns[:, :degree]], 1)
        solution = torch.linalg.lstsq(root * columns, root * target[:, i, None]).solution
        residual = root * (columns @ solution - target[:, i, None])
        found.append(residual.square().sum() * weights.W_out[i].square().sum())
    return torch.stack(found)


@pytest.mark.parametrize("act", ["silu", "leaky_relu", "tanh", "relu2", "gelu"])
@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_error_of_every_pair_of_tails_is_that_of_its_least_squares(layer, degree, act):
    weights, X = LAYERS[layer](), randn(500, D_IN, seed=6)
    weights = replace(weights, act=polylens.activation(act))
    w = randn(500, seed=7).exp()
    neurons = torch.arange(weights.d_mlp)
    pairs = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.03, 0.1), (0.6, 0.1)]
    found = tails._Sums(weights, list(blocks(weights, X, w)), w, degree).choices(neurons, pairs)
    for k, (below, above) in enumerate(pairs):
        ends = tail_ends(weights, X, below, above)
        assert torch.allclose(found.ends[k], ends, rtol=1e-12, atol=1e-12)
        for own, errors in enumerate(found.errors, 1):
            expected = left_over(weights, X, w, own, ends)
            assert torch.allclose(errors[k], expected, rtol=1e-6, atol=1e-8 * expected.max())
        assert found.spent[k] == int(below * 500) / 500 + int(above * 500) / 500


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("layer", LAYERS)
def test_no_other_tails_of_the_same_total_leave_less(layer, share):
    weights, X = LAYERS[layer](), randn(2000, D_IN, seed=6)
    chosen = torch.arange(3)
    roles = {name: getattr(weights, name, None) for name in ("W_in", "W_gate", "b_in", "b_gate")}
    own = {name: t[..., chosen] for name, t in roles.items() if t is not None}
    weights = replace(weights, W_out=weights.W_out[chosen], **own)
    w = randn(2000, seed=7).exp()
    ends = tails.best_tails(weights, X, w, 2, share)[-1]
    y, _ = preactivations(weights, X)
    spent = float(((y < ends[0] - 1e-9) | (y > ends[1] + 1e-9)).double().mean())
    assert 0 < spent <= share
    pairs = list(itertools.product(tails.SMALL, tails.SMALL))
    sums = tails._Sums(weights, list(blocks(weights, X, w)), w, 2)
    errors = sums.choices(chosen, pairs).errors[-1]
    found = float(left_over(weights, X, w, 2, ends).sum())
    for choice in itertools.product(range(len(pairs)), repeat=3):
        if sum(sum(pairs[k]) for k in choice) / 3 <= spent + 1e-9:
            assert errors[list(choice), chosen].sum() > found * (1 - 1e-6)


def test_a_neuron_that_is_flat_for_nearly_all_inputs_is_so_beyond_its_end():
    """It writes for one input in forty; what else it does is nothing."""
    rare = torch.zeros(4000, 1, dtype=torch.float64)
    rare[::40] = 1
    X = torch.cat([rare * (3 + 0.3 * randn(4000, 1)), randn(4000, D_IN - 1, seed=6)], 1)
    W_in = randn(D_IN, 20)
    W_in[0, 3], W_in[1:, 3] = 4, 2
    b_in = randn(20)
    b_in[3] = -9
    W_out = randn(20, 3)
    W_out[3] *= 10
    weights = polylens.MLPWeights(W_in, W_out, "sigmoid", b_in)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends = tails.best_tails(weights, X, None, 3, 0.08)[-1]
    y, _ = preactivations(weights, X)
    outside = ((y < ends[0]) | (y > ends[1])).double().mean(0)
    assert outside[3] > 0.5
    assert outside.mean() < 0.08
    even = tail_ends(weights, X, 0.04, 0.04)
    none = even.new_tensor([-math.inf, math.inf])[:, None].expand_as(even)
    plain, even, found = (
        left_over(weights, X, torch.ones(4000), 3, each)[3] for each in (none, even, ends)
    )
    assert found < 0.4 * min(even, plain)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_rare_huge_preactivation_does_not_bend_a_fit_to_samples_with_tails(layer):
    """One sample in 400 is forty times as far out; most are not among those that decide."""
    weights, X = LAYERS[layer](), randn(8000, D_IN, seed=6)
    X[::400] *= 40
    held_out = randn(2000, D_IN, seed=8)
    held_out[::500] *= 30
    true = weights(held_out)

    def error(poly):
        left = (poly(held_out) - true).square().sum(1)
        return left.sum() / (true - true.mean(0)).square().sum(), left[1:100].mean()

    free, ended, tailed = (
        error(fit(weights, Samples(X), 2, tails=share)) for share in (None, 0.0, 0.03)
    )
    assert tailed[0] < 0.01
    assert tailed[1] < 0.2 * min(ended[1], free[1])


def test_a_huge_preactivation_among_those_that_decide_is_beyond_the_end_of_its_neuron():
    """The neuron is off otherwise: a cubic goes through that one and is wrong for the next."""
    W_gate, b_gate = randn(D_IN, 40), torch.zeros(40, dtype=torch.float64)
    W_gate[:, 3] *= 2.1 / W_gate[:, 3].norm()
    b_gate[3] = -9.4
    W_in, W_out = randn(D_IN, 40, seed=1), randn(40, 3, seed=2)
    weights = polylens.GLUWeights(W_in, W_out, W_gate, "silu", b_gate=b_gate)
    X, far = randn(1000, D_IN, seed=6), W_gate[:, 3] / W_gate[:, 3].square().sum()
    X[500] += 56 * far
    y, z = preactivations(weights, randn(50, D_IN, seed=9) + 45 * far)
    true = (weights.act(y) * z)[:, 3]

    def error(poly):
        return float((poly.neurons(y, z)[:, 3] - true).norm() / true.norm())

    assert error(fit(weights, Samples(X), 3, tails=0.01)) < 0.001
    assert error(fit(weights, Samples(X), 3)) > 0.1


def test_samples_that_can_be_read_once_or_twice_are_fitted_alike():
    weights, X = LAYERS["glu"](), randn(3000, D_IN, seed=6)
    poly = fit(weights, Samples(X), 2, tails=0.05)
    again = fit(weights, Samples(lambda: iter(X.split(700))), 2, tails=0.05)
    once = fit(weights, Samples(iter(X.split(700))), 2, tails=0.05)
    assert torch.allclose(again(X), poly(X))
    y, _ = preactivations(weights, X)
    for each in (poly, once):
        outside = (y < each.ends[0]) | (y > each.ends[1])
        assert 0.02 < outside.double().mean() < 0.053
        error = (each(X) - weights(X)).norm() / (poly(X) - weights(X)).norm()
        assert float(error) == pytest.approx(1, abs=0.1)
    ones = torch.ones(700, dtype=torch.float64)
    mixed = [(X[:700], ones), X[700:1000], (X[1000:1700], ones), X[1700:]]
    assert torch.allclose(fit(weights, Samples(iter(mixed)), 2, tails=0.05)(X), once(X))
    few = fit(weights, Samples(X[:20]), 2, tails=0.05)
    assert torch.allclose(few.ends, tail_ends(weights, X[:20], 0, 0))


@pytest.mark.parametrize("share", [0.5, -0.1, 1, "yes", float("nan"), True])
def test_tails_that_are_none_are_refused(share):
    weights = LAYERS["mlp"]()
    with pytest.raises(InvalidInputError, match="tails="):
        fit(weights, Samples(X), 2, tails=share)
    with pytest.raises(InvalidInputError, match="for Samples: a Gaussian"):
        fit(weights, Gaussian.standard(D_IN), 2, tails=0.1)


def test_tails_need_enough_inputs_and_a_degree():
    gelu = polylens.MLPWeights(randn(D_IN, 7), randn(7, 3), "gelu")
    for x, degree in ((X[:30], 2), (X.repeat(9, 1), 0)):
        assert tails.best_tails(gelu, x, None, degree, 0.3).isinf().all()
    assert not tails.best_tails(gelu, X.repeat(9, 1), None, 2, 0.3).isinf().all()


@pytest.mark.parametrize("stream", [TrueStream, Sequential])
@pytest.mark.parametrize("estimator", ["samples", "joint"])
def test_attach_fits_with_tails_of_what_it_sees(stream, estimator):
    model, tokens = build("llama"), torch.arange(640).reshape(40, 16) * 7 % 50
    options = {"method": stream(estimator, tails=0.1, weighting="output"), "layers": [0]}
    with polylens.attach(model, tokens, degree=2, progress=False, **options) as lens:
        assert "ends with tails of 0.1" in lens.inputs_summary
        _, cache = lens.run_with_cache(tokens, layers=0)
        x = cache["in", 0].reshape(40, 16, -1)[visiting_order(40), 1:].reshape(-1, lens[0].d_in)
        weights = lens.sites[0].weights()
        base = lens[0].base if estimator == "joint" else lens[0]
        w = 1 / weights(x).double().norm(dim=1)
        expected = tails.best_tails(weights, x, w, 2, 0.1)[-1]
        assert torch.allclose(base.ends, expected, rtol=1e-5, atol=1e-6)
        y, (low, high) = x @ weights.W_gate, base.ends.float()
        assert 0.05 < float(((y < low) | (y > high)).double().mean()) <= 0.1


@pytest.mark.parametrize("layer", LAYERS)
def test_interactions_are_of_the_polynomial_with_ends(layer):
    weights = LAYERS[layer]()
    per_neuron = fit(weights, Gaussian.standard(D_IN), 2)
    jointly = fit_joint(weights, Samples(randn(400, D_IN) ** 3), 2)
    u, writers = randn(weights.d_out, seed=3), randn(4, D_IN, seed=4)
    for poly in (per_neuron, jointly):
        far = torch.stack(
            [torch.full((weights.d_mlp,), end, dtype=torch.float64) for end in (8, 9)]
        )
        limited = poly.with_ends(far)
        assert not torch.allclose(limited(writers), poly(writers))
        assert torch.equal(limited.optimum()(writers), poly(writers))
        found = polylens.analysis.interactions(limited, writers, u)
        total = found.constant + found.linear.sum() + found.pairs.sum()
        expected = limited(writers.sum(0, keepdim=True))[0] @ u
        assert torch.allclose(total, expected, rtol=1e-9)


@pytest.mark.parametrize("verb", [fit, fit_joint])
def test_r2_does_not_depend_on_when_it_was_read(verb, tmp_path):
    weights, X = LAYERS["glu"](), randn(800, D_IN) ** 3
    polys = [verb(weights, Samples(X), 3) for _ in range(2)]
    read = polys[0].r2
    y, _ = preactivations(weights, X)
    ends = torch.stack([y.quantile(q, 0) for q in (0.1, 0.9)])
    first, second = (poly.with_ends(ends) for poly in polys)
    assert torch.equal(first.r2, second.r2)
    assert torch.equal(first.r2, read)
    assert torch.equal(first.optimum().replacement_r2, read)
    assert not torch.allclose(first.replacement_r2, read)
    assert torch.equal(first.truncate(2).r2, first.r2[:3])
    first.save(tmp_path / "x")
    assert torch.equal(type(first).load(tmp_path / "x").r2, second.r2)
    error = (second(X) - weights(X)).square().sum()
    total = (weights(X) - weights(X).mean(0)).square().sum()
    assert float(first.replacement_r2[3]) == pytest.approx(float(1 - error / total), abs=1e-9)


@pytest.mark.parametrize("low", [-0.5, 0.7])
def test_the_identity_goes_on_beyond_ends_on_either_side_of_zero(low):
    weights = polylens.MLPWeights(torch.randn(3, 8), torch.randn(8, 2), "identity")
    fitted = fit(weights, Gaussian.standard(3), 1)
    ends = torch.stack([torch.full((8,), low), torch.full((8,), low + 0.2)])
    x = torch.randn(50, 3)
    torch.testing.assert_close(fitted.with_ends(ends)(x), weights(x), rtol=1e-4, atol=1e-5)
