"""Options of attach that say how, not what: with any two of them the polynomials are the same."""

import random
from itertools import combinations, product

import pytest
import torch
from torch import nn

import polylens
from polylens import Sequential, TrueStream
from polylens.saving.checkpoint import Checkpoint

D, WIDTH, LAYERS = 6, 12, 3
X = torch.randn(2700, 2, D, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Its stream may be written in place; a GLU in the middle."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Glu() if i == 1 else mlp() for i in range(LAYERS))

    def forward(self, x):
        x = x.clone()
        for block in self.blocks:
            if self.in_place:
                x += block(x)
            else:
                x = x + block(x)
        return x


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D))


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH), nn.Linear(D, WIDTH)
        self.act, self.down = nn.SiLU(), nn.Linear(WIDTH, D)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


# What decides which polynomials there are, and what must not.
WHAT = {
    "fit": (*product(("samples", "joint"), (None, 0.0, 0.05)), ("gaussian", None)),
    "weighting": ("equal", "output"),
    "sequential": (True, False),
    "dtype": (torch.float32, torch.float64),
    "degree": (2, 3),
}
HOW = {
    "batch_size": (37, 500, 5000),
    "offload": (None, "cpu", "disk"),
    "checkpoint": (None, "whole", "interrupted"),
    "layers": (None, "0-1"),
    "given": ("tensor", "list", "mapping"),
}


def covering(axes):
    """Rows in which any two values of two axes are together: of random ones those that add most."""
    draw, names = random.Random(0), list(axes)
    left = {
        frozenset(((a, x), (b, y)))
        for a, b in combinations(names, 2)
        for x, y in product(axes[a], axes[b])
    }
    while left:
        rows = [{name: draw.choice(axes[name]) for name in names} for _ in range(100)]
        best = max(rows, key=lambda row: len(left & together(row)))
        left -= together(best)
        yield best


def together(row):
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def fitted(row, folder, monkeypatch):
    """{layer: what its polynomial makes of some inputs}; without a folder in the plain way."""
    model, x = Residual(folder is not None).to(row["dtype"]).eval(), X.to(row["dtype"])
    method = dict(zip(("estimator", "tails"), row["fit"], strict=True))
    method["weighting"] = row["weighting"]
    options = {"degree": row["degree"], "progress": False, "example_inputs": x[:4]}
    if row["fit"][0] == "joint":  # holds out a part of each batch
        options["batch_size"] = row["batch_size"]
    kind, some = Sequential if row["sequential"] else TrueStream, x[:64]
    if folder is not None:
        folder.mkdir()
        options |= {"batch_size": row["batch_size"], "layers": row["layers"]}
        x = {"tensor": x, "list": list(x.split(900)), "mapping": {"x": x}}[row["given"]]
        if row["sequential"]:
            method["offload"] = folder if row["offload"] == "disk" else row["offload"]
            method["checkpoint"] = folder / "it" if row["checkpoint"] else None
    if method.get("checkpoint") and row["checkpoint"] == "interrupted":
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "add", stopping(Checkpoint.add))
            with pytest.raises(KeyboardInterrupt):
                polylens.attach(model, x, method=kind(**method), **options)
    with polylens.attach(model, x, method=kind(**method), **options) as lens:
        return {n: lens[n](some) for n in lens}


def stopping(add):
    def stop_at_the_second(self, layer, polynomial):
        if self._entries:
            raise KeyboardInterrupt
        add(self, layer, polynomial)

    return stop_at_the_second


ROWS = list(covering(WHAT | HOW))


# of every estimator; the rest on the newest and lowest versions
FEW = (4, 11, 13)


@pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "i", [pytest.param(i, marks=() if i in FEW else pytest.mark.more) for i in range(len(ROWS))]
)
def test_pairwise(i, tmp_path, monkeypatch):
    row = ROWS[i]
    expected, found = fitted(row, None, monkeypatch), fitted(row, tmp_path / "x", monkeypatch)
    assert list(found) == ([0, 1] if row["layers"] else [0, 1, 2])
    for layer, values in found.items():
        torch.testing.assert_close(values, expected[layer])
