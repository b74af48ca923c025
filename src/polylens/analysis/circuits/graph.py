"""A circuit: what flows from the embeddings of a prompt to a target, node by node."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from polylens.analysis.circuits.replacement import Flow, Replacement
from polylens.brief import Brief
from polylens.errors import InvalidInputError

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


@dataclass(frozen=True, repr=False)
class Circuit(Brief):
    """The direct effects of nodes on each other, in units of the target.

        value of a node with edges = sum of its edges + its bias
        target = embeddings + biases + errors

    The second holds of the whole model, whatever is split.

    Attributes:
        target: what is traced.
        names: of the prompt's tokens.
        nodes: the target first, then what has edges, then the others.
        edges: [nodes with edges, nodes] float64: what each node does in another directly, through
            attention and norms only, of that one's value.
        biases: [nodes with edges].
        embeddings, bias, errors: what all of a kind amount to at the target.
        rounding: of the model's own forward pass: its target less their sum.
        missing: layers without a polynomial, whose outputs are errors as a whole.
        unsplit: share of |value| of all MLPs that is in those left whole.
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
        """The k nodes of largest |value|, of one kind or all."""
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

    def __repr__(self) -> str:
        kinds = {kind: sum(node.kind == kind for node in self.nodes) for kind in KINDS[1:]}
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        return (
            f"Circuit({self.target} = {self.value:.4g} = embeddings {self.embeddings:.4g} + biases "
            f"{self.bias:.4g} + errors {self.errors:.4g}; {counts}; "
            f"{int(self.edges.count_nonzero())} edges)"
        )
