"""The sums behind a report's losses: cross entropy, KL and agreement."""

from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polylens.errors import UnsupportedModel
from polylens.hosts.base import Host
from polylens.hosts.batch import IGNORED, Batch, Stream
from polylens.hosts.direction import sees_behind
from polylens.ranks import Ranks

# The one prediction for each input of a model that reads no tokens.
ONE = "predictions"


class Scores(NamedTuple):
    """Of every position of a batch, in float64 where the logits are; 0 where it does not count.

    Attributes:
        ce: [batch, pos - lead] cross entropy of the token `lead` further on.
        kl: [batch, pos] KL(true model || this one); agree: [batch, pos] 1 where both have the
            same most likely token. Zeros without a true model to compare with.
    """

    ce: Tensor
    kl: Tensor
    agree: Tensor


def lead_of(host: Host, batch: Batch) -> int:
    """How far behind a position the token is that its logits are about.

    1, the next one; 0, its own, in a model whose logits depend on what comes behind them, such as a
    masked language model: it can see the next one. Two forward passes over one sequence, where
    the batch does not say it itself.
    """
    if batch.lead is not None:
        return batch.lead
    return (
        0 if sees_behind(batch, batch.about, lambda each: [host.logits(each)], host.rounding) else 1
    )


def of_each_input(data: Batch) -> Batch:
    """These inputs with one prediction for each, and none of what comes next."""
    one = torch.zeros(len(data), 1, dtype=torch.long)
    streams = {**data.streams, ONE: Stream.of(one)}
    return replace(data, streams=streams, about=ONE, targets=one, lead=1)


def predictions(host: Host, batch: Batch) -> Tensor:
    """Logits [batch, pos, d_vocab]; [batch, 1, classes] of a batch `of_each_input`."""
    logits = host.logits(batch)
    return logits[:, None] if batch.about == ONE and logits.dim() == 2 else logits


def number_of_classes(host: Host, data: Batch) -> int | None:
    """What a model that reads no tokens returns for each input, if that may be logits of classes.

    None of hidden states, or of one number for each. A forward pass over the first inputs.
    """
    few = data.rows(torch.arange(min(2, len(data))))
    try:
        out = host.logits(few)
    except UnsupportedModel:
        return None
    classes = isinstance(out, Tensor) and out.dim() == 2 and len(out) == len(few)
    return out.shape[1] if classes and out.shape[1] > 1 else None


def score(logits: Tensor, truth: Tensor | None, batch: Batch, lead: int = 1) -> Scores:
    """Cross entropies of logits, and their KL and agreement with the truth.

    Sequence by sequence, so that only one sequence of log-probabilities is in memory.

    Args:
        logits, truth: [batch, pos, d_vocab].
        batch: what they are about; padding does not count, nor targets that are IGNORED.
        lead: of the tokens whose cross entropy it is, see `lead_of`.
    """
    targets, real = _targets(batch), batch.streams[batch.about].there
    ce, counts = [], scored(batch, lead)
    kl, agree = (
        torch.zeros(real.shape, dtype=torch.float64, device=logits.device) for _ in range(2)
    )
    for i in range(len(targets)):
        log_q = _log_softmax(logits[i])
        wanted = targets[i, lead:, None].clamp(min=0).to(log_q.device)
        ce_i = -log_q[: len(wanted)].gather(1, wanted).squeeze(1)
        ce.append(torch.where(counts[i].to(log_q.device), ce_i, 0).double())
        if truth is not None:
            log_p, here = _log_softmax(truth[i]), real[i].to(log_q.device)
            divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            kl[i] = torch.where(here, divergence, 0)
            agree[i] = here & (log_q.argmax(-1) == log_p.argmax(-1))
    return Scores(torch.stack(ce), kl, agree)


def scored(batch: Batch, lead: int) -> Tensor:
    """[batch, pos - lead] of bool: where the token `lead` further on is predicted and scored."""
    real = batch.streams[batch.about]
    return real.targets(lead) & (_targets(batch)[:, lead:] != IGNORED)


def _targets(batch: Batch) -> Tensor:
    assert batch.targets is not None
    return batch.targets


class Cost:
    """Streamed cost of a change of the model, paired with the true model sequence by sequence."""

    def __init__(self) -> None:
        self._rises: list[Tensor] = []
        self._kl: Tensor | float = 0.0
        self._agree: Tensor | float = 0.0

    def update(self, changed: Scores, true: Scores) -> None:
        self._rises.append((changed.ce - true.ce).sum(1))
        self._kl = self._kl + changed.kl.sum()
        self._agree = self._agree + changed.agree.sum()

    def merge(self, ranks: Ranks) -> None:
        """Let all ranks have seen what each has, one after the other."""
        rises, kl, agree = zip(*ranks.gathered((self._rises, self._kl, self._agree)), strict=True)
        self._rises = [each for of_rank in rises for each in of_rank]
        self._kl, self._agree = sum(kl), sum(agree)

    def kl(self, n_positions: int) -> float:
        """Mean over positions."""
        return float(self._kl) / n_positions

    def agreement(self, n_positions: int) -> float:
        """Share of positions."""
        return float(self._agree) / n_positions

    def delta_ce(self, n_targets: Tensor) -> float:
        """Mean rise of the cross entropy; n_targets [sequences] of each sequence."""
        return float(self._all_rises().sum() / n_targets.sum())

    def delta_ce_se(self, n_targets: Tensor) -> float | None:
        """Standard error of `delta_ce`, None of fewer than two sequences.

        Tokens of one sequence are not independent, so that sequences are the units: with their
        summed rises D_i and targets n_i it is that of the ratio of sums r = sum D_i / sum n_i,
        sqrt(S / (S - 1) sum (D_i - r n_i)^2) / sum n_i.
        """
        S = int((n_targets > 0).sum())
        rises = self._all_rises()
        left = rises - rises.sum() / n_targets.sum() * n_targets
        error = float(left.square().sum().sqrt() / n_targets.sum())
        return (S / (S - 1)) ** 0.5 * error if S > 1 and isfinite(error) else None

    def _all_rises(self) -> Tensor:
        """[sequences], on the CPU."""
        self._rises = [torch.cat(self._rises).cpu()]
        return self._rises[0]


def _log_softmax(logits: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1)
