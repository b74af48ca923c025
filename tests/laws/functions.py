"""Random elementwise functions with kinks anywhere, and what is known of their smoothness."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tests.oracles import generator
from torch import Tensor

from polylens.activations.hermite import hermite_polynomials

SMOOTH = (torch.tanh, torch.erf, F.silu, torch.sin, torch.asinh, lambda y: y / (1 + y * y))
# jumps of the value, of the first and of the second derivative, and something narrow
ROUGH = (
    lambda t: (t > 0).to(t) / 4,
    torch.relu,
    lambda t: torch.relu(t) - torch.relu(t - 1),
    lambda t: torch.where(t > 0, t.square() / (1 + t.square()), 0.0),
    lambda t: torch.exp(-((t / 0.02) ** 2)) / 3,
)


class Rough(NamedTuple):
    """fn, where it is not smooth, the places that are declared, and whether it is periodic."""

    fn: Callable[[Tensor], Tensor]
    places: list[float]
    declared: list[float]
    oscillates: bool


def random_function(seed: int) -> Rough:
    """A smooth function and up to three rough ones, at edges of panels or anywhere."""
    g = generator(seed)

    def number(n: int) -> int:
        return int(torch.randint(0, n, (), generator=g))

    smooth, terms, places = SMOOTH[number(len(SMOOTH))], [], []
    for _ in range(number(4)):
        kind = number(len(ROUGH))
        at = (0.0, 0.25, -1.0, 4.0, -16.0, 64.0, 0.5)[number(7)]
        if number(2):
            at = float(10 ** (3 * torch.rand((), generator=g) - 1)) * (-1) ** number(2)
        terms.append((ROUGH[kind], at))
        places += {2: [at, at + 1], 4: [at + 0.02 * j for j in range(-6, 7)]}.get(kind, [at])
    declared = [place for place in places if number(2)]

    def fn(y: Tensor) -> Tensor:
        return sum((term(y - at) for term, at in terms), smooth(y) + 0.3 * y)

    return Rough(fn, places, declared, smooth is torch.sin)


def coefficients(rough: Rough, m: float, s: float, degree: int = 8) -> Tensor:
    """c_0 ... c_degree of fn(m + s xi) by Gauss-Legendre on short pieces between the places."""
    reach = 12.0
    pieces = torch.arange(-reach, reach, min(0.05, 0.5 / s), dtype=torch.float64)
    cuts = torch.tensor([(p - m) / s for p in rough.places], dtype=torch.float64)
    edges = torch.cat([pieces, cuts.clamp(-reach, reach), torch.tensor([reach])]).unique()
    k = torch.arange(1, 16).double()
    J = torch.diag(k / (4 * k * k - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(J + J.T)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    xi = edges[:-1, None] + half * (1 + nodes)
    weight = half * 2 * vectors[0].square() * torch.exp(-xi * xi / 2) / 2.5066282746310002
    value = weight * rough.fn(m + s * xi)
    return torch.stack([(value * he).sum() for he in hermite_polynomials(xi, degree)])
