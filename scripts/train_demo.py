"""Train the byte-level language model that ships in polylens.demo.

Deterministic for a given Python, torch and machine; takes about ten minutes on two CPU cores.

    python scripts/train_demo.py
"""

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from polylens import demo
from polylens.training.tracer import TraceData, Tracer

CONFIG = {
    "vocab_size": 256,
    "n_positions": 256,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "activation_function": "gelu",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 10,
    "eos_token_id": 10,
}
BATCH, LENGTH, PEAK_RATE, WARMUP = 16, 256, 2e-3, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(demo.__file__).parent)
    parser.add_argument(
        "--trace", type=Path, help="R2 of degree 1 to 3 at steps 0, 1, 2, 4, ..., as JSON lines"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    training, held_out = map(demo.encode, demo.texts())
    model = GPT2LMHeadModel._from_config(GPT2Config(**CONFIG), attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, (0.9, 0.95), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    generator = torch.Generator().manual_seed(args.seed)

    windows = TraceData(*(demo.batches(text, 16, 128) for text in demo.texts()))
    tracer = Tracer(windows, 3, path=args.trace) if args.trace else None

    curve, start = [], time.time()
    for step in tqdm(range(args.steps)):
        if tracer is not None:
            tracer(step, model)
        starts = torch.randint(len(training) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([training[i : i + LENGTH] for i in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 200 == 0 or step == args.steps - 1:
            curve.append({"step": step + 1, "train": round(loss.item(), 4)})
            tqdm.write(json.dumps(curve[-1]))

    if tracer is not None:
        tracer.measure(args.steps, lambda: model)
        tracer.trace.plot().savefig(args.trace.with_suffix(".png"))
    save(model, args.out / "model.safetensors")
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": args.seed,
        "steps": args.steps,
        "tokens": args.steps * BATCH * LENGTH,
        "seconds": round(time.time() - start),
        "training_bytes": len(training),
        "training_sha256": digest(training),
        "held_out_bytes": len(held_out),
        "held_out_sha256": digest(held_out),
        "held_out_nats_per_byte": held_out_loss(model, held_out),
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokens: Tensor, windows: int = 64) -> float:
    """Nats per byte on the first windows of the held-out text."""
    windows = min(windows, len(tokens) // LENGTH)
    batch = tokens[: windows * LENGTH].reshape(windows, LENGTH)
    losses = [model(part, labels=part).loss.item() for part in batch.split(BATCH)]
    return round(sum(losses) / len(losses), 4)


def save(model: GPT2LMHeadModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    save_file(state, path)


def digest(tokens: Tensor) -> str:
    return hashlib.sha256(bytes(tokens.tolist())).hexdigest()


if __name__ == "__main__":
    main()
