"""A layer's fit and R2 where the model is, in a class that travels and needs nothing but torch.

What it calls of polylens is sent by source with it (`polylens.hosts.nnsight.remote`): so it refers
to no dataclasses, errors or devices.
"""

import torch
from torch import Tensor, nn

from polylens.fitting.neuron_gram import fill_basis, solve_nested

# Float64 numbers in one block of features.
BLOCK = 1 << 24
# Activations fitted to, and measured on; variance and mean square of the outputs; mean squared
# error of every degree.
Figures = tuple[int, int, float, float, Tensor]


class RemoteFit:
    """Least squares per neuron, and the R2 of every degree on other inputs.

    The basis is that of `NeuronGram`, of what a layer's linear maps return; the target is what
    its out-projection reads.

    Args:
        degree: highest degree.
        y, z: (which of the maps' outputs, part of it) is the activated preactivation, and the
            linear branch of a GLU; part 1 or 2 is a half of the columns.
    """

    def __init__(self, degree: int, y: tuple[int, int], z: tuple[int, int] | None) -> None:
        self.degree, self.y, self.z = degree, y, z
        self.size = (degree if z is None else 2 * degree) + 2
        self.fitted = self.seen = 0
        self.standardise: list[Tensor] = []
        self.gram: list[Tensor] = []
        self.solutions: list[Tensor] = []
        self.shift = self.total = self.square = self.residual = torch.zeros(())

    def add(self, outputs: list[Tensor], h: Tensor, kept: Tensor) -> None:
        """Add what flowed in one pass to the normal equations.

        Args:
            outputs: of the linear maps, [batch, pos, columns]; h: [batch, pos, d_mlp].
            kept: [batch, pos] bool, which positions count.
        """
        branches, h = self.read(outputs, kept), rows_of(h, kept)
        if not self.standardise:
            for branch in branches:
                values = branch.double()
                deviation = values.std(0, correction=0)
                self.standardise += [values.mean(0), torch.where(deviation > 0, deviation, 1.0)]
        self.fitted += len(h)
        for i, part in enumerate(self.blocks(h)):
            features = self.features(part, branches, h)
            product = features @ features.mT
            if i < len(self.gram):
                self.gram[i] += product
            else:
                self.gram.append(product)

    def solve(self) -> None:
        """Fit every degree to what was added."""
        gram, size = torch.cat(self.gram) / self.fitted, self.size - 1
        system, right, few = gram[:, :size, :size], gram[:, :size, -1:], self.fitted < size
        finite = bool(torch.isfinite(gram).all())
        if not finite:  # what is measured will say so
            system, right = torch.zeros_like(system), torch.zeros_like(right)
        found, _ = solve_nested(system, right, self.degree, self.z is not None, few, True)
        self.solutions, self.gram = list(found if finite else found * torch.nan), []

    def see(self, outputs: list[Tensor], h: Tensor, kept: Tensor, out: nn.Module) -> None:
        """Add what flowed in one pass to what R2 is measured of; out: the out-projection."""
        branches, h = self.read(outputs, kept), rows_of(h, kept)
        values = [torch.empty_like(h) for _ in self.solutions]
        for part in self.blocks(h):
            features = self.features(part, branches, h)[:, :-1]
            for value, solution in zip(values, self.solutions, strict=True):
                value[:, part] = (features * solution[part, :, None]).sum(1).T.to(h.dtype)
        y, bias = out(h).double(), out(torch.zeros_like(h[:1])).double()
        if not self.seen:
            self.shift = y.mean(0)
        self.seen += len(y)
        centred = y - self.shift
        self.total = self.total + centred.sum(0)
        self.square = self.square + centred.square().sum()
        # what is left goes through the map by itself: of half precision, its own rounding only
        left = [(out(h - value).double() - bias).square().sum() for value in values]
        self.residual = self.residual + torch.stack(left)

    def figures(self) -> Figures:
        """What an R2 is made of."""
        mean = self.total / self.seen
        variance = self.square / self.seen - mean.square().sum()
        square, mse = (self.shift + mean).square().sum(), self.residual / self.seen
        return self.fitted, self.seen, float(variance), float(square), mse.cpu()

    def read(self, outputs: list[Tensor], kept: Tensor) -> list[Tensor]:
        """y and z [n, d_mlp] where it counts."""
        found: list[Tensor] = []
        for place in (self.y, self.z):
            if place is not None:
                value = rows_of(outputs[place[0]], kept)
                found.append(value if not place[1] else value.chunk(2, -1)[place[1] - 1])
        return found

    def blocks(self, h: Tensor) -> list[slice]:
        step = max(1, BLOCK // (self.size * len(h)))
        return [slice(i, i + step) for i in range(0, h.shape[1], step)]

    def features(self, part: slice, branches: list[Tensor], h: Tensor) -> Tensor:
        """Basis and target [neurons, size, n] in float64."""
        values = [branch[:, part].T.double() for branch in branches]
        out = values[0].new_empty(values[0].shape[0], self.size, len(h))
        out[:, -1] = h[:, part].T
        out[:, 0] = 1.0
        if self.degree:
            for i, value in enumerate(values):
                mean, deviation = (each[part, None] for each in self.standardise[2 * i : 2 * i + 2])
                out[:, 1 + i] = (value - mean) / deviation
            fill_basis(out, self.degree, len(values) > 1, out[:, 1])
        return out


def rows_of(value: Tensor, kept: Tensor) -> Tensor:
    """[n, columns] of [batch, pos, columns], or of [batch * pos, columns], where it counts."""
    return value.reshape(-1, value.shape[-1])[kept.flatten().to(value.device)]
