"""Tracing a prompt through the polynomials of a lens."""

from typing import Any

import torch
from torch import Tensor

from polylens.analysis.arguments import check_lens
from polylens.analysis.circuits.graph import Circuit, Node, starts
from polylens.analysis.circuits.replacement import Flow, Replacement, stacked, values
from polylens.analysis.circuits.target import TargetLike, prompt_of, resolve
from polylens.analysis.eigensolver import extreme_eigenpairs
from polylens.analysis.features import DENSE
from polylens.calibration.seen import require_deterministic
from polylens.checks import check_at_least
from polylens.hosts.freezing import freeze
from polylens.polynomials.quadratic_form import QuadraticForm

# Where not all eigenpairs are computed, so many times the features that are kept.
SPARE = 3


@torch.no_grad()
def circuit(
    lens: Any,
    tokens: Any,
    target: TargetLike = None,
    *,
    position: int = -1,
    layer: int | None = None,
    features: int = 8,
    mlps: int = 64,
) -> Circuit:
    """What makes a model predict what it does at a prompt, from its weights.

    With attention patterns and norm scales held at their values and every MLP the polynomial that
    the lens has (the piece that its input lies in), the model is a polynomial of its embeddings.
    What it lacks of the true MLPs at this prompt stands beside it as errors, so that its target is
    the model's own. Every MLP's output is shared among the parts of its input to order two in
    closed form (`polylens.polynomials.shares`), so that what flows into a node flows out of it:

        target = embeddings + biases + errors, and each node = its edges + its bias

    An MLP at a position is split along what flows back into it: the eigenvectors of the quadratic
    form that it is there, by what they contribute, and the rest.

    Args:
        lens: attached, of a decoder, or of an encoder with norms in front of its layers, whose
            edges come from both sides. Layers that it lacks are errors as a whole.
        tokens: [pos] ids of one prompt, or its text.
        target: a token whose logit is traced, id or text; (token, against) for a difference of
            logits; a direction [d_model] of the stream in front of `layer`; the most likely token
            by default.
        position: where.
        features: of each MLP that is split.
        mlps: how many MLPs at positions are split and get edges: those whose contributions are
            largest. The others are leaves.

    Raises:
        InvalidInputError: a target that is no token, a prompt of one token, another lens.
        UnsupportedModel: a model whose attention or norms cannot be frozen.
        StalePolynomialError, AttachmentError: as `Lens.replaced`.

    Cost: a forward pass; for each MLP that is split an eigenproblem of d_in x d_in (Lanczos above
    1024) and features + 1 rows, each of which takes attention's two maps back through all layers
    below. Memory: rows x pos x d_model in float64, three times.

    >>> import polylens
    >>> from polylens import analysis, demo
    >>> model, tokens = demo.load_model(), demo.batches(demo.texts()[1], 4, 64)
    >>> lens = polylens.attach(model, tokens, progress=False)
    >>> traced = analysis.circuit(lens, demo.encode("a list of str"), mlps=4)
    >>> sources = [edge for _, edge in traced.sources("target")]
    >>> abs(sum(sources) + float(traced.biases[0]) - traced.value) < 1e-9
    True
    """
    check_lens(lens)
    check_at_least("features", features, 1)
    check_at_least("mlps", mlps, 0)
    lens.ready(None, None)
    require_deterministic(lens.host.module)
    ids = prompt_of(lens.host, tokens)
    with lens.suspended():
        frozen = freeze(lens.host, ids, lens.layers)
    goal = resolve(lens.host, frozen, target, position, layer)
    replacement = Replacement.of(lens, frozen, goal)
    flows, of_embeddings, bias = replacement.flows()
    by_token = values(of_embeddings, frozen.embedding)
    # by layer and position: of the polynomial without its constant, and of the error
    layers = replacement.layers
    written = [layer.written for layer in layers]
    mlp = torch.stack([values(flow.u, written[n]) for n, flow in enumerate(flows)])
    error = torch.stack([values(flow.u, layers[n].error) for n, flow in enumerate(flows)])
    chosen = _largest(mlp, mlps)
    found = _Nodes(replacement)
    found.add([Node("target", goal.layer, goal.position)], torch.zeros_like(frozen.embedding[:1]))
    places = [(n, t) for n in reversed(range(len(layers))) for t in range(len(ids))]
    for n, t in places:
        if (n, t) in chosen:
            found.split(n, t, flows[n], features)
    leaves = [(n, t) for n, t in places if layers[n].shares is not None and (n, t) not in chosen]
    for n, t in leaves:
        found.add([Node("mlp", n, t, value=float(mlp[n, t]))], written[n][t][None])
    for n, t in places:
        found.add([Node("error", n, t, value=float(error[n, t]))], layers[n].error[t][None])
    for t, value in enumerate(by_token.tolist()):
        found.add([Node("token", -1, t, value=value)], frozen.embedding[t][None])
    embeddings, errors = float(by_token.sum()), float(error.sum())
    left = sum(abs(float(mlp[n, t])) for n, t in leaves)
    return found.circuit(
        embeddings,
        bias,
        errors,
        float(_true(replacement)) - (embeddings + bias + errors),
        left / max(float(mlp.abs().sum()), 1e-300),
        _texts(lens.host.tokenizer, ids),
        flows,
        lens,
    )


def _texts(tokenizer: Any, ids: Tensor) -> tuple[str, ...]:
    """By token; its number where there is no tokenizer."""
    return tuple(str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids.tolist())


def _true(replacement: Replacement) -> Tensor:
    """The target, by the model itself."""
    target, frozen = replacement.target, replacement.frozen
    if not target.tokens or frozen.capped:
        stream = frozen.streams()[target.layer][target.position]
        return stream @ target.direction + target.constant
    logits = frozen.logits[target.position, list(target.tokens)]
    return logits[0] if len(logits) == 1 else logits[0] - logits[1]


def _largest(sizes: Tensor, count: int) -> set[tuple[int, int]]:
    """(layer, position) of the largest |entries| that are not zero."""
    flat = sizes.abs().reshape(-1)
    order = flat.argsort(descending=True)[:count].tolist()
    return {divmod(i, sizes.shape[1]) for i in order if flat[i] > 0}


class _Nodes:
    """Nodes as they are found, with what they write and, of those with edges, read."""

    def __init__(self, replacement: Replacement) -> None:
        self.replacement = replacement
        self.nodes: list[Node] = []
        self.writes: list[Tensor] = []
        self.reads: list[Tensor] = []  # of nodes behind the target: covectors of MLP inputs

    def add(self, nodes: list[Node], writes: Tensor) -> None:
        self.nodes += nodes
        self.writes.append(writes)

    def split(self, n: int, t: int, flow: Flow, count: int) -> None:
        """The features of one MLP at one position, and the rest."""
        layer = self.replacement.layers[n]
        assert layer.shares is not None
        x, r = layer.read[t], flow.r[t]
        form = layer.shares.second(t, flow.u[t])
        vectors = _eigenvectors(form, x, r, count)
        image = form @ torch.cat([vectors, x[:, None]], dim=1)
        eigenvalues = torch.linalg.vecdot(vectors, image[:, :-1], dim=0)
        activations, gains = x @ vectors, r @ vectors
        seconds, every = eigenvalues * activations.square(), float(x @ image[:, -1])
        read = gains * vectors
        written = layer.shares.forward(t, (activations * vectors).T)
        own: list[Node] = []
        for i, second in enumerate(seconds.tolist()):
            value, a = float(activations[i] * gains[i]), float(activations[i])
            own.append(
                Node("feature", n, t, i, value, a, value - second, second, float(eigenvalues[i]))
            )
        rest = r - read.sum(1)
        value, second = float(x @ rest), every - float(seconds.sum())
        own.append(Node("rest", n, t, 0, value, None, value - second, second))
        self.reads += [*read.T, rest]
        in_all = layer.shares.forward(t, x[None])
        self.add(own, torch.cat([written, in_all - written.sum(0, keepdim=True)]))

    def circuit(
        self,
        embeddings: float,
        bias: float,
        errors: float,
        rounding: float,
        unsplit: float,
        names: tuple[str, ...],
        flows: list[Flow],
        lens: Any,
    ) -> Circuit:
        replacement, writes = self.replacement, torch.cat(self.writes)
        reads = stacked(self.reads, replacement.layers[0].read)
        edges, biases = direct_effects(replacement, self.nodes, writes, reads)
        value = embeddings + bias + errors
        self.nodes[0] = Node(
            "target", replacement.target.layer, replacement.target.position, value=value
        )
        missing = [n for n, layer in enumerate(replacement.layers) if layer.shares is None]
        return Circuit(
            replacement.target.label,
            names,
            tuple(self.nodes),
            edges,
            biases,
            embeddings,
            bias,
            errors,
            rounding,
            tuple(missing),
            unsplit,
            writes,
            reads,
            replacement,
            tuple(flows),
            lens,
        )


def direct_effects(
    replacement: Replacement, nodes: list[Node], writes: Tensor, reads: Tensor
) -> tuple[Tensor, Tensor]:
    """(edges [1 + reads, nodes], biases): what the target and nodes 1, 2, ... read of all."""
    by_place: dict[tuple[int, int], list[int]] = {}
    for i, node in enumerate(nodes[1:], 1):
        by_place.setdefault((node.layer, node.position), []).append(i)
    of_place = {place: writes[own].T for place, own in by_place.items()}
    edges = writes.new_zeros(1 + len(reads), len(nodes))

    def visit(n: int, rows: slice, covectors: Tensor) -> None:
        for t in range(covectors.shape[1]):
            if own := by_place.get((n, t)):
                edges[rows, own] = covectors[:, t] @ of_place[n, t]

    return edges, replacement.direct(starts(nodes[1 : 1 + len(reads)], reads), visit)


def _eigenvectors(form: QuadraticForm, x: Tensor, r: Tensor, count: int) -> Tensor:
    """[d_in, k] of norm 1, those that contribute most at x, where r flows back."""
    if not form.p.any() and (form.q is None or not form.q.any()):
        return x.new_zeros(len(x), 0)
    if form.d_in <= DENSE:
        # single precision tells eigenvectors apart as well, and what a sum lacks is in the rest
        exact = form.W.dtype == torch.float64
        gamma = form.to_dense() if exact else form.to_dense(torch.float32)
        vectors = torch.linalg.eigh(gamma)[1].double()
    else:
        wanted = min(form.d_in, SPARE * count)
        _, vectors = extreme_eigenpairs(form.__matmul__, form.d_in, wanted, x.device, 1e-6)
    order = ((x @ vectors) * (r @ vectors)).abs().argsort(descending=True)[:count]
    return torch.nn.functional.normalize(vectors[:, order], dim=0)
