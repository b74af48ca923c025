"""Circuits: what flows into a node flows out of it, and the target is the model's own."""

import json
from dataclasses import replace

import pytest
import torch
from tests.hf_models import build
from tests.models import HOSTS, hooked

import polylens
from polylens import InvalidInputError, UnsupportedModel, analysis
from polylens.analysis.circuits import replacement
from polylens.analysis.circuits.documents import page, rounded
from polylens.analysis.circuits.paths import arriving

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
        for name in (
            *("gpt2", "llama", "gemma", "gemma2", "gpt_bigcode", "gptj", "phi3"),
            *("falcon", "bloom", "eurobert"),
        )
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


def test_edges_of_a_model_that_reads_both_ways_come_from_both_sides():
    with attach(build("eurobert")) as lens:
        found = analysis.circuit(lens, PROMPT, 11, position=3, features=2, mlps=ALL)
        reader = found.top(1, "feature")[0]
        sources = [source for source, _ in found.sources(reader) if source.position > 3][:3]
        cut = found.ablate_edges([(source, reader) for source in sources])
        later = [node for node in found.top(ALL, "feature") if node.position > 3][:6]
        taken = found.ablate(later)
    for each in (cut, taken):
        assert each.measured.abs().min() > 1e-6
        assert each.correlation() > 0.95


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
    assert f"; {100 * found.unsplit:.2g} % of what MLPs do is left whole)" in repr(found)
    assert found.unsplit > 0
    with pytest.raises(InvalidInputError, match="no node 'L9'"):
        found["L9"]
    with pytest.raises(InvalidInputError, match="kind must be one of feature, rest"):
        found.top(3, "features")
    for k in (found.top, lambda k: found.pairs(top[0], k)):
        with pytest.raises(InvalidInputError, match="k must be"):
            k(-1)


def test_rows_that_are_taken_back_a_few_at_a_time_are_the_same(lens, monkeypatch):
    expected = analysis.circuit(lens, PROMPT, 11, mlps=5, features=2)
    monkeypatch.setattr(replacement, "POSITIONS", 4 * len(PROMPT))
    found = analysis.circuit(lens, PROMPT, 11, mlps=5, features=2)
    assert len(found.edges) == 16
    torch.testing.assert_close(found.edges, expected.edges, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.biases, expected.biases, rtol=0, atol=1e-12)
    heads = found.heads()
    for edge, parts in expected.heads().items():
        assert dict(heads[edge]) == pytest.approx(dict(parts), abs=1e-12)


BAD = {
    "no token": (dict(target=90), "no token"),
    "no number": (dict(target=1.5), "no token"),
    "a tensor of no number": (dict(target=torch.tensor(1.5)), "no token"),
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
    with attach(build("bert")) as lens, pytest.raises(UnsupportedModel, match="be frozen"):
        analysis.circuit(lens, PROMPT)
    with attach(hooked()) as lens:
        pass
    with pytest.raises(polylens.AttachmentError, match="detached"):
        analysis.circuit(lens, PROMPT)


def test_ids_and_targets_as_they_come(lens):
    expected = analysis.circuit(lens, PROMPT, (11, 4), mlps=1)
    for tokens in (PROMPT.tolist(), PROMPT.numpy(), PROMPT[None], {"input_ids": PROMPT[None]}):
        for target in ([11, 4], (PROMPT.new_tensor(11), PROMPT.numpy().dtype.type(4))):
            assert torch.equal(analysis.circuit(lens, tokens, target, mlps=1).edges, expected.edges)


def test_a_replaced_lens_is_traced_as_the_true_model():
    model = hooked()
    with attach(model, degree=1) as lens:
        expected = analysis.circuit(lens, PROMPT, 11, mlps=4)
        with lens.replaced():
            found = analysis.circuit(lens, PROMPT, 11, mlps=4)
    assert torch.equal(found.edges, expected.edges)


def small(model, **options):
    with attach(model) as lens:
        yield lens, analysis.circuit(lens, PROMPT, (11, 4), **{"features": 2, "mlps": 8, **options})


@pytest.fixture(scope="module", params=["hooked-gated", "hooked-parallel", "bridge-olmo2", "gpt2"])
def traced(request):
    yield from small(MODELS[request.param]())


def test_pruning_is_that_of_circuit_tracer(traced):
    """Against its definitions with whole matrices and inverses."""
    _, circuit = traced
    n, rows = len(circuit), len(circuit.edges)
    A = torch.zeros(n, n, dtype=torch.float64)
    A[:rows] = circuit.edges.abs()
    A = A / A.sum(1, keepdim=True).clamp(min=1e-10)
    own = (torch.linalg.inv(torch.eye(n, dtype=torch.float64) - A) - torch.eye(n))[0]
    kind = {k: torch.tensor([node.kind == k for node in circuit]) for k in ("token", "error")}
    with_target = own + torch.eye(n)[0]
    pruned = circuit.pruned()
    scores = pruned.scores
    tokens, errors = own[kind["token"]].sum(), own[kind["error"]].sum()
    assert scores.replacement == pytest.approx(float(tokens / (tokens + errors)))
    explained = 1 - A[:, kind["error"]].sum(1)
    expected = float((explained * with_target).sum() / with_target.sum())
    # it counts leaves as explained, as nodes with no edges are there
    assert scores.completeness == pytest.approx(expected)
    order = own.argsort(descending=True)
    kept = int((own[order].cumsum(0) / own.sum() < 0.8).sum()) + 1
    strongest = {circuit.nodes[i].name for i in order[:kept].tolist()}
    names = {node.name for node in pruned}
    assert {n for n in names if "token" not in n and n != "target"} <= strongest
    assert {node.name for node in circuit if node.kind == "token"} <= names
    assert scores.nodes == (len(pruned), n)
    assert scores.edges[0] == int(pruned.edges.count_nonzero()) < scores.edges[1]
    for node in pruned.nodes[1:]:
        if node.kind != "token":
            assert pruned.readers(node.name)
        if node.kind in ("feature", "rest"):
            assert pruned.sources(node.name)
        for reader, edge in pruned.readers(node.name):
            whole = circuit.edges[circuit.number(reader.name), circuit.number(node.name)]
            assert edge == float(whole)
    assert pruned.cumulative.max() <= 1 + 1e-12


def test_pruning_keeps_all_at_one_and_refuses_what_is_no_share(traced):
    _, circuit = traced
    every = circuit.pruned(1.0, 1.0)
    assert every.scores.edges[0] > 0.9 * every.scores.edges[1]
    assert len(circuit.pruned(0.3)) < len(every)
    for options in ({"nodes": 1.1}, {"edges": -0.1}, {"nodes": True}, {"nodes": "a"}):
        with pytest.raises(InvalidInputError, match="must be a share"):
            circuit.pruned(**options)
    with pytest.raises(InvalidInputError, match="pruned already"):
        every.pruned()


def test_heads_sum_to_their_edges(traced):
    _, circuit = traced
    circuit = circuit.pruned(0.95)
    heads = circuit.heads()
    assert len(heads) == int(circuit.edges.count_nonzero())
    for (source, reader), parts in heads.items():
        edge = float(circuit.edges[circuit.number(reader), circuit.number(source)])
        assert sum(value for _, value in parts) == pytest.approx(edge, abs=1e-12)
        for name, _ in parts:
            layer = circuit[source].layer
            assert name == "residual" or int(name[1:].split("H")[0]) > layer
        if circuit[source].position != circuit[reader].position:
            assert all(name != "residual" for name, _ in parts)


def test_an_edge_through_one_head_has_its_name():
    """Of two layers and a direction behind the first, an edge from elsewhere passes one head."""
    model = hooked()
    with attach(model) as lens:
        traced = analysis.circuit(lens, PROMPT, torch.randn(24), layer=1, mlps=0)
        _, cache = model.run_with_cache(PROMPT[None])
    heads = traced.heads()["token@2", "target"]
    assert {name for name, _ in heads} == {f"L0H{h}" for h in range(4)}
    pattern, scale = cache["pattern", 0][0, :, -1, 2], cache["blocks.0.ln1.hook_scale"][0, 2, 0]
    x = model.blocks[0].hook_resid_pre(cache["resid_pre", 0][0, 2])
    read = (x - x.mean()) / scale * model.blocks[0].ln1.w
    attn = model.blocks[0].attn
    written = torch.einsum("h,m,hmd,hdo->ho", pattern, read, attn.W_V, attn.W_O)
    u = traced.replacement.target.direction.float()
    for name, value in heads:
        assert value == pytest.approx(float(written[int(name[-1])] @ u), abs=1e-5)


def test_pairs_sum_to_their_node(traced):
    _, circuit = traced
    for kind in ("feature", "rest"):
        for node in circuit.top(3, kind):
            pairs = circuit.pairs(node.name, k=5)
            assert len(pairs.names) == min(5, len(circuit.sources(node.name))) + 1
            torch.testing.assert_close(pairs.second, pairs.second.T)
            total = float(pairs.first.sum() + pairs.second.sum())
            assert total == pytest.approx(node.value, abs=1e-9)
            assert float(pairs.first.sum()) == pytest.approx(node.first, abs=1e-9)
            for i, (source, edge) in enumerate(circuit.sources(node.name)[:5]):
                assert pairs.names[i] == source.name
                own = float(pairs.first[i] + pairs.second[i].sum())
                assert own == pytest.approx(edge, abs=1e-9)
            a, b, value = pairs.top(1)[0]
            i, j = pairs.names.index(a), pairs.names.index(b)
            assert value == pytest.approx(float(pairs.second[i, j]) * (1 if i == j else 2))
    with pytest.raises(InvalidInputError, match="no feature or rest"):
        circuit.pairs("target")
    node = circuit.pruned().nodes[1]
    torch.testing.assert_close(
        circuit.pruned().pairs(node.name).first.sum(), circuit.pairs(node.name).first.sum()
    )


def test_ablations_are_those_of_a_hook(traced):
    lens, circuit = traced
    host = lens.host
    parts = circuit.top(3, "feature") + circuit.top(1, "error") + circuit.top(1, "rest")
    found = circuit.ablate([*parts, [parts[0], "L0.rest@6"]], batch_size=4)
    assert found.names[-1] == f"{parts[0].name} + L0.rest@6"
    assert str(found).splitlines()[-1].split()[-4] == f"{found.measured[-1]:+.4f}"
    for i, group in enumerate([*([p] for p in parts), [parts[0], circuit["L0.rest@6"]]]):

        def out(arrival, group=group, n=0):
            y = arrival.y.clone()
            for node in group:
                if node.layer == n:
                    y[0, node.position] -= circuit.writes[circuit.number(node.name)].to(y)
            return y

        layers = {node.layer for node in group}
        with torch.no_grad(), host.edit({n: lambda a, n=n: out(a, n=n) for n in layers}):
            edited = host.logits(PROMPT[None])[0, -1]
        with torch.no_grad():
            true = host.logits(PROMPT[None])[0, -1]
        expected = (edited[11] - edited[4]) - (true[11] - true[4])
        assert float(found.measured[i]) == pytest.approx(float(expected), abs=1e-5)
        assert float(found.linear[i]) == pytest.approx(-sum(node.value for node in group))
    # one alone, and one that is named twice
    for groups in (parts[0], [[parts[0].name, parts[0]]]):
        (again,) = circuit.ablate(groups).measured
        assert float(again) == pytest.approx(float(found.measured[0]), abs=1e-5)


def test_a_small_change_is_predicted_to_first_order():
    """Of a bilinear model in float64, with nothing but attention patterns left out."""
    model = hooked(torch.float64, gated_mlp=True, normalization_type="RMS", act_fn="silu")
    for block in model.blocks:
        block.mlp.act_fn = torch.nn.Identity()
        block.attn.W_Q.data.zero_()  # patterns depend on nothing
        block.attn.b_Q.data.zero_()
    with attach(model, degree=2) as lens:
        circuit = analysis.circuit(lens, PROMPT, 11, features=2, mlps=ALL)
        readers = circuit.top(6, "feature") + circuit.top(3, "rest")
        edges = [(source, node) for node in readers for source, _ in circuit.sources(node)[:3]]
        assert {source.kind for source, _ in edges} > {"token", "feature"}
        # patterns that do not change: what is predicted is what happens
        for found in (circuit.ablate(circuit.top(12, "feature")), circuit.ablate_edges(edges)):
            torch.testing.assert_close(found.predicted, found.measured, atol=1e-8, rtol=1e-6)
            assert found.measured.abs().min() > 1e-6
            assert found.correlation() == pytest.approx(1)
            assert found.agreement() == 1
            assert found.correlation("gradient") < 1 - 1e-6
            # its first order is the true one, then, but for the third in the small step
            error, first = (
                (each - found.measured).abs().max() for each in (found.corrected, found.gradient)
            )
            assert error < 1e-2 * first


def test_the_corrected_prediction_has_the_gradient_for_small_changes(traced):
    """What is nearly nothing is to first order alone: then it is the gradient."""
    _, circuit = traced
    nodes = circuit.top(6, "feature")
    shrunk = circuit.writes.clone()
    own = [circuit.number(node) for node in nodes]
    shrunk[own] *= 1e-2
    found = replace(circuit, writes=shrunk).ablate(nodes)
    own, others = ((found.gradient - p).abs().max() for p in (found.corrected, found.predicted))
    assert own < 2e-2 * found.gradient.abs().max()
    assert own < 0.7 * others
    with pytest.raises(InvalidInputError, match="of must be one of predicted, linear, gradient"):
        found.correlation("x")


def test_an_edge_taken_out_is_a_path_patched_in_the_true_model(traced):
    """Off the reader's input alone what it reads of the source, whatever it makes of that."""
    lens, circuit = traced
    host, weights = lens.host, lens[1].weights

    def target(scale, taken, position):
        def out(arrival):
            now = arrival.x.clone()
            now[..., position, :] -= scale * taken
            change = weights(now) - weights(arrival.x)
            return arrival.y + change.reshape(arrival.y.shape)

        with host.edit({1: out}):
            logits = host.logits(PROMPT[None])[0, -1]
        return logits[11] - logits[4]

    for kind in ("feature", "rest"):
        node = next(n for n in circuit.top(99, kind) if n.layer == 1)
        sources = [source for source, _ in circuit.sources(node)[:3]]
        found = circuit.ablate_edges([(source, node.name) for source in sources], batch_size=2)
        t = node.position
        features = torch.stack(circuit._features(1, t))
        every = torch.eye(features.shape[1], dtype=torch.float64)
        read = features[node.index].outer(features[node.index])
        read = read if kind == "feature" else every - features.T @ features
        for i, source in enumerate(sources):
            edge = circuit.edges[circuit.number(node), circuit.number(source)]
            assert float(found.linear[i]) == pytest.approx(-float(edge), abs=1e-9)
            written = circuit._written(circuit.number(source))
            taken = (read @ arriving(circuit.replacement, [written], 1, t)[0]).float()
            scale = torch.zeros((), requires_grad=True)
            target(scale, taken, t).backward()
            assert float(found.gradient[i]) == pytest.approx(float(scale.grad), abs=1e-5)
            with torch.no_grad():
                expected = float(target(1.0, taken, t) - target(0.0, taken, t))
            assert float(found.measured[i]) == pytest.approx(expected, abs=1e-5)
        pruned = circuit.pruned(1.0, 1.0)
        again = pruned.ablate_edges([(sources[0].name, node.name)])
        assert again.names == found.names[:1]
        torch.testing.assert_close(again.linear, found.linear[:1])
        torch.testing.assert_close(again.predicted, found.predicted[:1], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_taken_out_is_named(lens):
    circuit = analysis.circuit(lens, PROMPT, 11, mlps=2)
    for node in ("target", "token@2", 0):
        with pytest.raises(InvalidInputError, match="no part of an MLP"):
            circuit.ablate([node])
    rest = circuit.top(1, "rest")[0]
    for reader in ("target", "token@2"):
        with pytest.raises(InvalidInputError, match="no feature or rest"):
            circuit.ablate_edges([("token@1", reader)])
    for take_out, nothing in (
        (circuit.ablate, []),
        (circuit.ablate, [[]]),
        (circuit.ablate_edges, []),
    ):
        with pytest.raises(InvalidInputError, match="nothing to take out"):
            take_out(nothing)
    with pytest.raises(InvalidInputError, match="must be pairs"):
        circuit.ablate_edges(("token@1", rest.name))
    with pytest.raises(InvalidInputError, match="batch_size"):
        circuit.ablate([rest], batch_size=0)
    for source in ("target", rest):
        with pytest.raises(InvalidInputError, match=f"is not below {rest.name}"):
            circuit.ablate_edges([(source, rest)])
    with pytest.raises(InvalidInputError, match="two ablations"):
        circuit.ablate([circuit.top(1, "rest")[0]]).correlation()
    along = analysis.circuit(lens, PROMPT, torch.ones(24), layer=2, mlps=2)
    with pytest.raises(InvalidInputError, match="not measured"):
        along.ablate(along.top(2, "rest"))


def test_another_model_than_was_traced_is_not_measured():
    model = hooked()
    with attach(model) as lens:
        circuit = analysis.circuit(lens, PROMPT, 11, mlps=2)
        rest = circuit.top(1, "rest")[0]
        model.blocks[0].mlp.W_in.data.mul_(1.1)
        with pytest.raises(polylens.StalePolynomialError):
            circuit.ablate(rest)
    with pytest.raises(polylens.AttachmentError, match="detached"):
        circuit.ablate_edges([("token@1", rest)])


# What is published: required fields and JSON types of Neuronpedia's graph-schema.json 1.0.0, and
# the fields of circuit_tracer.frontend.graph_models, which are all written. [x]: a list of x.
TEXT, NUMBER, INTEGER, FLAG = (str,), (int, float), (int,), (bool,)
SOME = (*NUMBER, type(None))
SCHEMA = {
    "metadata": {
        **{"slug": TEXT, "scan": TEXT, "prompt": TEXT, "prompt_tokens": [TEXT]},
        **{"transcoder_list": [TEXT], "node_threshold": NUMBER, "schema_version": INTEGER},
        "info": {"description": TEXT, "generator": {"name": TEXT, "url": TEXT}},
        "pruning_settings": {"node_threshold": NUMBER, "edge_threshold": NUMBER},
    },
    "qParams": {
        **{"pinnedIds": [TEXT], "supernodes": [[TEXT]], "linkType": TEXT},
        **{"clickedId": TEXT, "sg_pos": TEXT},
    },
    "nodes": [
        {
            **{"node_id": TEXT, "jsNodeId": TEXT, "clerp": TEXT, "feature_type": TEXT},
            **{"feature": INTEGER, "layer": TEXT, "ctx_idx": INTEGER, "token_prob": NUMBER},
            **{"is_target_logit": FLAG, "run_idx": INTEGER, "reverse_ctx_idx": INTEGER},
            **{"influence": SOME, "activation": SOME},
        }
    ],
    "links": [{"source": TEXT, "target": TEXT, "weight": NUMBER}],
}
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def require_shape(value, schema, place="graph"):
    if isinstance(schema, dict):
        assert set(value) == set(schema), place
        for name, own in schema.items():
            require_shape(value[name], own, f"{place}.{name}")
    elif isinstance(schema, list):
        assert type(value) is list, place
        for i, each in enumerate(value):
            require_shape(each, schema[0], f"{place}[{i}]")
    else:
        assert type(value) in schema, (place, value)


def require_schema(graph):
    require_shape(graph, SCHEMA)
    nodes = graph["nodes"]
    assert {node["feature_type"] for node in nodes} <= TYPES
    ids = [node["node_id"] for node in nodes]
    assert len(set(ids)) == len(ids) == len({node["jsNodeId"] for node in nodes})
    assert {e[end] for e in graph["links"] for end in ("source", "target")} <= set(ids)
    n = len(graph["metadata"]["prompt_tokens"])
    assert all(0 <= node["ctx_idx"] < n for node in nodes)
    assert all(-1 <= (node["influence"] or 0) <= 1 + 1e-9 for node in nodes)


def require_opens(graph):
    """What the code of both front ends does with a node, and the published tests of ids."""
    nodes = graph["nodes"]
    for node in nodes:
        layer, number, at = node["node_id"].split("_")
        assert (layer, int(at)) == (node["layer"], node["ctx_idx"])
        if node["feature_type"] == "logit":
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(
                node["token_prob"], abs=6e-4
            )
            assert node["clerp"].split('"')[1]
        elif node["feature_type"] == "mlp reconstruction error":
            assert (int(number), node["feature"]) == (-1, -1)
        elif node["feature_type"] != "embedding":
            x, y = int(layer), int(number)
            assert node["feature"] == (x + y) * (x + y + 1) // 2 + y
    # one that is at more than two thirds of the positions would be left out
    places = [(n["layer"], n["feature"]) for n in nodes if "error" not in n["feature_type"]]
    assert len(places) == len(set(places))


def test_the_graph_file_is_what_front_ends_read(traced, tmp_path):
    _, circuit = traced
    for each in (circuit, circuit.pruned()):
        each.save_graph(tmp_path / "graph.json", "mine", "tiny")
        graph = json.loads((tmp_path / "graph.json").read_text())
        require_schema(graph)
        require_opens(graph)
        assert graph["metadata"]["slug"] == "mine"
        assert graph["metadata"]["scan"] == "tiny"
        (target,) = (node for node in graph["nodes"] if node["feature_type"] == "logit")
        assert target["is_target_logit"]
        assert target["node_id"] == "3_11_6"
        tokens = [node for node in graph["nodes"] if node["feature_type"] == "embedding"]
        assert [node["ctx_idx"] for node in tokens] == list(range(7))
        assert tokens[2]["node_id"] == f"E_{int(PROMPT[2])}_2"
    graph["nodes"][0]["clerp"] = None
    with pytest.raises(AssertionError):
        require_schema(graph)
    graph["nodes"][0]["clerp"] = "logit of 11"
    with pytest.raises(IndexError):
        require_opens(graph)


def test_the_page_holds_what_the_circuit_does(traced, tmp_path):
    _, circuit = traced
    pruned = circuit.pruned()
    pruned.save_page(tmp_path / "page.html", examples=TOKENS)
    text = (tmp_path / "page.html").read_text()
    assert "http" not in text.replace("http-equiv", "")  # nothing is loaded
    line = next(each for each in text.splitlines() if each.startswith("const data = "))
    data = json.loads(line.removeprefix("const data = ").removesuffix(";").replace("<\\/", "</"))
    assert data == json.loads(json.dumps(rounded(pruned.to_dict(TOKENS))))
    assert data["value"] == pytest.approx(circuit.value, rel=1e-4)
    assert [node["name"] for node in data["nodes"]] == [node.name for node in pruned]
    assert len(data["edges"]) == pruned.scores.edges[0]
    features = [node for node in data["nodes"] if node["kind"] == "feature"]
    assert features
    assert all(node["examples"] and node["raises"] and node["pairs"] for node in features)
    for node in features:
        activations = [each[3] for each in node["examples"]]
        assert activations == sorted(activations, reverse=True)
    assert pruned.to_dict()["nodes"][1]["examples"] == []


def test_text_that_would_end_the_script_does_not(tmp_path):
    text = page({"target": "</script><b>"})
    assert text.count("</script>") == 1
    assert "<\\/script>" in text


def test_it_is_drawn(traced):
    _, circuit = traced
    figure = circuit.pruned().plot(k=5)
    (panel,) = figure.axes
    assert len(panel.lines) == 5
    assert panel.get_title().startswith("logit of")
    assert len(panel.get_xticklabels()) == 7


def test_a_feature_is_scaled_wherever_the_model_runs(traced):
    lens, circuit = traced
    host, node = lens.host, circuit.top(1, "feature")[0]
    tokens = TOKENS[1:3, :9]
    v = torch.nn.functional.normalize(circuit.reads[circuit.number(node) - 1], dim=0)
    weights = lens[node.layer].weights
    seen = {}

    def expected(arrival):
        seen["x"] = arrival.x
        x = arrival.x.double()
        x = x - (x @ v)[..., None] * v
        return weights(x.to(arrival.x.dtype)).reshape(arrival.y.shape)

    with torch.no_grad():
        true = host.logits(tokens)
        with circuit.steered(node, 1.0):
            torch.testing.assert_close(host.logits(tokens), true)
        with circuit.steered(node):
            removed = host.logits(tokens)
        with host.edit({node.layer: expected}):
            torch.testing.assert_close(removed, host.logits(tokens), atol=1e-4, rtol=1e-4)
        with circuit.steered({node.name: 3.0}):
            assert not torch.allclose(host.logits(tokens), true)
        assert torch.equal(host.logits(tokens), true)
        assert (removed - true).abs().max() > 1e-4
        with circuit.steered([node]):
            assert torch.equal(host.logits(tokens), removed)
        for scales in ("token@1", {node: "a"}, {node: float("nan")}):
            with pytest.raises(InvalidInputError, match="scaled by fin"), circuit.steered(scales):
                pass
        with pytest.raises(InvalidInputError, match="nothing to scale"), circuit.steered([]):
            pass
        with pytest.raises(InvalidInputError, match="no node"), circuit.steered("L0.f9@1"):
            pass


def test_features_that_recur_are_listed(lens):
    prompts = [PROMPT, PROMPT, TOKENS[1, :5]]
    found = analysis.circuits(lens, prompts, [11, 11, 11], mlps=3, features=2)
    assert len(found) == 3
    assert [len(c.names) for c in found] == [7, 7, 5]
    recurring = found.recurring(cosine=0.999)
    assert recurring
    # the first two are the same prompt
    for group in recurring:
        numbers = [number for number, _ in group.members]
        assert group.prompts == len(set(numbers)) >= 2
        assert {0, 1} <= set(numbers)
        assert (group.cosines.abs() >= 0.999).all()
        for number, name in group.members:
            assert found[number][name].layer == group.layer
    own = {name for group in recurring for number, name in group.members if number == 0}
    assert own == {node.name for node in found[0] if node.kind == "feature"}
    assert found.recurring(cosine=0.999, least=4) == []
    for options in (dict(prompts=[]), dict(prompts=prompts, targets=[1])):
        with pytest.raises(InvalidInputError, match="targets for"):
            analysis.circuits(lens, **options)
    for cosine in (0, "a", True):
        with pytest.raises(InvalidInputError, match="cosine must be"):
            found.recurring(cosine=cosine)
    with pytest.raises(InvalidInputError, match="least must be"):
        found.recurring(least=0)


def test_attribution_patching_is_the_gradient_of_the_true_model(traced):
    lens, circuit = traced
    last = [n for n in circuit if n.position == 6 and n.kind in ("feature", "rest", "error")][:4]
    found = circuit.ablate(last)
    for node, value in zip(last, found.gradient, strict=True):
        slope = analysis.logit_gradient(lens, PROMPT[None], node.layer, 11, 4)[0]
        expected = -float(slope @ circuit.writes[circuit.number(node)])
        assert float(value) == pytest.approx(expected, abs=1e-6)
