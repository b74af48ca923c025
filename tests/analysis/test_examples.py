"""Examples of features against brute force over all activations, and what they do against hooks."""

import pytest
import torch
from tests.hf_models import DECODER, build, from_config
from tests.models import BRIDGES

import polylens
from polylens import analysis, demo
from polylens.errors import InvalidInputError

CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return demo.load_model()


@pytest.fixture(scope="module")
def text():
    return demo.batches(demo.texts()[1], 12, 48)


@pytest.fixture(scope="module")
def lens(model, text):
    with polylens.attach(model, text, degree=2, progress=False) as lens:
        yield lens


def activations(lens, tokens, layer, features, mask=None):
    """[batch, pos, k] by a hook of its own, -inf where nothing counts."""
    read = []
    module = lens.host.module.get_submodule(lens.sites[layer].path)
    hook = module.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        lens.host.logits(tokens, mask)
    hook.remove()
    return (read[0].double() - features.metric.center()) @ features.vectors


@pytest.mark.parametrize("padded", [False, True])
def test_examples_are_the_largest_of_all(lens, text, padded):
    mask = None
    if padded:
        mask = torch.ones_like(text)
        mask[3, :20] = 0
    u = torch.randn(128, dtype=torch.float64)
    features = {
        3: analysis.eigenfeatures(lens[3], u, 3, metric="covariance"),
        1: analysis.singular_features(lens[1], 4),
    }
    found = analysis.examples(
        lens, features, text, k=5, batch_size=5, attention_mask=mask, context=6
    )
    for layer, each in features.items():
        a = activations(lens, text, layer, each, mask)
        counts = torch.ones_like(text, dtype=torch.bool) if mask is None else mask.bool()
        counts = counts & (counts.long().cumsum(1) > 1)
        for i, row in enumerate(found[layer].rows):
            for sign, end in ((1, row.highest), (-1, row.lowest)):
                signed = torch.where(counts, sign * a[..., i], -torch.inf)
                best = signed.flatten().topk(5)
                values = torch.tensor([example.activation for example in end])
                torch.testing.assert_close(sign * values.double(), best.values, **CLOSE)
                places = [divmod(int(p), 48) for p in best.indices]
                assert [(e.sequence, e.position) for e in end] == places
            sequence, position = row.highest[0].sequence, row.highest[0].position
            ids = text[sequence].tolist()
            first = max(position - 6, 20 if padded and sequence == 3 else 0)
            assert row.highest[0].before == lens.host.tokenizer.decode(ids[first:position])
            assert row.highest[0].token == lens.host.tokenizer.decode(ids[position : position + 1])
            assert row.highest[0].after == lens.host.tokenizer.decode(
                ids[position + 1 : position + 3]
            )
        assert found[layer][0].value == pytest.approx(float(each.values[0]))
        assert sum(row.share for row in found[layer].rows) == pytest.approx(float(each.share[-1]))


def test_embeddings_are_shown_where_they_explain_the_activation(lens, model, text):
    features = {n: analysis.singular_features(lens[n], 3, metric="covariance") for n in (0, 3)}
    found = analysis.examples(lens, features, text)
    for layer, each in features.items():
        a = activations(lens, text, layer, each)[:, 1:]
        block = model.transformer.h[layer]
        with torch.no_grad():
            embedded = block.ln_2(model.transformer.wte.weight).double()
        embedded = (embedded - each.metric.center()) @ each.vectors
        for i, row in enumerate(found[layer].rows):
            pair = torch.stack([a[..., i].flatten(), embedded[text[:, 1:], i].flatten()])
            assert row.token_r2 == pytest.approx(float(torch.corrcoef(pair)[0, 1] ** 2), rel=1e-3)
            assert bool(row.high) == (row.token_r2 >= 0.5)
            if row.high:
                best = int(embedded[:, i].argmax())
                assert row.high[0][0] == repr(chr(best))
    # in the first layer tokens mean something
    assert max(row.token_r2 for row in found[0].rows) > 0.5
    assert min(row.token_r2 for row in found[3].rows) < 0.5


def test_effects_are_those_of_the_feature_at_its_examples(lens, model, text):
    features = analysis.singular_features(lens[2], 2, metric="covariance")
    found = analysis.examples(lens, {2: features}, text, k=3, effects=True)[2]
    for i, row in enumerate(found.rows):
        moved = 0
        for example in row.highest:
            tokens = text[example.sequence : example.sequence + 1]
            written = torch.zeros(1, 48, 128)

            def without(module, args, y, written=written, i=i, example=example):
                x = args[0][0, example.position].double()
                strength = (x - features.metric.center()) @ features.vectors[:, i]
                written[0, example.position] = (
                    strength * features.values[i] * features.outputs[:, i]
                )
                return y - written

            with torch.no_grad():
                base = model(tokens).logits[0, example.position]
                hook = model.transformer.h[2].mlp.register_forward_hook(without)
                moved = moved + base - model(tokens).logits[0, example.position]
                hook.remove()
        moved = moved.double() / 3
        moved = moved - moved.mean()
        best = moved.topk(5)
        assert [value for _, value in row.raises] == pytest.approx(best.values.tolist(), rel=1e-3)
        assert row.raises[0][0] == repr(chr(int(best.indices[0])))
    shown = found._repr_html_()
    assert "raises" in shown
    rows = found.to_dict()["rows"]
    assert rows[0]["highest"][0]["token"] == found[0].highest[0].token


def test_the_pass_ends_behind_the_last_layer_and_leaves_nothing(lens, model, text):
    calls = []
    hook = model.transformer.h[2].register_forward_hook(lambda *_: calls.append(2))
    before = lens.host.logits(text)
    calls.clear()
    directions = torch.randn(128, 6)
    found = analysis.examples(lens, {1: directions}, text, batch_size=4)
    hook.remove()
    assert len(calls) == 2  # a tiny pass for the norm, and the first of three batches
    assert torch.equal(lens.host.logits(text), before)
    assert found[1][0].value is None
    lists = analysis.examples(lens, {1: directions.numpy()}, text, batch_size=4)
    assert lists[1].rows == found[1].rows
    assert analysis.examples(lens, {-3: directions}, text, batch_size=4)[1].rows == found[1].rows
    with lens.replaced():  # the true model all the same
        again = analysis.examples(lens, {1: directions}, text, batch_size=4)
    assert found[1].rows == again[1].rows


def test_examples_of_features_on_bridges_and_of_experts():
    model = BRIDGES["gemma2"]()
    tokens = torch.randint(3, 88, (8, 24))
    with polylens.attach(model, tokens, degree=2, progress=False) as lens:
        features = analysis.singular_features(lens[0], 2)
        found = analysis.examples(lens, {0: features, 1: features}, tokens, effects=True)
        assert found[0][0].token_r2 > 0
        assert len(found[0][0].raises) == 5
    moe = from_config("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4})
    with polylens.attach(moe, tokens, degree=1, layers=0, progress=False) as lens:
        directions = torch.randn(24, 2, dtype=torch.float64)
        found = analysis.examples(lens, dict.fromkeys(lens.layers, directions), tokens)
        read = []
        with lens.host.observe({n: lambda a, n=n: read.append((n, a)) for n in lens.layers}):
            with torch.no_grad():
                lens.host.logits(tokens)
        for expert, arrival in read:
            there = arrival.places.rows % 24 > 0
            a = arrival.x[there].double() @ directions
            row = found[expert][0]
            assert row.highest[0].activation == pytest.approx(float(a[:, 0].max()), rel=1e-4)
            place = int(arrival.places.rows[there][int(a[:, 0].argmax())])
            assert (row.highest[0].sequence, row.highest[0].position) == divmod(place, 24)


def test_examples_of_a_shared_block_and_of_inputs_that_are_no_tokens():
    tokens = torch.randint(3, 88, (6, 16))
    with polylens.attach(build("albert"), tokens, degree=1, progress=False) as lens:
        directions = torch.randn(24, 2)
        found = analysis.examples(lens, {0: directions}, tokens, batch_size=2)
        read = []
        with lens.host.observe({0: lambda a: read.append(a.x[:, 1:].detach())}):
            lens.host.logits(tokens)
        assert len(read) == 2  # one block for both layers
        best = (torch.stack(read) @ directions).flatten(0, 2).max(0).values
        for row, value in zip(found[0].rows, best, strict=True):
            assert row.highest[0].activation == pytest.approx(float(value), rel=1e-4)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(20, 3)
    with polylens.attach(network.eval(), x, degree=2, progress=False) as lens:
        found = analysis.examples(lens, {0: torch.eye(3)}, x, k=2)
        assert found[0][1].highest[0].sequence == int(x[:, 1].argmax())
        assert found[0][1].lowest[0].activation == pytest.approx(float(x[:, 1].min()))
        assert found[0][1].highest[0].token == ""
        with pytest.raises(InvalidInputError, match="reads none"):
            analysis.examples(lens, {0: torch.eye(3)}, x, effects=True)


def test_layer_features_have_examples_where_there_is_a_text(lens, text, tmp_path):
    found = analysis.layer_features(lens, 1, ord("e"), text, against=ord("a"), k=2, n_examples=3)
    assert found.about == "along the logit of 'e' against 'a'"
    assert len(found[0].highest) == 3
    plain = analysis.layer_features(lens, 1, ord("e"), against=ord("a"), k=2)
    assert plain[0].value == found[0].value
    assert len(plain[0].high) == 6
    assert plain[0].highest == ()
    found.plot().savefig(tmp_path / "features.png")
    plain.features.plot().savefig(tmp_path / "spectrum.png")
    analysis.singular_features(lens[1], 3).plot().savefig(tmp_path / "singular.png")


def test_bad_input_is_refused(lens, text):
    features = analysis.singular_features(lens[1], 2)
    calls = {
        r"finite \[128, k\], got \(64, 2\)": lambda: analysis.examples(
            lens, {1: torch.randn(64, 2)}, text
        ),
        "no layer 9": lambda: analysis.examples(lens, {9: features}, text),
        "given by layer": lambda: analysis.examples(lens, features, text),
        "k must be": lambda: analysis.examples(lens, {1: features}, text, k=0),
        "directions from elsewhere": lambda: analysis.examples(
            lens, {1: torch.randn(128, 2)}, text, effects=True
        ),
        "features must be a tensor": lambda: analysis.examples(lens, {1: "the"}, text),
        "token ids": lambda: analysis.examples(lens, {1: features}, text.float()),
    }
    for message, call in calls.items():
        with pytest.raises(InvalidInputError, match=message):
            call()
