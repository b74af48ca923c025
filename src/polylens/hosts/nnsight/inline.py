"""A polynomial in a class of its own that needs nothing but torch where it is sent."""

from typing import Any

import torch
from torch import Tensor, nn


class InlinePolynomial(nn.Module):
    """h = P(t) + z Q(t) per neuron, f(x) = h W_out + b_out; [..., d_in] -> [..., d_out].

    Called as f(x, y) with the true output y [batch, pos, d_out], position 0 of each sequence
    stays true; a sequence of one position is a continuation and is all polynomial.

    Args:
        tensors: W_in, W_out and those of W_gate, b_gate, b_in, b_out that there are.
        m, s: [d_mlp] mean and standard deviation of the activated preactivation.
        P: [degree + 1, d_mlp] Hermite coefficients in t = (y - m) / s.
        Q: [degree, d_mlp] those of the factor of the linear branch z, or None for an MLP.
        ends: low and high [d_mlp], of y - m, where P and Q end; below and above, what the
            activation gains there (start and rates, [d_mlp] each) or None. None without ends.
    """

    W_in: Tensor
    W_out: Tensor
    W_gate: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    shift: Tensor
    scale: Tensor
    P: Tensor
    Q: Tensor | None
    v_range: Tensor | None
    below: Tensor | None
    above: Tensor | None

    def __init__(
        self,
        tensors: dict[str, Tensor],
        m: Tensor,
        s: Tensor,
        P: Tensor,
        Q: Tensor | None,
        ends: Any = None,
    ) -> None:
        nn.Module.__init__(self)  # sent by source, where super() has no class to refer to
        dtype = torch.promote_types(tensors["W_in"].dtype, torch.float32)
        gate_bias = tensors.get("b_in" if Q is None else "b_gate")
        shift = -m.double() if gate_bias is None else gate_bias.double() - m.double()
        scale = torch.where(s == 0, 0.0, 1 / torch.where(s == 0, 1.0, s))
        own = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
        own |= {"shift": shift.to(dtype), "scale": scale.to(dtype), "P": P.to(dtype)}
        own |= {} if Q is None else {"Q": Q.to(dtype)}
        if ends is not None:
            own["v_range"] = torch.stack([ends.low, ends.high])
            for name, side in (("below", ends.below), ("above", ends.above)):
                own |= {} if side is None else {name: torch.stack([side.start, *side.rates])}
        for name in ("W_in", "W_out", "W_gate", "b_in", "b_out", "shift", "scale", "P", "Q"):
            self.register_buffer(name, own.get(name))
        for name in ("v_range", "below", "above"):
            self.register_buffer(name, own.get(name))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        pre = x @ (self.W_in if self.Q is None else self.W_gate)
        v, gained = pre.to(self.P.dtype) + self.shift, None
        for side in (self.below, self.above):
            if side is not None:
                beyond = v - side[0]
                beyond = beyond.clamp(max=0) if side is self.below else beyond.clamp(min=0)
                rate = torch.zeros_like(v)
                for power in side[1:].flip(0):
                    rate = rate * beyond + power
                gained = beyond * rate if gained is None else gained + beyond * rate
        if self.v_range is not None:
            v = v.clamp(self.v_range[0], self.v_range[1])
        t = v * self.scale
        hermite = [torch.ones_like(t), t]
        for k in range(1, len(self.P) - 1):
            hermite.append(t * hermite[k] - k * hermite[k - 1])
        h = torch.zeros_like(t)
        for p, he in zip(self.P, hermite, strict=False):
            h = h + p * he
        if self.Q is not None:
            z = x @ self.W_in if self.b_in is None else x @ self.W_in + self.b_in
            for q, he in zip(self.Q, hermite, strict=False):
                h = h + z * q * he
            gained = None if gained is None else gained * z
        h = h if gained is None else h + gained
        out = h.to(self.W_out.dtype) @ self.W_out
        out = out if self.b_out is None else out + self.b_out
        if y is None or out.shape[-2] == 1:
            return out
        return torch.cat([y[..., :1, :], out[..., 1:, :]], dim=-2)
