"""Interventions against hooks written by hand, and what features write against their forms."""

import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tests.hf_models import DECODER, build, from_config
from tests.oracles import random_gaussian, random_layer

import polylens
from polylens import analysis
from polylens.analysis import Edit
from polylens.errors import InvalidInputError, UnsupportedModel

TOKENS = (torch.arange(36).reshape(3, 12) * 37 + 11) % 85 + 3
MASK = torch.ones_like(TOKENS)
MASK[1, :4] = 0
READ = dict(attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0))
CLOSE = dict(rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lens(request):
    model = build(request.param)
    tokens = torch.randint(3, 88, (8, 24), generator=torch.Generator().manual_seed(3))
    with polylens.attach(model, tokens, degree=2, progress=False) as lens:
        yield lens


def mlp_of(lens, layer):
    return lens.host.module.get_submodule(lens.sites[layer].path)


@contextmanager
def hooked(lens, layer, change):
    """Within the context change(y, x) is what the MLP writes."""
    hook = mlp_of(lens, layer).register_forward_hook(lambda m, args, y: change(y, args[0]))
    try:
        yield
    finally:
        hook.remove()


def by_hand(lens, layer, change, where):
    """Figures of an intervention from two passes of the model itself."""
    model = lens.host.module
    with torch.no_grad():
        base = model(TOKENS, **READ).logits
        with hooked(lens, layer, change):
            logits = model(TOKENS, **READ).logits
    real = MASK.bool()
    counted = (real[:, :-1] & real[:, 1:]).flatten()

    def ce(values):
        each = F.cross_entropy(
            values[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
        )
        return each[counted].double().mean()

    p, q = base.log_softmax(-1)[real].double(), logits.log_softmax(-1)[real].double()
    moved = (logits - base)[where].double().mean(0)
    return {
        "delta_ce": float(ce(logits) - ce(base)),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "logits": moved - moved.mean(),
    }


def assert_equals(effect, expected):
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(getattr(effect, name)),
            torch.as_tensor(value),
            check_dtype=False,
            **CLOSE,
        )


@pytest.mark.parametrize("replaced", [False, True])
def test_interventions_are_those_of_hooks(lens, replaced):
    layer, d_out = 0, lens.sites[0].d_out
    vector, part = torch.randn(d_out), lens[layer].part(2)
    at = torch.tensor([3, -1, 5])
    one = torch.zeros_like(MASK, dtype=torch.bool)
    one[[0, 1, 2], [3, 11, 5]] = True
    edits = {
        "steer": Edit(layer, vector, by=2.0),
        "degree 2": Edit(layer, part),
        "there": Edit(layer, part, by=3.0, at=at),
        "both": [Edit(layer, vector, by=-0.5, at=2 + 3), Edit(layer, lens[layer].weights)],
    }
    five = torch.zeros_like(one)
    five[:, 5] = True
    true = lens[layer].weights
    changes = {
        "steer": (lambda y, x: y + 2 * vector, MASK.bool()),
        "degree 2": (lambda y, x: y - part(x), MASK.bool()),
        "there": (lambda y, x: y + 3 * one[..., None] * part(x), one),
        "both": (lambda y, x: y - 0.5 * five[..., None] * vector - true(x), MASK.bool()),
    }
    with lens.replaced() if replaced else lens.suspended():
        found = analysis.intervene(lens, TOKENS, edits, attention_mask=MASK, batch_size=2)
        for name, change in changes.items():
            # padding is not edited, and nobody attends to it
            assert_equals(found[name], by_hand(lens, layer, *change))
            both = {"input_ids": TOKENS, "attention_mask": MASK}  # as tokenizers give them
        last = analysis.intervene(lens, both, Edit(-1, vector))["edit"]
        assert_equals(last, by_hand(lens, 1, lambda y, x: y - vector, MASK.bool()))
        alone = analysis.intervene(lens, TOKENS, edits["there"], attention_mask=MASK)
    assert [row.name for row in found] == list(edits)
    assert alone["edit"].kl == pytest.approx(found["there"].kl, rel=1e-4)
    best = int(found["steer"].logits.argmax())
    assert found["steer"].raises[0][0] == str(best)
    assert "steer" in str(found.to_dict())
    assert "steer" in found._repr_html_()
    assert re.search(r"^steer +[+-]", str(found), re.MULTILINE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_taking_a_degree_out_of_the_replacement_is_the_lower_degree(name):
    """Without ends, where both are the optima whose parts these are."""
    method = polylens.TrueStream(tails=None)
    with polylens.attach(build(name), TOKENS, degree=2, method=method, progress=False) as lens:
        edits = {"both": [Edit(layer, lens[layer].part(2)) for layer in lens]}
        with lens.replaced():
            found = analysis.intervene(lens, TOKENS, edits)["both"]
            base = lens.host.logits(TOKENS).log_softmax(-1).detach()
        with lens.replaced(degree=1), torch.no_grad():
            lower = lens.host.logits(TOKENS).log_softmax(-1)
    kl = F.kl_div(lower, base, log_target=True, reduction="none").sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-3)


def test_nothing_is_left_behind_and_training_models_are_refused(lens):
    before = lens.host.logits(TOKENS)
    broken = Edit(0, lambda x: x[:, :3])
    with pytest.raises(InvalidInputError, match=r"must write \[n, 24\], got \(36, 3\)"):
        analysis.intervene(lens, TOKENS, broken)
    assert torch.equal(lens.host.logits(TOKENS), before)


def test_logit_gradient_is_a_finite_difference(lens):
    direction = torch.randn(lens.sites[0].d_out)
    u = analysis.logit_gradient(lens, TOKENS, 0, 7, 11, at=4)
    step = 1e-2
    there = {
        s: analysis.intervene(lens, TOKENS[:1], Edit(0, direction, by=s * step, at=4))["edit"]
        for s in (1, -1)
    }
    moved = (there[1].logits - there[-1].logits) / (2 * step)
    assert float(moved[7] - moved[11]) == pytest.approx(float(u[0] @ direction.double()), rel=1e-2)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_parts_of_features_are_those_of_the_optimum(kind):
    layer, gaussian = random_layer(3, kind), random_gaussian(4)
    poly, x = polylens.fit(layer, gaussian, 2), torch.randn(50, 4, dtype=torch.float64)
    beta, _ = poly.linear()
    for metric in (None, "covariance"):
        part = analysis.singular_features(poly, metric=metric).part()
        torch.testing.assert_close(part(x), (x - gaussian.mean) @ beta)
        few = analysis.singular_features(poly, metric=metric)
        torch.testing.assert_close(few.part([0, 2])(x) + few.part(1)(x), part(x))
        u = torch.randn(3, dtype=torch.float64)
        features = analysis.eigenfeatures(poly, u, 4, metric=metric)
        written = features.part([1, 2, 3])(x)
        whole, first = features.restricted(4), features.restricted(1)
        torch.testing.assert_close(written @ u, whole(x) - first(x))
        other = u.new_tensor([u[1], -u[0], 0.0])  # along u only
        torch.testing.assert_close(written @ other, torch.zeros(50, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"some of 0 \.\.\. 3"):
        features.part(4)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_second_differences_are_the_pairs(kind):
    poly = polylens.fit(random_layer(3, kind), random_gaussian(4), 2)
    writers, u = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    a, b = torch.triu_indices(5, 5, 1)
    found = analysis.interactions(poly, writers, u)
    differences = analysis.second_differences(poly, writers, a, b)
    torch.testing.assert_close(differences @ u, 2 * found.pairs[a, b])
    f, x = poly.weights, writers.sum(0)
    true = analysis.second_differences(f, writers, a[:1], b[:1])[0]
    w, v = writers[0], writers[1]
    torch.testing.assert_close(true, f(x) - f(x - w) - f(x - v) + f(x - w - v))


def test_experts_are_edited_where_they_are_routed_to():
    model = from_config("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 2})
    tokens = torch.randint(3, 88, (16, 24))
    with polylens.attach(model, tokens, degree=1, layers=0, progress=False) as lens:
        vector = torch.randn(24)
        every = {expert: Edit(expert, vector, at=5) for expert in lens.layers}
        found = analysis.intervene(lens, TOKENS, {"all": list(every.values())})["all"]
        # both experts see every token, with weights that sum to 1
        mlp = model.model.layers[0].mlp
        there = torch.zeros(3, 12, 1)
        there[:, 5] = 1
        with torch.no_grad():
            base = model(TOKENS).logits
            hook = mlp.register_forward_hook(lambda m, args, y: y - there * vector)
            moved = (model(TOKENS).logits - base)[:, 5].double().mean(0)
            hook.remove()
        torch.testing.assert_close(found.logits, moved - moved.mean(), **CLOSE)


def test_bad_interventions_are_refused(lens):
    edit = Edit(0, torch.ones(24))
    calls = {
        r"vector \(24,\)": lambda: analysis.intervene(lens, TOKENS, Edit(0, torch.ones(25))),
        r"at must be in -12 \.\.\. 11": lambda: analysis.intervene(
            lens, TOKENS, Edit(0, torch.ones(24), at=12)
        ),
        "padding": lambda: analysis.intervene(
            lens, TOKENS, Edit(0, torch.ones(24), at=0), attention_mask=MASK
        ),
        "one for each of the 3": lambda: analysis.intervene(
            lens, TOKENS, Edit(0, torch.ones(24), at=torch.tensor([1, 2]))
        ),
        "no layer 7": lambda: analysis.intervene(lens, TOKENS, Edit(7, torch.ones(24))),
        "one Edit or several": lambda: analysis.intervene(lens, TOKENS, {}),
        "must be an Edit": lambda: analysis.intervene(lens, TOKENS, {"a": [edit, 3]}),
        "part must be a vector": lambda: analysis.intervene(lens, TOKENS, Edit(0, "degree 2")),
        r"got \(2, 24\)": lambda: analysis.intervene(lens, TOKENS, Edit(0, torch.ones(2, 24))),
        "a finite": lambda: analysis.intervene(lens, TOKENS, Edit(0, torch.ones(24) / 0)),
        "token must be an id": lambda: analysis.logit_gradient(lens, TOKENS, 0, 900),
    }
    for message, call in calls.items():
        with pytest.raises(InvalidInputError, match=message):
            call()
    with pytest.raises(KeyError, match="no intervention 'x'"):
        analysis.intervene(lens, TOKENS, {"a": edit})["x"]


def test_interventions_in_a_classifier_and_in_a_model_of_images():
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    x = torch.randn(300, 3)
    with polylens.attach(network.eval(), x, degree=2, progress=False) as lens:
        features = analysis.singular_features(lens[0], metric="covariance")
        edits = {i: Edit(0, features.part(i)) for i in range(3)}
        found = analysis.intervene(lens, x, edits, batch_size=128)
        for i, effect in enumerate(found):
            base = network(x).detach()
            moved = base - features.part(i)(x)
            p, q = base.double().log_softmax(-1), moved.log_softmax(-1)
            assert effect.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
            same = (p.argmax(-1) == q.argmax(-1)).double().mean()
            assert effect.agreement == pytest.approx(float(same))
            assert effect.delta_ce is None
        assert "300 inputs" in found._repr_html_()
    model, pixels = build("vit"), torch.randn(6, 3, 16, 16)
    with polylens.attach(model, pixels, degree=1, progress=False) as lens:
        vector = torch.randn(24)
        found = analysis.intervene(lens, pixels, Edit(1, vector))["edit"]
        with torch.no_grad():
            base = model(pixels).logits.double()
            with hooked(lens, 1, lambda y, x: y - vector):
                moved = (model(pixels).logits.double() - base).mean(0)
        torch.testing.assert_close(found.logits, moved - moved.mean(), **CLOSE)
    embedder = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    embedder.append(torch.nn.Unflatten(1, (2, 1, 2)))
    with polylens.attach(embedder.eval(), x, degree=1, progress=False) as lens:
        with pytest.raises(UnsupportedModel, match=r"returns \[8, 2, 1, 2\]"):
            analysis.intervene(lens, x, Edit(0, torch.ones(4)))
