"""Circuits by polynomials beside circuits by transcoders trained for the embedded model.

    python benchmarks/circuits_transcoder.py

A transcoder is relu(x W_in + b_in) W_out + b_out with few neurons active, trained with an L1
penalty; as a polynomial whose ends are both zero it is itself, so the same code traces it. Nodes
are its active neurons there, eigenfeatures and rests here; the 50 of largest value are taken out
of the true model one by one.
"""

import argparse
import time

import torch
from torch import Tensor

import polylens
from polylens import MLPWeights, analysis, demo
from polylens.analysis.circuits.ablation import measured, predicted
from polylens.analysis.circuits.paths import Written
from polylens.analysis.circuits.replacement import Replacement
from polylens.analysis.circuits.target import resolve
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


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--penalty", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=1000)
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
    for i in range(args.prompts):
        ids = demo.encode(texts[1])[3000 + 200 * i : 3032 + 200 * i]
        circuit = analysis.circuit(lens, ids, mlps=64)
        strongest = [n for n in circuit.top(len(circuit)) if n.kind in ("feature", "rest")][:50]
        by_polynomials = circuit.ablate(strongest)
        frozen = freeze(lens.host, ids, own)
        target = resolve(lens.host, frozen, None, -1, None)
        replacement = Replacement.of(Transcoders(own), frozen, target)
        flows, _, _ = replacement.flows()
        nodes: list[tuple[float, Written]] = []
        errors = 0.0
        for n, (layer, flow) in enumerate(zip(replacement.layers, flows, strict=True)):
            h = torch.relu(layer.read @ own[n].W_in.double() + own[n].b_in.double())
            values = h * (flow.u @ own[n].W_out.double().T)
            errors += float((layer.error * flow.u).sum())
            largest = values.abs().flatten().topk(200).indices.tolist()
            for t, j in (divmod(k, values.shape[1]) for k in largest):
                written = Written(n, t, h[t, j] * own[n].W_out[j].double())
                nodes.append((float(values[t, j]), written))
        chosen = sorted(nodes, key=lambda each: -abs(each[0]))[:50]
        groups = [[written] for _, written in chosen]
        with torch.no_grad():
            said, true = predicted(replacement, groups), measured(lens, replacement, groups, 16)
        rows.append(
            (
                by_polynomials.correlation(),
                correlation(said, true),
                by_polynomials.agreement(),
                float((said.sign() == true.sign()).double().mean()),
                abs(circuit.errors / circuit.value),
                abs(errors / circuit.value),
                float(by_polynomials.measured.abs().mean()),
                float(true.abs().mean()),
            )
        )
    means = torch.tensor(rows).mean(0).tolist()
    names = ("correlation", "sign", "share of errors", "mean change")
    for k, name in enumerate(names):
        print(f"{name}: polynomials {means[2 * k]:.3f}, transcoders {means[2 * k + 1]:.3f}")


if __name__ == "__main__":
    main()
