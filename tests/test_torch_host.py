"""Plain torch and Hugging Face models: hooks only, exact restoration, values at the points."""

import copy

import pytest
import torch
from torch import nn

import polylens
from polylens.errors import AttachmentError, InvalidInputError, UnsupportedModel
from polylens.hosts.passage import PolyPoint
from polylens.hosts.torch import TorchHost
from tests.hf_models import ARCHITECTURES, D_VOCAB, build

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")

TOKENS = torch.randint(3, D_VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))
# a fused gate, no mlp module and flat inputs, a residual inside, two stacks, one shared block
MODELS = ["gpt2", "llama", "phi3", "opt", "bloom", "bert", "albert", "t5", "bart", "modernbert"]
DEGREE = 3


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def attach(model, **options):
    return polylens.attach(model, TOKENS, progress=False, **{"degree": DEGREE, **options})


def logits(model):
    with torch.no_grad():
        return TorchHost(model).logits(TOKENS)


def snapshot(model):
    """Everything that must come back, by identity."""
    modules = [
        (name, id(m), list(m._forward_hooks), list(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]
    return modules, list(model.state_dict()), [id(p) for p in model.parameters()]


def test_observing_changes_nothing_and_detach_restores_everything(model):
    before, reference = snapshot(model), logits(model)
    lens = attach(model)
    assert lens.refused == {}
    assert torch.equal(logits(model), reference)
    assert list(model.state_dict()) == before[1]
    with lens.replaced():
        assert not torch.equal(logits(model), reference)
    assert torch.equal(logits(model), reference)
    lens.detach()
    assert snapshot(model) == before
    assert torch.equal(logits(model), reference)


def test_parts_and_error_add_up_to_the_true_output(model):
    lens = attach(model)
    true = {}

    def keep(layer):
        return lambda x, y: true.__setitem__(layer, y)

    with lens.host.cache() as cache, lens.host.observe({i: keep(i) for i in lens.layers}):
        logits(model)
    for layer in lens.layers:
        parts = [cache[f"degree_{k}", layer] for k in range(DEGREE + 1)]
        assert parts[0].shape == (4, 12, 24)
        torch.testing.assert_close(sum(parts), cache["out", layer], atol=1e-5, rtol=1e-4)
        total = cache["out", layer] + cache["error", layer]
        torch.testing.assert_close(total, true[layer], atol=1e-5, rtol=1e-4)
        expected = lens[layer](cache["in", layer])
        torch.testing.assert_close(cache["out", layer], expected, atol=1e-5, rtol=1e-4)


def test_points_are_modules_under_the_sites_path(model):
    lens = attach(model)
    point = model.get_submodule(f"{lens.sites[0].path}.hook_poly_out")
    seen = []
    point.register_forward_hook(lambda module, args, out: seen.append(out))
    logits(model)
    assert seen
    assert not any("poly" in name for name in model.state_dict())


def test_a_copy_is_independent(model):
    lens = attach(model)
    reference = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), reference)
    with pytest.raises(AttachmentError, match="hook_poly_in already"):
        attach(twin)
    lens.detach()
    assert torch.equal(logits(twin), reference)
    assert any(isinstance(m, PolyPoint) for m in twin.modules())
    assert not any(isinstance(m, PolyPoint) for m in model.modules())


def test_gradients_flow_through_the_replacement(model):
    lens = attach(model)
    with lens.replaced(), lens.host.cache(names=["out"]) as cache:
        out = lens.host.logits(TOKENS)
        gradients = torch.autograd.grad(out.sum(), list(cache.values()))
    assert all(bool(g.any()) for g in gradients)


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5"])
def test_generation_uses_the_replacement_at_every_step(name):
    model = build(name)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with attach(model) as lens:
        calls = []
        with lens.replaced():
            point = model.get_submodule(f"{lens.sites[lens.layers[-1]].path}.hook_poly_out")
            point.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
            model.generate(TOKENS[:1], **options)
        steps = calls[1:]
    assert steps
    assert set(steps) == {1}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_text_is_sampled_without_touching_the_random_state(name):
    host = TorchHost(build(name))
    state = torch.get_rng_state()
    first, again = (host.sample_tokens(3, 9, seed=1) for _ in range(2))
    assert first.shape == (3, 9)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_models_that_cannot_generate_ask_for_tokens():
    with pytest.raises(UnsupportedModel, match="give tokens="):
        polylens.attach(build("bert"), progress=False)


def test_bfloat16():
    model = build("llama", torch.bfloat16)
    reference = logits(model)
    with attach(model) as lens:
        assert torch.equal(logits(model), reference)
        with lens.replaced():
            assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("step", range(4))
def test_nothing_stays_behind_if_attaching_fails(monkeypatch, step):
    model = build("gpt2")
    before = snapshot(model)
    register, calls = nn.Module.register_forward_hook, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) > step and type(self).__name__ == "Conv1D" and model_is_fitted:
            raise RuntimeError("no more hooks")
        return register(self, *args, **kwargs)

    host_sites = TorchHost.install
    model_is_fitted = False

    def install(self, site, emitter):
        nonlocal model_is_fitted
        model_is_fitted = site.layer == 1
        return host_sites(self, site, emitter)

    monkeypatch.setattr(TorchHost, "install", install)
    monkeypatch.setattr(nn.Module, "register_forward_hook", failing)
    with pytest.raises(RuntimeError, match="no more hooks"):
        attach(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("point", ["in", "out", "error", "degree_0", "degree_2"])
def test_an_exception_at_a_point_leaves_the_model_usable(point):
    model = build("llama")
    before, reference = snapshot(model), logits(model)

    def fail(module, args, out):
        raise ValueError("in a hook")

    lens = attach(model)
    handle = model.get_submodule(f"model.layers.1.mlp.hook_poly_{point}")
    handle = handle.register_forward_hook(fail)
    with pytest.raises(ValueError, match="in a hook"), lens.replaced():
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), reference)
    lens.detach()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "centred", "offset"),
    [("gpt2", True, 0), ("bert", True, 0), ("llama", False, 0), ("gemma2", False, 1)],
)
def test_the_norm_in_front_is_found_by_what_flows(name, centred, offset):
    model = build(name)
    host = TorchHost(model)
    sites, _ = host.sites()
    norm = host.norm(sites[1])
    assert norm.centred is centred
    blocks = {"gpt2": "transformer.h.1.ln_2", "bert": "bert.encoder.layer.1.attention.output"}
    path = blocks.get(name, "model.layers.1.post_attention_layernorm")
    path = "model.layers.1.pre_feedforward_layernorm" if name == "gemma2" else path
    module = model.get_submodule(path + (".LayerNorm" if name == "bert" else ""))
    torch.testing.assert_close(norm.weight, module.weight + offset)


def test_hidden_layers_of_a_classifier_are_replaced_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 21), nn.GELU(), nn.Linear(21, 3)
    )
    before, x = snapshot(model), torch.randn(50, 10)
    reference = model(x)
    host = TorchHost(model)
    sites, refused = host.sites()
    assert [(s.layer, s.path, s.d_in, s.d_mlp, s.d_out) for s in sites] == [
        (0, "2", 10, 20, 21),
        (1, "4", 20, 21, 3),
    ]
    assert refused == {}
    gaussian = polylens.Gaussian(torch.zeros(10), torch.eye(10))
    lens = polylens.attach(model, inputs=gaussian, layers=0, degree=2, progress=False)
    assert torch.equal(model(x), reference)
    with lens.replaced():
        expected = model[4](model[3](lens[0](x)))
        torch.testing.assert_close(model(x), expected)
    with lens.host.cache([0], ["out"]) as cache:
        model(x)
    torch.testing.assert_close(cache["out", 0], lens[0](x))
    lens.detach()
    assert snapshot(model) == before


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x, scale):
        return scale * self.b(torch.relu(self.a(x)))


def test_inputs_that_cannot_be_guessed_are_asked_for_by_name():
    with pytest.raises(UnsupportedModel, match="example_inputs="):
        TorchHost(TwoInputs()).sites()
    x = torch.randn(30, 5)
    for inputs in ((x, torch.tensor(2.0)), {"x": x, "scale": torch.tensor(2.0)}):
        sites, _ = TorchHost(TwoInputs(), example_inputs=inputs).sites()
        assert [site.activation.name for site in sites] == ["relu"]


@pytest.mark.parametrize("name", ["vit", "clip", "whisper"])
def test_inputs_of_other_modalities_are_guessed(name):
    sites, refused = TorchHost(build(name)).sites()
    assert {site.kind for site in sites} == {ARCHITECTURES[name][3]}
    assert refused == {}


def test_unknown_layers_and_points_are_named():
    lens = attach(build("gpt2"))
    with pytest.raises(InvalidInputError, match="no layer 7"), lens.host.cache([7]):
        pass
    with pytest.raises(InvalidInputError, match="no hook point 'degree_9'"):
        lens.host.cache(names=["degree_9"]).__enter__()


def test_a_second_lens_is_refused():
    model = build("gpt2")
    attach(model)
    with pytest.raises(AttachmentError, match="already"):
        attach(model)


def test_blocks_inside_of_what_belongs_to_another_block():
    model = build("mobilebert")
    before = snapshot(model)
    lens = attach(model, degree=1)
    paths = [site.path for site in lens.sites.values()]
    assert "encoder.layer.0" in paths
    assert "encoder.layer.0.ffn.0" in paths
    lens.detach()
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_linear_map_replaced_by_another_library_is_noticed(name):
    model = build("llama")
    before, reference = snapshot(model), logits(model)
    lens = attach(model)
    mlp = model.model.layers[0].mlp
    original = getattr(mlp, name)
    setattr(mlp, name, nn.Sequential(original))
    with pytest.raises(AttachmentError, match=f"{name} of a LlamaMLP was replaced"):
        logits(model)
    setattr(mlp, name, original)
    assert torch.equal(logits(model), reference)
    lens.detach()
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert"])
def test_all_hosts_agree_on_r2(name):
    sources = pytest.importorskip("transformer_lens.model_bridge.sources")
    nnsight = pytest.importorskip("nnsight", minversion="0.8")
    model = build(name)
    bridge = sources.build_bridge_from_module(
        copy.deepcopy(model), type(model).__name__, hf_config=model.config, tokenizer=None
    )
    values = []
    for host_model in (model, nnsight.NNsight(copy.deepcopy(model)), bridge):
        with attach(host_model) as lens:
            report = lens.report(TOKENS.flip(0), loss=False, progress=False)
        values.append([row.r2 for row in report.rows])
    for other in values[1:]:
        torch.testing.assert_close(torch.tensor(values[0]), torch.tensor(other), atol=1e-5, rtol=0)


@pytest.mark.parametrize("outer", ["observe", "substitute"])
def test_observers_see_the_true_output_and_substitutes_have_the_last_word(outer):
    model = build("gpt2")
    host = TorchHost(model)
    _, true = record(host)
    with attach(model) as lens, lens.replaced(), torch.no_grad():
        seen = []
        contexts = {
            "observe": lambda: host.observe({1: lambda x, y: seen.append(y) or y + 1}),
            "substitute": lambda: host.substitute({0: lambda x, y: torch.zeros_like(y)}),
        }
        inner = "substitute" if outer == "observe" else "observe"
        with contexts[outer](), contexts[inner](), host.substitute({1: lambda x, y: y * 0}):
            zeroed = logits(model)
        with host.substitute({0: lambda x, y: y * 0, 1: lambda x, y: y * 0}):
            assert torch.equal(logits(model), zeroed)
    assert not torch.equal(seen[0], torch.zeros_like(seen[0]))
    with torch.no_grad(), host.substitute({0: lambda x, y: y * 0}):
        assert torch.equal(seen[0], record(host)[1])
    assert not torch.equal(seen[0], true)


def record(host):
    """(x, y) of layer 1 in one pass."""
    kept = []
    with torch.no_grad(), host.observe({1: lambda x, y: kept.append((x, y))}):
        host.logits(TOKENS)
    return kept[0]
