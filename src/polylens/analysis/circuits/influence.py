"""Influence in a graph of direct effects, what is kept of it, and how much it explains.

As circuit-tracer has it (Ameisen et al. 2025, "Circuit Tracing", and its library): edges into a
node are taken by size and as shares of their sum; a node's influence is that of all paths from it
to the target. Nodes are kept that have `nodes` of all influence together, then edges that have
`edges` of it, then what still has edges on both sides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.errors import InvalidInputError

SMALLEST = 1e-10


@dataclass(frozen=True)
class Scores:
    """How much of what reaches the target passes through nodes that say something.

    Attributes:
        replacement: share of the influence of embeddings in that of embeddings and errors: what
            passes from end to end without an error.
        completeness: share of edges, weighted by the influence of what they enter, that come from
            other nodes than errors.
        whole: share of influence that ends in MLPs which were left whole, among that which ends
            there, in errors or in embeddings.
        nodes, edges: kept, and of how many.
    """

    replacement: float
    completeness: float
    whole: float
    nodes: tuple[int, int]
    edges: tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """What is left of a graph.

    Attributes:
        nodes: [nodes] of bool; edges: [rows, nodes] of bool.
        cumulative: [nodes] share of all influence that a node and those above it have.
    """

    nodes: Tensor
    edges: Tensor
    cumulative: Tensor


def shares(edges: Tensor) -> Tensor:
    """|edges| [rows, nodes] as shares of each row."""
    sizes = edges.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=SMALLEST)


def influence(edges: Tensor) -> Tensor:
    """[nodes]: of each node on node 0, by all paths; edges are those into the first nodes."""
    rows, own = shares(edges), edges.new_zeros(edges.shape[1])
    own[0], total = 1.0, torch.zeros_like(own)
    for _ in range(len(edges) + 1):
        own = own[: len(rows)] @ rows
        if not own.any():
            return total
        total += own
    raise InvalidInputError("the graph has a cycle")


def keep(
    edges: Tensor, always: Tensor, inner: Tensor, node_share: float, edge_share: float
) -> Kept:
    """What is kept.

    Args:
        edges: [rows, nodes] into the first nodes, the target first.
        always: [nodes] of bool, kept whatever they are (embeddings and the target).
        inner: [nodes] of bool, needed to have edges that enter them.
        node_share, edge_share: of all influence.

    Raises:
        InvalidInputError: shares outside of 0 ... 1.
    """
    for name, share in (("nodes", node_share), ("edges", edge_share)):
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share <= 1:
            raise InvalidInputError(
                f"{name} must be a share of influence in 0 ... 1, got {share!r}"
            )
    own, rows = influence(edges), len(edges)
    nodes = (own >= _threshold(own, node_share)) | always
    left = edges * nodes[:rows, None] * nodes
    through = influence(left)
    through[0] += 1.0
    scores = shares(left) * through[:rows, None]
    chosen = (scores >= _threshold(scores.flatten(), edge_share)) & (left != 0)
    while True:
        chosen = chosen & nodes[:rows, None] & nodes
        entered = torch.ones_like(nodes)
        entered[:rows] = chosen.any(1)
        fewer = nodes & (chosen.any(0) | always) & (entered | ~inner)
        if torch.equal(fewer, nodes):
            break
        nodes = fewer
    order = own.argsort(descending=True)
    cumulative = torch.zeros_like(own)
    cumulative[order] = own[order].cumsum(0) / own.sum().clamp(min=SMALLEST)
    return Kept(nodes, chosen, cumulative)


def completeness(edges: Tensor, errors: Tensor) -> float:
    """See `Scores`; errors: [nodes] of bool."""
    through = influence(edges)
    through[0] += 1.0
    from_errors = edges.new_zeros(edges.shape[1])
    from_errors[: len(edges)] = shares(edges)[:, errors].sum(1)
    return float(((1 - from_errors) * through).sum() / through.sum())


def _threshold(scores: Tensor, share: float) -> Tensor:
    """The smallest score such that those from it on have this share of all."""
    ordered = scores.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum().clamp(min=SMALLEST)
    at = int(torch.searchsorted(reached, torch.tensor(share).to(reached)))
    return ordered[min(at, len(ordered) - 1)]
