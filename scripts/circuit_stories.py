"""The circuits of docs/circuits.md: traced, checked on the true model, written as pages.

python scripts/circuit_stories.py model.gguf --lens file.lens --out docs/circuits
"""

import argparse
import json
from pathlib import Path

import torch

import polylens
from polylens import analysis, demo
from polylens.cli.loading import load_model

STORIES = {
    "fact": ("The capital of France is Paris. The capital of Japan is", (" Tokyo", " Paris")),
    "agreement": ("The keys to the old wooden cabinet in the hall", (" are", " is")),
    "copy": (
        "Alice lives in London. Bob lives in Madrid. Alice lives in",
        (" London", " Madrid"),
    ),
}


def told(circuit: analysis.Circuit, count: int) -> dict:
    """What a story says in numbers."""
    pruned = circuit.pruned()
    strongest = [n for n in circuit.top(len(circuit)) if n.kind in ("feature", "rest")][:count]
    ablations = circuit.ablate(strongest)
    numbers = zip(strongest, ablations.predicted, ablations.measured, strict=True)
    tokens = [(circuit.names[n.position], n.value) for n in circuit.top(6, "token")]
    heads = {
        f"{source} > {reader}": parts[:3]
        for (source, reader), parts in pruned.heads().items()
        if source.startswith("token") and parts[0][0] != "residual"
    }
    largest = sorted(heads.items(), key=lambda each: -abs(each[1][0][1]))[:5]
    return {
        "target": circuit.target,
        "value": circuit.value,
        "embeddings": circuit.embeddings,
        "biases": circuit.bias,
        "errors": circuit.errors,
        "rounding": circuit.rounding,
        "scores": vars(pruned.scores),
        "tokens": tokens,
        "heads": dict(largest),
        "strongest": [(n.name, n.value, float(p), float(m)) for n, p, m in numbers][:8],
        "correlation": ablations.correlation(),
        "gradient": ablations.correlation("gradient"),
        "values": ablations.correlation("linear"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--lens", required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/circuits"))
    parser.add_argument("--count", type=int, default=50)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    lens = polylens.load(args.lens, model)
    text = polylens.tokenize(demo.texts()[1][:20000], tokenizer)[:8]
    for name, (prompt, target) in STORIES.items():
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        circuit = analysis.circuit(lens, ids, target)
        story = {"prompt": prompt, **told(circuit, args.count)}
        circuit.pruned(0.6, 0.9).save_page(args.out / f"{name}.html", examples=text)
        print(json.dumps(story, indent=1), flush=True)


if __name__ == "__main__":
    main()
