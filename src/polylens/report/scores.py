"""The sums behind a report: squares for R2; cross entropy, KL and agreement for the losses."""

from math import isfinite
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polylens.checks import label
from polylens.errors import InvalidInputError
from polylens.hosts.base import TOLERANCE, Host, Layer, relative_error
from polylens.polynomials.explained_variance import is_constant, share_explained


class ResidualSums:
    """Streamed float64 squares of one layer, about the first batch's mean: nothing cancels.

    Attributes:
        n: rows seen so far.
    """

    n = 0

    def update(self, y: Tensor, predictions: Tensor) -> None:
        """y [n, d], predictions [degree + 1, n, d]."""
        if len(y) == 0:
            return
        y = y.double()
        if self.n == 0:
            self.shift = y.mean(0)
            self.total = torch.zeros_like(self.shift)
            self.square = self.total.new_zeros(())
            self.residual = self.total.new_zeros(len(predictions))
        self.n += len(y)
        self.total += (y - self.shift).sum(0)
        self.square += (y - self.shift).square().sum()
        self.residual += torch.stack([(y - p.double()).square().sum() for p in predictions])

    @property
    def mean(self) -> Tensor:
        """[d_out] mean of y."""
        return self.shift + self.total / self.n

    @property
    def variance(self) -> float:
        """Of y, summed over directions."""
        return float(self.square / self.n - (self.total / self.n).square().sum())

    @property
    def constant(self) -> bool:
        """Whether y does not vary."""
        return is_constant(self.variance, self.mean.square().sum())

    def r2(self, layer: Layer) -> tuple[float, ...] | None:
        """1 - residual / centred squares for every degree (see `quality.share_explained`); None
        with fewer than two rows.

        Raises:
            InvalidInputError: outputs or polynomials that are not finite (`layer` names them).
        """
        if self.n < 2:
            return None
        variance = self.variance
        bad = [f"degree {k}" for k, v in enumerate(self.residual.tolist()) if not isfinite(v)]
        if not isfinite(variance) or bad:
            what = f"its polynomials of {', '.join(bad)}" if isfinite(variance) else "its outputs"
            raise InvalidInputError(
                f"layer {label(layer)}: {what} are not finite on these tokens, so R2 would be "
                "NaN; use a wider dtype, and check the model's activations on them"
            )
        return self._shares()

    def last_r2(self) -> float | None:
        """R2 of the last degree; None with fewer than two rows, -inf of what is not finite."""
        if self.n < 2:
            return None
        finite = isfinite(self.variance) and isfinite(float(self.residual[-1]))
        return self._shares()[-1] if finite else float("-inf")

    def _shares(self) -> tuple[float, ...]:
        mse = self.residual / self.n
        return tuple(share_explained(mse, self.variance, self.mean.square().sum()).tolist())


class Scores(NamedTuple):
    """Of every position of a batch, in float64 on the CPU; 0 where it does not count.

    Attributes:
        ce: [batch, pos - lead] cross entropy of the token `lead` further on.
        kl: [batch, pos] KL(true model || this one); agree: [batch, pos] 1 where both have the
            same most likely token. Zeros without a true model to compare with.
    """

    ce: Tensor
    kl: Tensor
    agree: Tensor


def lead_of(host: Host, tokens: Tensor) -> int:
    """How far behind a position the token is that its logits are about.

    1, the next one; 0, its own, in a model whose logits depend on what comes behind them, such as a
    masked language model: it can see the next one. Two forward passes over one sequence.

    Args:
        tokens: [batch, pos].
    """
    config = getattr(host.module, "config", None)
    if tokens.shape[1] < 2 or getattr(config, "is_encoder_decoder", False):
        return 1
    first, other = tokens[:1], tokens[:1].clone()
    other[0, -1] += -1 if other[0, -1] > 0 else 1
    with torch.no_grad():
        here, there = (host.logits(sequence) for sequence in (first, other))
    if here.dim() != 3:  # not of positions; `measure_losses` says so
        return 1
    return 0 if relative_error(there[:, :-1], here[:, :-1]) > TOLERANCE[here.dtype] else 1


def score(
    logits: Tensor, truth: Tensor | None, tokens: Tensor, real: Tensor, lead: int = 1
) -> Scores:
    """Cross entropies of logits, and their KL and agreement with the truth.

    Sequence by sequence, so that only one sequence of log-probabilities is in memory.

    Args:
        logits, truth: [batch, pos, d_vocab].
        tokens: [batch, pos].
        real: [batch, pos] of bool, False at padding, which does not count.
        lead: of the tokens whose cross entropy it is, see `lead_of`.
    """
    ce, counts = [], targets(real, lead)
    kl, agree = (torch.zeros(real.shape, dtype=torch.float64) for _ in range(2))
    for i in range(len(tokens)):
        log_q = _log_softmax(logits[i])
        wanted = tokens[i, lead:, None].to(log_q.device)
        ce_i = -log_q[: len(wanted)].gather(1, wanted).squeeze(1)
        ce.append(torch.where(counts[i].to(log_q.device), ce_i, 0).cpu().double())
        if truth is not None:
            log_p, here = _log_softmax(truth[i]), real[i].to(log_q.device)
            divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            kl[i] = torch.where(here, divergence, 0)
            agree[i] = here & (log_q.argmax(-1) == log_p.argmax(-1))
    return Scores(torch.stack(ce), kl, agree)


def targets(real: Tensor, lead: int = 1) -> Tensor:
    """[batch, pos - lead] of bool: where a real position predicts a real token."""
    return real[:, : real.shape[1] - lead] & real[:, lead:]


class Cost:
    """Streamed cost of a change of the model, paired with the true model sequence by sequence."""

    def __init__(self) -> None:
        self._rises: list[Tensor] = []
        self._kl = self._agree = 0.0

    def update(self, changed: Scores, true: Scores) -> None:
        self._rises.append((changed.ce - true.ce).sum(1))
        self._kl += float(changed.kl.sum())
        self._agree += float(changed.agree.sum())

    def kl(self, n_positions: int) -> float:
        """Mean over positions."""
        return self._kl / n_positions

    def agreement(self, n_positions: int) -> float:
        """Share of positions."""
        return self._agree / n_positions

    def delta_ce(self, n_targets: Tensor) -> float:
        """Mean rise of the cross entropy; n_targets [sequences] of each sequence."""
        return float(torch.cat(self._rises).sum() / n_targets.sum())

    def delta_ce_se(self, n_targets: Tensor) -> float | None:
        """Standard error of `delta_ce`, None of fewer than two sequences.

        Tokens of one sequence are not independent, so that sequences are the units: with their
        summed rises D_i and targets n_i it is that of the ratio of sums r = sum D_i / sum n_i,
        sqrt(S / (S - 1) sum (D_i - r n_i)^2) / sum n_i.
        """
        S = int((n_targets > 0).sum())
        rises = torch.cat(self._rises)
        left = rises - rises.sum() / n_targets.sum() * n_targets
        error = float(left.square().sum().sqrt() / n_targets.sum())
        return (S / (S - 1)) ** 0.5 * error if S > 1 and isfinite(error) else None


def _log_softmax(logits: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1)
