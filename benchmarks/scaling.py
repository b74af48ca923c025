"""How a fit to a layer's inputs grows with its width and with tokens, beside the products it takes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--draw]

One GLU (SiLU, degree 3, float32), fed 1,024 tokens at a time: d = 512 ... 8192 with h = 2 d and
2,048 tokens, then 1,024 ... 1,048,576 tokens with d = h = 512. Beside every fit, in the
same process, the matrix products that it cannot do without: to fit to samples x W of the gate and
of the linear branch, once for every token, in float32; to fit to a Gaussian x^T x of every token
and cov W in float64. CPU seconds of one thread, which other work on the machine hardly changes;
peak memory above what was held before, from Linux. Rows are kept in scaling.jsonl, and --draw only
draws them.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from core import Measured, random_layer

from polylens import GLUWeights
from polylens.drawing import COLOURS, GREY, MARKERS, figure, tidy
from polylens.fitting.estimator import Estimator
from polylens.fitting.gaussian import GaussianEstimator
from polylens.fitting.samples import TAILS, SamplesEstimator

ROWS = Path(__file__).parent / "scaling.jsonl"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "scaling.png"
BATCH, DEGREE = 1024, 3
WIDTHS = [512, 1024, 2048, 4096, 8192]
TOKENS = [1 << 10, 1 << 13, 1 << 16, 1 << 20]
ESTIMATORS: dict[str, Callable[[GLUWeights], Estimator]] = {
    "Gaussian": lambda weights: GaussianEstimator(weights, DEGREE),
    "samples": lambda weights: SamplesEstimator(weights, DEGREE),
    "samples with ends (default)": lambda weights: SamplesEstimator(weights, DEGREE, TAILS),
}
measured = partial(Measured, SimpleNamespace(cpu_time=True, device="cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if not args.draw:
        torch.set_num_threads(1)
        found = []
        for row in rows():
            found.append(row)
            print(row, flush=True)
        ROWS.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    draw([json.loads(line) for line in ROWS.read_text().splitlines()])


def rows() -> Iterator[dict[str, Any]]:
    for d in [64, *WIDTHS]:  # the first warms up
        for row in costs(d, 2 * d, 2048):
            if d > 64:
                yield {"against": "d", **row}
    for tokens in TOKENS:
        for row in costs(512, 512, tokens):
            yield {"against": "tokens", **row}


@torch.no_grad()
def costs(d: int, h: int, tokens: int) -> Iterator[dict[str, Any]]:
    """What every estimator takes, and the products beside it."""
    weights = random_layer("glu", d, h, 16, torch.float32)
    assert isinstance(weights, GLUWeights)
    batches = torch.randn(2, BATCH, d, generator=torch.Generator().manual_seed(1))
    batches *= 0.3 + torch.rand(2, BATCH, 1)  # heavier tails than a Gaussian's
    times = tokens // BATCH
    for name, make in ESTIMATORS.items():
        with measured() as fit:
            estimator = make(weights)
            for i in range(times):
                estimator.update(batches[i % 2])
            estimator.solve()
        del estimator
        with measured() as products:
            if name == "Gaussian":
                cov = torch.zeros(d, d, dtype=torch.float64)
                for i in range(times):
                    x = batches[i % 2].double()
                    cov.addmm_(x.T, x)
                for part in weights.W_gate.split(4096, 1):
                    cov @ part.double()
            else:
                for i in range(times):
                    for W in (weights.W_gate, weights.W_in):
                        W.T @ batches[i % 2].T
        yield {
            "what": name,
            "d": d,
            "h": h,
            "tokens": tokens,
            "seconds": round(fit.seconds, 4),
            "products": round(products.seconds, 4),
            "gigabytes": round(fit.gigabytes, 4),
            "torch": torch.__version__,
        }


def draw(found: list[dict[str, Any]]) -> None:
    """Time, its ratio to the products, and memory; against d above, against tokens below."""
    labels = {
        "d": "d: width of the inputs (h = 2 d, 2,048 tokens)",
        "tokens": "tokens (d = h = 512)",
    }
    with figure((7.2, 4.6)) as page:
        panels = page.subplots(2, 3)
        for line, (against, label) in zip(panels, labels.items(), strict=True):
            for i, name in enumerate(ESTIMATORS):
                own = [r for r in found if (r["against"], r["what"]) == (against, name)]
                at = [r[against] for r in own]
                style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 3.5, "lw": 1.2}
                values = (
                    [r["seconds"] for r in own],
                    [r["seconds"] / r["products"] for r in own],
                    [r["gigabytes"] for r in own],
                )
                for panel, value in zip(line, values, strict=True):
                    panel.plot(at, value, label=name, **style)
                if i != 1:  # those of samples are the same with ends
                    of = "Gaussian" if i == 0 else "samples"
                    products = [r["products"] for r in own]
                    style = {"color": COLOURS[i], "ls": ":", "lw": 1.2}
                    line[0].plot(at, products, label=f"products alone, {of}", **style)
            line[1].axhline(1, color=GREY, lw=0.8)
            titles = "CPU seconds of one thread", "times those of the products", "peak memory (GB)"
            for panel, title in zip(line, titles, strict=True):
                panel.set_xscale("log", base=2 if against == "d" else 10)
                panel.set_yscale("log")
                panel.set_ylabel(title)
                tidy(panel)
                if against == "d":
                    panel.set_xticks(WIDTHS, [str(d) for d in WIDTHS])
                else:
                    panel.set_xticks(TOKENS, ["1k", "8k", "64k", "1M"])
                    panel.minorticks_off()
            if against == "tokens":
                line[2].set_yscale("linear")
                line[2].set_ylim(0, 0.1)
            line[1].set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
            line[1].minorticks_off()
            line[1].set_ylim(0.8, 25)
            line[1].set_xlabel(label)
        handles, names = panels[0, 0].get_legend_handles_labels()
        page.legend(handles, names, loc="outside lower center", ncol=3, frameon=False)
        page.suptitle(
            "Fitting one GLU (SiLU, degree 3, float32), and the products it takes", fontsize=8
        )
        page.savefig(FIGURE)


if __name__ == "__main__":
    main()
