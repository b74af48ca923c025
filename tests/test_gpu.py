"""What a GPU computes is what a CPU computes; `make gpu` runs this where there is one."""

import copy

import pytest
import torch
import transformers

import polylens
from polylens import (
    Gaussian,
    GaussianMixture,
    GLUWeights,
    MLPWeights,
    Samples,
    analysis,
    demo,
    fit,
    fit_global,
    fit_joint,
)
from polylens.fitting.neuron_gram import NeuronGram
from polylens.polynomials.ends import PreactivationRange
from polylens.polynomials.evaluation import evaluate
from tests.hf_models import DECODER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

D, H, OUT = 24, 150, 7


def layer(glu: bool, act: str = "silu", dtype: torch.dtype = torch.float32):
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64).div(shape[0] ** 0.5).to(dtype)

    if glu:
        return GLUWeights(
            W_gate=random(D, H), W_in=random(D, H), W_out=random(H, OUT), act=act, b_in=random(H)
        )
    return MLPWeights(random(D, H), random(H, OUT), act, b_in=random(H))


def gaussian() -> Gaussian:
    factor = torch.randn(D, D, dtype=torch.float64)
    return Gaussian(factor[0], factor @ factor.T / D)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    a, b = a.double().cpu(), b.double().cpu()
    assert torch.isfinite(a).all()
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("glu", [False, True], ids=["mlp", "glu"])
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "samples", "tails", "joint", "global"])
def test_fits_are_those_of_the_cpu(glu, kind):
    weights, x = layer(glu), torch.randn(3000, D)
    parts = [gaussian(), gaussian()]
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]),
        torch.stack([part.mean for part in parts]),
        torch.stack([part.cov for part in parts]),
    )
    models = {"gaussian": parts[0], "mixture": mixture, "global": mixture}
    given = models.get(kind, Samples(x))

    def fitted(w):
        if kind == "joint":
            return fit_joint(w, given, 2)
        if kind == "global":
            return fit_global(w, given, 2, outputs=torch.eye(OUT, dtype=torch.float64)[:, :2])
        return fit(w, given, 3, **({"tails": 0.05} if kind == "tails" else {}))

    cpu, gpu = fitted(weights), fitted(weights.to("cuda"))
    # samples are summed from preactivations in float32
    exact = kind in ("gaussian", "mixture", "global")
    x = x[:50].double() if kind == "global" else x[:50]
    close(gpu(x.to("cuda")), cpu(x), 2e-5)
    close(gpu.r2, cpu.r2, 1e-9 if exact else 1e-5)


@pytest.mark.parametrize("glu", [False, True], ids=["mlp", "glu"])
@pytest.mark.parametrize("ends", [False, True], ids=["plain", "ends"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_evaluates_as_the_operations_do(glu, ends, dtype):
    weights = layer(glu, "silu" if glu else "relu2", dtype).to("cuda")
    for degree in (0, 3):
        poly = fit(weights, gaussian(), degree)
        if ends:
            poly = poly.with_ends(torch.stack([poly.m - poly.s, poly.m + 0.5 * poly.s]))
        own = poly._horner(degree)
        y = 3 * torch.randn(2, 37, 2 * H, device="cuda").to(dtype)[..., :H]
        z = torch.randn(2, 37, H, device="cuda").to(dtype) if glu else None
        y[0, 0, 0], y[0, 1, 1] = torch.inf, torch.nan
        with torch.no_grad():
            fused, plain = poly.neurons(y, z), evaluate(own.tables, y, z, own.mean)
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(
            fused, plain, rtol=4 * epsilon, atol=40 * epsilon, equal_nan=True
        )
        y.requires_grad_()
        assert poly.neurons(y, z).requires_grad or degree == 0


@pytest.mark.parametrize("glu", [False, True], ids=["mlp", "glu"])
@pytest.mark.parametrize(("linear", "weighted"), [(False, False), (True, True)])
@pytest.mark.parametrize("tails", [False, True])
def test_the_kernel_sums_as_the_operations_do(glu, linear, weighted, tails, monkeypatch):
    for degree, act in ((1, "relu2"), (3, "silu")):
        weights = layer(glu, act).to("cuda")
        x = torch.randn(777, D, device="cuda")
        w = torch.rand(777, device="cuda") if weighted else None
        ends = torch.tensor([[-0.5], [0.8]], dtype=torch.float64, device="cuda").repeat(1, H)

        def gram(weights=weights, degree=degree, ends=ends, x=x, w=w):
            seen = PreactivationRange(weights, ends) if tails else None
            sums = NeuronGram(weights, degree, None, seen, linear)
            sums.update(x[:400], None if w is None else w[:400])
            sums.update(x[400:], None if w is None else w[400:])
            return sums._gram

        fused = gram()
        with monkeypatch.context() as patch:
            patch.setattr("polylens.fitting.neuron_gram.add_fused", lambda *_: False)
            plain = gram()
        # operation by operation the target is multiplied, and has its asymptote taken off, in
        # float32; here all is in float64
        close(fused, plain, 1e-6 if tails or glu else 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_multiplied_as_in_float32(dtype):
    weights, x = layer(True, dtype=dtype), torch.randn(3000, D).to(dtype)
    cpu, gpu = (fit(w, Samples(x), 3) for w in (weights, weights.to("cuda")))
    close(gpu.r2, cpu.r2, 1e-5)
    close(gpu.P[3], cpu.P[3], 1e-4)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(
        3, DECODER["vocab_size"], (24, 32), generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval()


@pytest.mark.parametrize(
    "method",
    [
        polylens.TrueStream("samples"),
        polylens.TrueStream("gaussian"),
        polylens.TrueStream("joint"),
        polylens.Sequential("samples"),
        polylens.Sequential("joint"),
        polylens.Sequential("gaussian"),
    ],
    ids=repr,
)
def test_a_lens_is_that_of_the_cpu(llama, tokens, method, tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        model, ids = copy.deepcopy(llama).to(device), tokens.to(device)
        lens = polylens.attach(model, ids, degree=2, method=method, progress=False)
        with torch.no_grad(), lens.replaced():
            logits = model(ids).logits
        report = lens.report(tokens, progress=False)
        lens.save(tmp_path / device)
        loaded_on = copy.deepcopy(llama).to(device)
        loaded = polylens.load(tmp_path / device, loaded_on)
        with torch.no_grad(), loaded.replaced():
            torch.testing.assert_close(loaded_on(ids).logits, logits, rtol=0, atol=1e-5)
        found[device] = logits, torch.tensor([row.r2 for row in report.rows])
    close(found["cuda"][0], found["cpu"][0], 1e-3)
    close(found["cuda"][1], found["cpu"][1], 1e-4)


def test_the_embedded_model_is_opened_up():
    found = {}
    text = demo.batches(demo.texts()[0], 40, 64)
    for device in ("cpu", "cuda"):
        model = demo.load_model(device)
        lens = polylens.attach(model, text.to(device), progress=False)
        u = torch.randn(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        features = analysis.eigenfeatures(lens[2], u.to(device), 8)
        found[device] = features.values.cpu(), lens[2].truncate(1).linear()[0].cpu()
    close(found["cuda"][0], found["cpu"][0], 1e-4)
    close(found["cuda"][1], found["cpu"][1], 1e-5)
