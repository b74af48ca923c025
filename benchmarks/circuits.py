"""Circuits checked on the true model: nodes, edges, pairs taken out, predicted and measured.

    python benchmarks/circuits.py                                   # the embedded model
    python benchmarks/circuits.py --model model.gguf --prompts 20   # SmolLM2, 1 to 2 minutes each

Prints, over prompts, how what was predicted correlates with what was measured: by the circuit's
model ("circuit"), by the values of nodes ("values"), by attribution patching ("gradient"), and by
that with the circuit's terms of higher order ("corrected").
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch

import polylens
from polylens import analysis, demo
from polylens.analysis.circuits.ablation import Ablations
from polylens.cli.loading import load_model

BY = {
    "circuit": "predicted",
    "values": "linear",
    "gradient": "gradient",
    "corrected": "corrected",
}
EDGES = ("strong edges", "random edges", "weak edges")
PROMPTS = (
    "The Eiffel Tower is in the city of Paris. The Colosseum is in the city of",
    "The capital of France is Paris. The capital of Japan is",
    "The keys to the old wooden cabinet in the hall",
    "The author of the books that were on the table",
    "When Mary and John went to the store, John gave a drink to",
    "def add(a, b):\n    return a +",
    "print('hello world'",
    "one two three four five six seven",
    "The quick brown fox jumps over the lazy",
    "Monday, Tuesday, Wednesday, Thursday,",
    "Alice lives in London. Bob lives in Madrid. Alice lives in",
    "Water boils at a temperature of one hundred degrees",
    "The opposite of hot is cold. The opposite of big is",
    "He put the book on the shelf because it was too",
    "The chemical symbol for gold is",
    "She opened the umbrella because it started to",
    "2 + 2 = 4. 3 + 3 =",
    "The dog chased the cat. The cat was chased by the",
    "Shakespeare wrote Hamlet. Tolstoy wrote War and",
    "The sun rises in the east and sets in the",
)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def second_differences(changes: torch.Tensor) -> torch.Tensor:
    """What both did together, of changes without a, without b, without both, over and over."""
    a, b, both = changes.reshape(-1, 3).T
    return both - a - b


def grouped(some: list, count: int, seed: int) -> dict[str, list]:
    """Of what is sorted from the strongest down."""
    chosen = random.Random(seed).sample(some, min(count, len(some)))
    return {"strong": some[:count], "random": chosen, "weak": some[-count:]}


def told(ablations: Ablations) -> dict[str, float]:
    """Correlations, and shares of signs."""
    found = {by: ablations.correlation(of) for by, of in BY.items()}
    found |= {f"sign, {by}": ablations.agreement(of) for by, of in BY.items()}
    errors = {
        f"error, {by}": float((getattr(ablations, of) - ablations.measured).abs().mean())
        for by, of in BY.items()
    }
    return found | errors | {"size": float(ablations.measured.abs().mean())}


def checked(
    circuit: analysis.Circuit, pruned: analysis.Circuit, count: int, seed: int
) -> dict[str, dict[str, float]]:
    """By group of nodes or edges what `told` says, of one prompt."""
    nodes = [node for node in circuit.top(len(circuit)) if node.kind in ("feature", "rest")]
    found = {name: told(circuit.ablate(own)) for name, own in grouped(nodes, count, seed).items()}
    # of all edges most are nothing: those that the pruned circuit keeps, but into the target
    edges = [
        (edge, source, reader)
        for reader in pruned.nodes[1 : len(pruned.edges)]
        if reader.kind in ("feature", "rest")
        for source, edge in pruned.sources(reader)
    ]
    edges = [(s, r) for _, s, r in sorted(edges, key=lambda each: -abs(each[0]))]
    for name, own in grouped(edges, count, seed).items():
        found[f"{name} edges"] = told(pruned.ablate_edges(own))
    pairs = [(a, b) for i, a in enumerate(nodes[:8]) for b in nodes[:i]]
    ablations = circuit.ablate([group for a, b in pairs for group in ([a], [b], [a, b])])
    true = second_differences(ablations.measured)
    own = second_differences(ablations.predicted)
    # attribution patching has nothing to say of pairs: its error is all of it
    found["pairs"] = {
        "circuit": correlation(own, true),
        "sign, circuit": float((own.sign() == true.sign()).double().mean()),
        "size": float(true.abs().mean()),
        "error, circuit": float((own - true).abs().mean()),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--lens", help="file of a lens; made, and written there, if it is missing")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of a prompt")
    parser.add_argument("--mlps", type=int, default=64)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    texts = demo.texts()
    if args.lens and Path(args.lens).exists():
        lens = polylens.load(args.lens, model)
    else:
        tokens = polylens.tokenize(texts[0][:60000], tokenizer)[:32]
        lens = polylens.attach(model, tokens, method=polylens.Sequential(), progress=False)
        if args.lens:
            lens.save(args.lens)
    prompts = PROMPTS
    if args.model == "demo":
        prompts = [texts[1][3000 + 200 * i : 3032 + 200 * i] for i in range(args.prompts)]
    rows = []
    for i, prompt in enumerate(prompts[: args.prompts]):
        if i < args.first:
            continue
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        start = time.perf_counter()
        circuit = analysis.circuit(lens, ids, mlps=args.mlps, features=args.features)
        traced = time.perf_counter() - start
        pruned = circuit.pruned()
        seconds = time.perf_counter() - start
        found = checked(circuit, pruned, args.count, i)
        scores = pruned.scores
        assert scores is not None
        row = {
            "prompt": prompt,
            "target": circuit.target,
            "value": circuit.value,
            "errors": circuit.errors,
            "tokens": len(ids),
            "seconds": seconds,
            "traced": traced,
            "replacement": scores.replacement,
            "completeness": scores.completeness,
            "whole": scores.whole,
            "nodes": scores.nodes,
            "edges": scores.edges,
            **found,
        }
        rows.append(row)
        strong, edges = (
            ", ".join(f"{by} {found[group][by]:.3f}" for by in BY)
            for group in ("strong", "strong edges")
        )
        print(
            f"{prompt!r} -> {circuit.target} = {circuit.value:.3f} (errors {circuit.errors:+.3f}), "
            f"{seconds:.1f} s, {scores.nodes[0]} nodes, completeness {scores.completeness:.3f}, "
            f"replacement {scores.replacement:.3f}; strongest: {strong}; edges: {edges}; pairs "
            f"{found['pairs']['circuit']:.3f}",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    for group in ("strong", "random", "weak", *EDGES, "pairs"):
        keys = rows[0][group]
        means = {key: torch.tensor([row[group][key] for row in rows]).mean() for key in keys}
        print(group, ", ".join(f"{key} {float(value):.3f}" for key, value in means.items()))


if __name__ == "__main__":
    main()
