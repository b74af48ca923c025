"""A model of a billion parameters from end to end on a CPU: time and peak memory of every step.

    python benchmarks/billion.py [--layers 16] [--tokens 2048]

A Llama with random weights in bfloat16 (d 2048, h 8192, SiLU, 32,000 tokens of vocabulary). CPU
seconds are those of all threads, which other work on the machine hardly changes; beside them how
many times those of the forward pass they are. Peak memory is that of the process in the step, from
Linux; beside it what is held after the step.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import polylens

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    table = Table("step", "seconds", "CPU seconds", "x forward", "peak GB", "held GB")
    forward_seconds: list[float] = []

    def step(name: str, call: Callable[[], Any]) -> Any:
        RESET.write_text("5")  # the peak counts from here
        start, cpu = time.perf_counter(), time.process_time()
        found = call()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        if name == "forward":
            forward_seconds.append(cpu)
        times = f"{cpu / forward_seconds[0]:.1f}" if forward_seconds else ""
        memory = gigabytes("VmHWM"), gigabytes("VmRSS")
        table.add_row(name, f"{seconds:.1f}", f"{cpu:.1f}", times, *memory)
        return found

    model = step("model", lambda: billion(args.layers))
    tokens = torch.randint(32_000, (args.tokens // 128, 128))
    held_out = torch.randint(32_000, (4, 128))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.model(batch).last_hidden_state for batch in tokens.split(8)])

    step("forward", forward)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lens.safetensors"
        with step(
            "attach, samples", lambda: polylens.attach(model, tokens, progress=False)
        ) as lens:
            measure = partial(lens.report, held_out, loss=False, progress=False)
            report = step("report without losses", measure)
            with lens.replaced():
                step("forward, replaced", forward)
            step("save", partial(lens.save, path))
            size = path.stat().st_size / 1e9
        step("load", lambda: polylens.load(path, model))
    console = Console(width=100)
    count = sum(p.numel() for p in model.parameters())
    r2 = [row.r2[-1] for row in report]
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    console.print(
        f"{count:,} parameters in bfloat16, {tokens.numel():,} tokens; file {size:.2f} GB"
    )
    console.print(f"R2 of degree 3, held out: {min(r2):.4f} to {max(r2):.4f}")
    console.print(table)


def billion(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32_000,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def gigabytes(name: str) -> str:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return f"{int(line.split()[1]) * 1024 / 1e9:.2f}"


if __name__ == "__main__":
    main()
