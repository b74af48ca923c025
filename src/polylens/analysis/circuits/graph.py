"""A circuit: what flows from the embeddings of a prompt to a target, node by node."""

import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polylens.analysis.circuits.ablation import (
    Ablations,
    Group,
    Read,
    gradients,
    measured,
    predicted,
    reading,
    to_first_order,
)
from polylens.analysis.circuits.documents import attribution_graph, page
from polylens.analysis.circuits.influence import SMALLEST, Scores, completeness, influence, keep
from polylens.analysis.circuits.paths import Written, arriving, behind, first_heads
from polylens.analysis.circuits.replacement import Flow, Replacement
from polylens.analysis.examples import examples as examples_of
from polylens.analysis.figures import circuit_figure
from polylens.analysis.readout import top_tokens
from polylens.brief import Brief
from polylens.calibration.tokens import token_names
from polylens.checks import Layer, check_at_least
from polylens.errors import InvalidInputError
from polylens.files.whole import beside
from polylens.hosts.base import Arrival, Function
from polylens.hosts.frozen import linear
from polylens.polynomials.quadratic_form import QuadraticForm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("target", "feature", "rest", "mlp", "error", "token")


@dataclass(frozen=True)
class Node:
    """One node of a circuit.

    Attributes:
        kind: "token" (an embedding), "feature" and "rest" (an MLP at a position, in parts), "mlp"
            (one that is left whole, a leaf), "error" (what the polynomial lacks), "target".
        layer: of the MLP; -1 of a token, the layer that a target reads.
        position: in the prompt.
        index: of a feature among those of its MLP, by falling size of `value`.
        value: what it contributes to the target, by all paths.
        activation: of a feature, the input along its reading direction.
        first, second: of a feature or rest, parts of `value`: what its input does in terms of
            degree one, and in products with the input.
        eigenvalue: of a feature.
    """

    kind: str
    layer: int
    position: int
    index: int = 0
    value: float = 0.0
    activation: float | None = None
    first: float = 0.0
    second: float = 0.0
    eigenvalue: float | None = None

    @property
    def name(self) -> str:
        """Such as `L3.f0@5`, `L3.rest@5`, `L3.error@5`, `token@5`."""
        if self.kind == "target":
            return "target"
        own = {"feature": f"f{self.index}", "token": "token"}.get(self.kind, self.kind)
        return (
            f"{own}@{self.position}" if self.layer < 0 else f"L{self.layer}.{own}@{self.position}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Pairs(Brief):
    """What two nodes do together in a third: parts of its value that need both.

    Attributes:
        node: the third.
        names: of what it reads, the last all that is not named, biases included.
        first: [n] what each does in terms of degree one.
        second: [n, n] symmetric; a and b together do second[a, b] + second[b, a].
    """

    node: str
    names: tuple[str, ...]
    first: Tensor
    second: Tensor

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """The k largest products, (node, node, what they do together)."""
        found = []
        for a, name in enumerate(self.names):
            found.append((name, name, float(self.second[a, a])))
            found += [(name, self.names[b], 2 * float(self.second[a, b])) for b in range(a)]
        return sorted(found, key=lambda each: -abs(each[2]))[:k]


def starts(nodes: Sequence[Node], reads: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer the positions of nodes and what they read, as `Replacement.direct` takes them."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for n in {node.layer for node in nodes}:
        own = [i for i, node in enumerate(nodes) if node.layer == n]
        positions = torch.tensor([nodes[i].position for i in own], device=reads.device)
        found[n] = positions, reads[own]
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Brief):
    """The direct effects of nodes on each other, in units of the target.

        value of a node with edges = sum of its edges + its bias
        target = embeddings + biases + errors

    The second holds of the whole model, whatever is split.

    Attributes:
        target: what is traced.
        names: the texts of the prompt's tokens.
        nodes: the target first, then what has edges, then the others.
        edges: [nodes with edges, nodes] float64: what each node does in another directly, through
            attention and norms only, of that one's value.
        biases: [nodes with edges].
        embeddings, bias, errors: what all of a kind amount to at the target.
        rounding: of the model's own forward pass: its target less their sum.
        missing: layers without a polynomial, whose outputs are errors as a whole.
        unsplit: share of |value| of all MLPs that is in those left whole.
        whole: of a pruned circuit, what it was pruned from; scores: about that; kept: the shares
            of influence of nodes and edges that were asked for.
        cumulative: [nodes] of a pruned one, see `polylens.analysis.circuits.influence`.
    """

    target: str
    names: tuple[str, ...]
    nodes: tuple[Node, ...]
    edges: Tensor
    biases: Tensor
    embeddings: float
    bias: float
    errors: float
    rounding: float
    missing: tuple[int, ...]
    unsplit: float
    writes: Tensor = field(repr=False)
    reads: Tensor = field(repr=False)
    replacement: Replacement = field(repr=False)
    flows: tuple[Flow, ...] = field(repr=False)
    lens: Any = field(repr=False)
    whole: "Circuit | None" = field(default=None, repr=False)
    scores: Scores | None = None
    kept: tuple[float, float] = (1.0, 1.0)
    cumulative: Tensor | None = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """embeddings + bias + errors, which is the target."""
        return self.embeddings + self.bias + self.errors

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of a node by its name."""
        return {node.name: i for i, node in enumerate(self.nodes)}

    def __getitem__(self, name: str) -> Node:
        return self.nodes[self.number(name)]

    def number(self, node: Node | str | int) -> int:
        """Which of `nodes`.

        Raises:
            InvalidInputError: none.
        """
        if isinstance(node, int) and not isinstance(node, bool) and node in range(len(self)):
            return node
        name = node.name if isinstance(node, Node) else node
        if not isinstance(name, str) or name not in self.index:
            some = ", ".join(self.nodes[i].name for i in self.order()[:4])
            raise InvalidInputError(f"no node {node!r} in this circuit; there are {some}, ...")
        return self.index[name]

    def order(self) -> list[int]:
        """All nodes but the target, by falling |value|."""
        return sorted(range(1, len(self)), key=lambda i: -abs(self.nodes[i].value))

    def top(self, k: int = 10, kind: str | None = None) -> list[Node]:
        """The k nodes of largest |value|, of one kind or all.

        Raises:
            InvalidInputError: k < 0, an unknown kind.
        """
        check_at_least("k", k, 0)
        if kind is not None and kind not in KINDS[1:]:
            raise InvalidInputError(f"kind must be one of {', '.join(KINDS[1:])}; got {kind!r}")
        every = (self.nodes[i] for i in self.order())
        return [node for node in every if kind in (None, node.kind)][:k]

    def sources(self, node: Node | str | int) -> list[tuple[Node, float]]:
        """(node, edge) of all that a node reads, by falling size."""
        i = self.number(node)
        if i >= len(self.edges):
            return []
        return self._sorted(self.edges[i], lambda j: self.nodes[j])

    def readers(self, node: Node | str | int) -> list[tuple[Node, float]]:
        """(node, edge) of all that read a node, by falling size."""
        return self._sorted(self.edges[:, self.number(node)], lambda i: self.nodes[i])

    def _sorted(self, row: Tensor, of: Callable[[int], Node]) -> list[tuple[Node, float]]:
        found = row.abs().argsort(descending=True).tolist()
        return [(of(i), float(row[i])) for i in found if row[i]]

    def pruned(self, nodes: float = 0.8, edges: float = 0.98) -> "Circuit":
        """What is left when nodes and edges of little influence are taken away, with `scores`.

        Embeddings and the target stay. Values are those of the whole circuit.

        Args:
            nodes, edges: shares of all influence that are kept, circuit-tracer's by default.

        Raises:
            InvalidInputError: shares outside of 0 ... 1, a circuit that is pruned already.
        """
        if self.whole is not None:
            raise InvalidInputError("this circuit is pruned already; prune the whole one")
        kinds = [node.kind for node in self.nodes]
        of = {kind: self.edges.new_tensor([k == kind for k in kinds]).bool() for kind in KINDS}
        inner = of["feature"] | of["rest"]
        kept = keep(self.edges, of["token"] | of["target"], inner, nodes, edges)
        own, rows = influence(self.edges), len(self.edges)
        ends = [float(own[of[kind]].sum()) for kind in ("token", "error", "mlp")]
        scores = Scores(
            ends[0] / max(ends[0] + ends[1], SMALLEST),
            completeness(self.edges, of["error"]),
            ends[2] / max(sum(ends), SMALLEST),
            (int(kept.nodes.sum()), len(kinds)),
            (int(kept.edges.sum()), int(self.edges.count_nonzero())),
        )
        chosen, behind = kept.nodes.nonzero()[:, 0], kept.nodes[:rows].nonzero()[:, 0]
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in chosen.tolist()),
            edges=(self.edges * kept.edges)[behind][:, chosen],
            biases=self.biases[behind],
            writes=self.writes[chosen],
            reads=self.reads[behind[1:] - 1],
            whole=self,
            scores=scores,
            kept=(float(nodes), float(edges)),
            cumulative=kept.cumulative[chosen],
        )

    def heads(self) -> dict[tuple[str, str], list[tuple[str, float]]]:
        """By (source, reader): the heads that edges pass first, with their parts, largest first.

        "residual" is what comes without a head. The parts sum to the edge. Of a pruned circuit
        for preference.

        Cost: as of the edges themselves.
        """
        places = self.edges.nonzero().tolist()
        parts = first_heads(
            self.replacement,
            self._starts(),
            [(i, self._written(j)) for i, j in places],
        )
        found: dict[tuple[str, str], list[tuple[str, float]]] = {}
        for (i, j), part in zip(places, parts, strict=True):
            own = [(f"L{n}H{h}", float(part[n, h])) for n, h in part.nonzero().tolist()]
            left = float(self.edges[i, j] - part.sum())
            if self.nodes[i].position == self.nodes[j].position:
                own.append(("residual", left))
            key = self.nodes[j].name, self.nodes[i].name
            found[key] = sorted(own, key=lambda each: -abs(each[1]))
        return found

    def pairs(self, node: Node | str | int, k: int = 12) -> Pairs:
        """What the k strongest sources of a feature or rest do in it, alone and two by two.

        Raises:
            InvalidInputError: a node without edges, or the target, which is linear in all; k < 0.
        """
        check_at_least("k", k, 0)
        i = self.number(node)
        own = self.nodes[i]
        if own.kind not in ("feature", "rest"):
            raise InvalidInputError(
                f"{own.name} is no feature or rest of an MLP, which is where nodes do something "
                "together"
            )
        layer, flow = self.replacement.layers[own.layer], self.flows[own.layer]
        assert layer.shares is not None
        sources = [source for source, _ in self.sources(i)[:k]]
        written = [self._written(self.number(source)) for source in sources]
        parts = arriving(self.replacement, written, own.layer, own.position)
        x, u = layer.read[own.position], flow.u[own.position]
        parts = torch.cat([parts, (x - parts.sum(0))[None]])
        form = layer.shares.second(own.position, u)
        if own.kind == "feature":
            v = self.reads[i - 1] / self.reads[i - 1].norm()
            second = _square(form, parts, v)
        else:
            second = parts @ (form @ parts.T)
            for v in (self.whole or self)._features(own.layer, own.position):
                second = second - _square(form, parts, v)
        first = parts @ self.reads[i - 1] - second.sum(1)
        names = (*(source.name for source in sources), "all others")
        return Pairs(own.name, names, first, second)

    def _features(self, layer: int, position: int) -> list[Tensor]:
        """Reading directions of the features of one MLP."""
        places = [(node.kind, node.layer, node.position) for node in self.nodes[: len(self.edges)]]
        own = [j for j, place in enumerate(places) if place == ("feature", layer, position)]
        return [self.reads[j - 1] / self.reads[j - 1].norm() for j in own]

    def ablate(
        self,
        groups: Node | str | int | Iterable[Node | str | int | Iterable[Node | str | int]],
        *,
        batch_size: int = 16,
    ) -> Ablations:
        """How the target changes when nodes, or groups of them, are taken out.

        Predicted by the circuit's model, by attribution patching and by both together; measured in
        the true model: what a node writes is taken off the output of its MLP at its position, and
        all that follows, attention and norms included, is as it is then.

        Raises:
            InvalidInputError: no nodes, no such node, a token or the target, a layer that the lens
                lacks; a circuit along a direction.
            AttachmentError, StalePolynomialError: as `Lens.replaced`.
        """
        several = [groups] if isinstance(groups, Node | str | int) else groups
        chosen = [
            list(dict.fromkeys(map(self.number, [g] if isinstance(g, Node | str | int) else g)))
            for g in several
        ]
        for i in (i for group in chosen for i in group):
            node = self.nodes[i]
            if node.kind in ("target", "token") or node.layer in self.missing:
                raise InvalidInputError(
                    f"{node.name} is no part of an MLP that the lens has; only those are taken out"
                )
        written = [[self._written(i) for i in group] for group in chosen]
        names = [" + ".join(self.nodes[i].name for i in group) for group in chosen]
        own = [-sum(self.nodes[i].value for i in group) for group in chosen]
        return self._without(written, names, own, batch_size)

    def ablate_edges(
        self, edges: Iterable[tuple[Node | str | int, Node | str | int]], *, batch_size: int = 16
    ) -> Ablations:
        """How the target changes when single edges are taken out, as `ablate` has it of nodes.

        What the source does in the reader's input, by attention and norms as they were, is taken
        off what the reader reads, and off nothing else: of a feature, along its reading direction;
        of a rest, the part that no feature reads. The MLP at that position, the true one where it
        is measured, makes of it what it does, and all that follows is as it is then.

        Args:
            edges: (source, reader), as `sources` and `readers` have them.

        Raises:
            InvalidInputError: no edges, no such node; a reader that is no feature or rest (into
                the target nothing has to be predicted: what it reads is linear but for its norm);
                a source that is not below it; a circuit along a direction.
            AttachmentError, StalePolynomialError: as `Lens.replaced`.
        """
        edges = list(edges)
        if not all(isinstance(edge, tuple) and len(edge) == 2 for edge in edges):
            raise InvalidInputError(f"edges must be pairs (source, reader), got {edges!r}")
        chosen = [(self.number(source), self.number(reader)) for source, reader in edges]
        for j, i in chosen:
            source, reader = self.nodes[j], self.nodes[i]
            if reader.kind not in ("feature", "rest"):
                raise InvalidInputError(
                    f"{reader.name} is no feature or rest of an MLP; only edges into those are "
                    "taken out"
                )
            if source.layer >= reader.layer:
                raise InvalidInputError(f"{source.name} is not below {reader.name}")
        groups: list[Group] = []
        values: list[float] = []
        for j, i in chosen:
            place = self.nodes[i].layer, self.nodes[i].position
            (x,) = arriving(self.replacement, [self._written(j)], *place)
            groups.append([Read(*place, self._part(i, x))])
            values.append(-float(self.reads[i - 1] @ x))
        names = [f"{self.nodes[j].name} > {self.nodes[i].name}" for j, i in chosen]
        return self._without(groups, names, values, batch_size)

    def _without(
        self, groups: Sequence[Group], names: Sequence[str], values: list[float], batch_size: int
    ) -> Ablations:
        if not groups or not all(groups):
            raise InvalidInputError("there is nothing to take out: no nodes or edges were given")
        check_at_least("batch_size", batch_size, 1)
        self.lens.ready(None, None)
        some = [groups[i : i + batch_size] for i in range(0, len(groups), batch_size)]
        with torch.no_grad():
            said = torch.cat([predicted(self.replacement, each) for each in some]).cpu()
            first = torch.cat([to_first_order(self.replacement, each) for each in some]).cpu()
            true = measured(self.lens, self.replacement, groups, batch_size)
        slopes = gradients(self.lens, self.replacement, groups)
        linear = torch.tensor(values, dtype=torch.float64)
        return Ablations(tuple(names), said, linear, slopes, slopes + said - first, true)

    def _part(self, i: int, x: Tensor) -> Tensor:
        """[d_in]: what a feature or rest reads of what its MLP reads."""
        reader = self.nodes[i]
        if reader.kind == "feature":
            v = torch.nn.functional.normalize(self.reads[i - 1], dim=0)
            return (x @ v) * v
        for v in (self.whole or self)._features(reader.layer, reader.position):
            x = x - (x @ v) * v
        return x

    @contextmanager
    def steered(
        self,
        scales: Mapping[Node | str, float] | Node | str | Iterable[Node | str],
        scale: float = 0.0,
    ) -> Generator[None, None, None]:
        """Within the context, features are scaled wherever the model runs, as in generation.

            with circuit.steered("L11.f0@4"):  # removed; a second argument scales it
                model.generate(tokens)

        The true MLP of a feature's layer writes what it does for its input with the part along the
        feature's reading direction times `scale`, at every position. What flows otherwise is
        as it is.

        Args:
            scales: a feature or several, or with a scale each.
            scale: of those without their own.

        Raises:
            InvalidInputError: what is no feature of this circuit, a scale that is not finite.
            AttachmentError: the lens is detached.
        """
        one = isinstance(scales, Node | str)
        given = dict(scales) if isinstance(scales, Mapping) else {}
        given = given or dict.fromkeys([scales] if one else scales, scale)
        if not given:
            raise InvalidInputError("there is nothing to scale: no features were given")
        by_layer: dict[int, list[tuple[Tensor, float]]] = {}
        for node, by in given.items():
            i = self.number(node)
            number = isinstance(by, int | float) and not isinstance(by, bool)
            if self.nodes[i].kind != "feature" or not number or not math.isfinite(by):
                raise InvalidInputError(
                    f"features are scaled by finite numbers, got {self.nodes[i].name} by {by!r}"
                )
            v = torch.nn.functional.normalize(self.reads[i - 1], dim=0)
            by_layer.setdefault(self.nodes[i].layer, []).append((v, by))
        self.lens.ready(list(by_layer), None)
        functions: dict[Layer, Function] = {
            n: partial(_scaled, self.lens[n].weights, several) for n, several in by_layer.items()
        }
        with self.lens.host.edit(functions):
            yield

    def to_dict(self, examples: Any = None, n_tokens: int = 5, pairs: int = 6) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts: all that the page shows.

        Args:
            examples: [batch, pos] token ids of a text, for where in it features are most active.
            n_tokens: named at either end of what a node's writing raises.
            pairs: named of each node.
        """
        if self.whole is None:
            return self.pruned(1.0, 1.0).to_dict(examples, n_tokens, pairs)
        target, frozen = self.replacement.target, self.replacement.frozen
        raised, found, heads = self._raised(n_tokens), self._examples(examples), self.heads()
        assert self.cumulative is not None
        nodes: list[dict[str, Any]] = []
        for i, node in enumerate(self.nodes):
            own = {"name": node.name, **asdict(node), "influence": float(self.cumulative[i])}
            own["raises"], own["lowers"] = raised[i]
            own["bias"] = float(self.biases[i]) if i < len(self.edges) else None
            own["examples"] = found.get(i, [])
            known = node.kind in ("feature", "rest")
            top = self.pairs(i, max(pairs, 1)).top(pairs) if known and pairs else []
            own["pairs"] = [list(each) for each in top]
            nodes.append(own)
        edges = [
            {
                "source": self.nodes[j].name,
                "target": self.nodes[i].name,
                "weight": float(self.edges[i, j]),
                "heads": [list(each) for each in heads[self.nodes[j].name, self.nodes[i].name][:4]],
            }
            for i, j in self.edges.nonzero().tolist()
        ]
        return {
            "target": self.target,
            "vocabulary_index": target.tokens[0] if target.tokens else -1,
            "probability": target.probability,
            "value": self.value,
            "embeddings": self.embeddings,
            "bias": self.bias,
            "errors": self.errors,
            "rounding": self.rounding,
            "names": list(self.names),
            "tokens": frozen.tokens.tolist(),
            "layers": len(frozen.blocks),
            "missing": list(self.missing),
            "unsplit": self.unsplit,
            "scores": None if self.scores is None else asdict(self.scores),
            "kept": {"nodes": self.kept[0], "edges": self.kept[1]},
            "nodes": nodes,
            "edges": edges,
        }

    def save_page(self, path: str | os.PathLike[str], examples: Any = None) -> None:
        """Write one HTML file to look through it: positions by layers, and what a node does.

        Best of a pruned circuit.

        Args:
            examples: [batch, pos] token ids of a text, for where in it features are most active.

        Raises:
            OSError: the file cannot be written.
        """
        self._write(path, page(self.to_dict(examples)))

    def save_graph(
        self, path: str | os.PathLike[str], slug: str = "polylens", scan: str | None = None
    ) -> None:
        """Write the JSON that circuit-tracer's and Neuronpedia's front ends read.

        Best of a pruned circuit.

        Args:
            slug: its name there.
            scan: the model's name there; that of the lens by default.

        Raises:
            OSError: the file cannot be written.
        """
        graph = attribution_graph(self.to_dict(pairs=0), slug, scan or self.lens.model_name)
        self._write(path, json.dumps(graph, ensure_ascii=False, indent=1))

    @staticmethod
    def _write(path: str | os.PathLike[str], text: str) -> None:
        with beside(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def plot(self, k: int = 60) -> "Figure":
        """Nodes by position and layer, with the k largest edges. Best of a pruned circuit."""
        flat = self.edges.abs().flatten()
        strongest = flat.argsort(descending=True)[:k].tolist()
        places = [divmod(i, self.edges.shape[1]) for i in strongest if flat[i]]
        last = len(self.replacement.frozen.blocks)
        rows = [last if node.kind == "target" else node.layer for node in self.nodes]
        return circuit_figure(
            [(row, node.position, node.kind) for row, node in zip(rows, self.nodes, strict=True)],
            [node.value for node in self.nodes],
            [(j, i, float(self.edges[i, j])) for i, j in places],
            self.names,
            f"{self.target} = {self.value:.3f}",
        )

    def _raised(self, n_tokens: int) -> list[tuple[list[Any], list[Any]]]:
        """By node the tokens that what it writes raises and lowers, with logits by which."""
        frozen, position = self.replacement.frozen, self.replacement.target.position
        names = token_names(self.lens.host.tokenizer)
        found: list[tuple[list[Any], list[Any]]] = []
        at = torch.tensor(position, device=self.writes.device)
        for i, node in enumerate(self.nodes):
            if node.kind == "target":
                found.append(([], []))
                continue
            vector = linear(frozen.final, behind(self.replacement, self._written(i)), at)
            logits = (vector.to(frozen.W_U.dtype) @ frozen.W_U).float()
            logits = logits - logits.mean()
            found.append(top_tokens(logits, min(n_tokens, len(logits)), names))
        return found

    def _examples(self, tokens: Any) -> dict[int, list[list[Any]]]:
        """By number of a feature: texts before, at and behind where it is most active."""
        own = [i for i, node in enumerate(self.nodes) if node.kind == "feature"]
        if tokens is None or not own:
            return {}
        members: dict[Layer, list[int]] = {}
        for i in own:
            members.setdefault(self.nodes[i].layer, []).append(i)
        directions: dict[Layer, Any] = {
            n: torch.nn.functional.normalize(self.reads[[i - 1 for i in some]].T, dim=0)
            for n, some in members.items()
        }
        found: dict[int, list[list[Any]]] = {}
        for n, features in examples_of(self.lens, directions, tokens).items():
            for i, row in zip(members[n], features.rows, strict=True):
                sign = self._sign(i)
                ends = row.highest if sign > 0 else row.lowest
                found[i] = [[e.before, e.token, e.after, sign * e.activation] for e in ends]
        return found

    def _sign(self, i: int) -> float:
        """Of the activation at the prompt along the normalised row of `reads`."""
        node = self.nodes[i]
        x = self.replacement.layers[node.layer].read[node.position]
        return 1.0 if float(x @ self.reads[i - 1]) >= 0 else -1.0

    def _written(self, i: int) -> Written:
        node = self.nodes[i]
        return Written(node.layer, node.position, self.writes[i])

    def _starts(self) -> dict[int, tuple[Tensor, Tensor]]:
        return starts(self.nodes[1 : len(self.edges)], self.reads)

    def __repr__(self) -> str:
        kinds = {kind: sum(node.kind == kind for node in self.nodes) for kind in KINDS[1:]}
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        left = f"; {100 * self.unsplit:.2g} % of what MLPs do is left whole" if self.unsplit else ""
        return (
            f"Circuit({self.target} = {self.value:.4g} = embeddings {self.embeddings:.4g} + biases "
            f"{self.bias:.4g} + errors {self.errors:.4g}; {counts}; "
            f"{int(self.edges.count_nonzero())} edges{left})"
        )


def _square(form: QuadraticForm, parts: Tensor, v: Tensor) -> Tensor:
    """[n, n]: what parts do two by two along an eigenvector v of a form."""
    along = parts @ v
    return float(v @ (form @ v)) * along[:, None] * along


def _scaled(weights: Any, several: list[tuple[Tensor, float]], arrival: Arrival) -> Tensor:
    """What the layer writes for its input with the parts along directions v scaled."""
    now = arrival.x.to(weights.dtype).double()
    for v, scale in several:
        now = now + (scale - 1) * (now @ v)[..., None] * v
    return reading(weights, arrival, now)
