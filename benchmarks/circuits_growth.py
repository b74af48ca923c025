"""Time and memory of tracing and pruning a circuit, by tokens, layers and MLPs that are split.

    python benchmarks/circuits_growth.py --model model.gguf --lens file.lens

Of one thread: seconds of the processor, so that others on the machine do not count, and the peak
of resident memory above what the model and its lens take (Linux). Each line is its own process.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

import polylens
from polylens import analysis, demo
from polylens.cli.loading import load_model

# tokens, layers below the target, MLPs split
SIZES = (
    *((16, 30, 32), (32, 30, 32), (64, 30, 32), (128, 30, 32), (256, 30, 32), (512, 30, 32)),
    *((32, 10, 64), (32, 20, 64), (32, 30, 64)),
    *((32, 30, 0), (32, 30, 128), (32, 30, 256), (32, 30, 960)),
)


def memory(which: str) -> float:
    """GB: VmRSS, what is resident; VmHWM, the most that was."""
    found = re.search(which + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e6


def measure(args: argparse.Namespace, tokens: int, layers: int, mlps: int) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model)
    lens = polylens.load(args.lens, model)
    ids = torch.tensor(tokenizer(demo.texts()[1][:20000])["input_ids"])[:tokens]
    target, options = None, {}
    if layers < len(lens.layers):
        direction = torch.randn(lens[0].d_in, generator=torch.Generator().manual_seed(0))
        target, options = direction, {"layer": layers}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, start = memory("VmRSS"), time.process_time()
    circuit = analysis.circuit(lens, ids, target, mlps=mlps, **options)
    scores = circuit.pruned().scores
    seconds, above = time.process_time() - start, memory("VmHWM") - before
    assert scores is not None
    print(
        f"{tokens} tokens, {layers} layers, {mlps} MLPs split: {seconds:.1f} s, {above:.2f} GB; "
        f"{scores.nodes[1]} nodes, {scores.edges[1]} edges, unsplit {circuit.unsplit:.2f}, "
        f"influence in MLPs left whole {scores.whole:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--lens", required=True)
    parser.add_argument("--size", type=int, nargs=3, help="tokens, layers, MLPs: only these")
    args = parser.parse_args()
    if args.size:
        measure(args, *args.size)
        return
    for size in SIZES:
        command = [sys.executable, *sys.argv, "--size", *map(str, size)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
