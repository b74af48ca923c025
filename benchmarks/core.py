"""The approximation core: how its cost grows, and against least squares on samples.

    python benchmarks/core.py growth         closed form and scikit-learn, d = 16 ... 4096; figure
    python benchmarks/core.py coefficients   Hermite coefficients of a million neurons
    python benchmarks/core.py mixture        global quadratics, d = 784, 10 components, 10 outputs
    python benchmarks/core.py layers         a GLU of d = 4096, h = 11008 at degree 3

Options: `--device cuda`, `--cpu-time` (of all threads, for busy machines), `--out FIGURE`.
Every case runs in a process of its own; memory is the peak above what was held before, read from
Linux' /proc.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import polylens
from polylens import Gaussian, GaussianMixture, GLUWeights, MLPWeights, fit

CLEAR_REFS = Path("/proc/self/clear_refs")
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "cost.png"
SIZES = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
# Least squares is given as many samples as make its function differ from the optimum by this
# share of the layer's variance; the closed form differs by rounding.
EXCESS = 0.01
OUTPUTS = 16
METHODS = {
    "closed form, degree 1": SIZES,
    "closed form, degree 3": SIZES,
    "scikit-learn, degree 1": SIZES[:8],  # 4096 would take 16 GB
    "scikit-learn, degree 2": [16, 32, 64, 96],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["growth", "coefficients", "mixture", "layers"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path, default=FIGURE)
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(PARTS[args.part](args, *args.case)))
        return
    clock = "CPU seconds of all threads" if args.cpu_time else "wall time"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, {clock}\n")
    if args.part == "growth":
        figure(growth_table(args), args)
        return
    cases = {
        "coefficients": [["silu"], ["gelu"], ["relu"], ["tanh"], ["mish"]],
        "mixture": [[p, t] for p in ("natural", "digits") for t in ("1e-6", "1e-8")],
        "layers": [["glu"]],
    }
    for case in cases[args.part]:
        result = run(args, case)
        print(f"| {result['what']} | {result['seconds']:.3g} s | {result['gigabytes']:.2f} GB |")


def run(args: argparse.Namespace, case: list[str]) -> dict:
    """The case in a fresh process."""
    command = [sys.executable, __file__, args.part, "--device", args.device]
    command += ["--cpu-time"] * args.cpu_time + ["--case", *case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
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
        return {"what": what, "seconds": self.seconds, "gigabytes": self.gigabytes, **more}


# ------------------------------------------------------------------ growth


def growth(args: argparse.Namespace, method: str, size: str) -> dict:
    d = int(size)
    layer, inputs = random_layer("mlp", d, d, OUTPUTS), falling(d)
    degree = int(method[-1])
    if method.startswith("closed"):
        fit(random_layer("mlp", 8, 8, 8), falling(8), degree)  # warm
        with Measured(args) as measured:
            fit(layer.to(args.device), inputs.to(args.device), degree)
        return measured.report(method, d=d)
    from sklearn.linear_model import LinearRegression
    from sklearn.preprocessing import PolynomialFeatures

    best = fit(layer, inputs, degree)
    features = math.comb(d + degree, degree)
    n = math.ceil(max(2.0, float(1 - best.r2[degree]) / EXCESS) * features)
    with Measured(args) as measured:
        x = inputs.sample(n, torch.Generator().manual_seed(1))
        y = layer(x)
        expand = PolynomialFeatures(degree, include_bias=False)
        regression = LinearRegression().fit(expand.fit_transform(x.numpy()), y.numpy())
    fresh = inputs.sample(2000, torch.Generator().manual_seed(2))
    predicted = torch.as_tensor(regression.predict(expand.transform(fresh.numpy())))
    true, best = layer(fresh), best(fresh)
    excess = (predicted - best).square().sum() / (true - true.mean(0)).square().sum()
    return measured.report(method, d=d, samples=n, excess=float(excess))


def growth_table(args: argparse.Namespace) -> list[dict]:
    print("| method | d | seconds | peak memory | samples | differs from the optimum by |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = []
    for method, sizes in METHODS.items():
        for d in sizes:
            r = run(args, [method, str(d)])
            results.append(r)
            n, excess = r.get("samples"), r.get("excess")
            tail = "| 0 | rounding |" if n is None else f"| {n:,} | {excess:.2%} of the variance |"
            print(f"| {method} | {d} | {r['seconds']:.3g} | {r['gigabytes'] * 1e3:.1f} MB {tail}")
    return results


def figure(results: list[dict], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    clock = "CPU time (s)" if args.cpu_time else "time (s)"
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = zip(axes, ("seconds", "gigabytes"), (clock, "peak memory (GB)"), strict=True)
    for axis, key, label in panels:
        for method in METHODS:
            rows = [r for r in results if r["what"] == method]
            style = "o-" if method.startswith("closed") else "s--"
            values = [max(r[key], 1e-4) for r in rows]
            axis.loglog([r["d"] for r in rows], values, style, label=method, base=10)
        axis.set(xlabel="d (inputs and neurons)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    fig.suptitle(f"Least squares on samples differs from the optimum by {EXCESS:.0%} of variance")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=120)
    print(f"\n{args.out}")


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
        best = fit(layer, inputs, 2, "global", tolerance=float(tolerance))
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
