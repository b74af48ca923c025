"""How alike a layer and what replaces it are, input by input: outputs and derivatives."""

from typing import Any

import torch
from torch import Tensor

from polylens.devices import numbers
from polylens.polynomials.joint import Fitted
from polylens.ranks import Ranks

# Inputs of a batch at which derivatives are compared.
DERIVATIVES = 32


class Likeness:
    """Streamed over inputs x, of a layer y(x) and what replaces it, f(x):

        cosine           mean of <y, f> / (|y| |f|)
        norm_ratio       mean of |f| / |y|
        jacobian_cosine  sum <Y u, F u> / sqrt(sum |Y u|^2 sum |F u|^2)

    with Y and F the Jacobians [d_in, d_out] at some inputs of every batch and a random direction
    u ~ N(0, 1) at each: an estimate of the cosine between them as vectors of all their entries.
    Inputs whose y or f is zero have no cosine and are left out of the first two.

    Cost: a gradient along one direction at `DERIVATIVES` inputs of a batch.
    """

    def __init__(self, layer: Fitted, replacement: Fitted) -> None:
        self._layer, self._replacement = layer.weights, replacement
        self._sums: Tensor | float = 0.0
        self._products: Tensor | float | None = 0.0

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, f: Tensor, seed: int) -> None:
        """Add inputs x [n, d_in], the layer's outputs y and the replacement's f [n, d_out].

        Args:
            seed: of the random directions, another one for each batch.
        """
        if not len(x):
            return
        y, f = y.double(), f.double()
        squares = y.square().sum(1), f.square().sum(1)
        there = (squares[0] > 0) & (squares[1] > 0)
        size, other = (torch.where(there, square, 1).sqrt() for square in squares)
        each = (y * f).sum(1) / (size * other), other / size, torch.ones_like(size)
        self._sums = self._sums + torch.where(there, torch.stack(each), 0).sum(1)
        if self._products is None:
            return
        x = x[:: max(1, len(x) // DERIVATIVES)][:DERIVATIVES]
        random = torch.Generator().manual_seed(seed)
        u = torch.randn(len(x), y.shape[1], generator=random).to(x)
        try:
            true, replaced = (_gradient(each, x, u) for each in (self._layer, self._replacement))
        except (NotImplementedError, RuntimeError):  # of an activation without a derivative
            self._products = None
            return
        pairs = (true, replaced), (true, true), (replaced, replaced)
        self._products = self._products + torch.stack([(a * b).sum() for a, b in pairs])

    def merge(self, ranks: Ranks) -> None:
        """Become the sums over what all ranks saw."""
        sums, products = zip(*ranks.gathered((self._sums, self._products)), strict=True)
        self._sums = sum(sums)
        self._products = None if any(each is None for each in products) else sum(products)

    def columns(self) -> dict[str, float | None]:
        """The figures by their names in a LayerRow, None where there are none."""
        found: dict[str, float | None] = {"cosine": None, "norm_ratio": None}
        if isinstance(self._sums, Tensor):
            cosine, ratio, count = numbers(self._sums)
            if count:
                found = {"cosine": cosine / count, "norm_ratio": ratio / count}
        if isinstance(self._products, Tensor):
            both, true, replaced = numbers(self._products)
            if true > 0 and replaced > 0:
                found["jacobian_cosine"] = both / (true * replaced) ** 0.5
        return found


def _gradient(function: Any, x: Tensor, u: Tensor) -> Tensor:
    """That of <function(x), u> at inputs x [n, d_in], in float64; u [n, d_out]."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(function(x), x, u)[0].double()
