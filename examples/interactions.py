"""Does a layer's quadratic form predict how its writers interact? Asked of the true MLP.

At positions of held-out text, u is the unembedding of the model's first guess minus that of its
second. The polynomial says for each pair of writers (embeddings, heads, earlier MLPs) by how much
the two together move the layer's output along u beyond what each moves alone: pairs[a, b] twice.
The true MLP is asked by taking writers out of its input, norm scale frozen:

    f(x) - f(x - a) - f(x - b) + f(x - a - b)

Runs offline on the embedded model, or on another one:

    python examples/interactions.py [--out figure.png]
    python examples/interactions.py --model HuggingFaceTB/SmolLM2-135M --layers 5 15 25
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import polylens
from polylens import analysis, demo
from polylens.loading import load_model, token_windows

POSITIONS = (30, 60, 90, 120)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def true_interactions(layer, writers: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Second differences of the true MLP along u, for every pair of writers."""
    a, b = torch.triu_indices(len(writers), len(writers), 1)
    x = writers.sum(0)

    def f(inputs: torch.Tensor) -> torch.Tensor:
        return layer(inputs.to(layer.dtype)).double() @ u.double()

    alone = f(x - writers)
    return f(x[None]) - alone[a] - alone[b] + f(x - writers[a] - writers[b])


@torch.no_grad()
def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="heat map of one position")
    parser.add_argument("--model", help="hub name, directory or GGUF file")
    parser.add_argument("--layers", type=int, nargs="+", help="all by default")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS)
    options = parser.parse_args(arguments)
    training, held_out = demo.texts()
    if options.model is None:
        model = demo.load_bridge()
        tokens = demo.batches(training, 64, 128)
        test = demo.batches(held_out, options.sequences, 128)
    else:
        model, tokenizer = load_model(options.model)
        tokens, test = token_windows(tokenizer, held_out, 32, options.sequences, 128)
    columns = ("R² degree 2", "pairs", "r", "r, top 1%", "same sign, top 1%")
    table = Table("layer", *columns, title="Predicted against true interactions")
    rows = []
    with polylens.attach(model, tokens, degree=2, layers=options.layers) as lens:
        report = lens.report(test, loss=False, progress=False)
        logits, cache = model.run_with_cache(test)
        for layer in lens:
            predicted, true = [], []
            for batch in range(len(test)):
                for position in options.positions:
                    first, second = logits[batch, position].topk(2).indices.tolist()
                    u = model.W_U[:, first] - model.W_U[:, second]
                    writers, names = analysis.residual_writers(lens, cache, layer, position, batch)
                    found = analysis.interactions(lens[layer], writers, u, names)
                    a, b = torch.triu_indices(len(writers), len(writers), 1)
                    predicted.append(2 * found.pairs[a, b])
                    true.append(true_interactions(lens[layer].weights, writers, u))
            p, t = torch.cat(predicted), torch.cat(true)
            strong = p.abs() > p.abs().quantile(0.99)
            row = {
                "R² degree 2": report[layer].r2[2],
                "pairs": len(p),
                "r": correlation(p, t),
                "r, top 1%": correlation(p[strong], t[strong]),
                "same sign, top 1%": float((p * t > 0)[strong].double().mean()),
            }
            rows.append(row)
            table.add_row(str(layer), *(f"{row[c]:.3f}".removesuffix(".000") for c in columns))
    if options.out is not None:
        found.plot(20).savefig(options.out)
    Console().print(table)
    return rows


if __name__ == "__main__":
    main()
