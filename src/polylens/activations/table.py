"""The activations that polylens knows: one row for each, families of them, other names.

To add one, add its row to TABLE: the function, the two polynomials that it approaches, the edges
of panels on which what is left is smooth. Its kinks are where fn is not analytic. A test compares
every row with 50-digit quadrature (tests/make_oracle.py).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.activations.hermite import cdf, hermite_polynomials, phi
from polylens.errors import InvalidInputError


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
    return F.silu(y) if beta == 1 else y * torch.sigmoid(beta * y)


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


# A parameter that a module has under one of these names, None where it has none.
Reader = Callable[..., float | None]


class Family(NamedTuple):
    """Activations with parameters.

    Attributes:
        make: parameters -> the activation; it refuses what they cannot be.
        read: parameters of a module of this family, from what it has by name; None in their place
            where it has not got them. What it reads is compared by value.
    """

    make: Callable[..., Activation]
    read: Callable[[Reader], tuple[float | None, ...]]


def _read(*names: str) -> Callable[[Reader], tuple[float | None, ...]]:
    """The one parameter of a family, under these names."""
    return lambda number: (number(*names),)


def _read_xielu(number: Reader) -> tuple[float | None, ...]:
    raw_p, raw_n, beta = number("alpha_p"), number("alpha_n"), number("beta")
    if raw_p is None or raw_n is None or beta is None:
        return (None,)
    alpha_p, alpha_n = (F.softplus(torch.tensor(v, dtype=torch.float64)) for v in (raw_p, raw_n))
    eps = number("eps")
    return float(alpha_p), beta + float(alpha_n), beta, -1e-6 if eps is None else eps


FAMILIES = {
    "leaky_relu": Family(leaky_relu, _read("negative_slope", "weight")),
    "elu": Family(elu, _read("alpha")),
    "swish": Family(swish, _read("beta")),
    "xielu": Family(xielu, _read_xielu),
}

ALIASES = {
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

TABLE: dict[str, Activation] = {
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
    return tuple(sorted([*TABLE, *ALIASES]))
