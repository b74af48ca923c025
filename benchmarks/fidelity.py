"""What it costs to replace every MLP of a language model, by input model, degree and text.

    python benchmarks/fidelity.py MODEL --calibration a.txt b.txt --heldout a.txt c.txt

Calibrates layer by layer on windows of 128 tokens, the same number from each calibration text
and some that the model itself writes, and prints what changes on windows of every held-out text
when all MLPs are replaced and position 0 stays true: rise of the cross entropy ± its standard
error over windows, KL, share of equal most likely tokens; then how the true and the replaced
model go on from the same prompts. Windows are drawn from all over a text; a text on both lists
gives different windows to each. `docs/fidelity.md` says what was measured so.

    python benchmarks/fidelity.py MODEL ... --tails none 0 0.01 0.03 --degrees 2 3 --plot tails.png

also draws the KL against the share of preactivations that may leave the polynomial.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

import polylens
from polylens.calibration.tokens import windows as all_windows
from polylens.cli.loading import load_model
from polylens.report.scores import Cost, score

LENGTH = 128
PROMPT, CONTINUATION = 24, 24


def windows(tokenizer, path):
    """[n, LENGTH] all windows of a text, BOS included, in an order that is always the same."""
    text = Path(path).read_text(encoding="utf-8", errors="ignore")[:800_000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = all_windows(tokenizer, ids, LENGTH)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def logits(model, tokens):
    return torch.cat([model(batch, return_type="logits") for batch in tokens.split(8)])


@torch.no_grad()
def continued(model, tokens):
    """Greedily, without a cache."""
    for _ in range(CONTINUATION):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, -CONTINUATION:]


def cost(model, truth, tokens):
    real = torch.ones_like(tokens, dtype=torch.bool)
    found = Cost()
    found.update(
        score(logits(model, tokens), truth, tokens, real), score(truth, None, tokens, real)
    )
    counts = torch.full((len(tokens),), LENGTH - 1)
    positions = tokens.numel()
    return {
        "delta_ce": found.delta_ce(counts),
        "standard_error": found.delta_ce_se(counts),
        "kl": found.kl(positions),
        "agreement": found.agreement(positions),
    }


def described(row):
    return (
        f"{row['delta_ce']:+.4f} ± {row['standard_error']:.4f}, KL {row['kl']:.4f}, "
        f"agree {row['agreement']:.3f}"
    )


def draw(rows, path):
    """KL by degree and tails: mean of the texts, and from the least to the most costly one."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    names = {None: "nowhere", 0.0: "beyond\nthe seen"}
    shares = sorted(
        {row["tails"] for row in rows}, key=lambda share: -1 if share is None else share
    )
    for degree in sorted({row["degree"] for row in rows}):
        found = [
            [row["kl"] for row in rows if (row["degree"], row["tails"]) == (degree, share)]
            for share in shares
        ]
        x, low, high = range(len(shares)), list(map(min, found)), list(map(max, found))
        (line,) = axes.plot(x, list(map(fmean, found)), "o-", label=f"degree {degree}")
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
    labels = [names.get(s, f"and in\n{100 * (s or 0):.3g} %") for s in shares]
    axes.set_xticks(range(len(shares)), labels)
    axes.set(
        yscale="log", ylabel="KL, nats per token", xlabel="where neurons follow asymptotes instead"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def share(text):
    return None if text == "none" else float(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name, directory or .gguf file")
    parser.add_argument("--calibration", nargs="*", default=[], help="UTF-8 texts")
    parser.add_argument("--heldout", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--degrees", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--estimator", nargs="+", default=["samples"])
    parser.add_argument("--weighting", nargs="+", default=["output"])
    parser.add_argument("--tails", nargs="+", type=share, default=["default"], help="none or 0.05")
    parser.add_argument("--windows", nargs="+", type=int, default=[252], help="calibration, in all")
    parser.add_argument("--sampled", type=int, default=0, help="windows written by the model")
    parser.add_argument("--heldout-windows", type=int, default=10, help="from each text")
    parser.add_argument("--json", help="file for the figures that are printed")
    parser.add_argument("--plot", help="file for the picture of them by degree and tails")
    options = parser.parse_args()
    if options.plot and "default" in options.tails:
        parser.error("--plot draws by --tails: give that, too")
    model, tokenizer = load_model(options.model)
    texts = {path: windows(tokenizer, path) for path in {*options.calibration, *options.heldout}}
    held_out = {path: texts[path][-options.heldout_windows :] for path in options.heldout}
    truth = {path: logits(model, tokens) for path, tokens in held_out.items()}
    prompts = torch.stack([tokens[0, :PROMPT] for tokens in held_out.values()])
    sampled = []
    if options.sampled:
        sampled.append(polylens.sample_tokens(model, options.sampled, LENGTH))
    print("true model:", [tokenizer.decode(row) for row in continued(model, prompts)], flush=True)
    rows = []
    grid = itertools.product(
        options.windows, options.estimator, options.weighting, options.tails, options.degrees
    )
    for count, estimator, weighting, tails, degree in grid:
        each = count // max(1, len(options.calibration))
        seen = [texts[path][: -options.heldout_windows][:each] for path in options.calibration]
        tokens = torch.cat(seen + sampled)
        method = polylens.Sequential(estimator, tails, weighting)
        start = time.perf_counter()
        with polylens.attach(model, tokens, degree=degree, method=method) as lens:
            print(
                f"\ndegree {degree}, {lens.inputs_summary}, {options.sampled} windows sampled, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
            with lens.replaced():
                found = {path: cost(model, truth[path], held_out[path]) for path in held_out}
                for path, row in found.items():
                    print(f"{Path(path).name}: {described(row)}", flush=True)
                ce, kl = (fmean(row[name] for row in found.values()) for name in ("delta_ce", "kl"))
                print(f"mean: {ce:+.4f}, KL {kl:.4f}")
                print([tokenizer.decode(row) for row in continued(model, prompts)], flush=True)
        setting = {"degree": degree, "tails": tails, "estimator": estimator}
        setting |= {"weighting": weighting, "windows": len(tokens)}
        rows += [setting | {"text": Path(path).stem} | row for path, row in found.items()]
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
