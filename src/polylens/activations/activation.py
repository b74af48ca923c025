"""Activations, and the closed form or quadrature of their Hermite coefficients.

An activation is described by what makes its coefficients exact: two polynomials that it
approaches on either side of a split point (their coefficients are closed form), and the edges
of panels on which what is left is smooth (quadrature). Piecewise polynomials need no more than
that; erf-GELU has an elementary closed form of its own.
"""

import difflib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polylens.activations.hermite import (
    cdf,
    evaluate_powers,
    hermite_polynomials,
    monomial_coefficients,
    phi,
    quadrature_coefficients,
    ramp_coefficients,
    shifted_difference,
)
from polylens.errors import InvalidInputError, UnsupportedActivation

MAX_DEGREE = 12


@dataclass(frozen=True)
class Activation:
    """An elementwise function with accurate Hermite coefficients.

    Attributes:
        name: as in Hugging Face's and TransformerLens' tables.
        fn: the function, in torch operations, accurate in float64.
        left, right: ascending coefficients of the polynomials that fn approaches (or equals)
            far below and far above `split`.
        split: where the two polynomials meet.
        edges: increasing panel edges; fn minus its asymptote is smooth inside each panel and
            negligible outside them all. Empty if fn equals the asymptotes.
        kinks: points where fn itself is not analytic.
        width: scale of fn's features; Gaussians narrower than a quarter of it need no
            asymptotes, and lose digits by them where fn is small.
        closed_form: (m, s, degree) -> coefficients, where one is known.
        accuracy: relative error of the coefficients that was measured; of a registered
            activation by refining its panels, of a built-in one against 50-digit quadrature.
        family: (constructor's name, its arguments ...) of a parametrised one, see FAMILIES.
    """

    name: str
    fn: Callable[[Tensor], Tensor]
    left: tuple[float, ...] = ()
    right: tuple[float, ...] = ()
    split: float = 0.0
    edges: tuple[float, ...] = ()
    kinks: tuple[float, ...] = ()
    width: float = 1.0
    closed_form: Callable[[Tensor, Tensor, int], Tensor] | None = None
    accuracy: float = 1e-10
    family: tuple = ()

    def __call__(self, y: Tensor) -> Tensor:
        return self.fn(y)

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"

    def hermite_coefficients(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        """c_k = E[fn(m + s xi) He_k(xi)] for k = 0 ... degree, xi ~ N(0, 1).

        Args:
            m, s: mean and standard deviation per neuron, any common shape; s may be 0.
            degree: highest k, at most 12 (beyond, float64 no longer holds k!-sized terms).

        Returns:
            float64 [degree + 1, *m.shape] on the device of m.

        Raises:
            InvalidInputError: negative or non-finite s, non-finite m, degree out of range.
        """
        if not 0 <= degree <= MAX_DEGREE + 1:
            raise InvalidInputError(
                f"degree {degree} is outside 0 ... {MAX_DEGREE}: He_k(t) and k! of a higher degree "
                "cancel more digits than float64 has"
            )
        m, s = torch.broadcast_tensors(m.double(), s.double())
        if not (torch.isfinite(m).all() and torch.isfinite(s).all() and (s >= 0).all()):
            raise InvalidInputError(
                "preactivation means must be finite and standard deviations finite and >= 0; "
                f"got {int((~torch.isfinite(m)).sum())} non-finite means and "
                f"{int((~torch.isfinite(s) | (s < 0)).sum())} bad standard deviations"
            )
        shape, m, s = m.shape, m.reshape(-1), s.reshape(-1)
        constant = s == 0
        coefficients = self._coefficients(m, torch.where(constant, 1.0, s), degree)
        if constant.any():
            coefficients[:, constant] = 0.0
            coefficients[0, constant] = self.fn(m[constant])
        return coefficients.reshape(degree + 1, *shape)

    def _coefficients(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        if self.closed_form is not None:
            return self.closed_form(m, s, degree)
        if not self.edges:
            return self._about_asymptotes(m, s, degree)
        narrow = s <= self.width / 4
        if not narrow.any():
            return self._about_asymptotes(m, s, degree)
        out = torch.empty(degree + 1, len(m), dtype=m.dtype, device=m.device)
        out[:, narrow] = self._direct(m[narrow], s[narrow], degree)
        out[:, ~narrow] = self._about_asymptotes(m[~narrow], s[~narrow], degree)
        return out

    def _direct(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        edges = (-math.inf, *self.kinks, math.inf)
        panels = [
            quadrature_coefficients(self.fn, m, s, lower, upper, degree)
            for lower, upper in itertools.pairwise(edges)
        ]
        return torch.stack(panels).sum(0)

    def _about_asymptotes(self, m: Tensor, s: Tensor, degree: int) -> Tensor:
        out = monomial_coefficients(self.left, m, s, degree)
        for power, jump in enumerate(shifted_difference(self.left, self.right, self.split)):
            if jump:
                out += jump * ramp_coefficients(power, m, s, self.split, degree)
        for lower, upper in itertools.pairwise(self.edges):
            side = self.left if upper <= self.split else self.right
            remainder = partial(_remainder, self.fn, side)
            out += quadrature_coefficients(remainder, m, s, lower, upper, degree)
        return out


def _remainder(fn: Callable[[Tensor], Tensor], side: tuple[float, ...], y: Tensor) -> Tensor:
    return fn(y) - evaluate_powers(side, y)


def _gelu_coefficients(m: Tensor, s: Tensor, degree: int) -> Tensor:
    """Coefficients of y Phi(y): those of Phi are derivatives of a normal density in m."""
    tau = torch.sqrt(1 + s * s)
    u = m / tau
    ratio, density = s / tau, phi(u)
    parts = [cdf(u)]
    for k, he in enumerate(hermite_polynomials(u, degree)):
        parts.append((-1) ** k * ratio ** (k + 1) * he * density)
    out = [m * parts[0] + s * parts[1]]
    for k in range(1, degree + 1):
        out.append(m * parts[k] + s * (parts[k + 1] + k * parts[k - 1]))
    return torch.stack(out)


def _tanh_gelu(y: Tensor) -> Tensor:
    # y * sigmoid(2 t) instead of y (1 + tanh t) / 2: exact in the far left tail
    return y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * y * (1 + 0.044715 * y * y))


def _mish(y: Tensor) -> Tensor:
    # tanh(log(1 + e^y)) = 1 - 2 / (1 + (1 + e^y)^2), kept as a ratio for small e^y
    e = torch.exp(-y.abs())
    numerator = torch.where(y > 0, 1 + 2 * e, e * (e + 2))
    return y * numerator / (numerator + torch.where(y > 0, 2 * e * e, 2.0))


def swish(beta: float = 1.0) -> Activation:
    """y sigmoid(beta y); SiLU is beta = 1, quick-GELU beta = 1.702."""
    if not (math.isfinite(beta) and beta > 0):
        raise InvalidInputError(f"swish needs a finite beta > 0, got {beta}")
    name = {1.0: "silu", 1.702: "quick_gelu"}.get(beta, f"swish(beta={beta:g})")
    return Activation(
        name,
        partial(_swish, beta),
        (),
        (0.0, 1.0),
        edges=_two_sided(40 / beta),
        width=1 / beta,
        family=("swish", beta),
    )


def _swish(beta: float, y: Tensor) -> Tensor:
    return y * torch.sigmoid(beta * y)


def leaky_relu(slope: float) -> Activation:
    """y for y > 0, slope * y below."""
    name, family = f"leaky_relu({slope:g})", ("leaky_relu", slope)
    return Activation(name, partial(_leaky, slope), (0.0, slope), (0.0, 1.0), family=family)


def _leaky(slope: float, y: Tensor) -> Tensor:
    return torch.where(y > 0, y, slope * y)


def elu(alpha: float = 1.0, scale: float = 1.0) -> Activation:
    """scale * y for y > 0, scale * alpha * (e^y - 1) below; SELU is one of them."""
    name = "elu" if (alpha, scale) == (1.0, 1.0) else f"elu(alpha={alpha:g}, scale={scale:g})"
    return Activation(
        name,
        partial(_elu, alpha, scale),
        (-scale * alpha,),
        (0.0, scale),
        edges=(-40.0, -10.0, 0.0),
        kinks=(0.0,),
        family=("elu", alpha, scale),
    )


def _elu(alpha: float, scale: float, y: Tensor) -> Tensor:
    return scale * torch.where(y > 0, y, alpha * torch.expm1(torch.clamp(y, max=0.0)))


def xielu(alpha_p: float, alpha_n: float, beta: float, eps: float) -> Activation:
    """alpha_p y^2 + beta y for y > 0, alpha_n (e^min(y, eps) - 1 - y) + beta y below."""
    kinks = (eps, 0.0) if eps < 0 else (0.0,)
    return Activation(
        f"xielu(alpha_p={alpha_p:g}, alpha_n={alpha_n:g}, beta={beta:g})",
        partial(_xielu, alpha_p, alpha_n, beta, eps),
        (-alpha_n, beta - alpha_n),
        (0.0, beta, alpha_p),
        edges=(-40.0, -10.0, *kinks),
        kinks=kinks,
        family=("xielu", alpha_p, alpha_n, beta, eps),
    )


def _xielu(alpha_p: float, alpha_n: float, beta: float, eps: float, y: Tensor) -> Tensor:
    below = alpha_n * (torch.expm1(torch.clamp(y, max=eps)) - y)
    return torch.where(y > 0, alpha_p * y * y, below) + beta * y


FAMILIES = {"swish": swish, "leaky_relu": leaky_relu, "elu": elu, "xielu": xielu}


def _two_sided(reach: float) -> tuple[float, ...]:
    return (-reach, -reach / 4, 0.0, reach / 4, reach)


def _softplus(y: Tensor) -> Tensor:
    # F.softplus is the identity above 20, which costs 2e-9
    return torch.logaddexp(y, torch.zeros_like(y))


def _squared_relu(y: Tensor) -> Tensor:
    return torch.relu(y).square()


def _clipped_gelu(y: Tensor) -> Tensor:
    return F.gelu(y).clamp(-10.0, 10.0)


def _identity(y: Tensor) -> Tensor:
    return y


_ALIASES = {
    "linear": "identity",
    "relu_squared": "relu2",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "swish": "silu",
}

_REGISTRY: dict[str, Activation] = {
    act.name: act
    for act in (
        Activation("identity", _identity, (0.0, 1.0), (0.0, 1.0)),
        Activation("relu", torch.relu, (), (0.0, 1.0)),
        Activation("relu2", _squared_relu, (), (0.0, 0.0, 1.0)),
        Activation("relu6", F.relu6, (), (6.0,), edges=(0.0, 6.0), kinks=(0.0, 6.0)),
        Activation("gelu", F.gelu, (), (0.0, 1.0), closed_form=_gelu_coefficients),
        Activation("gelu_new", _tanh_gelu, (), (0.0, 1.0), edges=(-12.0, -3.0, 0.0, 3.0, 12.0)),
        Activation(
            "gelu_10",
            _clipped_gelu,
            (),
            (10.0,),
            edges=(-40.0, -10.0, -3.0, 0.0, 3.0, 10.0),
            kinks=(10.0,),
        ),
        swish(1.0),
        swish(1.702),
        Activation("sigmoid", torch.sigmoid, (), (1.0,), edges=_two_sided(40.0)),
        Activation("tanh", torch.tanh, (-1.0,), (1.0,), edges=_two_sided(20.0)),
        Activation("softplus", _softplus, (), (0.0, 1.0), edges=_two_sided(40.0)),
        Activation("mish", _mish, (), (0.0, 1.0), edges=_two_sided(40.0)),
        Activation(
            "hardswish", F.hardswish, (), (0.0, 1.0), edges=(-3.0, 0.0, 3.0), kinks=(-3.0, 3.0)
        ),
        Activation(
            "hardsigmoid", F.hardsigmoid, (), (1.0,), edges=(-3.0, 0.0, 3.0), kinks=(-3.0, 3.0)
        ),
        elu(),
        replace(elu(1.6732632423543772, 1.0507009873554805), name="selu"),
        replace(leaky_relu(0.01), name="leaky_relu"),
    )
}


def known_activations() -> tuple[str, ...]:
    """Names that `activation` accepts, aliases included."""
    return tuple(sorted([*_REGISTRY, *_ALIASES]))


def activation(source: "str | Activation | Callable[[Tensor], Tensor]") -> Activation:
    """The Activation for a name, or for a host's function or module by what it computes.

    A callable is evaluated on a grid and compared with every known activation, so it does not
    matter which library it comes from. Modules with parameters (leaky ReLU, ELU, SiLU with a
    beta, xIELU, ...) are read first and then compared in the same way.

    Raises:
        UnsupportedActivation: unknown name, or a function that equals no known activation.
    """
    if isinstance(source, Activation):
        return source
    if isinstance(source, str):
        name = _ALIASES.get(source, source)
        if name not in _REGISTRY:
            near = difflib.get_close_matches(source, known_activations(), n=3)
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            raise UnsupportedActivation(
                f"unknown activation {source!r}{hint}; known: {', '.join(known_activations())}"
            )
        return _REGISTRY[name]
    if not callable(source):
        raise UnsupportedActivation(
            f"an activation is a name, a callable or an Activation, got {type(source).__name__}"
        )
    return _identify(source)


_PROBE = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-60.0, -25.0, 25.0, 60.0])])


@torch.no_grad()
def _identify(source: Callable[[Tensor], Tensor]) -> Activation:
    label = getattr(source, "__name__", type(source).__name__)
    parameter = next(iter(getattr(source, "parameters", lambda: ())()), None)
    device = parameter.device if parameter is not None else "cpu"
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-6)):
        probe = _PROBE.to(dtype=dtype, device=device)
        try:
            values = source(probe.clone())
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        if not isinstance(values, Tensor) or values.shape != probe.shape:
            raise UnsupportedActivation(
                f"{label} is not elementwise: {tuple(probe.shape)} values in, "
                f"{tuple(getattr(values, 'shape', ()))} out"
            )
        for candidate in [*_parametrised(source), *_REGISTRY.values()]:
            expected = candidate.fn(probe)
            error = (values.to(dtype) - expected).abs() / expected.abs().clamp(min=1.0)
            if bool((error <= tolerance).all()):
                return candidate
    raise UnsupportedActivation(
        f"{label} computes none of the known activations ({', '.join(sorted(_REGISTRY))})"
    )


def _parametrised(source: Any) -> list[Activation]:
    """Activations that a module's own parameters suggest; the caller compares the values."""
    found = []

    def number(*names: str) -> float | None:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, (int, float)) or (
                isinstance(value, Tensor) and value.numel() == 1
            ):
                return float(value)
        return None

    slope = number("negative_slope", "weight")
    if slope is not None:
        found.append(leaky_relu(slope))
    alpha = number("alpha")
    if alpha is not None:
        found.append(elu(alpha))
    beta = number("beta")
    if beta is not None and beta > 0:
        found.append(swish(beta))
    raw_p, raw_n, eps = number("alpha_p"), number("alpha_n"), number("eps")
    if raw_p is not None and raw_n is not None and beta is not None:
        alpha_p = float(F.softplus(torch.tensor(raw_p, dtype=torch.float64)))
        alpha_n = beta + float(F.softplus(torch.tensor(raw_n, dtype=torch.float64)))
        found.append(xielu(alpha_p, alpha_n, beta, -1e-6 if eps is None else eps))
    return found
