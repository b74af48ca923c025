"""A polynomial in a class of its own that needs nothing but torch where it is sent."""

from torch import Tensor, nn

from polylens.polynomials.evaluation import PerNeuron


class InlinePolynomial(nn.Module):
    """f(x) = (P(y) + z Q(y)) W_out + b_out, [..., d_in] -> [..., d_out].

    Args:
        tensors: W_in, W_out and those of W_gate, b_gate, b_in, b_out that there are.
        tables: of `PerNeuron`.
    """

    W_in: Tensor
    W_out: Tensor
    W_gate: Tensor | None
    b_in: Tensor | None
    b_out: Tensor | None

    def __init__(self, tensors: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)  # sent by source, where super() has no class to refer to
        own = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        bias = own.pop("b_gate" if "W_gate" in own else "b_in", None)
        if bias is not None:  # in the dtype of the tables, which is the wider one
            tables = {**tables, "mean": tables["mean"] - bias.to(tables["mean"])}
        for name in ("W_in", "W_out", "W_gate", "b_in", "b_out"):
            self.register_buffer(name, own.get(name))
        self.neurons = PerNeuron(tables)

    def forward(self, x: Tensor) -> Tensor:
        z = None
        if self.W_gate is not None:
            z = x @ self.W_in if self.b_in is None else x @ self.W_in + self.b_in
        pre = x @ (self.W_in if self.W_gate is None else self.W_gate)
        h = self.neurons(pre.to(self.neurons.mean.dtype), z)
        out = h.to(self.W_out.dtype) @ self.W_out
        return out if self.b_out is None else out + self.b_out
