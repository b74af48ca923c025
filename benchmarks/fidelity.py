"""What it costs to replace every MLP of a language model, by input model, degree and text.

    python benchmarks/fidelity.py MODEL --calibration a.txt b.txt --heldout a.txt c.txt

Calibrates layer by layer on windows of 128 tokens, the same number from each calibration text,
and prints by how much the cross entropy rises on windows of every held-out text when all MLPs
are replaced and position 0 stays true. Windows are drawn from all over a text; a text on both
lists gives different windows to each. `docs/fidelity.md` says what was measured so.
"""

import argparse
import time
from pathlib import Path

import torch

import polylens
from polylens.loading import load_model
from polylens.scoring import score

LENGTH = 128


def windows(tokenizer, path):
    """[n, LENGTH] all windows of a text, in an order that is always the same."""
    text = Path(path).read_text(encoding="utf-8", errors="ignore")[:800_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    found = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def loss(model, tokens):
    total = 0.0
    with torch.no_grad():
        for batch in tokens.split(8):
            logits = model(batch, return_type="logits")
            total += float(score(logits, None, batch, torch.ones_like(batch, dtype=torch.bool))[0])
    return total / tokens[:, 1:].numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name, directory or .gguf file")
    parser.add_argument("--calibration", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--heldout", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--degrees", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--inputs", nargs="+", default=["gaussian", "samples"])
    parser.add_argument("--windows", type=int, default=252, help="for calibration, in all")
    parser.add_argument("--heldout-windows", type=int, default=10, help="from each text")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    each = options.windows // len(options.calibration)
    calibration = torch.cat([windows(tokenizer, path)[:each] for path in options.calibration])
    held_out = {
        Path(path).name: windows(tokenizer, path)[-options.heldout_windows :]
        for path in options.heldout
    }
    base = {name: loss(model, tokens) for name, tokens in held_out.items()}
    print("true", {name: round(value, 3) for name, value in base.items()}, flush=True)
    for inputs in options.inputs:
        for degree in options.degrees:
            start = time.perf_counter()
            with polylens.attach(
                model, calibration, degree=degree, inputs=inputs, calibration="sequential"
            ) as lens:
                seconds = time.perf_counter() - start
                with lens.replaced():
                    rise = {n: loss(model, tokens) - base[n] for n, tokens in held_out.items()}
            shown = {name: round(value, 4) for name, value in rise.items()}
            print(f"{inputs}, degree {degree}: {shown}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
