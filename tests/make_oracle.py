"""Write tests/data/hermite_oracle.json: Hermite coefficients by 40-digit quadrature.

    python tests/make_oracle.py

Gauss-Legendre on panels no longer than one standard deviation, split at every kink and at the
scales of the functions' own features; two node counts must agree to 1e-22 of the largest
coefficient. Independent of polylens: the functions are written out again in mpmath.
"""

import json
import random
from itertools import pairwise
from pathlib import Path

import mpmath as mp
import numpy as np

DEGREE = 8
PATH = Path(__file__).parent / "data" / "hermite_oracle.json"
mp.mp.dps = 40


def _sigmoid(y):
    return 1 / (1 + mp.exp(-y)) if y >= 0 else mp.exp(y) / (1 + mp.exp(y))


def _gelu(y):
    return y * mp.erfc(-y / mp.sqrt(2)) / 2


def _tanh_gelu(y):
    return y * _sigmoid(2 * mp.sqrt(2 / mp.pi) * (y + mp.mpf("0.044715") * y**3))


def _softplus(y):
    return max(y, mp.mpf(0)) + mp.log1p(mp.exp(-abs(y)))


def _mish(y):
    return y * mp.tanh(_softplus(y))


def _clip(y, low, high):
    return min(max(y, mp.mpf(low)), mp.mpf(high))


def _elu(y, alpha=1, scale=1):
    return scale * (y if y > 0 else alpha * mp.expm1(y))


def _xielu(y):
    p, n, b, eps = mp.mpf("0.8"), mp.mpf("1.3"), mp.mpf("0.5"), mp.mpf(-1e-6)
    return (p * y * y if y > 0 else n * (mp.expm1(min(y, eps)) - y)) + b * y


# name -> (function, kinks)
FUNCTIONS = {
    "identity": (lambda y: y, ()),
    "relu": (lambda y: max(y, mp.mpf(0)), (0,)),
    "leaky_relu": (lambda y: y if y > 0 else mp.mpf(0.01) * y, (0,)),
    "relu2": (lambda y: max(y, mp.mpf(0)) ** 2, (0,)),
    "relu6": (lambda y: _clip(y, 0, 6), (0, 6)),
    "gelu": (_gelu, ()),
    "gelu_new": (_tanh_gelu, ()),
    "gelu_10": (lambda y: min(_gelu(y), mp.mpf(10)), (10,)),
    "quick_gelu": (lambda y: y * _sigmoid(mp.mpf(1.702) * y), ()),
    "silu": (lambda y: y * _sigmoid(y), ()),
    "swish(beta=0.4)": (lambda y: y * _sigmoid(mp.mpf(0.4) * y), ()),
    "sigmoid": (_sigmoid, ()),
    "tanh": (mp.tanh, ()),
    "softplus": (_softplus, ()),
    "mish": (_mish, ()),
    "hardswish": (lambda y: y * _clip(y + 3, 0, 6) / 6, (-3, 3)),
    "hardsigmoid": (lambda y: _clip(y + 3, 0, 6) / 6, (-3, 3)),
    "elu": (_elu, (0,)),
    "selu": (lambda y: _elu(y, mp.mpf(1.6732632423543772), mp.mpf(1.0507009873554805)), (0,)),
    "xielu": (_xielu, (mp.mpf(-1e-6), 0)),
}
FEATURES = (0, *(sign * 2**j for j in range(9) for sign in (-1, 1)))


def legendre(nodes):
    """Nodes and weights on [-1, 1] to working precision, by Newton from NumPy's."""
    out = []
    for guess in np.polynomial.legendre.leggauss(nodes)[0]:
        x = mp.mpf(float(guess))
        for _ in range(3):
            before, value = mp.mpf(1), x
            for k in range(1, nodes):
                before, value = value, ((2 * k + 1) * x * value - k * before) / (k + 1)
            slope = nodes * (x * value - before) / (x * x - 1)
            x -= value / slope
        out.append((x, 2 / ((1 - x * x) * slope * slope)))
    return out


def coefficients(f, kinks, m, s, rule):
    m, s = mp.mpf(m), mp.mpf(s)
    if s == 0:
        return [f(m)] + [mp.mpf(0)] * DEGREE
    edges = {mp.mpf(i) for i in range(-15, 16)}
    edges |= {(mp.mpf(y) - m) / s for y in (*FEATURES, *kinks)}
    edges = sorted(e for e in edges if -15 <= e <= 15)
    total = [mp.mpf(0)] * (DEGREE + 1)
    for low, high in pairwise(edges):
        half = (high - low) / 2
        for x, w in rule:
            xi = low + half * (1 + x)
            value = half * w * f(m + s * xi) * mp.exp(-xi * xi / 2)
            before, he = mp.mpf(0), mp.mpf(1)
            for k in range(DEGREE + 1):
                total[k] += value * he
                before, he = he, xi * he - k * before
    return [c / mp.sqrt(2 * mp.pi) for c in total]


def cases(rng):
    """(m, s): fixed corners and a few random ones, |m| / s <= 40."""
    fixed = [(0.0, 0.0), (-2.5, 0.0), (0.0, 1.0), (1e-6, 1e-6), (40e3, 1e3), (-40e3, 1e3)]
    fixed += [(-4e-5, 1e-6), (0.0, 1e3), (-30.0, 1.0), (6.0, 0.2)]
    return fixed + [
        (s * rng.uniform(-1, 1) * rng.choice([1, 5, 40]), s)
        for s in (10 ** rng.uniform(-6, 3) for _ in range(6))
    ]


def main():
    rng = random.Random(0)
    rules = [legendre(28), legendre(36)]
    table = []
    for name, (f, kinks) in FUNCTIONS.items():
        for i, (m, s) in enumerate(cases(rng)):
            c = coefficients(f, kinks, m, s, rules[0])
            if i % 5 == 2:
                finer = coefficients(f, kinks, m, s, rules[1])
                error = max(abs(a - b) for a, b in zip(c, finer, strict=True))
                assert error <= mp.mpf(10) ** -22 * max(map(abs, c)), (name, m, s, error)
            table.append({"act": name, "m": m, "s": s, "c": [float(v) for v in c]})
    PATH.parent.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in table)
    PATH.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
