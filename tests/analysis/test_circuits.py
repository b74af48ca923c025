"""Circuits: what flows into a node flows out of it, and the target is the model's own."""

import pytest
import torch
from tests.hf_models import build
from tests.models import HOSTS, hooked

import polylens
from polylens import InvalidInputError, UnsupportedModel, analysis

pytestmark = pytest.mark.filterwarnings("ignore::polylens.NumericalWarning", "ignore::UserWarning")

TOKENS = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(3))
PROMPT = TOKENS[0, :7]
ALL = 1000

MODELS = {
    **{
        name: HOSTS[name]
        for name in (
            *("hooked-layer_norm", "hooked-gated", "hooked-parallel", "hooked-post_norm"),
            *("hooked-folded", "bridge-gpt2", "bridge-llama", "bridge-olmo2", "bridge-neox"),
        )
    },
    **{
        name: lambda name=name: build(name)
        for name in ("gpt2", "llama", "gemma", "gemma2", "gpt_bigcode", "gptj", "phi3")
    },
}


def attach(model, **options):
    return polylens.attach(model, TOKENS, progress=False, **options)


def values(circuit):
    return torch.tensor([node.value for node in circuit], dtype=torch.float64)


def require_sums(circuit, logits, tolerance=1e-6):
    """All laws at once, to 1e-6 of the largest number; every MLP must have been split."""
    own = values(circuit)
    size = float(own.abs().max())
    into = circuit.edges.sum(1) + circuit.biases
    torch.testing.assert_close(into, own[: len(into)], atol=1e-9 * size, rtol=0)
    torch.testing.assert_close(circuit.edges.sum(0)[1:], own[1:], atol=1e-9 * size, rtol=0)
    of = {kind: sum(n.value for n in circuit if n.kind == kind) for kind in ("token", "error")}
    assert of["token"] == pytest.approx(circuit.embeddings, abs=1e-9 * size)
    assert of["error"] == pytest.approx(circuit.errors, abs=1e-9 * size)
    assert circuit.value == pytest.approx(logits, abs=tolerance * size)
    # of the host with eager attention, whose logits are others by its own rounding
    assert circuit.rounding == pytest.approx(logits - circuit.value, abs=tolerance * size)
    for node in circuit:
        if node.kind in ("feature", "rest"):
            assert node.first + node.second == pytest.approx(node.value, abs=1e-9 * size)


@pytest.mark.parametrize("name", MODELS)
def test_everything_sums_on_every_host(name):
    with attach(MODELS[name]()) as lens:
        for target, position in ((11, -1), ((11, 4), 3)):
            found = analysis.circuit(lens, PROMPT, target, position=position, features=3, mlps=ALL)
            if "gemma2" not in name:
                logits = lens.host.logits(PROMPT[None])[0, position].detach().double()
                expected = logits[11] - (logits[4] if target != 11 else 0)
            else:
                assert "before the cap" in found.target
                expected = torch.tensor(found.value + found.rounding)
            require_sums(found, float(expected))
            assert found.unsplit == 0
            assert found.missing == ()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("estimator", ["samples", "gaussian", "joint"])
def test_everything_sums_for_every_estimator_and_degree(estimator, degree):
    gated = dict(gated_mlp=True, normalization_type="RMS", act_fn="silu")
    method = polylens.TrueStream(estimator, tails=0.1 if estimator != "gaussian" else None)
    model = hooked(**gated)
    with attach(model, degree=degree, method=method) as lens:
        found = analysis.circuit(lens, PROMPT, 11, features=2, mlps=ALL)
        require_sums(found, float(model(PROMPT[None])[0, -1, 11]))
        kinds = {node.kind for node in found}
        # beyond an end it is y z, whatever the degree
        assert ("feature" in kinds) == (degree > 1 or estimator != "gaussian")


def test_of_a_layer_that_is_its_polynomial_nothing_is_an_error():
    model = hooked(torch.float64, gated_mlp=True, normalization_type="RMS", act_fn="silu")
    for block in model.blocks:
        block.mlp.act_fn = torch.nn.Identity()  # bilinear
    with attach(model, degree=2) as lens:
        found = analysis.circuit(lens, PROMPT, 11, mlps=ALL)
        assert max(abs(n.value) for n in found if n.kind == "error") < 1e-9
        # degree 2: the features of an MLP do nothing together
        own = [n for n in found if n.kind == "feature"]
        for node in own:
            assert node.second == pytest.approx(node.eigenvalue * node.activation**2, abs=1e-9)


def test_a_lens_without_all_layers_has_the_others_as_errors_and_says_so():
    model = hooked()
    with attach(model, layers=1) as lens:
        found = analysis.circuit(lens, PROMPT, 11, mlps=ALL)
        require_sums(found, float(model(PROMPT[None])[0, -1, 11]))
        assert found.missing == (0,)
        assert {n.layer for n in found if n.kind in ("feature", "rest")} == {1}
        assert {n.layer for n in found if n.kind == "error"} == {0, 1}


def test_a_direction_is_a_target_at_its_layer():
    model = hooked()
    u = torch.randn(24)
    with attach(model) as lens:
        _, cache = model.run_with_cache(PROMPT[None])
        for layer in (1, 2):
            expected = float(cache["resid_post", layer - 1][0, 3] @ u)
            found = analysis.circuit(lens, PROMPT, u, position=3, layer=layer, mlps=ALL)
            require_sums(found, expected)
            assert max(node.layer for node in found if node.kind != "target") == layer - 1
            assert all(n.value == 0 for n in found if n.position > 3)


def test_without_a_target_it_is_the_most_likely_token():
    model = hooked()
    with attach(model) as lens:
        best = model(PROMPT[None])[0, -1]
        found = analysis.circuit(lens, PROMPT)
        assert found.value == pytest.approx(float(best.max()), abs=1e-5)
        assert str(int(best.argmax())) in found.target


def test_mlps_left_whole_are_leaves():
    model = hooked()
    with attach(model) as lens:
        whole = analysis.circuit(lens, PROMPT, 11, mlps=0)
        some = analysis.circuit(lens, PROMPT, 11, mlps=3, features=2)
        every = analysis.circuit(lens, PROMPT, 11, mlps=ALL, features=2)
    assert whole.edges.shape == (1, len(whole))
    assert whole.unsplit == pytest.approx(1)
    assert 0 < some.unsplit < 1
    assert sum(n.kind == "rest" for n in some) == 3
    assert some.value == pytest.approx(every.value, abs=1e-12)
    # the strongest were split, and the target reads the same of all
    split = {(n.layer, n.position) for n in some if n.kind == "rest"}
    sizes = {(n.layer, n.position): abs(n.value) for n in whole if n.kind == "mlp"}
    assert split == set(sorted(sizes, key=sizes.get)[-3:])
    for node in some:
        if node.kind == "token":
            edge = float(every.edges[0, every.number(node)])
            assert float(some.edges[0, some.number(node)]) == pytest.approx(edge, abs=1e-12)


def test_nodes_by_name_and_by_size():
    model = hooked()
    with attach(model) as lens:
        found = analysis.circuit(lens, PROMPT, 11, mlps=4, features=2)
    top = found.top(3)
    assert [abs(n.value) for n in top] == sorted(abs(n.value) for n in found.nodes[1:])[::-1][:3]
    assert found[top[0].name] is top[0]
    assert found["token@2"].kind == "token"
    assert found.top(2, "error")[0].kind == "error"
    reads = found.sources("target")
    assert reads[0][1] == float(found.edges[0].abs().max()) or reads[0][1] < 0
    assert sum(edge for _, edge in reads) + float(found.biases[0]) == pytest.approx(found.value)
    assert ("target", reads[0][1]) in [(n.name, e) for n, e in found.readers(reads[0][0])]
    assert found.sources("token@2") == []
    assert "Circuit(logit of 11 = " in repr(found)
    with pytest.raises(InvalidInputError, match="no node 'L9'"):
        found["L9"]


BAD = {
    "no token": (dict(target=90), "no token"),
    "no number": (dict(target=1.5), "no token"),
    "text without a tokenizer": (dict(target="a"), "no tokenizer"),
    "against itself": (dict(target=(3, 3)), "against itself"),
    "three": (dict(target=(3, 4, 5)), r"\(token, against\)"),
    "a direction without its layer": (dict(target=torch.ones(24)), "needs layer="),
    "a direction of another size": (dict(target=torch.ones(23), layer=1), r"vector \[24\]"),
    "a layer for a token": (dict(target=3, layer=1), "direction target="),
    "a position outside": (dict(position=7), "position must be"),
    "no features": (dict(features=0), "features must be"),
    "one token": (dict(tokens=PROMPT[:1]), "two or more"),
    "several prompts": (dict(tokens=TOKENS), "one prompt"),
    "text": (dict(tokens="ab"), "no tokenizer"),
    "unknown ids": (dict(tokens=PROMPT + 90), "token ids must go"),
    "too many": (dict(tokens=torch.zeros(49, dtype=torch.long)), "49 positions"),
}


@pytest.fixture(scope="module")
def lens():
    with attach(hooked()) as lens:
        yield lens


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(lens, case):
    options, message = BAD[case]
    with pytest.raises(InvalidInputError, match=message):
        analysis.circuit(lens, options.pop("tokens", PROMPT), **options)


def test_other_models_and_lenses_are_refused_by_name():
    with pytest.raises(InvalidInputError, match="lens must be"):
        analysis.circuit(hooked(), PROMPT)
    with attach(build("falcon")) as lens, pytest.raises(UnsupportedModel, match="be frozen"):
        analysis.circuit(lens, PROMPT)
    with attach(hooked()) as lens:
        pass
    with pytest.raises(polylens.AttachmentError, match="detached"):
        analysis.circuit(lens, PROMPT)


def test_a_replaced_lens_is_traced_as_the_true_model():
    model = hooked()
    with attach(model, degree=1) as lens:
        expected = analysis.circuit(lens, PROMPT, 11, mlps=4)
        with lens.replaced():
            found = analysis.circuit(lens, PROMPT, 11, mlps=4)
    assert torch.equal(found.edges, expected.edges)
