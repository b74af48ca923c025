"""The approximation core: how its cost grows, and against least squares on samples.

    python benchmarks/core.py growth         closed form and scikit-learn, d = 16 ... 4096; figure
    python benchmarks/core.py coefficients   Hermite coefficients of a million neurons
    python benchmarks/core.py mixture        global quadratics, d = 784, 10 components, 10 outputs
    python benchmarks/core.py layers         a GLU of d = 4096, h = 11008 at degree 3

Options: `--device cuda`, `--cpu-time` (of all threads, for busy machines), `--out FIGURE`,
`--rows FILE`. Every case runs in a process of its own; memory is the peak above what was held
before, read from Linux' /proc. `growth` adds each row to FILE as soon as it is measured and does
not repeat those that FILE holds for the same versions, threads, device and clock.
"""

import argparse
import ctypes
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import polylens
from polylens import Gaussian, GaussianMixture, GLUWeights, MLPWeights, fit, fit_global
from polylens.drawing import COLOURS, FONT, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLEAR_REFS = Path("/proc/self/clear_refs")
ROWS = Path(__file__).parent / "growth.jsonl"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "cost.png"
SIZES = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
# Least squares is given as many samples as make its function differ from the optimum by this
# share of the layer's variance; the closed form differs by rounding.
EXCESS = 0.01
OUTPUTS = 16


class Method(NamedTuple):
    sizes: list[int]
    colour: str
    marker: str
    label: str = ""
    place: tuple[float, float] = (5, -8)  # of the label, in points from the end of the line


# The last character of the name is the degree.
METHODS = {
    "closed form, degree 1": Method(SIZES, COLOURS[0], MARKERS[0]),
    "closed form, degree 2": Method(
        sorted([*SIZES, 96]), COLOURS[0], MARKERS[1], "closed form,\ndegrees 1–3"
    ),
    "closed form, degree 3": Method(SIZES, COLOURS[0], MARKERS[2]),
    "LinearRegression, degree 1": Method(
        SIZES, COLOURS[1], MARKERS[3], "LinearRegression,\ndegree 1", (5, 8)
    ),
    "normal equations, degree 1": Method(
        SIZES, COLOURS[2], MARKERS[4], "normal equations,\ndegree 1"
    ),
    "normal equations, degree 2": Method(
        [16, 32, 64, 96], COLOURS[3], MARKERS[5], "normal equations,\ndegree 2", (-30, 14)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["growth", "coefficients", "mixture", "layers"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=FIGURE)
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(PARTS[args.part](args, *args.case)))
        return
    clock = "CPU seconds of all threads" if args.cpu_time else "seconds of wall time"
    setting = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, {clock}"
    )
    print(f"{setting}\n")
    if args.part == "growth":
        draw(growth_rows(args, setting), args.out, clock)
        print(f"\n{args.out}")
        return
    cases = {
        "coefficients": [["silu"], ["gelu"], ["relu"], ["tanh"], ["mish"]],
        "mixture": [[p, t] for p in ("natural", "digits") for t in ("1e-6", "1e-8")],
        "layers": [["glu"]],
    }
    for case in cases[args.part]:
        result = run(args, case)
        print(
            f"| {result['what']} | {result['seconds']:.3g} s | {result['gigabytes']:.2f} GB |",
            flush=True,
        )


def run(args: argparse.Namespace, case: list[str]) -> dict:
    """The case in a fresh process."""
    command = [sys.executable, __file__, args.part, "--device", args.device]
    command += ["--cpu-time"] * args.cpu_time + ["--case", *case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(case)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Measured:
    """Seconds of a block, and how far it raised the process's peak memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock = time.process_time if args.cpu_time else time.perf_counter
        self.cuda = args.device != "cpu"

    def __enter__(self) -> "Measured":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or what was freed before is used again, unseen
            CLEAR_REFS.write_text("5")  # the peak starts again from what is resident now
        self.before, self.start = self.peak(), self.clock()
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = self.clock() - self.start
        self.gigabytes = self.peak() - self.before

    def peak(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6

    def report(self, what: str, **more: object) -> dict:
        measured = {"seconds": round(self.seconds, 6), "gigabytes": round(self.gigabytes, 6)}
        return {"what": what, **measured, **more}


# ------------------------------------------------------------------ growth


def growth(args: argparse.Namespace, method: str, size: str) -> dict:
    d, degree = int(size), int(method[-1])
    layer, inputs = random_layer("mlp", d, d, OUTPUTS, torch.float32), falling(d)
    if method.startswith("closed"):
        fit(random_layer("mlp", 8, 8, 8), falling(8), degree)  # warm
        layer, inputs = layer.to(args.device), inputs.to(args.device)
        with Measured(args) as measured:
            fit(layer, inputs, degree)
        return measured.report(method, d=d)
    best = fit(layer, inputs, degree)
    # Of n samples with independent noise, p features fit p / (n - p - 1) of its variance too much.
    noise = float(1 - best.r2[degree])
    n = math.ceil(math.comb(d + degree, d) * (1 + noise / EXCESS)) + 1
    least_squares(method, random_layer("mlp", 8, 8, 8, torch.float32), falling(8), 200)  # warm
    with Measured(args) as measured:
        predict = least_squares(method, layer, inputs, n)
    x = samples(inputs, 2000, seed=2)
    true = layer(x)
    excess = (predict(x) - best(x)).square().sum() / (true - true.mean(0)).square().sum()
    return measured.report(method, d=d, samples=n, excess=float(excess))


def least_squares(
    method: str, layer: MLPWeights, inputs: Gaussian, n: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """scikit-learn's fit to n samples of the layer, in float32, which is ample for 1 %."""
    from sklearn.linear_model import LinearRegression, Ridge
    from sklearn.preprocessing import PolynomialFeatures

    expand = PolynomialFeatures(int(method[-1]), include_bias=False)

    def features(x: torch.Tensor) -> np.ndarray:
        return x.numpy() if method[-1] == "1" else expand.fit_transform(x.numpy())

    if method.startswith("normal equations"):
        regression = Ridge(alpha=0.0, solver="cholesky", copy_X=False)
    else:
        regression = LinearRegression(copy_X=False)
    x = samples(inputs, n, seed=1)
    y = torch.cat([layer(part) for part in x.split(4096)])
    regression.fit(features(x), y.numpy())
    return lambda x: torch.as_tensor(regression.predict(features(x)))


def samples(inputs: Gaussian, n: int, seed: int) -> torch.Tensor:
    """[n, d] draws in float32, a few at a time: the covariance is known to be diagonal."""
    independent = Gaussian(inputs.mean, inputs.cov.diagonal())
    g, x = torch.Generator().manual_seed(seed), torch.empty(n, inputs.d_in)
    for part in x.split(4096):
        part.copy_(independent.sample(len(part), g))
    return x


def growth_rows(args: argparse.Namespace, setting: str) -> list[dict]:
    """The rows of every method and size, read where they are, measured and kept where not."""
    print("| method | d | seconds | peak memory | samples | differs from the optimum by |")
    print("| --- | --- | --- | --- | --- | --- |")
    kept = args.rows.read_text().splitlines() if args.rows.exists() else []
    found = {(r["what"], r["d"]): r for r in map(json.loads, kept) if r["setting"] == setting}
    for name, method in METHODS.items():
        for d in method.sizes:
            if (name, d) not in found:
                found[name, d] = run(args, [name, str(d)]) | {"setting": setting}
                with args.rows.open("a") as file:
                    file.write(json.dumps(found[name, d]) + "\n")
            r = found[name, d]
            n, excess = r.get("samples"), r.get("excess")
            tail = "| 0 | rounding |" if n is None else f"| {n:,} | {excess:.2%} of the variance |"
            memory = f"{r['gigabytes'] * 1e3:.1f} MB"
            print(f"| {name} | {d} | {r['seconds']:.3g} | {memory} {tail}", flush=True)
    return list(found.values())


def draw(rows: list[dict], path: Path, clock: str) -> None:
    """Time and memory against d, a line for each method, named at its end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(7, 3), dpi=200, layout="constrained")
        panels = figure.subplots(1, 2)
        draw_cost(panels[0], rows, "seconds", clock)
        draw_cost(panels[1], rows, "gigabytes", "peak memory (GB)")
        figure.suptitle(
            "Polynomial of an MLP of d inputs and d neurons: in closed form, and by least squares "
            f"on\nso many samples that it differs from the optimum by about {EXCESS:.0%} "
            "of the variance",
            fontsize=8,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_cost(panel: "Axes", rows: list[dict], key: str, label: str) -> None:
    for name, method in METHODS.items():
        line = sorted((r["d"], r[key]) for r in rows if r["what"] == name)
        # The kernel counts memory in pages: below 0.1 MB that is all that is seen.
        line = [(d, value) for d, value in line if key == "seconds" or value >= 1e-4]
        panel.loglog(
            *zip(*line, strict=True),
            color=method.colour,
            marker=method.marker,
            markersize=3,
            lw=1.2,
        )
        panel.annotate(
            method.label,
            xy=line[-1],
            xytext=method.place,
            textcoords="offset points",
            va="center",
            color=method.colour,
            annotation_clip=False,
        )
    panel.set_xticks(SIZES[::2], SIZES[::2])
    panel.minorticks_off()
    panel.set_xlabel("d: inputs, and neurons")
    panel.set_ylabel(label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#DDDDDD", linewidth=0.5)


# ------------------------------------------------------------------ coefficients, layers


def coefficients(args: argparse.Namespace, act: str) -> dict:
    n = 1_000_000
    g = torch.Generator().manual_seed(0)
    m = torch.randn(n, generator=g, dtype=torch.float64).to(args.device)
    s = torch.rand(n, generator=g, dtype=torch.float64).mul(3).exp().to(args.device)
    chosen = polylens.activation(act)
    chosen.hermite_coefficients(m[:10], s[:10], 4)
    with Measured(args) as measured:
        chosen.hermite_coefficients(m, s, 4)
    return measured.report(f"{act}, {n:,} neurons, degree 0 ... 4")


def layers(args: argparse.Namespace, kind: str) -> dict:
    d, h = 4096, 11008
    inputs = falling(d).to(args.device)
    layer = random_layer(kind, d, h, d, torch.float32).to(args.device)
    with Measured(args) as measured:
        fit(layer, inputs, 3)
    return measured.report(f"one layer of {d} x {h}, {kind}, degree 3 (32 of them make a model)")


def random_layer(
    kind: str, d: int, h: int, d_out: int, dtype: torch.dtype = torch.float64
) -> MLPWeights | GLUWeights:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=dtype)

    W, W_out = draw(d, h, scale=2 * d**-0.5), draw(h, d_out, scale=h**-0.5)
    if kind == "mlp":
        return MLPWeights(W, W_out, "gelu", draw(h, scale=0.3))
    return GLUWeights(draw(d, h, scale=d**-0.5), W_out, W, "silu")


def falling(d: int) -> Gaussian:
    """Eigenvalues 1 / i in the standard basis, as a full matrix, with trace d."""
    spectrum = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    mean = 0.2 * torch.randn(d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Gaussian(mean, torch.diag(spectrum * d / spectrum.sum()))


# ------------------------------------------------------------------ mixtures


def mixture(args: argparse.Namespace, problem: str, tolerance: str) -> dict:
    inputs = {"natural": natural_images, "digits": digits}[problem](28).to(args.device)
    layer = random_layer("mlp", 784, 512, 10).to(args.device)
    with Measured(args) as measured:
        best = fit_global(layer, inputs, 2, tolerance=float(tolerance))
    assert isinstance(best, polylens.DensePolynomial)
    what = (
        f"{problem}, support {best.whiten.shape[1]}, to {tolerance}: {best.iterations} iterations"
    )
    return measured.report(f"{what}, residual {best.residual:.1e}")


def natural_images(side: int, k: int = 10) -> GaussianMixture:
    """Textures with oriented 1/f^a spectra under windows, each class its own.

    Every third covariance comes from 300 images and is singular, the others from 5,000.
    """
    g = torch.Generator().manual_seed(0)
    f = torch.fft.fftfreq(side).double()
    fx, fy = torch.meshgrid(f, f, indexing="ij")
    grid = torch.arange(side).double()
    yy, xx = torch.meshgrid(grid, grid, indexing="ij")
    x, labels = [], []
    for c in range(k):
        angle, power = math.pi * c / k, 1 + 0.6 * torch.rand(1, generator=g).item()
        along = fx * math.cos(angle) + fy * math.sin(angle)
        across = fy * math.cos(angle) - fx * math.sin(angle)
        spectrum = (1 / side + (along**2 + (2.5 * across) ** 2).sqrt()) ** -power
        cx, cy = ((torch.rand(2, generator=g) / 2 + 0.25) * side).tolist()
        window = 0.15 + torch.exp(-((xx - cx) ** 2 + (yy - cy) ** 2) / (2 * (0.3 * side) ** 2))
        n = 5000 if c % 3 else 300
        noise = torch.randn(n + 1, side, side, generator=g, dtype=torch.float64)
        images = torch.fft.ifft2(torch.fft.fft2(noise) * spectrum).real * window
        images /= images.std()
        x.append((images[:-1] + images[-1]).flatten(1))
        labels += [c] * n
    found = GaussianMixture.from_labels(torch.cat(x), torch.tensor(labels))
    return GaussianMixture(torch.full((k,), 1 / k), found.means, found.covs)


def digits(side: int, copies: int = 12) -> GaussianMixture:
    """scikit-learn's digits, enlarged to side x side, turned, scaled and moved at random."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small, labels = torch.tensor(data.images).double()[:, None] / 16, torch.tensor(data.target)
    g, n, x = torch.Generator().manual_seed(0), len(small), []
    for _ in range(copies):
        angle, size, move = (torch.rand(n, c, generator=g).double() - 0.5 for c in (1, 1, 2))
        angle, size = angle[:, 0] / 2, 1 + size[:, 0] / 5
        turn = torch.stack([size * angle.cos(), -angle.sin(), angle.sin(), size * angle.cos()], 1)
        theta = torch.cat([turn.reshape(n, 2, 2), 0.3 * move[:, :, None]], dim=2)
        where = F.affine_grid(theta, [n, 1, side, side], align_corners=False)
        image = F.grid_sample(small, where, mode="bicubic", align_corners=False)
        x.append(image.clamp(0, 1).flatten(1))
    return GaussianMixture.from_labels(torch.cat(x), labels.repeat(copies))


PARTS = {
    "growth": growth,
    "coefficients": coefficients,
    "mixture": mixture,
    "layers": layers,
}

if __name__ == "__main__":
    main()
