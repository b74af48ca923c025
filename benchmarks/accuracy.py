"""Hermite coefficients of every activation at random places, against 50-digit quadrature.

    python -m benchmarks.accuracy [--cases 1000] [--seed 0]

Degrees 0 to 8; s drawn log-uniformly from 1e-6 ... 1e3 (one case in forty: 0), |m| / s <= 40
and often a kink nearby. Besides the built-in activations, also with parameters other than their
defaults, some that are registered from nothing but a callable and its kinks. Errors are norms
over the degrees; tolerated is 1e-10 of the norm of the coefficients, or what rounding of the
argument amounts to, 1e-15 (|m| + s). Two quadratures must agree to a tenth of that.
"""

import argparse
import random
from collections.abc import Callable

import mpmath as mp
import torch
import torch.nn.functional as F
from tests import make_oracle as oracle

from polylens import activation, register_activation
from polylens.activations.activation import Activation
from polylens.activations.table import elu, leaky_relu, swish, xielu

# What is measured, the same function in mpmath, and where that is not analytic.
Case = tuple[Activation, Callable[[mp.mpf], mp.mpf], tuple[float, ...]]
PARAMETRISED = {"swish(beta=0.4)": swish(0.4), "xielu": xielu(0.8, 1.3, 0.5, -1e-6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mp.mp.dps = 50
    rules = oracle.legendre(28), oracle.legendre(36)
    rng, measured = random.Random(args.seed), built_in() + registered()
    worst, over = dict.fromkeys((act.name for act, _, _ in measured), 0.0), 0
    for i in range(args.cases):
        act, fn, kinks = measured[i % len(measured)]
        m, s = place(rng, kinks)
        ratio = error(act, fn, kinks, m, s, rules)
        worst[act.name] = max(worst[act.name], ratio)
        if ratio > 1:
            over += 1
            print(f"{act.name} at m={m!r}, s={s!r}: {ratio:.2g} of the tolerance", flush=True)
    print("| activation | largest error, of the tolerance |\n| --- | --- |")
    for name, ratio in sorted(worst.items(), key=lambda item: -item[1]):
        print(f"| {name} | {ratio:.2g} |")
    print(f"\n{args.cases} cases of {len(measured)} activations, {over} over the tolerance")


def place(rng: random.Random, kinks: tuple[float, ...]) -> tuple[float, float]:
    kind = rng.random()
    if kind < 1 / 40:
        return rng.uniform(-8, 8), 0.0
    s = 10 ** rng.uniform(-6, 3)
    if kind < 0.1:
        m = rng.uniform(-8, 8)
    elif kind < 0.25 and kinks:
        m = rng.choice(kinks) + s * rng.uniform(-2, 2)
    else:
        m = s * rng.uniform(-1, 1) * rng.choice([1, 3, 10, 40])
    return m, max(s, abs(m) / 40)


def error(
    act: Activation,
    fn: Callable[[mp.mpf], mp.mpf],
    kinks: tuple[float, ...],
    m: float,
    s: float,
    rules: tuple[list, list],
) -> float:
    coarse, fine = (oracle.coefficients(fn, kinks, m, s, rule) for rule in rules)
    at = (torch.tensor([value], dtype=torch.float64) for value in (m, s))
    got = [mp.mpf(float(c)) for c in act.hermite_coefficients(*at, oracle.DEGREE)[:, 0]]
    tolerance = max(mp.mpf("1e-10") * mp.norm(fine), mp.mpf("1e-15") * (abs(m) + s))
    assert distance(coarse, fine) <= tolerance / 10, (act.name, m, s)
    return float(distance(got, fine) / tolerance)


def distance(a: list[mp.mpf], b: list[mp.mpf]) -> mp.mpf:
    return mp.norm([x - y for x, y in zip(a, b, strict=True)])


def built_in() -> list[Case]:
    cases = [
        (PARAMETRISED.get(name) or activation(name), fn, kinks)
        for name, (fn, kinks) in oracle.FUNCTIONS.items()
    ]
    for beta in (0.05, 3.0, 11.0):
        # Not kinks: panels of the quadrature follow the scale of the function.
        edges = tuple(sign * 2.0**j / beta for j in range(7) for sign in (-1, 1))
        cases.append((swish(beta), mp_swish(beta), edges))
    for parameters in ((2.1, 0.3, 1.5, -1e-6), (0.01, 5.0, 0.5, -1e-6), (0.8, 1.3, 0.25, -0.3)):
        cases.append((xielu(*parameters), mp_xielu(*parameters), (parameters[-1], 0.0)))
    cases.append((elu(0.3, 2.0), mp_elu(0.3, 2.0), (0.0,)))
    cases.append((leaky_relu(0.2), lambda y: y if y > 0 else mp.mpf(0.2) * y, (0.0,)))
    return cases


def registered() -> list[Case]:
    half = mp.mpf(0.5)

    def case(
        name: str,
        fn: Callable[[torch.Tensor], torch.Tensor],
        same: Callable[[mp.mpf], mp.mpf],
        kinks: tuple[float, ...] = (),
    ) -> Case:
        return register_activation(name, fn, kinks), same, kinks

    return [
        case("atan", torch.atan, mp.atan),
        case("bump", lambda y: torch.exp(-y * y / 2), lambda y: mp.exp(-y * y / 2)),
        case("celu", lambda y: F.celu(y, 0.5), lambda y: y if y > 0 else mp.expm1(2 * y) / 2, (0,)),
        case("erf", torch.erf, mp.erf),
        case("hardshrink", F.hardshrink, lambda y: y if abs(y) > half else mp.mpf(0), (-0.5, 0.5)),
        case("isru", lambda y: y / torch.sqrt(1 + y * y), lambda y: y / mp.sqrt(1 + y * y)),
        case(
            "jump",
            lambda y: torch.where(y > 1.5, y, -0.25 * y),
            lambda y: y if y > mp.mpf(1.5) else -y / 4,
            (1.5,),
        ),
        case(
            "logcosh",
            lambda y: torch.logaddexp(y, -y),
            lambda y: abs(y) + mp.log1p(mp.exp(-2 * abs(y))),
        ),
        case("softsign", F.softsign, lambda y: y / (1 + abs(y)), (0.0,)),
        case(
            "squareplus",
            lambda y: (y + torch.sqrt(y * y + 4)) / 2,
            lambda y: (y + mp.sqrt(y * y + 4)) / 2,
        ),
        case(
            "three pieces",
            lambda y: torch.where(y > 0, 1.5 * y, 0.25 * y) + F.relu(y - 2),
            lambda y: (1.5 * y if y > 0 else y / 4) + max(y - 2, mp.mpf(0)),
            (0.0, 2.0),
        ),
        # Built-in functions again, by the way of a stranger.
        case("my silu", F.silu, mp_swish(1.0)),
        case("my mish", F.mish, oracle.FUNCTIONS["mish"][0]),
        case(
            "my gelu_new", lambda y: F.gelu(y, approximate="tanh"), oracle.FUNCTIONS["gelu_new"][0]
        ),
    ]


def mp_swish(beta: float) -> Callable[[mp.mpf], mp.mpf]:
    return lambda y: y * oracle.FUNCTIONS["sigmoid"][0](mp.mpf(beta) * y)


def mp_elu(alpha: float, scale: float) -> Callable[[mp.mpf], mp.mpf]:
    return lambda y: scale * (y if y > 0 else mp.mpf(alpha) * mp.expm1(y))


def mp_xielu(*parameters: float) -> Callable[[mp.mpf], mp.mpf]:
    p, n, b, eps = map(mp.mpf, parameters)
    return lambda y: (p * y * y if y > 0 else n * (mp.expm1(min(y, eps)) - y)) + b * y


if __name__ == "__main__":
    main()
