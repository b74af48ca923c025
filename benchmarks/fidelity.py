"""What it costs to replace every MLP of a language model, by method, estimator, degree and text.

    python benchmarks/fidelity.py MODEL --calibration a.txt --heldout a.txt b.txt c.txt

Attaches with each method to windows of 128 tokens of the calibration texts, replaces all MLPs at
once, and prints on windows of every held-out text the rise of the cross entropy ± its standard
error over windows, KL, and the share of equal most likely tokens; and how long attaching took, in
forward passes over the same tokens (CPU time). A text on both lists gives different windows to
each. With --tails, the same for several shares beyond the ends, and --plot draws them.
`docs/fidelity.md` says what was measured so.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import fmean

import torch

import polylens
from polylens.calibration.tokens import windows as all_windows
from polylens.cli.loading import load_model
from polylens.drawing import figure, style_of, tidy
from polylens.hosts.batch import batch_of
from polylens.report.scores import Cost, score

LENGTH = 128
METHODS = {"true": polylens.TrueStream, "sequential": polylens.Sequential}


def windows(tokenizer, path):
    """[n, LENGTH] all windows of a text, BOS included, in an order that is always the same."""
    text = Path(path).read_text(encoding="utf-8", errors="ignore")[:800_000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = all_windows(tokenizer, ids, LENGTH)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def logits(model, tokens):
    return torch.cat([model(batch, return_type="logits") for batch in tokens.split(8)])


def forward_seconds(model, tokens):
    start = time.process_time()
    for batch in tokens.split(8):
        logits(model, batch)
    return time.process_time() - start


def cost(model, truth, tokens):
    batch, found = batch_of((tokens,), {}), Cost()
    found.update(score(logits(model, tokens), truth, batch), score(truth, None, batch))
    counts = torch.full((len(tokens),), LENGTH - 1)
    return {
        "delta_ce": found.delta_ce(counts),
        "standard_error": found.delta_ce_se(counts),
        "kl": found.kl(tokens.numel()),
        "agreement": found.agreement(tokens.numel()),
    }


def described(row):
    return (
        f"{row['delta_ce']:+.4f} ± {row['standard_error']:.4f}, KL {row['kl']:.4f}, "
        f"agree {row['agreement']:.3f}"
    )


def draw(rows, path, title):
    """KL by degree and tails: mean of the texts, and from the least to the most costly one."""
    names = {None: "nowhere", 0.0: "beyond\nthe seen"}
    shares = sorted(
        {row["tails"] for row in rows}, key=lambda share: -1 if share is None else share
    )
    with figure((3.5, 2.6)) as drawn:
        panel = drawn.subplots()
        for degree in sorted({row["degree"] for row in rows}):
            found = [
                [row["kl"] for row in rows if (row["degree"], row["tails"]) == (degree, share)]
                for share in shares
            ]
            x, low, high = range(len(shares)), list(map(min, found)), list(map(max, found))
            colour, marker = style_of(degree)
            style = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.2}
            panel.plot(x, list(map(fmean, found)), label=f"degree {degree}", **style)
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        labels = [names.get(s, f"and in\n{100 * (s or 0):.3g} %") for s in shares]
        panel.set_xticks(range(len(shares)), labels)
        panel.set_yscale("log")
        panel.set_ylabel("KL [nats per token]")
        panel.set_xlabel("where neurons follow asymptotes instead")
        panel.set_title(title)
        panel.legend(frameon=False)
        tidy(panel)
    drawn.savefig(path)


def share(text):
    return None if text == "none" else float(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name, directory or .gguf file")
    parser.add_argument("--calibration", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--heldout", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--degrees", nargs="+", type=int, default=[2, 3])
    parser.add_argument(
        "--one-lens", action="store_true", help="read the lower degrees of a fit of the highest"
    )
    parser.add_argument("--methods", nargs="+", default=["true:samples"], help="true:joint, ...")
    parser.add_argument("--tails", nargs="+", type=share, default=["default"], help="none or 0.05")
    parser.add_argument("--windows", type=int, default=64, help="calibration, in all")
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
    each = options.windows // len(options.calibration)
    seen = [texts[path][: -options.heldout_windows][:each] for path in options.calibration]
    if options.sampled:
        seen.append(polylens.sample_tokens(model, options.sampled, LENGTH))
    tokens, rows = torch.cat(seen), []
    print(f"{tokens.numel()} tokens", flush=True)
    fits = [options.degrees] if options.one_lens else [[degree] for degree in options.degrees]
    for name, tails, degrees in itertools.product(options.methods, options.tails, fits):
        stream, estimator = name.split(":")
        method, most = METHODS[stream](estimator, tails), max(degrees)
        forward, start = forward_seconds(model, tokens), time.process_time()
        with polylens.attach(model, tokens, degree=most, method=method, progress=False) as lens:
            passes = (time.process_time() - start) / forward
            print(f"\n{name}, fitted to degree {most}, tails {tails}: {passes:.2f} forward passes")
            for degree in degrees:
                with lens.replaced(degree=degree):
                    found = {path: cost(model, truth[path], held_out[path]) for path in held_out}
                for path, row in found.items():
                    print(f"degree {degree}, {Path(path).stem}: {described(row)}", flush=True)
                ce, kl = (fmean(row[key] for row in found.values()) for key in ("delta_ce", "kl"))
                print(f"degree {degree}, mean: {ce:+.4f}, KL {kl:.4f}", flush=True)
                setting = {"method": name, "degree": degree, "tails": tails}
                setting["forward_passes"] = passes
                rows += [setting | {"text": Path(path).stem} | row for path, row in found.items()]
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        name = Path(options.model).name.removesuffix(".gguf")
        draw(
            rows,
            options.plot,
            f"Every MLP of {name} replaced,\nmean and range of {len(held_out)} texts",
        )


if __name__ == "__main__":
    main()
