"""What it costs to replace every MLP of a language model, by input model, degree and text.

    python benchmarks/fidelity.py MODEL --calibration a.txt b.txt --heldout a.txt c.txt

Calibrates layer by layer on windows of 128 tokens, the same number from each calibration text
and some that the model itself writes, and prints what changes on windows of every held-out text
when all MLPs are replaced and position 0 stays true: rise of the cross entropy ± its standard
error over windows, KL, share of equal most likely tokens; then how the true and the replaced
model go on from the same prompts. Windows are drawn from all over a text; a text on both lists
gives different windows to each. `docs/fidelity.md` says what was measured so.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch

import polylens
from polylens.loading import all_windows, load_model
from polylens.scoring import Cost, score

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
    return (
        f"{found.delta_ce(counts):+.4f} ± {found.delta_ce_se(counts):.4f}, "
        f"KL {found.kl(positions):.4f}, agree {found.agreement(positions):.3f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name, directory or .gguf file")
    parser.add_argument("--calibration", nargs="*", default=[], help="UTF-8 texts")
    parser.add_argument("--heldout", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--degrees", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--inputs", nargs="+", default=["samples"])
    parser.add_argument("--weighting", nargs="+", default=["output"])
    parser.add_argument("--clip", nargs="+", type=float, default=[None], help="0, 1 or a share")
    parser.add_argument("--windows", nargs="+", type=int, default=[252], help="calibration, in all")
    parser.add_argument("--sampled", type=int, default=0, help="windows written by the model")
    parser.add_argument("--heldout-windows", type=int, default=10, help="from each text")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    texts = {path: windows(tokenizer, path) for path in {*options.calibration, *options.heldout}}
    held_out = {path: texts[path][-options.heldout_windows :] for path in options.heldout}
    truth = {path: logits(model, tokens) for path, tokens in held_out.items()}
    prompts = torch.stack([tokens[0, :PROMPT] for tokens in held_out.values()])
    sampled = []
    if options.sampled:
        sampled.append(polylens.sample_tokens(model, options.sampled, LENGTH))
    print("true model:", [tokenizer.decode(row) for row in continued(model, prompts)], flush=True)
    grid = itertools.product(
        options.windows, options.inputs, options.weighting, options.clip, options.degrees
    )
    for count, inputs, weighting, clip, degree in grid:
        each = count // max(1, len(options.calibration))
        seen = [texts[path][: -options.heldout_windows][:each] for path in options.calibration]
        tokens = torch.cat(seen + sampled)
        start = time.perf_counter()
        with polylens.attach(
            model,
            tokens,
            degree=degree,
            inputs=inputs,
            calibration="sequential",
            weighting=weighting,
            clip=bool(clip) if clip in (0, 1) else clip,
        ) as lens:
            print(
                f"\ndegree {degree}, {lens.inputs_summary}, {options.sampled} windows sampled, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
            with lens.replaced():
                for path, tokens in held_out.items():
                    print(f"{Path(path).name}: {cost(model, truth[path], tokens)}", flush=True)
                print([tokenizer.decode(row) for row in continued(model, prompts)], flush=True)


if __name__ == "__main__":
    main()
