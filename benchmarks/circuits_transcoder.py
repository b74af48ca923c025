"""Circuits by polynomials beside circuits by transcoders trained for the embedded model.

    python benchmarks/circuits_transcoder.py --plot curves.png

A transcoder is relu(x W_in + b_in) W_out + b_out with few neurons active, trained with an L1
penalty; as a polynomial whose ends are both zero it is itself, so the same code traces it. Nodes
are its active neurons there, eigenfeatures and rests here. In the true model, the 50 of largest
value are taken out one by one; then, for more and more of the strongest, all others together
(faithfulness: how much of the target the kept ones bring) and they themselves (completeness: how
much of it is left without them), as shares of what all of them bring (Marks et al. 2024, "Sparse
Feature Circuits"). What is no node, embeddings, biases and errors, stays.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import polylens
from polylens import MLPWeights, analysis, demo
from polylens.analysis.circuits.ablation import measured, predicted
from polylens.analysis.circuits.paths import Written
from polylens.analysis.circuits.replacement import Replacement
from polylens.analysis.circuits.target import resolve
from polylens.drawing import COLOURS, MARKERS, figure, tidy
from polylens.hosts.freezing import freeze
from polylens.polynomials.factored import Polynomial


def arrivals(lens, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer x [n, d_in] and y [n, d_out] of the true model."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {n: [] for n in lens}

    def keep(n, arrival):
        seen[n].append((arrival.x.flatten(0, -2), arrival.y.flatten(0, -2)))

    with torch.no_grad(), lens.host.observe({n: (lambda a, n=n: keep(n, a)) for n in lens}):
        lens.host.run(tokens)
    return {n: tuple(map(torch.cat, zip(*pairs, strict=True))) for n, pairs in seen.items()}


def trained(x: Tensor, y: Tensor, width: int, penalty: float, steps: int) -> MLPWeights:
    """A transcoder, decoder rows of norm 1 by a penalty that weighs with it."""
    torch.manual_seed(0)
    d_in, d_out, size = x.shape[1], y.shape[1], y.pow(2).mean().sqrt()
    W_in = (torch.randn(d_in, width) / d_in**0.5).requires_grad_()
    W_out = (torch.randn(width, d_out) * size / width**0.5).requires_grad_()
    b_in, b_out = torch.zeros(width, requires_grad=True), y.mean(0).clone().requires_grad_()
    parameters = [W_in, b_in, W_out, b_out]
    optimiser = torch.optim.Adam(parameters, lr=2e-3)
    for step in range(steps):
        rows = torch.randint(len(x), (512,))
        h = torch.relu(x[rows] @ W_in + b_in)
        error = (h @ W_out + b_out - y[rows]).pow(2).sum(1).mean() / (size**2 * d_out)
        sparse = (h @ W_out.norm(dim=1)).mean() / (size * d_out**0.5)
        loss = error + penalty * min(1.0, 2 * step / steps) * sparse
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = [p.detach() for p in parameters]
    return MLPWeights(W_in=found[0], b_in=found[1], W_out=found[2], b_out=found[3], act="relu")


def as_polynomial(weights: MLPWeights) -> Polynomial:
    """Itself: zero up to both ends, which are zero, and its asymptotes beyond."""
    zero = torch.zeros(weights.d_mlp, dtype=torch.float64)
    P = torch.zeros(2, 2, weights.d_mlp, dtype=torch.float64)
    return Polynomial(weights, zero, zero + 1, P, None).with_ends(torch.stack([zero, zero]))


class Transcoders(dict[int, Polynomial]):
    """What a Replacement reads of a lens."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self)


SIZES = (0, *(2**k for k in range(17)))
QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


class Nodes:
    """Of one prompt: values [n], and what each writes [n, d_out] at layers and positions [n]."""

    def __init__(self, values: Tensor, writes: Tensor, layers: Tensor, positions: Tensor) -> None:
        order = values.abs().argsort(descending=True)
        self.values, self.writes = values[order], writes[order]
        self.layers, self.positions = layers[order], positions[order]

    def __len__(self) -> int:
        return len(self.values)

    def strongest(self, k: int) -> list[list[Written]]:
        """One by one."""
        return [self.together(slice(i, i + 1)) for i in range(k)]

    def together(self, some: slice) -> list[Written]:
        """What some of them write in all, place by place."""
        places = torch.stack([self.layers[some], self.positions[some]], dim=1)
        each, which = places.unique(dim=0, return_inverse=True)
        totals = self.writes.new_zeros(len(each), self.writes.shape[1])
        totals.index_add_(0, which, self.writes[some])
        return [Written(n, t, v) for (n, t), v in zip(each.tolist(), totals, strict=True)]


def of_circuit(circuit: analysis.Circuit) -> Nodes:
    own = [i for i, node in enumerate(circuit) if node.kind in ("feature", "rest")]
    some = [circuit.nodes[i] for i in own]
    return Nodes(
        torch.tensor([node.value for node in some], dtype=torch.float64),
        circuit.writes[own],
        torch.tensor([node.layer for node in some]),
        torch.tensor([node.position for node in some]),
    )


def of_transcoders(replacement: Replacement, own: dict[int, Polynomial]) -> tuple[Nodes, float]:
    """(active neurons, what errors bring)."""
    flows, _, _ = replacement.flows()
    parts: list[tuple[Tensor, ...]] = []
    errors = 0.0
    for n, (layer, flow) in enumerate(zip(replacement.layers, flows, strict=True)):
        W_out = own[n].W_out.double()
        h = torch.relu(layer.read @ own[n].W_in.double() + own[n].b_in.double())
        t, j = h.nonzero(as_tuple=True)
        active = h[t, j]
        values = active * (flow.u @ W_out.T)[t, j]
        parts.append((values, active[:, None] * W_out[j], torch.full_like(t, n), t))
        errors += float((layer.error * flow.u).sum())
    return Nodes(*map(torch.cat, zip(*parts, strict=True))), errors


def curves(lens, replacement: Replacement, nodes: Nodes) -> Tensor:
    """[sizes, 2] faithfulness and completeness with the strongest 0, 1, 2, 4, ... and all."""
    sizes = [min(k, len(nodes)) for k in SIZES]
    groups = [nodes.together(slice(k, None)) for k in sizes]
    groups += [nodes.together(slice(k)) for k in sizes]
    change = measured(lens, replacement, groups, 16).view(2, -1)
    return 1 - change.T / change[0, 0]


def draw(found: dict[str, Tensor], counts: dict[str, int], path: Path) -> None:
    """Medians over prompts with quartiles; found: by name [prompts, sizes, 2]."""
    with figure((6.5, 2.6)) as drawing:
        panels = drawing.subplots(1, 2, sharex=True, sharey=True)
        titles = ("Faithfulness: only these are kept", "Completeness: these are taken out")
        for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
            for (name, values), colour, marker in zip(
                found.items(), COLOURS, MARKERS, strict=False
            ):
                last = next(j for j, k in enumerate(SIZES) if k >= counts[name])
                x = [min(k, counts[name]) for k in SIZES[: last + 1]]
                low, middle, high = values[:, : last + 1, i].quantile(QUARTILES, dim=0)
                panel.plot(x, middle, marker, ls="-", color=colour, ms=3, lw=1, label=name)
                panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            panel.set_xscale("symlog", linthresh=1, linscale=0.3)
            panel.set_xticks(
                [0, 1, 10, 100, 1000, 10000], ["0", "1", "10", "100", "1,000", "10,000"]
            )
            panel.set_title(title)
            panel.set_xlabel("strongest nodes")
            tidy(panel)
        panels[0].set_ylabel("share of what all nodes bring")
        panels[0].legend(frameon=False)
        drawing.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--penalty", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    model, texts = demo.load_model(), demo.texts()
    tokens = demo.batches(texts[0], 128, 128)
    start = time.perf_counter()
    lens = polylens.attach(model, tokens, method=polylens.Sequential(), progress=False)
    closed = time.perf_counter() - start
    start = time.perf_counter()
    own = {
        n: as_polynomial(trained(x, y, args.width, args.penalty, args.steps))
        for n, (x, y) in arrivals(lens, tokens).items()
    }
    training = time.perf_counter() - start
    for n, (x, y) in arrivals(lens, demo.batches(texts[1], 16, 128)).items():
        with torch.no_grad():
            true, left = y - y.mean(0), [y - poly(x) for poly in (own[n], lens[n])]
            r2 = [1 - float(e.pow(2).sum() / true.pow(2).sum()) for e in left]
            active = float((x @ own[n].W_in + own[n].b_in > 0).float().sum(1).mean())
        print(f"layer {n}: R2 {r2[0]:.3f} with {active:.0f} active, polynomial {r2[1]:.3f}")
    print(f"polynomials {closed:.1f} s, transcoders {training:.1f} s")
    rows = []
    found: dict[str, list[Tensor]] = {"polynomials": [], "transcoders": []}
    counts = {"polynomials": 0, "transcoders": 0}
    for i in range(args.prompts):
        ids = demo.encode(texts[1])[3000 + 200 * i : 3032 + 200 * i]
        circuit = analysis.circuit(lens, ids, mlps=len(lens) * len(ids))
        frozen = freeze(lens.host, ids, own)
        target = resolve(lens.host, frozen, None, -1, None)
        replacement = Replacement.of(Transcoders(own), frozen, target)
        others, errors = of_transcoders(replacement, own)
        both = {"polynomials": (circuit.replacement, of_circuit(circuit))}
        both |= {"transcoders": (replacement, others)}
        row: list[tuple[float, ...]] = []
        for name, (model_of, nodes) in both.items():
            groups = nodes.strongest(50)
            with torch.no_grad():
                said = predicted(model_of, groups)
                true = measured(lens, model_of, groups, 16)
                found[name].append(curves(lens, model_of, nodes))
            counts[name] = max(counts[name], len(nodes))
            same = float((said.sign() == true.sign()).double().mean())
            share = abs((errors if name == "transcoders" else circuit.errors) / circuit.value)
            row.append((correlation(said, true), same, share, float(true.abs().mean()), len(nodes)))
        rows.append([x for pair in zip(*row, strict=True) for x in pair])
    means = torch.tensor(rows).mean(0).tolist()
    names = ("correlation", "sign", "share of errors", "mean change", "nodes")
    for k, name in enumerate(names):
        print(f"{name}: polynomials {means[2 * k]:.3f}, transcoders {means[2 * k + 1]:.3f}")
    stacks = {name: torch.stack(several) for name, several in found.items()}
    for name, values in stacks.items():
        for k, (kept, left) in zip(SIZES, values.quantile(0.5, dim=0).tolist(), strict=True):
            if k <= 2 * counts[name]:
                print(f"{name}, strongest {k}: faithfulness {kept:.3f}, completeness {left:.3f}")
    if args.plot:
        draw(stacks, counts, args.plot)


if __name__ == "__main__":
    main()
