"""What digits.py and mnist.py share: train small image classifiers and open them up.

The experiments of "Converting MLPs into Polynomials in Closed Form" (Belrose & Rigg 2025).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import polylens
from polylens import analysis
from polylens.analysis.figures import class_features_figure
from polylens.training.tracer import Trace, TraceData, Tracer

CLASSES = 10
# As many training images as a fit to the images themselves needs.
SAMPLES = 10_000


@dataclass
class Images:
    """Pixels [n, height * width] in float32, labels [n]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    shape: tuple[int, int]

    @property
    def d_in(self) -> int:
        return self.train.shape[1]


@dataclass
class Setting:
    hidden: int = 128
    epochs: int = 100
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    degree: int = 4
    activations: tuple[str, ...] = ("relu", "gelu", "swiglu")
    gate_bias: float = 0.0  # added to a GLU's gate at initialisation
    norms: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
    seed: int = 0


@dataclass
class Result:
    activation: str
    network: nn.Module
    trace: Trace
    accuracy: float
    accuracies: dict[str, list[float]]  # of degree 0 ... n, by input model
    r2: dict[str, list[float]]  # held out, degree 0 ... n, by input model
    features: list[analysis.EigenFeatures]
    restricted: dict[int, float]
    attacks: analysis.Attacks
    transfer: Tensor
    transfer_norm: float


class GatedMLP(nn.Module):
    """(silu(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out."""

    def __init__(self, d_in: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.gate, self.linear = nn.Linear(d_in, hidden), nn.Linear(d_in, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.linear(x))

    def normal_form(self) -> polylens.GLUWeights:
        return polylens.GLUWeights(
            W_in=self.linear.weight.T,
            W_out=self.out.weight.T,
            W_gate=self.gate.weight.T,
            act="silu",
            b_gate=self.gate.bias,
            b_in=self.linear.bias,
            b_out=self.out.bias,
        )


class PlainMLP(nn.Sequential):
    """act(x W_in + b_in) W_out + b_out."""

    def __init__(self, d_in: int, hidden: int, classes: int, act: nn.Module) -> None:
        super().__init__(nn.Linear(d_in, hidden), act, nn.Linear(hidden, classes))

    def normal_form(self) -> polylens.MLPWeights:
        first, act, last = self
        return polylens.MLPWeights(
            W_in=first.weight.T, W_out=last.weight.T, act=act, b_in=first.bias, b_out=last.bias
        )


def parser(description: str, out: str, **defaults: float) -> argparse.ArgumentParser:
    """What both scripts can be told."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path(out), help="folder for the figures")
    options.add_argument("--activations", nargs="+", default=Setting.activations)
    options.add_argument("--epochs", type=int, default=Setting.epochs)
    options.add_argument("--hidden", type=int, default=Setting.hidden)
    options.add_argument("--batch", type=int, default=Setting.batch)
    options.add_argument("--seed", type=int, default=Setting.seed)
    options.add_argument("--degree", type=int, default=Setting.degree)
    options.add_argument(
        "--gate-bias", type=float, default=Setting.gate_bias, help="SwiGLU at initialisation"
    )
    options.set_defaults(**defaults)
    return options


def chosen(options: argparse.Namespace, **fixed: Any) -> Setting:
    return Setting(
        hidden=options.hidden,
        epochs=options.epochs,
        batch=options.batch,
        seed=options.seed,
        degree=options.degree,
        activations=tuple(options.activations),
        gate_bias=options.gate_bias,
        **fixed,
    )


def build(activation: str, d_in: int, setting: Setting, seed: int) -> nn.Module:
    hidden = setting.hidden
    torch.manual_seed(seed)
    if activation == "swiglu":
        network = GatedMLP(d_in, hidden, CLASSES)
        with torch.no_grad():
            network.gate.bias += setting.gate_bias
        return network
    act = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]()
    return PlainMLP(d_in, hidden, CLASSES, act)


def train(network: nn.Module, images: Images, setting: Setting, seed: int, tracer=None) -> None:
    """AdamW on the cross entropy; the tracer looks before every step and after the last."""
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(setting.epochs):
        for rows in torch.randperm(len(images.train), generator=generator).split(setting.batch):
            if tracer is not None:
                tracer(step, network)
            x = images.train[rows]
            loss = F.cross_entropy(network(x), images.train_labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
    if tracer is not None:
        tracer.measure(step, lambda: network)


def accuracy(function, images: Images) -> float:
    with torch.no_grad():
        right = function(images.test).argmax(1) == images.test_labels
    return float(right.double().mean())


def study(activation: str, images: Images, setting: Setting, inputs: dict) -> Result:
    """Everything that the paper shows, for one activation."""
    data = TraceData(images.train, images.test, images.test_labels, inputs)
    tracer = Tracer(data, setting.degree)
    network = build(activation, images.d_in, setting, setting.seed)
    train(network, images, setting, setting.seed, tracer)
    network.eval()
    fits = {
        name: polylens.fit(network.normal_form(), model, setting.degree)
        for name, model in inputs.items()
    }
    accuracies = {
        name: [accuracy(fitted.truncate(k), images) for k in range(setting.degree + 1)]
        for name, fitted in fits.items()
    }
    polynomial = fits["gaussian"]
    features = [
        analysis.eigenfeatures(polynomial, u, 16, metric="covariance")
        for u in torch.eye(CLASSES, dtype=torch.float64)
    ]
    restricted = {
        k: sum(f.restricted(k).r2(images.test) for f in features) / CLASSES for k in (1, 4, 16)
    }
    attacks = analysis.evaluate_attacks(
        network, polynomial, images.test, images.test_labels, setting.norms
    )
    other = build(activation, images.d_in, setting, setting.seed + 1)
    train(other, images, setting, setting.seed + 1)
    other_polynomial = polylens.fit(other.eval().normal_form(), inputs["gaussian"], 1)
    norm = setting.norms[1]
    transfer = analysis.transfer(
        [network, other],
        [polynomial, other_polynomial],
        images.test,
        images.test_labels,
        norm,
    )
    last = tracer.trace.steps[-1]
    r2 = {row.inputs: list(row.r2) for row in tracer.trace.rows if row.step == last}
    return Result(
        activation,
        network,
        tracer.trace,
        accuracy(network, images),
        accuracies,
        r2,
        features,
        restricted,
        attacks,
        transfer,
        norm,
    )


def input_models(images: Images) -> dict:
    return {
        "gaussian": polylens.Gaussian.from_samples(images.train),
        "class mixture": polylens.GaussianMixture.from_labels(images.train, images.train_labels),
        "sampled": polylens.Samples(images.train[:SAMPLES]),
    }


def run(
    images: Images, setting: Setting, out: Path, console: Console | None = None
) -> list[Result]:
    """Study each activation, print the tables, write the figures to `out`."""
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    inputs = input_models(images)
    results = [study(activation, images, setting, inputs) for activation in setting.activations]
    for table in (quality_table(results), training_table(results), attack_table(results)):
        console.print(table)
    for result in results:
        draw(result, images.shape, out)
    console.print(f"figures in {out}")
    return results


def draw(result: Result, shape: tuple[int, int], out: Path) -> None:
    """Four figures of a network."""
    name = result.activation
    patterns = [(features.values, features.patterns) for features in result.features]
    figures = {
        "training": ("R² over training", result.trace.plot()),
        "attacks": ("Adversarial directions", result.attacks.plot()),
        "spectrum-3": ("Quadratic features of the logit of 3", result.features[3].plot(shape)),
        "classes": ("Strongest features of each logit", class_features_figure(patterns, shape)),
    }
    for kind, (title, figure) in figures.items():
        figure.suptitle(f"{title}, {name} network", fontsize=9)
        figure.savefig(out / f"{name}-{kind}.png")


def quality_table(results: list[Result]) -> Table:
    degrees = range(1, len(results[0].r2["gaussian"]))
    table = Table(title="Trained networks on test images")
    for column in ("", "inputs", "measure"):
        table.add_column(column)
    for column in ("network", *(f"deg {k}" for k in degrees)):
        table.add_column(column, justify="right")
    for result in results:
        for name, r2 in result.r2.items():
            table.add_row(result.activation, name, "R²", "", *(f"{v:.4f}" for v in r2[1:]))
        for name, scores in result.accuracies.items():
            cells = (f"{v:.2%}" for v in (result.accuracy, *scores[1:]))
            table.add_row(result.activation, name, "accuracy", *cells)
        for k, value in result.restricted.items():
            table.add_row(result.activation, "gaussian", f"R², top {k}", "", "", f"{value:.4f}")
        table.add_section()
    return table


def training_table(results: list[Result]) -> Table:
    table = Table(title="R² on test images over training (Gaussian inputs)")
    degrees = range(1, len(results[0].r2["gaussian"]))
    for column in ("", "step", "loss", *(f"degree {k}" for k in degrees)):
        table.add_column(column, justify="right")
    for result in results:
        for row in result.trace.rows:
            if row.inputs == "gaussian":
                values = (f"{v:.4f}" for v in row.r2[1:])
                table.add_row(result.activation, str(row.step), f"{row.loss:.4f}", *values)
        table.add_section()
    return table


def attack_table(results: list[Result]) -> Table:
    norms = sorted({row.norm for row in results[0].attacks.rows})
    mean = results[0].attacks.mean_norm
    table = Table(title=f"Share of right answers turned over, true network (mean |x| {mean:.2f})")
    for column in ("", "attack", *(f"norm {norm:g}" for norm in norms)):
        table.add_column(column, justify="right")
    for result in results:
        for attack in dict.fromkeys(row.attack for row in result.attacks.rows):
            success = result.attacks.success(attack)
            table.add_row(result.activation, attack, *(f"{success[n]:.1%}" for n in norms))
        own = float(result.transfer.diagonal().mean())
        across = float(result.transfer.sum() - result.transfer.trace()) / 2
        for name, share in (("linear, own", own), ("linear, other's", across)):
            cells = [f"{share:.1%}" if n == result.transfer_norm else "" for n in norms]
            table.add_row(result.activation, name, *cells)
        table.add_section()
    return table
