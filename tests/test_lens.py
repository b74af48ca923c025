"""What attach, Lens and the calibration refuse, and what they measure, on the trained model."""

import pytest
import torch

import polylens
from polylens import (
    AttachmentError,
    FromInputs,
    FromNorm,
    Gaussian,
    InvalidInputError,
    TrueStream,
    demo,
)
from tests.models import BRIDGES, D_VOCAB, hooked

TOKENS = demo.batches(demo.texts()[0], 8, 64)
HELD_OUT = demo.batches(demo.texts()[1], 8, 64)


@pytest.fixture(scope="module")
def model():
    return demo.load_bridge()


def attach(model, tokens=TOKENS, **options):
    return polylens.attach(model, tokens, progress=False, **options)


def inputs_of(model, layer, tokens):
    seen = []
    with torch.no_grad():
        model.run_with_hooks(
            tokens,
            fwd_hooks=[(f"blocks.{layer}.mlp.hook_in", lambda x, hook: seen.append(x))],
        )
    return seen[0].double()


def test_calibration_is_the_moments_of_the_counted_inputs(model):
    mask = torch.ones_like(TOKENS)
    mask[:, 50:] = 0
    with attach(model, attention_mask=mask, layers=2) as lens:
        gaussian = lens[2].inputs
    x = inputs_of(model, 2, TOKENS)[:, 1:50].reshape(-1, 128)
    assert torch.allclose(gaussian.mean, x.mean(0), atol=1e-6)
    assert torch.allclose(gaussian.cov, torch.cov(x.T, correction=0), atol=1e-6)


def test_batch_size_does_not_matter(model):
    means = []
    for batch_size in (1, 8):
        with attach(model, batch_size=batch_size, layers=[0]) as lens:
            means.append(lens[0].inputs.mean)
    assert torch.allclose(*means, atol=1e-9)


def test_the_trained_model_is_nearly_cubic(model):
    tokens = demo.batches(demo.texts()[0], 32, 128)
    with attach(model, tokens, degree=3) as lens:
        report = lens.report(HELD_OUT, progress=False)
    for row in report:
        assert row.r2[3] > 0.95
        assert row.r2[3] > row.r2[2] > row.r2[1]
        assert abs(row.delta_ce) < 0.06
    assert report.all_row.loss_recovered > 0.9
    assert "first positions excluded" in str(report)


def test_without_tokens_the_model_is_sampled(model):
    before = torch.random.get_rng_state()
    with polylens.attach(model, layers=1, progress=False) as lens:
        assert "sampled from the model" in lens.inputs_summary
        sampled = lens.report(HELD_OUT, loss=False, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sampled[1].r2[2] > 0.5


def test_a_hooked_transformer_is_sampled_too():
    model = hooked()
    with polylens.attach(model, layers=1, progress=False) as lens:
        assert "sampled from the model" in lens.inputs_summary


def test_the_norm_alone_needs_no_data(model):
    with polylens.attach(model, method=FromNorm(), layers=1, progress=False) as lens:
        gaussian = lens[1].inputs
        assert "norm" in lens.inputs_summary
    norm = demo.load_model().transformer.h[1].ln_2
    weight = norm.weight.double().detach()
    assert torch.allclose(gaussian.mean, norm.bias.double().detach())
    assert torch.allclose(gaussian.variances(), weight.square() * (1 - 1 / 128))


def test_reports_measure_the_true_model_even_inside_replaced(model):
    with attach(model) as lens:
        plain = lens.report(HELD_OUT, loss=False, progress=False)
        with lens.replaced():
            inside = lens.report(HELD_OUT, loss=False, progress=False)
    assert inside.to_dict() == plain.to_dict()


def test_another_lens_takes_the_place_of_the_one_that_is_there(model):
    first = attach(model, layers=0)
    plain = model(HELD_OUT)
    with pytest.raises(polylens.InvalidInputError, match="no layer 99"):
        attach(model, layers=99)
    assert first.is_attached
    assert polylens.attached(model) is first
    with first.replaced():
        replaced = model(HELD_OUT)
        with pytest.raises(AttachmentError, match="replaces layers"):
            attach(model)
    with pytest.warns(UserWarning, match="takes its place"):
        second = attach(model, layers="1-2")
    assert not first.is_attached
    assert polylens.attached(model) is second
    assert second.layers == (1, 2)
    second.detach()
    with attach(model, layers=[-4]) as again, again.replaced():
        assert torch.equal(model(HELD_OUT), replaced)
    assert torch.equal(model(HELD_OUT), plain)


def test_replaced_without_with_says_that_it_does_nothing(model):
    with attach(model) as lens, pytest.warns(UserWarning, match="write `with"):
        lens.replaced(degree=1)


def test_tokens_come_as_tokenizers_give_them(model):
    padded = TOKENS.clone()
    mask = torch.ones_like(TOKENS)
    padded[:, -9:], mask[:, -9:] = 0, 0
    with attach(model, padded, attention_mask=mask) as lens:
        by_name = lens.report(padded, attention_mask=mask, progress=False)
        plain = lens.run_with_cache(padded, attention_mask=mask)[1]["out", 1]
    given = {"input_ids": padded.tolist(), "attention_mask": mask.tolist()}
    with attach(model, given) as lens:
        assert lens.report(given, progress=False).to_dict() == by_name.to_dict()
        out = lens.run_with_cache(given, names="out")[1]["out", 1]
        torch.testing.assert_close(out, plain)  # not the sum of its degrees, to rounding
        assert lens[-1] is lens[3]
        for wrong in ("1", slice(0, 2), None):
            with pytest.raises(InvalidInputError, match="one polynomial a layer"):
                lens[wrong]
    assert attach(model, list(TOKENS.split(4))).detach() is None
    refused = {
        "padding=True": [[1, 2, 3], [4, 5]],
        "polylens.tokenize": ["some text"],
        "no pixels": {"input_ids": TOKENS, "pixels": TOKENS},
    }
    for words, wrong in refused.items():
        with pytest.raises(InvalidInputError, match=words):
            attach(model, wrong)
    with pytest.raises(InvalidInputError, match="twice"):
        attach(model, given, attention_mask=mask)
    with pytest.raises(
        TypeError, match=r"attach\(\) takes no batchsize=; did you mean batch_size="
    ):
        attach(model, batchsize=4)


def test_what_is_not_in_the_cache_is_named(model):
    with attach(model, layers=[0, 2]) as lens:
        _, cache = lens.run_with_cache(TOKENS[:1], names=["in", "out"])
        with pytest.raises(InvalidInputError, match="not a filter"):
            lens.run_with_cache(TOKENS[:1], names=lambda name: "out" in name)  # type: ignore
    assert repr(cache) == "Values of in, out of layers [0, 2], by (name, layer)"
    assert cache["out", -1] is cache["out", 2]
    for wrong in ("poly_out", ("poly_out", 2), ("out", 1), ("out", -3), ("out", 2, "mlp")):
        with pytest.raises(KeyError, match=r"one of in, out and layer one of \[0, 2\]"):
            cache[wrong]
    with pytest.raises(KeyError, match="TransformerLens' own"):
        cache["poly_out", 2]
    assert cache.get("poly_out") is None


def test_a_token_is_named_by_its_text(model):
    assert model.tokenizer.decode(polylens.tokenize("schön", model, 6)[0].tolist()) == "schön"
    assert model.to_string(model.to_tokens("schön")) == ["schön"]  # as users of the host do
    assert model.to_tokens(["ab", "c"]).tolist() == [[97, 98], [99, 0]]
    assert model("ab").shape == (1, 2, 256)
    with attach(model, layers=[1, 3]) as lens:
        towards = polylens.analysis.logit_direction
        assert torch.equal(towards(lens, -1, "e", "a"), towards(lens, 3, ord("e"), ord("a")))
    with pytest.raises(InvalidInputError, match="longest has 5"):
        polylens.tokenize(["abc", "abcde"], model, 6)
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        polylens.tokenize("abc", torch.nn.Identity())


def test_attached_finds_the_lens_and_detach_forgets_it(model):
    lens = attach(model, layers=0)
    assert polylens.attached(model) is lens
    lens.detach()
    assert polylens.attached(model) is None
    for use in (lens.detach, lambda: lens.report(HELD_OUT), lambda: lens.replaced().__enter__()):
        with pytest.raises(AttachmentError, match="detached"):
            use()


def test_a_dropped_lens_is_still_found():
    model = BRIDGES["gpt2"]()
    polylens.attach(model, method=FromNorm(), progress=False)
    polylens.attached(model).detach()
    assert polylens.attached(model) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens=TOKENS.float()), "integer token ids"),
        (dict(tokens=TOKENS[:0]), "empty"),
        (dict(tokens=TOKENS[0]), r"tokens\[None\]"),
        (dict(tokens=TOKENS, method=FromNorm()), "not both"),
        (dict(method="sequential"), r"TrueStream\(\), Sequential\(\)"),
        (dict(method=TrueStream), r"TrueStream\(\), Sequential\(\)"),
        (dict(tokens=None, method=FromInputs({0: Gaussian.standard(128)})), r"layers \[1, 2, 3\]"),
        (dict(tokens=None, method=FromInputs(Gaussian.standard(7))), "layer 0.*128 features"),
        (dict(layers=4), r"no layer 4; there are \[0, 1, 2, 3\]"),
        (dict(layers=[]), "empty"),
        (dict(degree=-1), "degree"),
        (dict(degree=13), r"0 \.\.\. 12"),
        (dict(attention_mask=torch.ones(3, 3)), "attention_mask"),
        (dict(batch_size=0), "batch_size"),
    ],
)
def test_attach_refuses_and_leaves_nothing(model, options, message):
    with pytest.raises(InvalidInputError, match=message):
        attach(model, **options)
    assert polylens.attached(model) is None
    assert not any("poly" in name for name in model.hook_dict)


def test_replaced_refuses_unknown_layers_and_degrees(model):
    with attach(model, degree=2, layers=[0, 1]) as lens:
        for options, message in (
            (dict(degree=3), "attach with degree=3"),
            (dict(degree=-1), "degree"),
            (dict(layers=2), r"there are \[0, 1\]"),
        ):
            with pytest.raises(InvalidInputError, match=message), lens.replaced(**options):
                pass
        with pytest.raises(InvalidInputError, match=r"there are \[0, 1\]"):
            lens[3]


def test_what_is_given_by_name_only_says_so(model):
    with attach(model, degree=2, layers=[0, 1]) as lens:
        for use in (lens.replaced, lens.export, lambda x: lens.inline(0, x)):
            with pytest.raises(InvalidInputError, match=r"degree=.* by name \(got 2\)"):
                use(2)


def test_few_tokens_warn_with_the_rank(model):
    with pytest.warns(polylens.NumericalWarning, match="layer 0.*rank at most 62"):
        attach(model, TOKENS[:1], layers=0, method=TrueStream("gaussian")).detach()


def test_dropout_in_training_mode_is_an_error():
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=D_VOCAB, n_embd=24, n_layer=1, n_head=4, n_positions=64)
    hf = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    model = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=config, tokenizer=None)
    model.train()
    with pytest.raises(AttachmentError, match=r"model\.eval\(\)"):
        attach(model, TOKENS % D_VOCAB)


def test_nan_activations_name_the_layer():
    model = BRIDGES["gpt2"]()
    calls = []

    def poison(x, hook):
        calls.append(None)
        return x * float("nan") if len(calls) > 1 else x  # after the verifying pass

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_in", poison)]),
        pytest.raises(
            InvalidInputError,
            match=r"layer 1 \(blocks\.1\.mlp\): 248 of 248 samples are NaN",
        ),
    ):
        attach(model, TOKENS[:, :32] % D_VOCAB, layers=1)
    assert polylens.attached(model) is None


def test_not_a_model():
    with pytest.raises(polylens.UnsupportedModel, match="MLP"):
        attach(torch.nn.Linear(3, 3))


def test_find_mlps(model):
    sites = polylens.find_mlps(model)
    assert [(s.layer, s.kind, s.activation.name) for s in sites] == [
        (layer, "mlp", "gelu") for layer in range(4)
    ]
    assert all(s.error < 1e-5 for s in sites)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_norm_weight_that_is_a_constant_is_not_taken_for_none(name):
    model = BRIDGES[name]()
    for block in model.blocks:
        for norm in (block.ln1, block.ln2):
            torch.nn.init.constant_(norm.original_component.weight, 0.5)
    with polylens.attach(model, method=FromNorm(), layers=0, progress=False) as lens:
        scale = 1.5 if name == "gemma2" else 0.5  # Gemma multiplies by 1 + weight
        rank = 23 / 24 if name == "gpt2" else 1.0
        expected = torch.full((24,), scale**2 * rank, dtype=torch.float64)
        assert torch.allclose(lens[0].inputs.variances(), expected)
