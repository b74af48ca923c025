"""Does a layer's quadratic form predict how its writers interact? Asked of the true model.

At positions of held-out text, u is the direction of the layer's output that raises the logit of the
model's first guess over that of its second: the gradient of the one less the other, through all
that follows, or with `--direction unembedding` what the layer writes to the logits itself, scales
of norms frozen. The polynomial says for each pair of writers (embeddings, heads, earlier MLPs) by
how much the two together move the layer's output along u beyond what each moves alone:
pairs[a, b] twice. Two checks, both in logits:

1. the true MLP, with writers taken out of its input, norm scale frozen:
   f(x) - f(x - a) - f(x - b) + f(x - a - b), along u, for every pair;
2. the whole model, with that difference taken out of the true MLP's output: how far the first
   guess's lead falls. For the strongest pairs of each position, and as many at random.

Runs offline on the embedded model, or on another one:

    python examples/interactions.py [--out figure.png]
    python examples/interactions.py --model HuggingFaceTB/SmolLM2-135M --layers 5 15 25
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import polylens
from polylens import analysis, demo
from polylens.cli.loading import load_model, token_windows

POSITIONS = (30, 60, 90, 120)


@dataclass(frozen=True)
class Case:
    """The strongest pair of writers at one position, effects in logits."""

    layer: int
    read: list[int]
    guesses: list[int]
    pair: tuple[str, str]
    predicted: float
    mlp: float
    whole: float
    found: analysis.Interactions


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def same_sign(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b > 0).double().mean())


def to_the_logits(lens, cache, layer: int, batch: int, position: int, guesses: list[int]):
    """[d_out]: along the unembedding, over what the norms behind the MLP divide by."""
    points = ("ln_final.hook_scale", f"blocks.{layer}.ln2_post.hook_scale")
    scales = torch.stack([cache[p][batch, position] for p in points if p in cache])
    return analysis.logit_direction(lens, layer, *guesses) / scales.prod().double()


def compare(lens, cache, logits, tokens, layer: int, options: argparse.Namespace):
    """(predicted, true MLP) of all pairs, the strongest pair of each position, and for the
    strongest and for random pairs (predicted, whole model).
    """
    generator = torch.Generator().manual_seed(0)
    every, cases, strongest, random = [], [], [], []
    whole = options.whole
    for batch, position in itertools.product(range(len(tokens)), options.positions):
        read = tokens[batch : batch + 1, : position + 1]
        guesses = logits[batch, position].topk(2).indices.tolist()
        if options.direction == "gradient":
            (u,) = analysis.logit_gradient(lens, read, layer, *guesses)
        else:
            u = to_the_logits(lens, cache, layer, batch, position, guesses)
        writers, names = analysis.residual_writers(lens, cache, layer, position, batch)
        found = analysis.interactions(lens[layer], writers, u, names)
        a, b = torch.triu_indices(len(writers), len(writers), 1)
        predicted = 2 * found.pairs[a, b]
        differences = analysis.second_differences(lens[layer].weights, writers, a, b)
        true = differences @ u
        every.append(torch.stack([predicted, true]))

        top = predicted.abs().topk(whole).indices
        chosen = torch.cat([top, torch.randperm(len(a), generator=generator)[:whole]])
        edits = {int(i): analysis.Edit(layer, differences[i], at=-1) for i in chosen}
        taken = analysis.intervene(lens, read, edits, batch_size=2 * whole)
        first, second = guesses
        falls = [taken[int(i)].logits[second] - taken[int(i)].logits[first] for i in chosen]
        effect = torch.stack([predicted[chosen], torch.stack(falls)])
        strongest.append(effect[:, :whole])
        random.append(effect[:, whole:])
        pair = names[a[top[0]]], names[b[top[0]]]
        numbers = float(predicted[top[0]]), float(true[top[0]]), float(effect[1, 0])
        cases.append(Case(layer, read[0, -8:].tolist(), guesses, pair, *numbers, found))
    return *(torch.cat(parts, dim=1) for parts in (every, strongest, random)), cases


def cells(row: dict, columns: Sequence[str]) -> list[str]:
    return [f"{row[c]:.3f}".removesuffix(".000") for c in columns]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="heat map of one position")
    parser.add_argument("--model", help="hub name, directory or GGUF file")
    parser.add_argument("--layers", type=int, nargs="+", help="all by default")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS)
    directions = ("gradient", "unembedding")
    parser.add_argument("--direction", choices=directions, default=directions[0])
    parser.add_argument("--whole", type=int, default=8, help="pairs per position in check 2")
    options = parser.parse_args(arguments)
    training, held_out = demo.texts()
    if options.model is None:
        model = demo.load_bridge()
        tokens = demo.batches(training, 64, 128)
        test = demo.batches(held_out, options.sequences, 128)

        def text(ids: list[int]) -> str:
            return repr(bytes(ids).decode(errors="replace"))
    else:
        model, tokenizer = load_model(options.model)
        tokens, test = token_windows(tokenizer, held_out, 32, options.sequences, 128)

        def text(ids: list[int]) -> str:
            return repr(tokenizer.decode(ids))

    columns = ("R² degree 2", "pairs", "r", "r, top 1%", "same sign, top 1%")
    mlp = Table("layer", *columns, title="Predicted interactions against the true MLP's")
    effects = ("size", "r", "same sign")
    whole = Table("layer", "pairs", *effects, title="Against the whole model's, taken out of it")
    rows, cases = [], []
    method = polylens.TrueStream(estimator="gaussian")
    with polylens.attach(model, tokens, degree=2, method=method, layers=options.layers) as lens:
        report = lens.report(test, loss=False, progress=False)
        logits, cache = model.run_with_cache(test)
        for layer in lens:
            (p, t), *chosen, strongest = compare(lens, cache, logits, test, layer, options)
            cases += strongest
            strong = p.abs() > p.abs().quantile(0.99)
            row = {
                "R² degree 2": report[layer].r2[2],
                "pairs": len(p),
                "r": correlation(p, t),
                "r, top 1%": correlation(p[strong], t[strong]),
                "same sign, top 1%": same_sign(p[strong], t[strong]),
            }
            mlp.add_row(str(layer), *cells(row, columns))
            for which, (predicted, effect) in zip(("strongest", "random"), chosen, strict=True):
                found_whole = {
                    "size": float(effect.abs().mean()),
                    "r": correlation(predicted, effect),
                    "same sign": same_sign(predicted, effect),
                }
                row[which] = found_whole
                whole.add_row(str(layer), which, *cells(found_whole, effects))
            rows.append(row)
    cases.sort(key=lambda case: -abs(case.predicted))
    if options.out is not None:
        case = cases[0]
        first, second = (text([guess]) for guess in case.guesses)
        title = f"layer {case.layer} behind {text(case.read)}: logit of {first} over {second}"
        replace(case.found, title=title).plot(20).savefig(options.out)
    numbers = ("predicted", "MLP", "model")
    named = Table("layer", "read", "guesses", "writers", *numbers, title="The strongest of all")
    for case in cases[:8]:
        guesses = " over ".join(text([guess]) for guess in case.guesses)
        shown = (f"{value:+.2f}" for value in (case.predicted, case.mlp, case.whole))
        named.add_row(str(case.layer), text(case.read), guesses, " × ".join(case.pair), *shown)
    Console(width=120).print(mlp, whole, named)
    return rows


if __name__ == "__main__":
    main()
