"""What replacing layers costs: one forward pass for each group of layers and batch."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from polylens.checks import Layer, block
from polylens.errors import InvalidInputError
from polylens.hosts.base import Arrival, Function
from polylens.hosts.batch import Batch
from polylens.inputs.residuals import ResidualSums
from polylens.installed.installation import Installation
from polylens.ranks import Ranks
from polylens.report.scores import Cost, Scores, predictions, score, scored
from polylens.report.worst import Rise, WorstRises

# Below this many nats an ablation is harmless, and the share of it recovered means nothing.
HARMLESS = 1e-6

Group = tuple[Layer, ...]


@dataclass(frozen=True)
class Losses:
    """Of the true model, and of every way in which layers were replaced.

    Attributes:
        base_ce: cross entropy of the true model, nats per token; None where there are no tokens.
        n_targets: predicted tokens.
        by_group: the loss columns of each group of layers, by their names in a LayerRow.
        r2_replaced: of each layer on the stream of all replaced; None where too little came.
        rises: the tokens that rise most with all replaced.
    """

    base_ce: float | None
    n_targets: int
    by_group: dict[Group, dict[str, float | None]]
    r2_replaced: dict[Layer, float | None]
    rises: list[Rise]


def alone_and_all(layers: Sequence[Layer]) -> list[Group]:
    """Each layer alone (experts are not, they are many), then all at once, if that is another."""
    alone = [(layer,) for layer in layers if isinstance(layer, int)]
    return list(dict.fromkeys([*alone, tuple(layers)]))


def prefixes_of(layers: Sequence[Layer]) -> dict[Layer, Group]:
    """By its last layer, every group that begins with the first one; experts of a block together.

    The first prefix is a layer alone, the last all of them, so that two are no other groups.
    """
    blocks = [block(layer) for layer in layers]
    ends = [i for i, block in enumerate(blocks) if blocks[i + 1 : i + 2] != [block]]
    return {layers[i]: tuple(layers[: i + 1]) for i in ends}


def passes_per_batch(layers: Sequence[Layer], prefixes: bool, zero: bool, tokens: bool) -> int:
    """Forward passes of `measure_losses`: the true model, those replaced, those ablated."""
    ablated = (1 + zero) * len(alone_and_all(layers)) * tokens
    return 1 + len(_replaced_groups(layers, prefixes)) + ablated


def _replaced_groups(layers: Sequence[Layer], prefixes: bool) -> list[Group]:
    further = prefixes_of(layers).values() if prefixes else ()
    return list(dict.fromkeys([*alone_and_all(layers), *further]))


def measure_losses(
    lens: Installation,
    degree: int,
    layers: Sequence[Layer],
    means: dict[Layer, Tensor],
    steps: Iterable[tuple[int, Batch]],
    bar: tqdm,
    *,
    prefixes: bool,
    zero: bool,
    worst: int,
    lead: int,
    about_tokens: bool,
    ranks: Ranks | None,
) -> Losses:
    """Replace and ablate each layer alone and all of them, and with `prefixes` replace those.

    While all are replaced every MLP is observed, so that polynomials are evaluated beside the
    true layers; what flows on is the same up to rounding. Of a batch `of_each_input`, which has no
    tokens, there are KL and agreement, and nothing is ablated.

    Args:
        means: of each layer's output, what an ablation puts there.
        steps: (index of the first sequence, batch), those of this rank.
        zero: also put zero there.
        worst: how many tokens to list.
        lead: of the predicted tokens, see `scores.lead_of`.
        about_tokens: whether the predictions are of tokens.
        ranks: which have all other batches.

    Raises:
        InvalidInputError: logits that are not [batch, pos, d_vocab], or nothing to predict.
    """
    everything = tuple(layers)
    constants = {"ablation_delta_ce": means} if about_tokens else {}
    if zero and about_tokens:
        constants["zero_delta_ce"] = {n: torch.zeros_like(mean) for n, mean in means.items()}
    ablated = {(g, name): Cost() for name in constants for g in alone_and_all(layers)}
    replaced = {group: Cost() for group in _replaced_groups(layers, prefixes)}
    stream, rises = _ReplacedStream(lens, degree, layers), WorstRises(worst, lead)
    base: Tensor | float = 0.0
    n_positions, n_targets = 0, []
    for first, batch in steps:
        n_targets.append(scored(batch, lead).sum(1))
        n_positions += int(batch.streams[batch.about].there.sum())
        truth, true = _truth(lens, batch, lead)
        base = base + true.ce.sum()
        bar.update()
        for group, cost in replaced.items():
            whole = group == everything
            watching = stream.watch(batch) if whole else nullcontext()
            with lens.flowing(dict.fromkeys(group, degree)), watching:
                changed = score(predictions(lens.host, batch), truth, batch, lead)
            cost.update(changed, true)
            if whole and about_tokens:
                rises.update(changed, true, first)
            bar.update()
        for (group, name), cost in ablated.items():
            put = {n: _constant(constants[name][n]) for n in group if n in constants[name]}
            with lens.host.substitute(put):
                ablation = score(lens.host.logits(batch), None, batch, lead)
                cost.update(ablation, true)
            bar.update()
    if ranks is not None:
        found = ranks.gathered((n_targets, base, n_positions))
        n_targets = [each for of_rank, *_ in found for each in of_rank]
        base, n_positions = sum(f[1] for f in found), sum(f[2] for f in found)
        for sums in (*replaced.values(), *ablated.values(), stream, rises):
            sums.merge(ranks)
    counts = torch.cat(n_targets).cpu()
    if about_tokens and counts.sum() == 0:
        raise InvalidInputError("no token follows another one that is not padding: no loss")
    by_group = {
        group: _columns(
            cost, {name: c for (g, name), c in ablated.items() if g == group}, counts, n_positions
        )
        for group, cost in replaced.items()
    }
    base_ce = float(base) / int(counts.sum()) if about_tokens else None
    return Losses(base_ce, int(counts.sum()), by_group, stream.r2(), rises.found)


class _ReplacedStream:
    """R2 of each layer's polynomial on what the other replaced layers make of its inputs."""

    def __init__(self, lens: Installation, degree: int, layers: Sequence[Layer]) -> None:
        self._lens = lens
        self._polynomials = {layer: lens[layer].truncate(degree) for layer in layers}
        self._sums = {layer: ResidualSums() for layer in layers}

    def watch(self, batch: Batch):
        """Within the context, what passes the layers is added up."""
        host, exclude_first = self._lens.host, self._lens.exclude_first

        def observer(layer: Layer):
            kept = batch.counted(host.stream(layer), exclude_first=exclude_first)

            def see(arrival: Arrival) -> None:
                x, y = arrival.rows(kept)
                self._sums[layer].update(y, self._polynomials[layer](x)[None])

            return see

        return host.observe({layer: observer(layer) for layer in self._sums})

    def merge(self, ranks: Ranks) -> None:
        for sums in self._sums.values():
            sums.merge(ranks)

    def r2(self) -> dict[Layer, float | None]:
        return {layer: sums.last_r2() for layer, sums in self._sums.items()}


def _truth(lens: Installation, batch: Batch, lead: int) -> tuple[Tensor, Scores]:
    truth, shape = predictions(lens.host, batch), batch.streams[batch.about].there.shape
    if truth.dim() != 3 or truth.shape[:2] != shape:
        raise InvalidInputError(
            f"the loss columns need logits [batch, pos, d_vocab]; {lens.model_name} returns "
            f"{list(truth.shape)} for tokens {list(shape)}; use report(..., loss=False)"
        )
    return truth, score(truth, None, batch, lead)


def _columns(
    cost: Cost, ablations: dict[str, Cost], n_targets: Tensor, n_positions: int
) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "kl": cost.kl(n_positions),
        "agreement": cost.agreement(n_positions),
    }
    if not n_targets.any():
        return found
    found |= {
        "delta_ce": (delta := cost.delta_ce(n_targets)),
        "delta_ce_se": cost.delta_ce_se(n_targets),
        **{name: ablation.delta_ce(n_targets) for name, ablation in ablations.items()},
    }
    harm = found.get("ablation_delta_ce")
    if harm is not None:
        found["loss_recovered"] = None if harm < HARMLESS else 1 - delta / harm
    return found


def _constant(mean: Tensor) -> Function:
    """This in place of an MLP's output, as a tensor of its own: a model may add to it in place."""
    return lambda arrival: mean.to(arrival.y).expand_as(arrival.y).clone()
