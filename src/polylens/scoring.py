"""The sums behind a report: squares for R2, cross entropy and KL for the losses."""

from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from polylens.errors import InvalidInputError
from polylens.hosts.base import Layer
from polylens.quality import is_constant, share_explained
from polylens.selection import label


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
        variance, mse = self.variance, self.residual / self.n
        bad = [f"degree {k}" for k, value in enumerate(mse.tolist()) if not isfinite(value)]
        if not isfinite(variance) or bad:
            what = f"its polynomials of {', '.join(bad)}" if isfinite(variance) else "its outputs"
            raise InvalidInputError(
                f"layer {label(layer)}: {what} are not finite on these tokens, so R2 would be "
                "NaN; use a wider dtype, and check the model's activations on them"
            )
        return tuple(share_explained(mse, variance, self.mean.square().sum()).tolist())


def score(logits: Tensor, truth: Tensor | None, tokens: Tensor, real: Tensor) -> Tensor:
    """[sum of next-token cross entropies, sum over positions of KL(truth || logits)], float64.

    Sequence by sequence, so that only one sequence of log-probabilities is in memory.

    Args:
        logits, truth: [batch, pos, d_vocab]; without truth the second sum is 0.
        tokens: [batch, pos].
        real: [batch, pos] of bool, False at padding; a target counts if it and the position
            that predicts it are real.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(len(tokens)):
        log_q = _log_softmax(logits[i])
        pairs = (real[i, :-1] & real[i, 1:]).nonzero().squeeze(1)
        nll = -log_q[pairs, tokens[i, pairs + 1]]
        total[0] += nll.double().sum().cpu()
        if truth is not None:
            log_p = _log_softmax(truth[i])
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            total[1] += kl[real[i]].double().sum().cpu()
    return total


def _log_softmax(logits: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1)
