"""The short way of a replacement, through the host's neurons, shows nowhere but in the clock."""

import importlib.util
from contextlib import contextmanager

import pytest
import torch
from tests.hf_models import build
from tests.host_contract import DEGREE, TOKENS, assert_close, attach, logits
from tests.models import HOSTS, hooked
from torch import nn

import polylens
from polylens import FromInputs, Gaussian, GLUWeights, MLPWeights, fit
from polylens.hosts import host_for
from polylens.installed.emitter import SiteEmitter

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

GATED = dict(gated_mlp=True, normalization_type="RMS", act_fn="silu")


def gated_without_bias():
    model = hooked(**GATED)
    for block in model.blocks:
        block.mlp.b_in.data.zero_()
    return model


def nnsight(name):
    return pytest.importorskip("nnsight", minversion="0.8").NNsight(build(name))


NAMES = ["hooked-layer_norm", "hooked-folded", "hooked-bf16", "bridge-gpt2", "bridge-llama"]
NAMES += ["bridge-phi3", "bridge-olmo2", "bridge-bloom", "bridge-llama_compatible"]
MODELS = {name: HOSTS[name] for name in NAMES} | {
    "hooked-gated": gated_without_bias,
    **{name: lambda name=name: build(name) for name in ("gpt2", "llama", "phi3", "opt", "t5")},
    "albert": lambda: build("albert"),
    "llama in bfloat16": lambda: build("llama", torch.bfloat16),
    **{f"nnsight-{name}": lambda name=name: nnsight(name) for name in ("gpt2", "llama")},
}
if importlib.util.find_spec("transformer_lens.HookedTransformer"):
    # TransformerLens 4 has hooks of its own inside of these
    MODELS |= {name: HOSTS[name] for name in ("bridge-opt", "bridge-bert")}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def dear(monkeypatch):
    """Tensors without values flow to h where they may, also where an activation costs little."""
    monkeypatch.setattr("polylens.hosts.passage.DEAR", (0, 0))


@pytest.fixture
def ways(monkeypatch):
    """How often a layer went the long way (evaluated on x) and the short way, since cleared."""
    taken = {"long": 0, "short": 0}
    call, neurons = SiteEmitter.__call__, SiteEmitter.neurons

    def long(self, arrival, tap):
        out = call(self, arrival, tap)
        taken["long"] += out is not arrival.y
        return out

    def short(self, *values):
        out = neurons(self, *values)
        taken["short"] += out is not None
        return out

    monkeypatch.setattr(SiteEmitter, "__call__", long)
    monkeypatch.setattr(SiteEmitter, "neurons", short)
    return taken


@contextmanager
def listening(lens):
    """Somebody reads one point of every layer."""
    points = [
        module
        for name, module in lens.host.module.named_modules()
        if name.endswith(("hook_poly_out", ".poly"))
    ]
    assert points
    handles = [point.register_forward_hook(lambda *args: None) for point in points]
    yield
    for handle in handles:
        handle.remove()


def both(lens, ways, tokens=TOKENS):
    """Logits the short way, checked to be it, and the long way."""
    ways.update(long=0, short=0)
    short = logits(lens.host.model, tokens)
    assert ways["short"] >= len(lens)
    assert ways["long"] == 0
    with listening(lens):
        long = logits(lens.host.model, tokens)
    assert ways["long"] == ways["short"]
    return short, long


@pytest.mark.parametrize(("exclude_first", "dear"), [(True, 0), (False, 1 << 30)])
def test_both_ways_agree_at_every_degree(model, ways, exclude_first, dear, monkeypatch):
    monkeypatch.setattr("polylens.hosts.passage.DEAR", (dear, dear))
    with attach(model, exclude_first=exclude_first) as lens:
        for degree in range(DEGREE + 1):
            with lens.replaced(degree=degree):
                assert_close(*both(lens, ways))
        with lens.replaced(layers=lens.layers[0]):
            short = logits(model)
            with listening(lens):
                assert_close(short, logits(model))
        ways.update(long=0, short=0)
        logits(model)
        assert ways == {"long": 0, "short": 0}


@pytest.mark.parametrize("name", ["hooked-layer_norm", "bridge-gpt2", "llama", "nnsight-gpt2"])
def test_sequences_of_one_position_are_replaced(name, ways):
    model = MODELS[name]()
    with attach(model) as lens, lens.replaced(degree=1):
        assert_close(*both(lens, ways, TOKENS[:, :1]))


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5"])
def test_generation_with_a_cache_is_the_same(name, ways):
    model = build(name)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    options |= dict(attention_mask=torch.ones_like(TOKENS[:1]))
    with attach(model) as lens, lens.replaced():
        short = model.generate(TOKENS[:1], **options)
        assert ways["long"] == 0
        assert ways["short"] >= 5 * 2
        with listening(lens):
            assert torch.equal(short, model.generate(TOKENS[:1], **options))


def interiors(lens):
    """{layer: Interior} of what is installed."""
    found = {}
    for module in lens.host.module.modules():
        for hook in module._forward_pre_hooks.values():
            passage = getattr(hook, "__self__", None)
            if getattr(passage, "_interior", None) is not None:
                found[passage.function.emitter.site.layer] = passage._interior
    return found


def test_hooks_inside_see_what_the_true_layer_computes(model, ways):
    """On the replaced stream; what they change does not reach the polynomial."""
    with attach(model, exclude_first=False) as lens, lens.replaced():
        inputs, seen = {}, {}
        observers = {layer: lambda a, layer=layer: inputs.update({layer: a.x}) for layer in lens}
        with lens.host.observe(observers):
            reference = logits(model)
        if len(lens) == 1:
            return  # one shared block, called by every layer
        for layer, interior in interiors(lens).items():
            expected = lens.sites[layer].weights().neurons(inputs[layer])
            for name, module in interior.points().items():
                part = 0 if name == "h" else getattr(interior, name)[1]
                if part:
                    continue

                def change(module, args, out, key=name):
                    seen[key] = args[0] if key == "h" else out.clone()
                    return torch.zeros_like(out) if key != "h" else None

                ways.update(long=0, short=0)
                handle = module.register_forward_hook(change)
                assert_close(logits(model), reference)
                handle.remove()
                assert ways["long"] == 1
                assert_close(seen[name].reshape(expected[name].shape), expected[name])


@pytest.mark.parametrize("name", ["hooked-layer_norm", "bridge-llama", "gpt2", "phi3"])
def test_with_autograd_nothing_differentiates_the_hosts_weights(name, ways):
    model = MODELS[name]()
    with attach(model, exclude_first=False) as lens, lens.replaced():
        ways.update(long=0, short=0)
        lens.host.logits(TOKENS).square().mean().backward()
        assert ways == {"long": len(lens), "short": 0}
        for site in lens.sites.values():
            mlp = lens.host.module.get_submodule(site.path)
            for parameter in mlp.parameters():
                assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("name", ["hooked-layer_norm", "bridge-gpt2", "llama"])
def test_other_dtypes_go_the_long_way(name, ways):
    model = MODELS[name]()
    with attach(model) as lens, lens.replaced():
        expected = logits(model)
        ways.update(long=0, short=0)
        with torch.inference_mode():
            assert_close(host_for(model).logits(TOKENS), expected)
        assert ways == {"long": 0, "short": len(lens)}
        if name != "hooked-layer_norm":  # which does not run under autocast
            with torch.autocast("cpu", torch.bfloat16):
                logits(model)
            assert ways == {"long": len(lens), "short": len(lens)}


def test_a_bias_after_the_product_goes_the_long_way(ways):
    model = hooked(**GATED)
    assert all(block.mlp.b_in.any() for block in model.blocks)
    with attach(model) as lens, lens.replaced():
        logits(model)
        assert ways == {"long": 2, "short": 0}


class InPlace(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 9), nn.Linear(9, 6), nn.ReLU(inplace=True)
        self.gate = nn.Linear(6, 9) if gated else None

    def forward(self, x):
        if self.gate is None:
            return x + self.b(self.act(self.a(x)))
        return x + self.b(self.act(self.gate(x)) * self.a(x))


@pytest.mark.parametrize("gated", [False, True])
def test_an_activation_in_place_goes_the_long_way(gated, ways):
    torch.manual_seed(0)
    model = InPlace(gated)
    x = torch.randn(50, 6)
    lens = polylens.attach(
        model, method=FromInputs(Gaussian.standard(6)), degree=2, example_inputs=x, progress=False
    )
    with torch.no_grad(), lens.replaced():
        torch.testing.assert_close(model(x), x + lens[0](x))
    assert ways == {"long": 1, "short": 0}


def test_two_readers_of_the_same_neurons_are_not_mixed_up(ways):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = nn.Linear(6, 9), nn.GELU()
            self.b, self.c = nn.Linear(9, 6), nn.Linear(9, 6)

        def forward(self, x):
            h = self.act(self.a(x))
            return self.b(h) - self.c(h)

    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(50, 6)
    lens = polylens.attach(
        model, method=FromInputs(Gaussian.standard(6)), degree=2, example_inputs=x, progress=False
    )
    with torch.no_grad(), lens.replaced():
        replaced = model(x)
        expected = lens[0](x) - model.c(model.act(model.a(x)))
    torch.testing.assert_close(replaced, expected)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("degree", [0, 1, 2, 4])
def test_neurons_of_known_preactivations_are_those_of_x(kind, dtype, degree):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    biases = dict(b_in=3 * draw(8), b_out=draw(4))
    if kind == "mlp":
        weights = MLPWeights(draw(5, 8), draw(8, 4), "gelu", **biases)
    else:
        weights = GLUWeights(draw(5, 8), draw(8, 4), draw(5, 8), "silu", draw(8), **biases)
    poly, x = fit(weights, Gaussian.standard(5), degree), draw(2, 3, 5)
    known = weights.neurons(x)
    known.pop("h")
    both = torch.cat(list(known.values()), dim=-1)
    for values in (list(known.values()), list(both.split(8, dim=-1))):
        before = [v.clone() for v in values]
        h = poly.neurons(*values)
        assert h.dtype == dtype
        assert_close(h @ weights.W_out + weights.b_out, poly(x))
        assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
    assert_close(poly.neurons(*(v.requires_grad_() for v in known.values())), h)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "bridge-llama", "hooked-layer_norm"])
def test_hooks_inside_never_see_tensors_without_values(name):
    model, computed = MODELS[name](), []
    with attach(model) as lens:
        for interior in interiors(lens).values():
            assert interior.plain
            for module in interior.modules:
                module.register_forward_hook(lambda m, args, out: computed.append(out.is_meta))
        with lens.replaced():
            logits(model)
        assert len(computed) > 2 * len(lens)
        assert not any(computed)
