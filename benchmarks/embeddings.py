"""What it costs to replace every MLP of a sentence encoder, by degree and text.

    python benchmarks/embeddings.py MODEL --calibration a.txt b.txt --heldout a.txt c.txt

Calibrates layer by layer on windows of 128 tokens, the same number from each calibration text,
and compares sentence embeddings (the mean over positions of the last hidden states, normalised)
of held-out windows of each text when all MLPs are replaced and position 0 stays true: mean cosine
with the true embedding, correlation of all pairwise similarities, share of equal nearest
neighbours. A text on both lists gives different windows to each. `docs/fidelity.md` says what was
measured so.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import polylens

LENGTH = 128


def windows(tokenizer, path):
    """[n, LENGTH] all windows of a text, in an order that is always the same."""
    text = Path(path).read_text(encoding="utf-8", errors="ignore")[:800_000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    fresh = LENGTH - 2
    starts = range(0, len(ids) - fresh + 1, fresh)
    found = torch.tensor([first + ids[i : i + fresh] + last for i in starts])
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def embeddings(model, tokens):
    hidden = [model(input_ids=batch).last_hidden_state for batch in tokens.split(32)]
    return normalize(torch.cat(hidden).mean(1), dim=1)


def compare(found, true):
    others = ~torch.eye(len(true), dtype=torch.bool)
    similar = [e @ e.T for e in (found, true)]
    correlation = torch.corrcoef(torch.stack([s[others] for s in similar]))[0, 1]
    nearest = [s.masked_fill(~others, -2).argmax(1) for s in similar]
    same = (nearest[0] == nearest[1]).float().mean()
    cosine = (found * true).sum(1).mean()
    return f"cosine {cosine:.4f}, similarities {correlation:.4f}, neighbours {same:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name or directory")
    parser.add_argument("--calibration", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--heldout", nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--degrees", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--estimator", nargs="+", default=["samples"])
    parser.add_argument("--windows", type=int, default=252, help="calibration, in all")
    parser.add_argument("--heldout-windows", type=int, default=60, help="from each text")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model).eval()
    texts = {path: windows(tokenizer, path) for path in {*options.calibration, *options.heldout}}
    held_out = {path: texts[path][-options.heldout_windows :] for path in options.heldout}
    true = {path: embeddings(model, tokens) for path, tokens in held_out.items()}
    each = options.windows // len(options.calibration)
    seen = [texts[path][: -options.heldout_windows][:each] for path in options.calibration]
    for estimator in options.estimator:
        for degree in options.degrees:
            start = time.perf_counter()
            with polylens.attach(
                model, torch.cat(seen), degree=degree, method=polylens.Sequential(estimator)
            ) as lens:
                seconds = time.perf_counter() - start
                print(f"\n{estimator}, degree {degree}, {seconds:.0f} s", flush=True)
                with lens.replaced():
                    for path, tokens in held_out.items():
                        print(
                            f"{Path(path).name}: {compare(embeddings(model, tokens), true[path])}"
                        )


if __name__ == "__main__":
    main()
