"""How far two lenses are apart: checkpoints, a base model and what was tuned of it, texts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polylens.analysis.arguments import check_lens, check_polynomial
from polylens.analysis.features import EigenFeatures, eigenfeatures
from polylens.analysis.figures import distances_figure
from polylens.analysis.layer_tokens import input_moments
from polylens.analysis.linear import SingularFeatures, singular_features
from polylens.checks import Layer, Layers, check_at_least, check_layers, label, to_json
from polylens.errors import InvalidInputError
from polylens.inputs.gaussian import Gaussian
from polylens.normal_forms.weights import GLUWeights, MLPWeights
from polylens.polynomials.explained_variance import Coefficients, energy_under
from polylens.polynomials.factored import Polynomial
from polylens.report.rendering import Tabled, as_frame, empty_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.table import Table

# A feature to which the other answers with less than this share of its value is not there.
THERE = 0.5
# Cosines from which on it reads and writes the same.
SAME = 0.9
TINY = torch.finfo(torch.float64).tiny

linalg: Any = torch.linalg  # without types


@dataclass(frozen=True)
class FeatureChange:
    """What becomes of one feature, read along q and written along o, in another polynomial.

    With M the other's linear map (or quadratic form along u) in white coordinates of the inputs,
    no two features are matched with each other, so that equal values, whose features are
    arbitrary, do no harm.

    Attributes:
        kind: "linear" or "quadratic".
        feature: its number.
        fate: "kept"; "turned": the other answers when it is read, or writes where it writes, but
            to another reading or in another direction; "vanished": neither, where it is one of the
            first lens; "appeared": neither, where it is one of the second.
        value: in its own polynomial.
        other: q M o, its value in the other one.
        reading: cosine of q with what the other reads when it writes o, M o.
        writing: cosine of o with what the other writes when q is read, q M.
    """

    kind: str
    feature: int
    fate: str
    value: float
    other: float
    reading: float
    writing: float


@dataclass(frozen=True)
class LayerDistance:
    """Of one layer.

    Attributes:
        layer: which.
        distance: E|f - g|^2 / Var f, f of the first lens and g of the second, under the inputs of
            the first: the share of f that g leaves unexplained. 1 is as far as the mean of f.
        by_degree: what each degree contributes to it, in Hermite polynomials of these inputs.
        changes: what becomes of the strongest features of either.
    """

    layer: Layer
    distance: float
    by_degree: tuple[float, ...]
    changes: tuple[FeatureChange, ...] = ()

    def count(self, fate: str) -> int:
        """How many features have this fate."""
        return sum(change.fate == fate for change in self.changes)


@dataclass(frozen=True, repr=False)
class Comparison(Tabled):
    """Two lenses, layer by layer; `comparison[layer]` is one."""

    first: str
    second: str
    rows: tuple[LayerDistance, ...] = field(repr=False)

    def __getitem__(self, layer: Layer) -> LayerDistance:
        found = next((row for row in self.rows if row.layer == layer), None)
        if found is None:
            raise KeyError(f"no layer {layer!r}; there are {[row.layer for row in self.rows]}")
        return found

    def __len__(self) -> int:
        return len(self.rows)

    def __rich__(self) -> "Table":

        table = empty_table()
        table.collapse_padding = True
        table.title = f"{self.first} → {self.second}: E|f − g|² / Var f"
        degrees = range(max((len(row.by_degree) for row in self.rows), default=0))
        # short titles: with four degrees it fits 80 columns
        fates = {"kept": "kept", "turned": "turned", "vanished": "gone", "appeared": "new"}
        for title in ("layer", "distance", *(f"deg {k}" for k in degrees), *fates.values()):
            table.add_column(title, justify="right")
        for row in self.rows:
            parts = (_small(part) for part in row.by_degree)
            counts = (str(row.count(fate)) for fate in fates)
            table.add_row(label(row.layer), _small(row.distance), *parts, *counts)
        table.caption = (
            "distance: the share of f's variance that g leaves unexplained, of each degree deg k\n"
            "kept, turned, gone, new: how many of the strongest features of either lens are in the "
            "other, with another direction in it, only in the first, only in the second"
        )
        table.caption_justify = "left"
        return table

    def plot(self) -> "Figure":
        """Distance by layer, of all degrees and of each."""
        return distances_figure(
            [label(row.layer) for row in self.rows], [row.by_degree for row in self.rows]
        )

    def to_pandas(self) -> "DataFrame":
        """A row for each layer; needs pandas."""
        columns = ("layer", "distance", "by_degree")
        return as_frame({each: getattr(row, each) for each in columns} for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        rows = [{**asdict(row), "layer": to_json(row.layer)} for row in self.rows]
        return {"first": self.first, "second": self.second, "rows": rows}


def _small(share: float) -> str:
    """In at most seven characters."""
    return "<1e-6" if 0 < share < 1e-6 else f"{share:.2g}"


@torch.no_grad()
def distance(polynomial: Any, other: Any, inputs: Gaussian) -> Tensor:
    """[degree + 1] float64: E|f_k - g_k|^2 of the parts of each degree, in closed form.

    f and g may be of different layers, degrees, activations and input models: the difference is
    one polynomial of both layers' neurons. f_k and g_k are their parts in the Hermite polynomials
    of `inputs`, so that all of them sum to E|f - g|^2. Of polynomials with ends it is about what
    they are without them.

    Args:
        polynomial, other: per neuron, of layers of the same kind (MLP or GLU) and shape.
        inputs: under which; `input_moments` of a lens.

    Raises:
        InvalidInputError: other shapes or kinds (which), joint or dense polynomials.

    Cost: as `explained_variance` of a layer with the neurons of both.

    >>> import torch, polylens
    >>> layer = polylens.MLPWeights(torch.eye(3), torch.ones(3, 1), "relu")
    >>> inputs = polylens.Gaussian.standard(3)
    >>> poly = polylens.fit(layer, inputs, degree=2)
    >>> apart = polylens.analysis.distance(poly, poly.truncate(1), inputs)
    >>> [round(float(part), 3) for part in apart]  # what degree 2 explains
    [0.0, 0.0, 0.239]
    """
    f, g = _per_neuron(polynomial, other)
    if not isinstance(inputs, Gaussian) or inputs.d_in != f.d_in:
        got = f"{inputs.d_in} features" if isinstance(inputs, Gaussian) else type(inputs).__name__
        raise InvalidInputError(f"inputs must be a Gaussian of {f.d_in} features, got {got}")
    device, n = f.weights.device, max(f.degree, g.degree)
    weights = _difference(f.weights, g.weights.to(device))
    own, others = _padded(f, n, device), _padded(g, n, device)
    both = (own.m, others.m), (own.s, others.s), (own.P, others.P)
    m, s, P = (torch.cat(pair, -1) for pair in both)
    Q = None
    if own.Q is not None and others.Q is not None:
        Q = torch.cat([own.Q, others.Q], -1)
    return energy_under(weights, inputs.to(device), Coefficients(m, s, P, Q))


@torch.no_grad()
def compare(
    first: Any,
    second: Any,
    *,
    layers: Layers | None = None,
    degree: int | None = None,
    k: int = 8,
    u: Tensor | Mapping[Layer, Tensor] | None = None,
) -> Comparison:
    """How far the polynomials of two lenses are apart, and which features appear, turn, vanish.

    In the metric of the first lens' inputs, in closed form; give them in the other order for that
    of the second's. The lenses may be of two checkpoints, a base model and a tuned one, two texts,
    estimators or degrees.

        print(analysis.compare(base_lens, instruct_lens))

    Args:
        first, second: lenses of layers of the same shape; detached ones serve as well.
        layers: which; all by default, which both must have.
        degree: of both, by truncation; by default each has its own.
        k: features of the linear parts, of either lens.
        u: an output direction [d_out], or one for each layer, along which k eigenfeatures are
            compared as well.

    Raises:
        InvalidInputError: other layers or shapes (which), a degree above the fitted ones.
        StalePolynomialError: weights changed since a fit.
        UnsupportedModel: nothing is known of a layer's inputs.

    Cost: per layer one sum over all pairs of neurons of both, and two SVDs [d_in, d_out].
    """
    check_lens(first)
    check_lens(second)
    check_at_least("k", k, 1)
    chosen = check_layers(layers, first.layers, first.refused, " in the first lens")
    strangers = [layer for layer in chosen if layer not in second.layers]
    if layers is None:
        strangers += [layer for layer in second.layers if layer not in first.layers]
    if strangers:
        raise InvalidInputError(
            f"only one of the lenses has layers {strangers}; say which to compare by layers="
        )
    first.verify(chosen)
    second.verify(chosen)
    rows = []
    for layer in chosen:
        try:
            f, g = _per_neuron(first[layer], second[layer])
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {label(layer)}: {error}") from error
        if degree is not None:
            f, g = f.truncate(degree), g.truncate(degree)
        inputs = input_moments(first, layer)
        own = energy_under(f.weights, inputs.to(f.weights.device), _padded(f, f.degree))
        variance = float(own[1:].sum())
        if variance <= 0:
            raise InvalidInputError(
                f"layer {label(layer)}: the first polynomial is constant, so that no distance is a "
                "share of its variance; distance() is not one"
            )
        apart = (distance(f, g, inputs) / variance).tolist()
        along = u.get(layer) if isinstance(u, Mapping) else u
        changes = feature_changes(f, g, inputs, k, along)
        rows.append(LayerDistance(layer, sum(apart), tuple(apart), changes))
    return Comparison(_named(first), _named(second), tuple(rows))


@torch.no_grad()
def feature_changes(
    polynomial: Any, other: Any, inputs: Gaussian, k: int = 8, u: Tensor | None = None
) -> tuple[FeatureChange, ...]:
    """What becomes of the k strongest features of each of two polynomials in the other one.

    Args:
        inputs: in whose metric.
        u: [d_out], for eigenfeatures along it beside those of the linear part.
    """
    changes = list[FeatureChange]()
    for own, there, gone in ((polynomial, other, "vanished"), (other, polynomial, "appeared")):
        if min(own.degree, there.degree) >= 1 and bool(own.linear()[0].any()):
            features = singular_features(own, metric=inputs)
            changes += _changes_of(features, there, min(k, len(features)), gone)
        if u is not None and min(own.degree, there.degree) >= 2:
            changes += _changes_of(eigenfeatures(own, u, k, metric=inputs), there, k, gone)
    return tuple(changes)


def _changes_of(
    features: SingularFeatures | EigenFeatures, there: Polynomial, k: int, gone: str
) -> list[FeatureChange]:
    metric, patterns = features.metric, features.patterns[:, :k]
    if isinstance(features, SingularFeatures):
        kind, outputs = "linear", features.outputs[:, :k]
        beta, _ = there.linear()
        written, read = (patterns.T @ beta).T, metric.into(beta @ outputs)
        other = (written * outputs).sum(0)
    else:
        kind = "quadratic"
        written = read = metric.into(there.quadratic_form(features.u) @ patterns)
        other = (metric.into(features.vectors[:, :k]) * written).sum(0)
    sizes = [linalg.vector_norm(t, dim=0).clamp(min=TINY) for t in (read, written)]
    values = features.values[:k]
    reading, writing = (other * values.sign() / size for size in sizes)
    strength = torch.stack(sizes).max(0).values / values.abs()
    same = torch.minimum(reading, writing) >= SAME
    changes = list[FeatureChange]()
    for i in range(len(values)):
        fate = gone if strength[i] < THERE else ("kept" if same[i] else "turned")
        value, there_value, read_as, written_as = (
            float(t[i]) for t in (values, other, reading, writing)
        )
        changes.append(FeatureChange(kind, i, fate, value, there_value, read_as, written_as))
    return changes


def _per_neuron(first: Any, second: Any) -> tuple[Polynomial, Polynomial]:
    """The optima of both."""
    pair = list[Polynomial]()
    for each in (first, second):
        check_polynomial(each)
        if not isinstance(each, Polynomial):
            raise InvalidInputError(
                f"a {each.kind} has no neurons that could be compared; fit per neuron, by the "
                'estimators "samples" or "gaussian"'
            )
        pair.append(each.optimum())
    f, g = pair
    a, b = f.weights, g.weights
    if type(a) is not type(b) or (f.d_in, f.d_out) != (g.d_in, g.d_out):
        kinds = (f"{type(w).__name__} from {w.d_in} to {w.d_out}" for w in (a, b))
        raise InvalidInputError(f"polynomials of other shapes: {' and '.join(kinds)}")
    return f, g


def _difference(a: MLPWeights | GLUWeights, b: MLPWeights | GLUWeights) -> Any:
    """A layer of the neurons of both, of which those of b write with the other sign."""

    def both(role: str, sign: int = 1) -> Tensor:
        pair = [getattr(w, role, None) for w in (a, b)]
        zeros = (w.W_in.new_zeros(w.d_mlp) for w in (a, b))
        x, y = (z if t is None else t for t, z in zip(pair, zeros, strict=True))
        return torch.cat([x.double(), sign * y.double()], dim=0 if role == "W_out" else -1)

    roles = {"W_in": both("W_in"), "W_out": both("W_out", -1), "b_in": both("b_in")}
    if isinstance(a, GLUWeights):
        roles |= {"W_gate": both("W_gate"), "b_gate": both("b_gate")}
    zero = roles["W_out"].new_zeros(a.d_out)
    own, other = (zero if w.b_out is None else w.b_out.double() for w in (a, b))
    return type(a)(act=a.act, b_out=own - other, **roles)


def _padded(p: Polynomial, n: int, device: torch.device | None = None) -> Coefficients:
    """Those of its optimum, as one of degree n."""
    P, Q = p.P[p.degree], None if p.Q is None else p.Q[p.degree]
    P = F.pad(P, (0, 0, 0, n + 1 - len(P)))
    Q = None if Q is None else F.pad(Q, (0, 0, 0, n - len(Q))).to(device)
    return Coefficients(p.m.to(device), p.s.to(device), P.to(device), Q)


def _named(lens: Any) -> str:
    return f"{lens.model_name} ({lens.inputs_summary})"
