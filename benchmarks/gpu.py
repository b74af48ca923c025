"""What polylens costs on a GPU, as ratios and against targets; `make gpu` writes GPU.md.

    python -m benchmarks.gpu [--out FILE]

Random weights of real shapes in bfloat16. Times are medians of device time, after a first call.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import polylens
from polylens import Gaussian, GLUWeights, fit
from polylens.activations.recognition import activation
from polylens.fitting import neuron_gram
from polylens.fitting.neuron_gram import NeuronGram
from polylens.polynomials.ends import PreactivationRange
from polylens.polynomials.evaluation import evaluate

OUT = Path(__file__).parent / "GPU.md"
BILLION = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)
DEVICE = "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; benchmarks/GPU.md stays as it is")
    torch.manual_seed(0)
    card = torch.cuda.get_device_name()
    lines = [
        "# On a GPU",
        "",
        f"`make gpu` on one {card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.",
        "Random weights of real shapes in bfloat16; medians of device time after a first call.",
        "Peak memory is what torch's allocator held, in GB of 10⁹ bytes.",
        "",
        "| case | measured | against | ratio | target |",
        "| --- | --- | --- | --- | --- |",
    ]
    for section in (coefficients, closed_form, growth, kernels, model):
        begun = time.perf_counter()
        for row in section():
            print(*row, sep=" | ", flush=True)
            lines.append("| " + " | ".join(row) + " |")
        torch.cuda.empty_cache()
        print(f"  {section.__name__}: {time.perf_counter() - begun:.0f} s", flush=True)
    args.out.write_text("\n".join(lines) + "\n")


def coefficients() -> Iterator[tuple[str, ...]]:
    n = 1_000_000
    m = torch.randn(n, dtype=torch.float64, device=DEVICE)
    s = 0.05 + 3 * torch.rand(n, dtype=torch.float64, device=DEVICE)
    for name in ("silu", "gelu", "gelu_new"):
        act = activation(name)
        seconds = median(lambda act=act: act.hermite_coefficients(m, s, 3))
        yield (
            f"Hermite coefficients of {n:,} {name} neurons, degree 3",
            ms(seconds),
            "",
            "",
            ("≤ 50 ms" if name == "silu" else ""),
        )


def closed_form() -> Iterator[tuple[str, ...]]:
    d, h, layers = 4096, 11008, 32
    weights = [glu(d, h) for _ in range(layers)]
    inputs = gaussian(d)
    W = weights[0].W_gate.double()
    seconds = median(lambda: [fit(w, inputs, 3) for w in weights], 3)
    product = median(lambda: inputs.cov @ W, 5)
    yield (
        f"closed form, {layers} SiLU GLUs of d={d} h={h}, degree 3, from moments",
        f"{seconds:.2f} s",
        f"{layers} × cov @ W, float64: {layers * product:.2f} s",
        f"{seconds / (layers * product):.2f}",
        "≤ 10 s",
    )


def growth() -> Iterator[tuple[str, ...]]:
    for d in (512, 1024, 2048, 4096, 8192):
        weights, inputs = glu(d, 4 * d), gaussian(d)
        W = weights.W_gate.double()
        seconds = median(lambda w=weights, i=inputs: fit(w, i, 3))
        product = median(lambda i=inputs, W=W: i.cov @ W)
        yield (
            f"closed form of one SiLU GLU, d={d} h={4 * d}, degree 3",
            ms(seconds),
            f"cov @ W, float64: {ms(product)}",
            f"{seconds / product:.2f}",
            "",
        )


def kernels() -> Iterator[tuple[str, ...]]:
    d, h, n = 2048, 8192, 16384
    weights = glu(d, h)
    ends = torch.tensor([[-1.0], [2.0]], dtype=torch.float64, device=DEVICE).expand(2, h)
    poly = fit(weights, gaussian(d), 3).with_ends(ends)
    y, z = (torch.randn(n, h, dtype=torch.bfloat16, device=DEVICE) for _ in "yz")
    own = poly._horner(3)
    with torch.no_grad():
        fused = median(lambda: poly.neurons(y, z))
        plain = median(lambda: evaluate(own.tables, y, z, own.mean))
        true = median(lambda: F.silu(y) * z)
    yield compared(f"cubics with ends of {n} × {h} neurons", fused, "SiLU(y) z", true)
    yield compared("the same, operation by operation", plain, "SiLU(y) z", true)
    x = torch.randn(n, d, dtype=torch.bfloat16, device=DEVICE)
    forward = median(lambda: weights(x))
    standardise = tuple(torch.ones(4, h, dtype=torch.float64, device=DEVICE))

    def sums() -> None:
        gram = NeuronGram(weights, 3, standardise, PreactivationRange(weights, ends))  # type: ignore
        gram.update(x)

    yield compared(f"normal equations of {n} inputs, d={d} h={h}", median(sums), "layer", forward)
    add, neuron_gram.add_fused = neuron_gram.add_fused, lambda *_: False  # type: ignore
    try:
        plain = median(sums, 3)
    finally:
        neuron_gram.add_fused = add
    yield compared("the same, operation by operation", plain, "layer", forward)


def model() -> Iterator[tuple[str, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(DEVICE):
        llama: Any = LlamaForCausalLM._from_config(LlamaConfig(**BILLION), dtype=torch.bfloat16)  # type: ignore
    llama = llama.eval()
    count = sum(p.numel() for p in llama.parameters()) / 1e9
    own = torch.cuda.memory_allocated()
    batch, length = 8, 1024
    tokens = torch.randint(BILLION["vocab_size"], (100_000 // length + 1, length), device=DEVICE)

    @torch.no_grad()
    def forward(ids: torch.Tensor) -> None:
        for part in ids.split(batch):
            llama(part, use_cache=False)

    torch.cuda.reset_peak_memory_stats()
    once = median(lambda: forward(tokens), 3)
    alone = torch.cuda.max_memory_allocated()
    for estimator in ("samples", "gaussian"):
        method = polylens.TrueStream(estimator)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            lens = polylens.attach(llama, tokens, method=method, batch_size=batch, progress=False)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            if len(seconds) == 1:
                lens.detach()
        peak = torch.cuda.max_memory_allocated()
        yield compared(
            f"attach, {estimator}, {count:.1f}B bf16, {tokens.numel():,} tokens",
            seconds[-1],
            "forward",
            once,
            "≤ 1.5" if estimator == "samples" else "",
        )
        yield (
            f"peak memory of it ({estimator})",
            f"{peak / 1e9:.2f} GB",
            f"of the forward pass {alone / 1e9:.2f} GB (model {own / 1e9:.2f} GB)",
            f"{peak / alone:.2f}",
            "",
        )
        for shape in ((batch, length), (1, 128), (1, 1)):
            ids = tokens[: shape[0], : shape[1]]
            true, replaced = paired(lambda ids=ids: forward(ids), lens)
            yield compared(
                f"all layers replaced, {estimator}, {shape[0]} × {shape[1]} tokens",
                replaced,
                "true forward",
                true,
                "≤ 1.05" if shape[1] == length else "",
            )
        lens.detach()


def paired(forward: Callable[[], None], lens: Any) -> tuple[float, float]:
    """Seconds of a forward pass, and with all layers replaced, in turn."""
    true, replaced = [], []
    for _ in range(3):
        true.append(median(forward, 5))
        with lens.replaced():
            replaced.append(median(forward, 5))
    return min(true), min(replaced)


def glu(d: int, h: int) -> GLUWeights:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) / shape[0] ** 0.5

    return GLUWeights(W_gate=random(d, h), W_in=random(d, h), W_out=random(h, d), act="silu")


def gaussian(d: int) -> Gaussian:
    factor = torch.randn(d, d, dtype=torch.float64, device=DEVICE)
    return Gaussian(factor[0], factor @ factor.T / d)


def compared(case: str, seconds: float, other: str, against: float, target: str = ""):
    return case, ms(seconds), f"{other}: {ms(against)}", f"{seconds / against:.2f}", target


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def median(function: Callable[[], object], times: int = 9) -> float:
    """Seconds of a call, by the device's clock, after a first one."""
    function()
    seconds = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
