"""Hermite coefficients against 40-digit quadrature, and registered activations."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from polylens import InvalidInputError, NumericalWarning, UnsupportedActivation
from polylens.activations.recognition import activation
from polylens.activations.registered import register_activation
from polylens.activations.table import TABLE, known_activations, leaky_relu, swish, xielu
from polylens.normal_forms.weights import MLPWeights

ORACLE = json.loads((Path(__file__).parent.parent / "data" / "hermite_oracle.json").read_text())
PARAMETRISED = {
    "swish(beta=0.4)": swish(0.4),
    "xielu": xielu(0.8, 1.3, 0.5, -1e-6),
}


def rows(name):
    chosen = [row for row in ORACLE if row["act"] == name]
    columns = ([row[key] for row in chosen] for key in ("m", "s", "c"))
    m, s, c = (torch.tensor(column, dtype=torch.float64) for column in columns)
    return m, s, c.T


def assert_accurate(act, m, s, expected):
    """|error| <= max(1e-10 |c|, 1e-15 (|m| + s)), norms over degrees 0 ... 8."""
    error = torch.linalg.vector_norm(act.hermite_coefficients(m, s, 8) - expected, dim=0)
    relative = 1e-10 * torch.linalg.vector_norm(expected, dim=0)
    excess = error / torch.maximum(relative, 1e-15 * (m.abs() + s)).clamp(min=1e-300)
    i = int(excess.argmax())
    assert float(excess[i]) <= 1, (
        f"{act.name}: error {float(error[i]):.2e} at m={float(m[i])}, s={float(s[i])}"
    )


@pytest.fixture
def registry():
    """Forget what a test registers."""
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


@pytest.mark.parametrize("name", sorted({row["act"] for row in ORACLE}))
def test_coefficients_equal_oracle(name):
    act = PARAMETRISED.get(name) or activation(name)
    assert_accurate(act, *rows(name))


def test_neurons_far_below_their_kink():
    # All coefficients are tiny here, and the norm of c hides c_0: 2 int_u^inf (t - u) Q(t) dt.
    u = torch.tensor([6.0, 8.25, 12.0], dtype=torch.float64)
    t = u + torch.linspace(0, 6, 600_001, dtype=torch.float64)[:, None]
    density = torch.exp(-t * t / 2) * 0.3989422804014327
    expected = [torch.trapezoid((t - u) ** (2 - k) * density, t, dim=0) for k in range(3)]
    got = activation("relu2").hermite_coefficients(-u, torch.ones(3), 2)
    factors = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(got, factors * torch.stack(expected), rtol=1e-8, atol=0)


def test_oracle_covers_every_builtin():
    assert set(TABLE) <= {row["act"] for row in ORACLE}


def test_helper_fails_on_a_wrong_coefficient():
    m, s, c = rows("gelu")
    with pytest.raises(AssertionError, match="gelu: error"):
        assert_accurate(activation("gelu"), m, s, c * (1 + 1e-9))


@pytest.mark.parametrize(
    ("name", "fn", "kinks"),
    [
        ("silu", F.silu, ()),
        ("tanh", torch.tanh, ()),
        ("hardswish", F.hardswish, (-3.0, 3.0)),
        ("relu6", F.relu6, (0.0, 6.0)),
        # F.elu is exp(y) - 1 in older versions of torch, which cancels where y is small.
        ("elu", lambda y: torch.where(y > 0, y, torch.expm1(y)), (0.0,)),
    ],
)
def test_registered_equals_builtin(registry, name, fn, kinks):
    act = register_activation(f"my_{name}", fn, kinks)
    assert act.accuracy <= 1e-10
    assert_accurate(act, *rows(name))
    assert f"my_{name}" in known_activations()


def test_registered_algebraic_tail(registry):
    act = register_activation("my_softsign", F.softsign, kinks=(0.0,), slopes=(0.0, 0.0))
    assert act.accuracy <= 1e-10
    # E[y / (1 + |y|) t] = 2 int_0^inf s x^2 / (1 + s x) phi(x) dx, s = 2
    x = torch.linspace(0, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) * 0.3989422804014327
    expected = 2 * torch.trapezoid(2 * x * x / (1 + 2 * x) * density, x)
    got = act.hermite_coefficients(torch.zeros(1), torch.full((1,), 2.0), 1)[1]
    assert abs(float(got) - float(expected)) < 1e-10
    layer = MLPWeights(torch.ones(1, 1), torch.ones(1, 1), "my_softsign")
    assert layer.act is act


def test_undeclared_kink_is_loud(registry):
    with pytest.warns(NumericalWarning, match="kinks="):
        act = register_activation("kinked", lambda y: (y - 1.2345).abs())
    assert act.accuracy > 1e-7
    assert register_activation("declared", lambda y: (y - 1.2345).abs(), (1.2345,)).accuracy < 1e-10


@pytest.mark.parametrize("kink", [0.0, 0.25, 1.0, -4.0, 0.3, 300.0])
def test_undeclared_kinks_on_edges_of_panels_are_loud(registry, kink):
    """Narrow Gaussians do not use the panels, wide ones do: to either alone it is invisible."""
    with pytest.warns(NumericalWarning, match=f"not smooth near {kink:g}"):
        act = register_activation(
            "leaky", lambda y: torch.where(y > kink, y - kink, (y - kink) / 5)
        )
    assert act.accuracy > 0.05
    m, s = torch.tensor([kink + 0.0007]).double(), torch.tensor([0.001]).double()
    truth = leaky_relu(0.2).hermite_coefficients(m - kink, s, 8)
    error = float((act.hermite_coefficients(m, s, 8) - truth).norm() / truth.norm())
    assert error <= 2 * act.accuracy


def test_functions_without_a_value_somewhere_are_refused(registry):
    with pytest.raises(UnsupportedActivation, match="NaN or infinity at y = 5"):
        register_activation("gap", lambda y: torch.where((y - 55).abs() < 3, torch.nan, y))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda y: torch.softmax(y, -1), "changes with the other values"),
        (lambda y: y - y.mean(), "changes with the other values"),
        (lambda y: y.sum(), "not elementwise"),
        (torch.log, "NaN or infinity"),
        (torch.square, "not asymptotically linear"),
        (lambda y: y.float(), "not elementwise"),
        (lambda y: y.missing, "failed"),
    ],
)
def test_unusable_functions_are_refused(registry, fn, message):
    with pytest.raises(UnsupportedActivation, match=message):
        register_activation("broken", fn)
    assert "broken" not in known_activations()


def test_registration_refuses_names_kinks_and_slopes(registry):
    with pytest.raises(InvalidInputError, match="exists already"):
        register_activation("swish", F.silu)
    with pytest.raises(InvalidInputError, match="non-empty"):
        register_activation("", F.silu)
    with pytest.raises(InvalidInputError, match="finite"):
        register_activation("new", F.silu, kinks=(float("nan"),))
    with pytest.raises(UnsupportedActivation, match="has slope 1"):
        register_activation("new", F.silu, slopes=(0.0, 0.5))


@pytest.mark.parametrize("kink", [0.0, 0.25, -1.0, 4.0, -64.0])
def test_an_undeclared_kink_on_the_edge_of_a_panel_is_loud(registry, kink):
    with pytest.warns(NumericalWarning, match="kinks="):
        act = register_activation("kinked", lambda y: (y - kink).abs())
    assert act.accuracy > 1e-4
    assert register_activation("declared", lambda y: (y - kink).abs(), (kink,)).accuracy < 1e-10


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("new", 3), UnsupportedActivation),
        (("new", torch.nn.ReLU), UnsupportedActivation),
        (("new", torch.relu, ["a"]), InvalidInputError),
        (("new", torch.relu, 3.0), InvalidInputError),
        (("new", torch.relu, [0], (0,)), InvalidInputError),
        (("new", torch.relu, [0], ("a", "b")), InvalidInputError),
        (("new", torch.relu, [0], (0, float("nan"))), InvalidInputError),
    ],
)
def test_bad_registrations(registry, arguments, error):
    with pytest.raises(error):
        register_activation(*arguments)
    assert "new" not in known_activations()


def test_bad_moments():
    act, one = activation("silu"), torch.ones(3)
    for m, s, degree, message in (
        (one, torch.ones(4), 2, "do not fit"),
        (one, one, 2.5, "2.5"),
        (None, one, 2, "m must be"),
        (one * 1j, one, 2, "floating point"),
        (one, -one, 2, "bad standard deviations"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            act.hermite_coefficients(m, s, degree)


@pytest.mark.parametrize("name", ["tanh", "silu", "gelu_new", "softplus", "mish", "elu", "gelu"])
def test_of_narrow_gaussians_every_coefficient_keeps_its_digits(name):
    """c_k / s^k is E[act^(k)], however narrow; quadrature leaves 1e-16 / s^k of it."""
    mpmath = pytest.importorskip("mpmath")
    mp = mpmath.mp
    functions = {
        "tanh": mp.tanh,
        "silu": lambda y: y / (1 + mp.exp(-y)),
        "gelu_new": lambda y: (
            y / (1 + mp.exp(-mp.sqrt(8 / mp.pi) * y * (1 + mp.mpf(0.044715) * y * y)))
        ),
        "softplus": lambda y: mp.log(1 + mp.exp(y)),
        "mish": lambda y: y * mp.tanh(mp.log(1 + mp.exp(y))),
        "elu": lambda y: y if y > 0 else mp.exp(y) - 1,
        "gelu": lambda y: y * mp.erfc(-y / mp.sqrt(2)) / 2,
    }
    with mpmath.workdps(50):
        for m in (-3.0, -0.3, 0.7, 3.0):
            taylor = mp.taylor(functions[name], mp.mpf(m), 7)
            for s in (1e-3, 1e-5, 1e-7):
                got = activation(name).hermite_coefficients(
                    *torch.tensor([[m], [s]], dtype=torch.float64), 3
                )
                for k in range(4):
                    # E[f^(k)(m + s xi)] / k!, to s^4
                    true = float(
                        sum(
                            taylor[k + 2 * j]
                            * mp.binomial(k + 2 * j, k)
                            * mp.fac2(2 * j - 1)
                            * mp.mpf(s) ** (2 * j)
                            for j in range(3)
                        )
                    )
                    value = float(got[k]) / float(mp.mpf(s) ** k * mp.factorial(k))
                    assert value == pytest.approx(true, rel=1e-8, abs=1e-12), (m, s, k)


def test_a_kink_beside_a_narrow_gaussian_is_seen():
    """SELU's second derivative jumps at 0: a window of one side must not reach over it."""
    act = activation("selu")
    s = torch.tensor([1e-6], dtype=torch.float64)
    for ratio in (-30.0, -12.0, -3.0, 0.0, 3.0, 12.0, 30.0):
        m = ratio * s
        own = leaky_relu(0.0).hermite_coefficients(m, s, 4)
        below = leaky_relu(0.0).hermite_coefficients(-m, s, 4)
        scale, alpha = 1.0507009873554805, 1.6732632423543772
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
        lines = scale * own - scale * alpha * signs * below  # e^y - 1 = y to 1e-6
        got = act.hermite_coefficients(m, s, 4)
        assert float((got - lines).norm() / lines.norm()) < 1e-4


def test_smooth_features_near_zero_are_resolved_between_kinks_far_away(registry):
    act = register_activation(
        "bent",
        lambda y: torch.tanh(y) + torch.relu(y - 32.5) + torch.relu(-52.8 - y),
        [32.5, -52.8],
    )
    assert act.accuracy < 1e-9
