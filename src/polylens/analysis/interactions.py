"""The polynomial's output along one direction, split over pairs of what writes the input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from polylens.analysis.arguments import check_polynomial
from polylens.analysis.figures import interactions_figure
from polylens.analysis.metric import check_inputs, direction, several
from polylens.analysis.players import taylor_interactions
from polylens.analysis.readout import behind_norm
from polylens.errors import InvalidInputError
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.report.rendering import Tabled, as_frame, empty_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.table import Table


@dataclass(frozen=True, eq=False, repr=False)
class Interactions(Tabled):
    """f(x) . u = constant + sum_a linear_a + sum_ab pairs_ab for the input x = sum_a writers_a.

    Attributes:
        names: of the writers.
        constant: float, what f is without any writer.
        linear: [n] first-order term of each writer.
        pairs: [n, n] symmetric; pairs[a, a] is a writer with itself, and two writers a != b
            interact by pairs[a, b] + pairs[b, a]. Products of three writers or more are shared
            among the pairs in them.
        about: what f is.
        title: what was asked, such as which layer, position and token; over tables and figures.
    """

    names: tuple[str, ...]
    constant: float
    linear: Tensor
    pairs: Tensor
    about: str = ""
    title: str = ""

    @property
    def total(self) -> float:
        """What f is along u."""
        return self.constant + float(self.linear.sum() + self.pairs.sum())

    @property
    def shapley(self) -> Tensor:
        """[n] Shapley values: what each writer adds, averaged over all orders of writers."""
        return self.linear + self.pairs.sum(1)

    def __len__(self) -> int:
        return len(self.names)

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """The k largest terms by absolute value, as (writer, writer or "", contribution).

        A first-order term has "" for its second writer; a pair holds both orders.
        """
        terms = [(name, "", float(v)) for name, v in zip(self.names, self.linear, strict=True)]
        values = self.pairs.tolist()
        for a, name in enumerate(self.names):
            terms.append((name, name, values[a][a]))
            terms += [(name, self.names[b], 2 * values[a][b]) for b in range(a)]
        return sorted(terms, key=lambda term: -abs(term[2]))[:k]

    def plot(self, k: int = 16) -> "Figure":
        """Heat map of the k writers that take part most; its cells are the terms of `top`."""
        return interactions_figure(
            self.names, self.constant, self.linear, self.pairs, k, title=self.title
        )

    def table(self, k: int = 12) -> "Table":
        """The k largest terms, and what the others sum to."""
        from rich.text import Text

        table = empty_table()
        table.title = Text(self.title or f"output along u, of a {self.about}")
        table.add_column("writers")
        table.add_column("adds", justify="right")
        terms = self.top(k)
        for a, b, value in terms:
            table.add_row(Text(f"{a} × {b}" if b else a), f"{value:+.4f}")
        others = self.total - self.constant - sum(value for *_, value in terms)
        n = len(self.names)
        table.add_row(f"{n + n * (n + 1) // 2 - len(terms):,} other terms", f"{others:+.4f}")
        table.add_row("constant", f"{self.constant:+.4f}", end_section=True)
        table.add_row("sum", f"{self.total:+.4f}", style="bold")
        return table

    def __rich__(self) -> "Table":
        return self.table()

    def to_pandas(self) -> "DataFrame":
        """All terms, by falling size: writer, writer or "", what they add; needs pandas."""
        terms = self.top(len(self) + len(self) * (len(self) + 1) // 2)
        return as_frame({"writer": a, "with": b, "adds": value} for a, b, value in terms)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; `pairs` as [writer, writer, contribution]."""
        terms = self.top(len(self) + len(self) * (len(self) + 1) // 2)
        return {
            "title": self.title,
            "about": self.about,
            "constant": self.constant,
            "total": self.total,
            "first order": [[a, value] for a, b, value in terms if not b],
            "pairs": [[a, b, value] for a, b, value in terms if b],
        }


@overload
def interactions(
    polynomial: Any,
    writers: Tensor,
    u: Tensor,
    names: Sequence[str] | None = None,
    *,
    title: str = "",
) -> Interactions: ...


@overload
def interactions(
    polynomial: Any,
    writers: Tensor,
    u: Sequence[Tensor],
    names: Sequence[str] | None = None,
    *,
    title: str = "",
) -> list[Interactions]: ...


@torch.no_grad()
def interactions(
    polynomial: Any,
    writers: Tensor,
    u: Tensor | Sequence[Tensor],
    names: Sequence[str] | None = None,
    *,
    title: str = "",
) -> Interactions | list[Interactions]:
    """Split the polynomial's output along u at one input over the writers of that input.

    With ends it is an ordinary polynomial around the input, that of their sum: neurons beyond an
    end follow their asymptote (`Approximation.piece`). That is split, for every degree, into
    what each writer does alone and Shapley-Taylor interactions of two, in closed form
    (`polylens.analysis.players`). Exact: all sum to the polynomial's output. Of degree 2 without
    ends, with y_a = w_a W, pairs_ab = sum_i p_i (W_out u)_i y_ai y_bi for an MLP, and the
    symmetrised gate-linear products as well for a GLU.

    Args:
        polynomial: per neuron or joint, or a dense one of degree 2; that of a lens is what
            replaces the layer. Of a lower degree: `polynomial.truncate(k)`.
        writers: [n, d_in], summing to what the layer reads: those of `residual_writers`, which may
            be the features of an SAE, or any of your own, which `through_norm` takes through a norm
            in front.
        u: [d_out] output direction: a logit, a probe, a row of a decoder, a column of an encoder;
            or a list of several, such as `list(sae.W_dec)`, for a list of results.
        names: one per writer; numbers by default.
        title: what the output and u are, for tables and figures: layer, position, logit of what.

    Raises:
        InvalidInputError: sizes that do not fit, u zero, no writers, names of another number, a
            dense polynomial of degree above 2.

    Cost: O(n d_in d_mlp + degree n^2 d_mlp) and no d_in x d_in matrix.
    """
    check_polynomial(polynomial)
    if several(u):
        return [interactions(polynomial, writers, each, names, title=title) for each in u]
    device = next(iter(polynomial.buffers())).device
    u = direction(u, polynomial.d_out, device)
    writers = check_inputs(writers, polynomial.d_in, device)
    if writers.dim() != 2 or not len(writers):
        raise InvalidInputError(
            f"writers must be [n, {polynomial.d_in}] with n >= 1, got {tuple(writers.shape)}; "
            "interactions are about one position at a time"
        )
    if not torch.isfinite(writers).all():
        raise InvalidInputError(
            f"writers have {int((~torch.isfinite(writers)).sum())} NaN or infinite entries"
        )
    names = tuple(str(i) for i in range(len(writers))) if names is None else tuple(names)
    if len(names) != len(writers):
        raise InvalidInputError(f"{len(names)} names for {len(writers)} writers")
    piece = polynomial.piece(writers.sum(0), u)
    (y, z), (P, Q) = piece.read(writers), piece.about_zero()
    linear, pairs = taylor_interactions(y, P, z, Q)
    if piece.linear is not None:
        linear = linear + writers @ piece.linear
    constant = piece.constant + float(P[0].sum())
    about = f"{polynomial.kind} of degree {piece.degree}"
    if getattr(polynomial, "ends", None) is not None:
        beyond, neurons = int(piece.beyond.sum()), len(piece.beyond)
        about += f" with ends, around an input beyond those of {beyond} of {neurons} neurons"
    return Interactions(names, constant, linear, pairs, about, title)


@torch.no_grad()
def second_differences(layer: Any, writers: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[pairs, d_out] float64: what two writers do together beyond what each does alone.

    f(x) - f(x - a) - f(x - b) + f(x - a - b) at x = sum_a writers_a, with f the true layer,
    whose differences a polynomial's `pairs` predict, or a polynomial itself.

    Args:
        layer: weights of a layer, such as `polynomial.weights`, or a polynomial.
        writers: [n, d_in].
        a, b: [pairs] numbers of writers.

    Raises:
        InvalidInputError: writers of another size, or a number beyond them.
    """
    weights: Any = layer
    if not isinstance(layer, MLPWeights | GLUWeights):
        check_polynomial(layer)
        weights = layer.weights
    dtype = weights.dtype
    writers = check_inputs(writers, weights.d_in, weights.device)
    a, b = (torch.as_tensor(numbers, device=writers.device) for numbers in (a, b))
    if writers.dim() != 2 or any(((t < 0) | (t >= len(writers))).any() for t in (a, b)):
        raise InvalidInputError(
            f"a and b must be numbers of writers [n, {weights.d_in}], got writers "
            f"{tuple(writers.shape)} and a, b in {int(torch.minimum(a, b).min())} ... "
            f"{int(torch.maximum(a, b).max())}"
        )
    x = writers.sum(0)

    def f(inputs: Tensor) -> Tensor:
        return layer(inputs.to(dtype)).double()

    alone = f(x - writers)
    return f(x[None]) - alone[a] - alone[b] + f(x - writers[a] - writers[b])


def through_norm(
    writers: Tensor,
    scale: float | Tensor,
    *,
    centred: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Writers of the residual stream as writers of the normalised input, the scale frozen.

    w -> ((w - mean(w)) / scale) * weight, without the mean for an RMSNorm: linear in w once the
    scale is a number, so the results still sum to the normed input less `bias`.

    Args:
        writers: [n, d_model] before the norm.
        scale: what the norm divided by at this position.
        centred: True for LayerNorm.
        weight, bias: [d_model] or None. A bias becomes one more writer, the last.

    Returns:
        [n, d_model] float64, [n + 1, d_model] with a bias.

    Raises:
        InvalidInputError: a scale that is not one positive number.
    """
    divisor = torch.as_tensor(scale).detach().double()
    if divisor.numel() != 1 or not divisor.isfinite().all() or not (divisor > 0).all():
        raise InvalidInputError(f"scale must be one positive number, got {scale!r}")
    out = behind_norm(writers, centred=centred, weight=weight)
    out = out / divisor.to(out.device).reshape(())
    return out if bias is None else torch.cat([out, bias.detach().double()[None]])
