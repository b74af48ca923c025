"""Plain torch and Hugging Face models: hooks only, exact restoration, values at the points."""

from types import SimpleNamespace

import pytest
import torch
from tests.hf_models import ARCHITECTURES, build
from tests.host_contract import (
    TOKENS,
    HostContract,
    Specimen,
    attach,
    logits,
    module_snapshot,
    test_assert_close_fails_on_what_is_not,  # noqa: F401
    test_the_snapshot_notices_each_kind_of_leftover,  # noqa: F401
)
from torch import nn

import polylens
from polylens import FromInputs
from polylens.errors import AttachmentError, InvalidInputError, UnsupportedModel
from polylens.hosts.torch.host import TorchHost

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning")

# a fused gate, no mlp module and flat inputs, a residual inside, two stacks, one shared block
MODELS = ["gpt2", "llama", "phi3", "opt", "bloom", "bert", "albert", "t5", "bart", "modernbert"]


class TestHost(HostContract):
    @pytest.fixture(scope="class", params=[*MODELS, "llama in bfloat16"])
    def specimen(self, request):
        name, _, bfloat16 = request.param.partition(" in ")
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        return Specimen(name, lambda: build(name, dtype))


def test_text_is_sampled_without_touching_the_random_state():
    host = TorchHost(build("gpt2"))
    state = torch.get_rng_state()
    first, again = (host.sample_tokens(3, 9, seed=1) for _ in range(2))
    assert first.shape == (3, 9)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_models_that_cannot_generate_ask_for_tokens():
    with pytest.raises(UnsupportedModel, match="give tokens="):
        polylens.attach(build("bert"), progress=False)
    with pytest.raises(UnsupportedModel, match="a mapping with decoder_input_ids or labels"):
        polylens.attach(build("t5"), progress=False)


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
    before, x = module_snapshot(model), torch.randn(50, 10)
    reference = model(x)
    host = TorchHost(model)
    sites, refused = host.sites()
    assert [(s.layer, s.path, s.d_in, s.d_mlp, s.d_out) for s in sites] == [
        (0, "2", 10, 20, 21),
        (1, "4", 20, 21, 3),
    ]
    assert refused == {}
    gaussian = polylens.Gaussian(torch.zeros(10), torch.eye(10))
    lens = polylens.attach(model, method=FromInputs(gaussian), layers=0, degree=2, progress=False)
    assert torch.equal(model(x), reference)
    with lens.replaced():
        expected = model[4](model[3](lens[0](x)))
        torch.testing.assert_close(model(x), expected)
    logits, cache = lens.run_with_cache(x, layers=0, names=["out"])
    assert torch.equal(logits, reference)
    torch.testing.assert_close(cache["out", 0], lens[0](x))
    lens.detach()
    assert module_snapshot(model) == before


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


def test_inputs_serve_as_their_own_example():
    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter, self.a, self.b = nn.Conv1d(3, 5, 2), nn.Linear(5, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.b(torch.relu(self.a(self.filter(x).mean(-1))))

    model, x = Filtered(), torch.randn(200, 3, 9, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModel, match="example_inputs="):
        polylens.find_mlps(model)
    with polylens.attach(model, x, degree=2, progress=False) as lens:
        assert len(lens) == 1
        assert lens.report(x, progress=False)[0].r2[2] > 0.5


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed, self.a, self.b = nn.Embedding(9, 5), nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, tokens):
        return self.kind(self.b(torch.relu(self.a(self.embed(tokens)))))


@pytest.mark.parametrize(
    "kind",
    [
        lambda logits: logits,
        lambda logits: (logits, None),
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: SimpleNamespace(logits=logits),
    ],
)
def test_logits_however_a_module_returns_them(kind):
    tokens, model = torch.arange(6).reshape(2, 3), Returns(kind)
    expected = model.b(torch.relu(model.a(model.embed(tokens))))
    assert torch.equal(TorchHost(model, example_inputs=tokens).logits(tokens), expected)


def test_a_model_of_two_kinds_of_inputs_is_to_be_attached_to_by_parts():
    model = build("clip")
    before = module_snapshot(model)
    with pytest.raises(UnsupportedModel, match=r"does not run on input_ids alone.*pixel_values"):
        attach(model)
    assert module_snapshot(model) == before
    with attach(model.text_model) as lens:
        assert len(lens.layers) == 2


@pytest.mark.parametrize("name", ["vit", "clip", "whisper"])
def test_inputs_of_other_modalities_are_guessed(name):
    sites, refused = TorchHost(build(name)).sites()
    assert {site.kind for site in sites} == {ARCHITECTURES[name][3]}
    assert refused == {}


@pytest.mark.parametrize("name", ["vaultgemma", "recurrent_gemma", "deberta_v2", "eurobert"])
def test_models_without_a_line_of_code_of_their_own(name):
    with attach(build(name)) as lens:
        assert lens.refused == {}
        report = lens.report(TOKENS.flip(0, 1), loss=False, progress=False)
    for row in report:
        assert row.r2[3] > 0.9
        assert row.r2[3] > row.r2[2] > row.r2[1] > 0


def test_unknown_layers_and_points_are_named():
    lens = attach(build("gpt2"))
    with pytest.raises(InvalidInputError, match="no layer 7"):
        lens.run_with_cache(TOKENS, layers=[7])
    with pytest.raises(InvalidInputError, match="no hook point 'degree_9'"):
        lens.run_with_cache(TOKENS, names=["degree_9"])
    with pytest.raises(AttributeError, match="run_with_cache"):
        lens.cache(0)


def test_blocks_inside_of_what_belongs_to_another_block():
    model = build("mobilebert")
    before = module_snapshot(model)
    lens = attach(model, degree=1)
    paths = [site.path for site in lens.sites.values()]
    assert "encoder.layer.0" in paths
    assert "encoder.layer.0.ffn.0" in paths
    lens.detach()
    assert module_snapshot(model) == before


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_linear_map_replaced_by_another_library_is_noticed(name):
    model = build("llama")
    before, reference = module_snapshot(model), logits(model)
    lens = attach(model)
    mlp = model.model.layers[0].mlp
    original = getattr(mlp, name)
    setattr(mlp, name, nn.Sequential(original))
    with pytest.raises(AttachmentError, match=f"{name} of a LlamaMLP was replaced"):
        logits(model)
    setattr(mlp, name, original)
    assert torch.equal(logits(model), reference)
    lens.detach()
    assert module_snapshot(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2"])
def test_tokens_are_directions_as_on_a_bridge(name):
    model = build(name)
    host = TorchHost(model)
    host.sites()
    inner = model.transformer if name == "gpt2" else model.model
    last, table = (inner.ln_f, inner.wte) if name == "gpt2" else (inner.norm, inner.embed_tokens)
    offset = 1 if name == "gemma2" else 0
    norm = host.final_norm()
    assert norm.centred is (name == "gpt2")
    torch.testing.assert_close(norm.weight, last.weight.detach() + offset)
    assert torch.equal(host.embedding, table.weight)
    assert torch.equal(host.unembedding, model.lm_head.weight.T)
    behind = host.norms_behind([0, 1], "mlp")
    assert set(behind) == ({0, 1} if name in ("gemma2", "olmo2") else set())
    if behind:
        weight = inner.layers[1].post_feedforward_layernorm.weight.detach()
        torch.testing.assert_close(behind[1].weight, weight + offset)
    reference = logits(model)
    # a layer moves the logits along the unembedding, through these norms
    direction = torch.randn(24)
    with host.edit({1: lambda arrival: arrival.y + 1e-3 * direction}), torch.no_grad():
        moved = (host.logits(TOKENS) - reference)[0, 3].double()
    if not behind:
        u = polylens.analysis.unembedding_scores(
            direction, host.unembedding, centred=norm.centred, weight=norm.weight
        )
        # the norm shrinks what lies along its input, too, which a frozen scale leaves out
        assert torch.corrcoef(torch.stack([moved - moved.mean(), u[:, 0]]))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "does not read a norm of what"),
        ("bart", "in the residual stream"),
        ("vit", "that polylens knows"),
    ],
)
def test_models_in_which_tokens_are_no_directions_say_so(name, reason):
    host = TorchHost(build(name))
    host.sites()
    with pytest.raises(UnsupportedModel, match=reason):
        host.final_norm()
    with pytest.raises(UnsupportedModel, match="that polylens knows"):
        _ = TorchHost(torch.nn.Sequential(torch.nn.Linear(3, 2))).embedding


def test_the_tokenizer_is_that_which_lies_beside_the_model(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = build("llama")
    model.save_pretrained(tmp_path)
    words = {f"w{i}": i for i in range(90)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(tmp_path)
    assert TorchHost(model).tokenizer is None
    host = TorchHost(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert host.tokenizer.decode([7]) == "w7"
    host.model.tokenizer = "mine"
    assert host.tokenizer == "mine"


class InPlace(nn.Module):
    """A residual stream that every MLP is added to in place, or that is added to its output."""

    def __init__(self, into_output):
        super().__init__()
        self.into_output = into_output
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)
        )

    def forward(self, x):
        x = x.clone()
        for layer in self.layers:
            out = layer(x)
            x = out.add_(x) if self.into_output else x.add_(out)
        return x


@pytest.mark.parametrize("into_output", [True, False])
def test_what_is_kept_of_a_pass_is_not_what_the_model_writes_to(into_output):
    torch.manual_seed(0)
    model, x = InPlace(into_output).eval(), torch.randn(200, 8)
    with polylens.attach(model, x, degree=2, progress=False) as lens, torch.no_grad():
        ways = (lens.suspended(), 2), (lens.replaced(), 2), (lens.replaced(degree=0), 0)
        for context, degree in ways:
            with context:
                _, cache = lens.run_with_cache(x, layers=0)
            torch.testing.assert_close(cache["in", 0], x)
            torch.testing.assert_close(cache["out", 0], lens[0].truncate(degree)(x))
            true = cache["out", 0] + cache["error", 0]
            torch.testing.assert_close(true, model.layers[0](x))
