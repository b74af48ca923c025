"""Circuits of several prompts, and the features that come back in them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polylens.analysis.circuits.graph import Circuit
from polylens.analysis.circuits.target import TargetLike
from polylens.analysis.circuits.trace import circuit
from polylens.brief import Brief
from polylens.checks import check_at_least
from polylens.errors import InvalidInputError


@dataclass(frozen=True, eq=False, repr=False)
class Recurring(Brief):
    """A feature that several prompts have, told by the direction that it reads.

    Attributes:
        layer: of its MLP.
        direction: [d_in], of the member that contributes most.
        members: (prompt, node), by falling share of what MLPs contribute there.
        shares: of each, |value| over that of all MLPs of its circuit.
        cosines: [members] of each with `direction`, either way.
        prompts: how many different ones.
    """

    layer: int
    direction: Tensor
    members: tuple[tuple[int, str], ...]
    shares: tuple[float, ...]
    cosines: Tensor
    prompts: int


@dataclass(frozen=True, repr=False)
class Circuits(Brief):
    """Those of several prompts.

    Attributes:
        circuits: in the order of the prompts.
    """

    circuits: tuple[Circuit, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.circuits)

    def __iter__(self) -> Iterator[Circuit]:
        return iter(self.circuits)

    def __getitem__(self, i: int) -> Circuit:
        return self.circuits[i]

    def recurring(self, cosine: float = 0.7, least: int = 2) -> list[Recurring]:
        """Features of the same layer that read the same direction, in `least` prompts or more.

        From the strongest down, a feature joins the first group whose strongest member reads a
        direction of at least this cosine with its own, up to sign. By falling number of prompts,
        then by share.

        Raises:
            InvalidInputError: a cosine outside of 0 ... 1, fewer than one prompt.
        """
        check_at_least("least", least, 1)
        number = isinstance(cosine, int | float) and not isinstance(cosine, bool)
        if not number or not 0 < cosine <= 1:
            raise InvalidInputError(f"cosine must be in 0 ... 1, got {cosine!r}")
        found: list[tuple[float, int, str, int, Tensor]] = []
        for number, own in enumerate(self.circuits):
            mlps = sum(abs(n.value) for n in own if n.kind in ("feature", "rest", "mlp"))
            for i, node in enumerate(own.nodes[: len(own.edges)]):
                if node.kind == "feature":
                    read = torch.nn.functional.normalize(own.reads[i - 1], dim=0)
                    share = abs(node.value) / max(mlps, 1e-300)
                    found.append((share, number, node.name, node.layer, read))
        groups: list[list[tuple[float, int, str, int, Tensor]]] = []
        for feature in sorted(found, key=lambda each: -each[0]):
            for group in groups:
                same = group[0][3] == feature[3]
                if same and abs(float(group[0][4] @ feature[4])) >= cosine:
                    group.append(feature)
                    break
            else:
                groups.append([feature])
        several = [_recurring(group) for group in groups]
        several = [each for each in several if each.prompts >= least]
        return sorted(several, key=lambda each: (-each.prompts, -sum(each.shares)))


def _recurring(group: list[tuple[float, int, str, int, Tensor]]) -> Recurring:
    direction = group[0][4]
    cosines = torch.stack([each[4] @ direction for each in group])
    members = tuple((number, name) for _, number, name, _, _ in group)
    shares = tuple(each[0] for each in group)
    prompts = len({number for number, _ in members})
    return Recurring(group[0][3], direction, members, shares, cosines, prompts)


def circuits(
    lens: Any, prompts: Iterable[Any], targets: Iterable[TargetLike] | None = None, **options: Any
) -> Circuits:
    """`circuit` of each of several prompts.

    Args:
        prompts: each [pos] token ids, or text.
        targets: one for each; the most likely tokens by default.
        options: of `circuit`, the same for all.

    Raises:
        InvalidInputError: no prompts, another number of targets; as `circuit`.
    """
    several = list(prompts)
    goals = [None] * len(several) if targets is None else list(targets)
    if not several or len(goals) != len(several):
        raise InvalidInputError(f"{len(goals)} targets for {len(several)} prompts")
    pairs = zip(several, goals, strict=True)
    return Circuits(tuple(circuit(lens, prompt, goal, **options) for prompt, goal in pairs))
