"""Which preactivations are clipped, of those for which the activation is flat."""

from dataclasses import replace

import torch
from torch import Tensor

from polylens.clipping import PreactivationRange, flat_sides, tail_ends
from polylens.neuron_gram import NeuronGram
from polylens.weights import GLUWeights, MLPWeights

# Shares of a neuron's preactivations that may be clipped; the large ones, of neurons that are
# flat for nearly all inputs, are tried where the error is largest.
SMALL, LARGE = (0.0, 0.01, 0.03, 0.1), (0.3, 0.6, 0.8, 0.9, 0.97)
LARGEST, FEW = 8, 64
# Inputs that must remain for each feature of a neuron.
REMAINING = 10


@torch.no_grad()
def best_tails(
    weights: MLPWeights | GLUWeights,
    x: Tensor,
    sample_weights: Tensor | None,
    degree: int,
    share: float,
) -> Tensor:
    """[2, d_mlp] float64: ends beyond which y is clipped, infinite where it is not.

    Far below, SiLU and GELU are constant, and a polynomial that follows them there bends
    everywhere else. Of all preactivations of the layer on inputs x [n, d_in] no more than `share`
    are clipped, only where the activation approaches a constant, and at the neurons where that
    lowers the error most: the minimum over shares p_i of sum_i err_i(p_i) + lambda p_i, with
    err_i(p) the squared error of neuron i's best P(y) + z Q(y) with the far p of its y clipped,
    times |W_out,i|^2, and lambda such that mean p_i <= share. A neuron that is flat for all but a
    few inputs may so be clipped for most of them.

    Cost: nine fits to x, five of them for an eighth of the neurons.
    """
    sides = sum(flat_sides(weights.act))
    features = (2 if isinstance(weights, GLUWeights) else 1) * degree + 1
    most = min(0.99, 1 - REMAINING * features / max(1, len(x))) / max(1, sides)
    shares = [p for p in SMALL + LARGE if p <= most]
    if not sides or len(shares) < 2:
        return tail_ends(weights, x[:0], [0.0])[0]
    ends = tail_ends(weights, x, shares)
    errors = ends.new_full((len(shares), weights.d_mlp), torch.inf)
    chosen = torch.arange(weights.d_mlp, device=ends.device)
    for k, p in enumerate(shares):
        if p == LARGE[0]:
            count = min(weights.d_mlp, max(FEW, weights.d_mlp // LARGEST))
            chosen = errors.amin(0).topk(count).indices
        part = weights if p < LARGE[0] else _neurons(weights, chosen)
        errors[k, chosen] = _errors(part, x, sample_weights, degree, ends[k][:, chosen])
    price = torch.tensor(shares).to(errors)[:, None] * sides
    # The least price at which the whole share is not spent.
    low, high = 0.0, float(errors[0].sum()) / shares[1]
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high * 1e-15
        choice = (errors + middle * price).argmin(0)
        spent = float(price[choice, 0].mean())
        low, high = (middle, high) if spent > share else (low, middle)
    choice = (errors + high * price).argmin(0)
    return ends.gather(0, choice.expand(1, 2, -1))[0]


def _errors(
    weights: MLPWeights | GLUWeights,
    x: Tensor,
    sample_weights: Tensor | None,
    degree: int,
    tails: Tensor,
) -> Tensor:
    """[d_mlp]: what each neuron's best polynomial with these tails leaves of the output."""
    gram = NeuronGram(weights, degree, seen=PreactivationRange(weights, tails))
    gram.update(x, sample_weights)
    return gram.errors() * weights.W_out.double().square().sum(1)


def _neurons(weights: MLPWeights | GLUWeights, chosen: Tensor) -> MLPWeights | GLUWeights:
    """The layer with some of its neurons."""
    roles = {name: getattr(weights, name, None) for name in ("W_in", "W_gate", "b_in", "b_gate")}
    parts = {name: t[..., chosen] for name, t in roles.items() if t is not None}
    return replace(weights, W_out=weights.W_out[chosen], **parts)
