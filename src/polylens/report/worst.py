"""The tokens that a replaced model predicts worst, compared with the true one, and why."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from polylens.checks import Layer
from polylens.errors import InvalidInputError
from polylens.hosts.base import Arrival, Observer
from polylens.hosts.batch import IGNORED, Batch
from polylens.installed.installation import Installation
from polylens.ranks import Ranks
from polylens.report.rows import WorstToken
from polylens.report.scores import Scores

Decode = Callable[[list[int]], str]

# Tokens in front of a worst one that are shown with it.
CONTEXT = 24
# A rise by less, in nats, is rounding.
ROUNDING = 1e-6


class Rise(NamedTuple):
    """A token and its scores; its position is that of the token, `at` is where it is predicted."""

    rise: float
    sequence: int
    position: int
    at: int
    true_ce: float
    replaced_ce: float
    kl: float


class WorstRises:
    """The n tokens whose cross entropy rises most, streamed; one that becomes NaN rises to inf.

    Args:
        lead: of the tokens before what predicts them, see `scoring.lead_of`.
    """

    def __init__(self, n: int, lead: int) -> None:
        self._n, self._lead = n, lead
        # rows: the rise, true, changed, KL, sequence, where it is predicted
        self._table = torch.zeros(6, 0, dtype=torch.float64)

    def update(self, changed: Scores, true: Scores, first: int) -> None:
        """Add sequences, of which `first` is the first."""
        rises = (changed.ce - true.ce).nan_to_num(nan=float("inf"), posinf=float("inf"))
        places = rises.flatten().topk(min(self._n, rises.numel())).indices.sort().values
        i, at = places // rises.shape[1], places % rises.shape[1]
        scores = [each[i, at] for each in (rises, true.ce, changed.ce, changed.kl)]
        new = torch.stack([*scores, (first + i).double(), at.double()])
        self._keep(torch.cat([self._table.to(new.device), new], dim=1))

    def merge(self, ranks: Ranks) -> None:
        """Let all ranks have seen what each has."""
        table = torch.cat(ranks.gathered(self._table), dim=1)
        self._keep(table[:, table[4].argsort(stable=True)])

    def _keep(self, table: Tensor) -> None:
        # of equal ones the first stays first
        order = table[0].argsort(descending=True, stable=True)[: self._n]
        self._table = table[:, order]

    @property
    def found(self) -> list[Rise]:
        """Worst first."""
        return [
            Rise(rise, int(sequence), int(at) + self._lead, int(at), *scores)
            for rise, *scores, sequence, at in self._table.T.tolist()
            if rise > ROUNDING
        ]


def explain(
    lens: Installation,
    degree: int,
    layers: Sequence[Layer],
    rises: Sequence[Rise],
    data: Batch,
    batch_size: int,
    decode: Decode,
) -> tuple[WorstToken, ...]:
    """What stands out where these tokens are predicted, with all these layers replaced.

    Cost: one forward pass over the sequences that the tokens are in.

    Args:
        data: all sequences.
    """
    sequences = sorted({rise.sequence for rise in rises})
    causes: list[dict[str, Any]] = [{} for _ in rises]
    n_pos = data.streams[data.about].there.shape[1]
    for k, step in enumerate(data.rows(torch.tensor(sequences)).split(batch_size)):
        here = sequences[k * batch_size : (k + 1) * batch_size]
        chosen = [i for i, rise in enumerate(rises) if rise.sequence in here]
        places = [(here.index(rises[i].sequence), rises[i].at) for i in chosen]
        at = torch.tensor([s * n_pos + p for s, p in places])
        there = [n for n in layers if lens.host.stream(n) == data.about]
        look = _observers(lens, degree, there, at, n_pos, [causes[i] for i in chosen])
        with lens.flowing(dict.fromkeys(layers, degree)), lens.host.observe(look):
            lens.host.run(step)
    return tuple(
        WorstToken(
            sequence=rise.sequence,
            position=rise.position,
            token=ids[-1],
            text=decode(ids[-1:]),
            context=decode(ids[:-1]),
            true_ce=rise.true_ce,
            replaced_ce=rise.replaced_ce,
            kl=rise.kl,
            **cause,
        )
        for rise, cause in zip(rises, causes, strict=True)
        for ids in [_up_to(data, rise)]
    )


def _observers(
    lens: Installation,
    degree: int,
    layers: Sequence[Layer],
    wanted: Tensor,
    n_pos: int,
    causes: list[dict[str, Any]],
) -> dict[Layer, Observer]:
    """Of row wanted[i] of a batch, each puts its layer into causes[i], unless a worse one is."""

    def observer(layer: Layer) -> Observer:
        polynomial = lens[layer].truncate(degree)
        neurons: Any = getattr(polynomial, "base", polynomial)

        def look(arrival: Arrival) -> None:
            x, y, places = arrival.x, arrival.y, arrival.places
            flat = rearrange(x, "... d -> (...) d")
            rows = torch.arange(len(flat)) if places is None else places.among(n_pos).cpu()
            row, which = (rows[:, None] == wanted).nonzero(as_tuple=True)
            row = row.to(x.device)
            x, y = flat[row], rearrange(y, "... d -> (...) d")[row].double()
            size = torch.linalg.vector_norm(y, dim=-1).clamp(min=torch.finfo(y.dtype).tiny)
            errors = torch.linalg.vector_norm(y - polynomial(x).double(), dim=-1) / size
            t = (polynomial.weights.neurons(x)["y"].double() - neurons.m) / neurons.s
            t = torch.where(neurons.s > 0, t, 0).nan_to_num()
            farthest = t.abs().argmax(-1)
            deviations = t.gather(-1, farthest[:, None]).squeeze(-1)
            errors = errors.nan_to_num(nan=float("inf"))
            found = torch.stack([errors, deviations, farthest.double()]).T.tolist()
            for i, (error, deviation, neuron) in zip(which.tolist(), found, strict=True):
                if error > causes[i].get("error", -1):
                    causes[i].update(layer=layer, error=error)
                    causes[i].update(neuron=int(neuron), deviation=deviation)

        return look

    return {layer: observer(layer) for layer in layers}


def _up_to(data: Batch, rise: Rise) -> list[int]:
    """The token and those in front of it, what is not scored as the model reads it."""
    assert data.targets is not None
    targets, ids = data.targets[rise.sequence], data.streams[data.about].ids
    there = data.streams[data.about].there[rise.sequence]
    if ids is not None and data.lead is None:
        targets = torch.where(there & (targets == IGNORED), ids[rise.sequence], targets)
    start = max(0, rise.position - CONTEXT)
    part = targets[start : rise.position + 1]
    return part[part != IGNORED].tolist()


def decoder(lens: Installation, decode: Decode | None, tokens: Tensor) -> Decode:
    """Token ids to text: as given, else by the model's tokenizer, else the ids themselves.

    Raises:
        InvalidInputError: one that does not turn a list of ids into text.
    """
    if decode is None:
        return _ids if lens.host.tokenizer is None else lens.host.tokenizer.decode
    sample = tokens.flatten()[:1].tolist()
    try:
        text = decode(sample)
    except Exception as error:
        raise InvalidInputError(
            f"decode fails on {sample}, a list of token ids ({type(error).__name__}: {error}); "
            "give a function such as tokenizer.decode"
        ) from error
    if not isinstance(text, str):
        raise InvalidInputError(
            f"decode must turn a list of token ids into a string, got {type(text).__name__}; give "
            "a function such as tokenizer.decode"
        )
    return decode


def _ids(ids: list[int]) -> str:
    return " ".join(map(str, ids))
