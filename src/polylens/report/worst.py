"""The tokens that a replaced model predicts worst, compared with the true one, and why."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from polylens.calibration.tokens import batches
from polylens.checks import Layer
from polylens.errors import InvalidInputError
from polylens.hosts.base import Arrival, Observer
from polylens.installed.installation import Installation
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

    Attributes:
        found: worst first.
    """

    def __init__(self, n: int, lead: int) -> None:
        self._n, self._lead, self._sequences = n, lead, 0
        self.found: list[Rise] = []

    def update(self, changed: Scores, true: Scores) -> None:
        rises = (changed.ce - true.ce).nan_to_num(nan=float("inf"), posinf=float("inf"))
        for place in rises.flatten().topk(min(self._n, rises.numel())).indices.tolist():
            i, at = divmod(place, rises.shape[1])
            scores = (table[i, at].item() for table in (rises, true.ce, changed.ce, changed.kl))
            rise, *rest = scores
            if rise > ROUNDING:
                self.found.append(Rise(rise, self._sequences + i, at + self._lead, at, *rest))
        self.found.sort(key=lambda found: (-found.rise, found.sequence, found.position))
        del self.found[self._n :]
        self._sequences += len(rises)


def explain(
    lens: Installation,
    degree: int,
    layers: Sequence[Layer],
    rises: Sequence[Rise],
    tokens: Tensor,
    mask: Tensor | None,
    batch_size: int,
    decode: Decode,
) -> tuple[WorstToken, ...]:
    """What stands out where these tokens are predicted, with all these layers replaced.

    Cost: one forward pass over the sequences that the tokens are in.

    Args:
        tokens, mask: [batch, pos] of all sequences.
    """
    sequences = sorted({rise.sequence for rise in rises})
    causes: list[dict[str, Any]] = [{} for _ in rises]
    some = torch.tensor(sequences, device=tokens.device)
    mask = None if mask is None else mask[some]
    for k, step in enumerate(batches(tokens[some], mask, batch_size)):
        here = sequences[k * batch_size : (k + 1) * batch_size]
        chosen = [i for i, rise in enumerate(rises) if rise.sequence in here]
        places = [(here.index(rises[i].sequence), rises[i].at) for i in chosen]
        n_pos = tokens.shape[1]
        at = torch.tensor([s * n_pos + p for s, p in places])
        look = _observers(lens, degree, layers, at, [causes[i] for i in chosen])
        with lens.replaced(degree=degree, layers=layers), lens.host.observe(look):
            lens.host.run(*step)
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
        for ids in [_up_to(tokens, rise)]
    )


def _observers(
    lens: Installation,
    degree: int,
    layers: Sequence[Layer],
    wanted: Tensor,
    causes: list[dict[str, Any]],
) -> dict[Layer, Observer]:
    """Of row wanted[i] of a batch, each puts its layer into causes[i], unless a worse one is."""

    def observer(layer: Layer) -> Observer:
        polynomial = lens[layer].truncate(degree)
        neurons: Any = getattr(polynomial, "base", polynomial)

        def look(arrival: Arrival) -> None:
            x, y, places = arrival.x, arrival.y, arrival.places
            flat = rearrange(x, "... d -> (...) d")
            rows = torch.arange(len(flat)) if places is None else places.rows.cpu()
            row, which = (rows[:, None] == wanted).nonzero(as_tuple=True)
            row = row.to(x.device)
            x, y = flat[row], rearrange(y, "... d -> (...) d")[row].double()
            size = torch.linalg.vector_norm(y, dim=-1).clamp(min=torch.finfo(y.dtype).tiny)
            errors = torch.linalg.vector_norm(y - polynomial(x).double(), dim=-1) / size
            t = (polynomial.weights.neurons(x)["y"].double() - neurons.m) / neurons.s
            t = torch.where(neurons.s > 0, t, 0).nan_to_num()
            farthest = t.abs().argmax(-1)
            found = zip(which.tolist(), errors.nan_to_num(nan=float("inf")).tolist(), strict=True)
            for j, (i, error) in enumerate(found):
                if error > causes[i].get("error", -1):
                    neuron = int(farthest[j])
                    causes[i].update(layer=layer, error=error)
                    causes[i].update(neuron=neuron, deviation=float(t[j, neuron]))

        return look

    return {layer: observer(layer) for layer in layers}


def _up_to(tokens: Tensor, rise: Rise) -> list[int]:
    start = max(0, rise.position - CONTEXT)
    return tokens[rise.sequence, start : rise.position + 1].tolist()


def decoder(lens: Installation, decode: Decode | None, tokens: Tensor) -> Decode:
    """Token ids to text: as given, else by the model's tokenizer, else the ids themselves.

    Raises:
        InvalidInputError: one that does not turn a list of ids into text.
    """
    if decode is None:
        return _ids if lens.host.tokenizer is None else lens.host.tokenizer.decode
    sample = tokens[0, :1].tolist()
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
