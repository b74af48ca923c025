"""Features that people can read: where in a text they are most active, and what they do there."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from polylens.analysis.arguments import check_layer, check_lens
from polylens.analysis.features import EigenFeatures, eigenfeatures
from polylens.analysis.figures import features_figure
from polylens.analysis.interventions import Edit, intervene
from polylens.analysis.layer_tokens import (
    TokenScores,
    embedding_activations,
    input_moments,
    logit_direction,
    token_id,
)
from polylens.analysis.linear import SingularFeatures
from polylens.analysis.readout import top_tokens
from polylens.calibration.seen import require_deterministic
from polylens.calibration.tokens import names_by
from polylens.calibration.tokens import read as read_inputs
from polylens.checks import Layer, check_at_least, label, real_numbers, to_json
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.hosts.base import Arrival, Observer
from polylens.hosts.batch import Batch, Inputs
from polylens.report.rendering import Tabled, empty_table
from polylens.report.worst import Decode, decoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# An activation, its sequence and its position.
Place = tuple[float, int, int]
Features = EigenFeatures | SingularFeatures | Tensor
# Where tokens' own embeddings explain less of an activation, they do not say what it is about.
MEANINGFUL = 0.5


@dataclass(frozen=True)
class Example:
    """A place in the text where a feature is active.

    Attributes:
        activation: (x - mean) . vector; in standard deviations under a covariance metric.
        sequence, position: where.
        before, token, after: the text there; empty where the model reads none.
    """

    activation: float
    sequence: int
    position: int
    before: str = ""
    token: str = ""
    after: str = ""

    def __str__(self) -> str:
        return f"{self.before}[{self.token}]{self.after}" if self.token else f"#{self.sequence}"


@dataclass(frozen=True)
class FeatureRow:
    """One feature of a layer.

    Attributes:
        value: its eigenvalue or singular value, None of a direction from elsewhere.
        share: of the energy along u, or of the variance of the linear part: this feature alone.
        highest, lowest: where in the text it is most active, either way. Both ends of an
            eigenfeature count alike: its activation enters squared.
        token_r2: share of the variance of its activations in the text that the embeddings of the
            tokens there explain; None where it was not measured.
        high, low: tokens whose embedding alone activates it most, either way: none where token_r2
            is below 0.5, where they say nothing. In SmolLM2-135M it is 0.95 in layer 0 and 0.01 in
            the median of every later layer.
        raises, lowers: tokens whose logits the feature raises and lowers most at its highest
            examples, through all that follows; none where that was not asked for.
        residual: of an eigenpair, relative to the largest value.
    """

    value: float | None
    share: float | None
    highest: tuple[Example, ...] = ()
    lowest: tuple[Example, ...] = ()
    token_r2: float | None = None
    high: TokenScores = field(default_factory=list)
    low: TokenScores = field(default_factory=list)
    raises: TokenScores = field(default_factory=list)
    lowers: TokenScores = field(default_factory=list)
    residual: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LayerFeatures(Tabled):
    """Features of one layer, with what they read and do.

    Attributes:
        layer: which.
        about: which features.
        rows: one per feature.
        features: the same as tensors.
    """

    layer: Layer
    about: str
    rows: tuple[FeatureRow, ...] = field(repr=False)
    features: Features = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> FeatureRow:
        return self.rows[i]

    def __rich__(self) -> "Table":
        from rich.text import Text

        table = empty_table()
        table.title = f"layer {label(self.layer)} {self.about}; activations less their mean"
        with_examples = any(row.highest for row in self.rows)
        with_tokens = any(row.high for row in self.rows)
        with_effects = any(row.raises for row in self.rows)
        for title in ("", "value", "share"):
            table.add_column(title, justify="right")
        for title in ["one end", "other end"] * (with_examples or with_tokens):
            table.add_column(title)
        for title in ["raises", "lowers"] * with_effects:
            table.add_column(title)
        for i, row in enumerate(self.rows, 1):
            value = "" if row.value is None else f"{row.value:+.3g}"
            share = "" if row.share is None else f"{row.share:.1%}"
            ends = []
            for examples, tokens in ((row.highest, row.high), (row.lowest, row.low)):
                lines = [f"{e.activation:+.1f} {e}".replace("\n", "⏎") for e in examples]
                ends.append("\n".join([*lines, _scores(tokens)] if tokens else lines))
            ends = ends if with_examples or with_tokens else []
            if with_effects:  # one a line, as examples are
                ends += [_scores(row.raises, "\n"), _scores(row.lowers, "\n")]
            table.add_row(str(i), value, share, *map(Text, ends))
        return table

    def plot(self) -> "Figure":
        """Values, each with the example that activates its feature most."""
        return features_figure(
            [row.value or 0.0 for row in self.rows],
            [str((*row.highest, "")[0]) for row in self.rows],
            f"layer {label(self.layer)} {self.about}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        rows = [asdict(row) for row in self.rows]
        return {"layer": to_json(self.layer), "about": self.about, "rows": rows}


def _scores(tokens: TokenScores, between: str = "  ") -> str:
    return between.join(f"{name} {value:+.1f}" for name, value in tokens)


@torch.no_grad()
def examples(
    lens: Any,
    features: Mapping[Layer, Features],
    tokens: Inputs,
    *,
    k: int = 4,
    context: int = 12,
    n_tokens: int = 5,
    effects: bool = False,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    decode: Decode | None = None,
) -> dict[Layer, LayerFeatures]:
    """The places in a text where each feature of each of these layers is most and least active.

        layers = {n: analysis.singular_features(lens[n], 16, metric="covariance") for n in lens}
        print(analysis.examples(lens, layers, tokens)[15])

    Activations are (x - mean) . vector of what the layers read in the true model, first positions
    left out as in the fit. All features of all layers are streamed in one pass, without their
    polynomials, which ends behind the last of these layers.

    Args:
        lens: attached.
        features: by layer; eigenfeatures, singular features, or directions from elsewhere
            [d_in, k], such as probes or the columns of an encoder.
        tokens: [batch, pos] token ids, as many as you like; floats [batch, ...] for a model that
            reads those, whose examples are numbers.
        k: examples at either end; context: tokens in front of each that are shown, and a third as
            many behind.
        n_tokens: named of embeddings and logits.
        effects: measure what each feature does to the logits at its highest examples: it is taken
            out of the layer's output there (`intervene`), for four forward passes over k sequences
            for each feature.
        attention_mask: [batch, pos], 0 at padding.
        decode: list of token ids -> text; by default the model's tokenizer, else ids.

    Raises:
        InvalidInputError: tokens or a layer that cannot be used, directions of another space,
            effects of directions from elsewhere or of a model without tokens.

    Cost: one forward pass, and x @ vectors at every layer.

    >>> import polylens
    >>> from polylens import analysis, demo
    >>> model, tokens = demo.load_model(), demo.batches(demo.texts()[1], 8, 64)
    >>> lens = polylens.attach(model, tokens, degree=2, layers=0, progress=False)
    >>> features = analysis.singular_features(lens[0], 2, metric="covariance")
    >>> found = analysis.examples(lens, {0: features}, tokens, k=3)[0]
    >>> len(found), len(found[0].highest), found[0].token_r2 > 0.5
    (2, 3, True)
    """
    check_lens(lens)
    check_at_least("k", k, 1)
    check_at_least("context", context, 0)
    host = lens.host
    if not isinstance(features, Mapping) or not features:
        raise InvalidInputError(
            f"features must be given by layer, {{3: features}}, got {type(features).__name__}"
        )
    features = {check_layer(lens, layer): _given(each) for layer, each in features.items()}
    read = {layer: _Read.of(lens, layer, each) for layer, each in features.items()}
    lens.ready(list(read), None)
    check_at_least("batch_size", batch_size, 1)
    data = read_inputs(host, tokens, attention_mask, lens.layers, exclude_first=lens.exclude_first)
    if effects and data.targets is None:
        raise InvalidInputError("effects are on the logits of tokens, and this model reads none")
    if effects and any(isinstance(each, Tensor) for each in features.values()):
        raise InvalidInputError(
            "directions from elsewhere say what is read, not what is written: effects=True needs "
            "eigenfeatures or singular features; intervene() has an Edit with a part of your own"
        )
    require_deterministic(host.module)
    seen = _scan(lens, read, data, k, batch_size)
    ids = [stream.ids for stream in data.streams.values() if stream.ids is not None]
    decode = decoder(lens, decode, ids[0]) if ids else str
    names, found = names_by(decode), dict[Layer, LayerFeatures]()
    for layer, each in features.items():
        stream = data.streams.get(host.stream(layer))
        shown = (None, None) if stream is None else (stream.ids, stream.there)
        text = _Text(*shown, decode, context)
        r2 = seen[layer].token_r2()
        meaningful = [i for i, share in enumerate(r2) if share is not None and share >= MEANINGFUL]
        embedded = _embedded_ends(lens, layer, read[layer], meaningful, n_tokens, names)
        rows = list[FeatureRow]()
        for i, ends in enumerate(seen[layer].places()):
            high, low = embedded.get(i, ([], []))
            raises, lowers = [], []
            if effects and ends[0]:
                moved = _effect(lens, layer, each, i, ends[0], data, batch_size)
                raises, lowers = top_tokens(moved, min(n_tokens, len(moved)), names)
            highest, lowest = (tuple(text(place) for place in end) for end in ends)
            value, share = _sizes(each, i)
            row = FeatureRow(value, share, highest, lowest, r2[i], high, low, raises, lowers)
            rows.append(replace(row, residual=_residual(each, i)))
        found[layer] = LayerFeatures(layer, _about(each), tuple(rows), each)
    return found


def _embedded_ends(
    lens: Any,
    layer: Layer,
    read: "_Read",
    features: Sequence[int],
    n_tokens: int,
    names: Callable[[int], str],
) -> dict[int, tuple[TokenScores, TokenScores]]:
    """Of these features, the tokens whose embedding alone activates them most, either way."""
    if not features:
        return {}
    scores = embedding_activations(lens, layer, read.vectors[:, list(features)], read.center)
    each = (top_tokens(column, min(n_tokens, len(column)), names) for column in scores.T)
    return dict(zip(features, each, strict=True))


def _effect(
    lens: Any,
    layer: Layer,
    features: Features,
    i: int,
    places: Sequence[Place],
    data: Batch,
    batch_size: int,
) -> Tensor:
    """[d_vocab] how much a feature raises each logit at these places, in the true model."""
    assert not isinstance(features, Tensor)
    there = torch.tensor([place[1:] for place in places])
    edit = Edit(layer, features.part(i), at=there[:, 1])
    with lens.suspended():
        (effect,) = intervene(lens, data.rows(there[:, 0]), edit, batch_size=batch_size)
    return -effect.logits  # what falls without the feature is what it raises


@torch.no_grad()
def layer_features(
    lens: Any,
    layer: Layer,
    token: int | str,
    tokens: Inputs | None = None,
    *,
    against: int | str | None = None,
    k: int = 8,
    n_tokens: int = 6,
    decode: Decode | None = None,
    **options: Any,
) -> LayerFeatures:
    """The k eigenfeatures of a layer along a token's logit, each with what it reads.

    The direction is `logit_direction`; the metric is that of `input_moments`, so that features are
    ordered by the variance they explain.

    Args:
        lens: of degree 2 or more.
        layer: an attached layer.
        token, against: ids, or text that is one token each.
        tokens: a text, for the `examples` of each feature in it. Without one there are the tokens
            whose embedding activates it, which say little behind the first layers.
        k: features; n_tokens: named at either end of each.
        decode: list of token ids -> text; by default the model's tokenizer, else ids.
        options: of `examples`; its k is `n_examples`.

    Raises:
        InvalidInputError: no such layer or token, k above the rank, a degree below 2.
        UnsupportedModel: as `logit_direction`; without a text, a layer that does not read a norm's
            output, such as one whose norm is folded away.
    """
    layer = check_layer(lens, layer)
    token, against = token_id(lens, token), None if against is None else token_id(lens, against)
    u = logit_direction(lens, layer, token, against)
    moments = input_moments(lens, layer)
    features = eigenfeatures(lens[layer], u, k, metric=moments)
    decode = decoder(lens, decode, torch.tensor([[token]]))
    names = names_by(decode)
    other = "the mean of all tokens" if against is None else names(against)
    about = f"along the logit of {names(token)} against {other}"
    if tokens is None:
        rows = feature_rows(lens, layer, features, n_tokens, names)
    else:
        each = {"k": options.pop("n_examples", 4), "n_tokens": n_tokens, "decode": decode}
        rows = examples(lens, {layer: features}, tokens, **each, **options)[layer].rows
    return LayerFeatures(layer, about, rows, features)


@torch.no_grad()
def feature_rows(
    lens: Any,
    layer: Layer,
    features: EigenFeatures | SingularFeatures,
    n_tokens: int,
    names: Callable[[int], str],
) -> tuple[FeatureRow, ...]:
    """Features of a layer with the tokens whose embedding alone activates them.

    Raises:
        UnsupportedModel: as `embedding_activations`.
    """
    own = _Read.of(lens, layer, features)
    ends = _embedded_ends(lens, layer, own, range(len(features)), n_tokens, names)
    return tuple(
        FeatureRow(*_sizes(features, i), high=high, low=low, residual=_residual(features, i))
        for i, (high, low) in ends.items()
    )


def _given(features: Any) -> Features:
    """Features as they are, directions from elsewhere as a tensor."""
    if isinstance(features, EigenFeatures | SingularFeatures):
        return features
    return real_numbers("features", features)


def _sizes(features: Features, i: int) -> tuple[float | None, float | None]:
    """(value, share of it alone)."""
    if isinstance(features, Tensor):
        return None, None
    share = features.share.tolist()
    return float(features.values[i]), share[i] - (share[i - 1] if i else 0.0)


def _residual(features: Features, i: int) -> float | None:
    return float(features.residuals[i]) if isinstance(features, EigenFeatures) else None


def _about(features: Features) -> str:
    if isinstance(features, Tensor):
        return "along given directions"
    return "along u" if isinstance(features, EigenFeatures) else "of the linear part"


class _Read(NamedTuple):
    """Reading directions [d_in, k] and where their activations are zero, in float64."""

    vectors: Tensor
    center: Tensor

    @classmethod
    def of(cls, lens: Any, layer: Layer, features: Features) -> "_Read":
        device, d_in = lens.host.device, lens.sites[layer].d_in
        if isinstance(features, EigenFeatures | SingularFeatures):
            vectors = features.vectors.to(device)
            center = features.metric.center().to(vectors)
        else:
            vectors = features.to(device).double()
            center = vectors.new_zeros(d_in)
        if vectors.dim() != 2 or len(vectors) != d_in or not torch.isfinite(vectors).all():
            raise InvalidInputError(
                f"layer {label(layer)} reads {d_in} numbers: its directions must be finite "
                f"[{d_in}, k], got {tuple(vectors.shape)}"
            )
        return cls(vectors, center)


class _Text(NamedTuple):
    """What an example is shown with: tokens [batch, pos], which of them are real, and their text.

    Tokens are None for a model that reads none.
    """

    tokens: Tensor | None
    real: Tensor | None
    decode: Decode
    context: int

    def __call__(self, place: Place) -> Example:
        activation, sequence, position = place
        if self.tokens is None or self.real is None:
            return Example(activation, sequence, position)
        ids, real = self.tokens[sequence], self.real[sequence]

        def shown(start: int, end: int) -> str:
            here = slice(max(start, 0), end)
            return self.decode(ids[here][real[here]].tolist())

        first, behind = position - self.context, position + 1
        words = shown(first, position), shown(position, behind)
        return Example(*place, *words, shown(behind, behind + self.context // 3))


class _Enough(Exception):
    """All layers were seen: the rest of the pass is of no use."""


class _Extremes:
    """Of the features of a layer, the k highest and lowest activations, and how far the tokens'
    own embeddings explain them; streamed."""

    def __init__(self, read: _Read, k: int, embedded: Tensor | None) -> None:
        self._read, self._k, self._embedded = read, k, embedded
        count = read.vectors.shape[1]
        self._values = read.vectors.new_zeros(2, count, 0)
        self._where = torch.zeros(2, count, 0, 2, dtype=torch.long, device=read.vectors.device)
        self._sums = read.vectors.new_zeros(6, count)

    def update(self, x: Tensor, where: Tensor, ids: Tensor | None) -> None:
        """x [n, d_in] at where [n, 2] (sequence, position), of tokens with these numbers [n]."""
        if not len(x):
            return
        vectors, center = self._read
        wide = torch.promote_types(x.dtype, torch.float32)
        a = x.to(wide) @ vectors.to(x.device, wide) - (center @ vectors).to(x.device, wide)
        rows = a.T.contiguous()
        signed = torch.stack([rows, -rows]).double()
        top = signed.topk(min(self._k, len(x)))
        self._values = torch.cat([self._values, top.values.to(self._values.device)], dim=2)
        found = where.to(x.device)[top.indices].to(self._where.device)
        self._where = torch.cat([self._where, found], dim=2)
        best = self._values.topk(min(self._k, self._values.shape[2]))
        self._values = best.values
        self._where = self._where.gather(2, best.indices[..., None].expand(-1, -1, -1, 2))
        if self._embedded is not None and ids is not None:
            e, a = self._embedded[ids.to(self._embedded.device)], a.to(self._embedded)
            terms = (torch.ones_like(a), a, e, a * a, e * e, a * e)
            self._sums += torch.stack([term.sum(0) for term in terms])

    def places(self) -> list[tuple[list[Place], list[Place]]]:
        """For each feature the places of either end, the most active first."""

        def end(i: int, side: int) -> list[Place]:
            places = self._where[side, i].tolist()
            values = (self._values[side, i] * (1 - 2 * side)).tolist()
            return [(v, place[0], place[1]) for v, place in zip(values, places, strict=True)]

        return [(end(i, 0), end(i, 1)) for i in range(self._values.shape[1])]

    def token_r2(self) -> list[float | None]:
        """Squared correlations with the activation of the token's embedding alone."""
        count = self._sums.shape[1]
        n, a, e, aa, ee, ae = self._sums.unbind()
        if self._embedded is None or not n.any():
            return [None] * count
        spread = (n * aa - a * a) * (n * ee - e * e)
        return torch.where(spread > 0, (n * ae - a * e) ** 2 / spread, 0.0).tolist()


def _scan(
    lens: Any,
    read: Mapping[Layer, _Read],
    data: Batch,
    k: int,
    batch_size: int,
) -> dict[Layer, _Extremes]:
    """One pass over the true model up to the last of these layers."""
    host = lens.host
    named = {layer: host.stream(layer) for layer in read}
    ids = {
        n: s.ids.unique(return_inverse=True) for n, s in data.streams.items() if s.ids is not None
    }
    seen = {
        layer: _Extremes(own, k, _embedded(lens, layer, own, ids.get(named[layer], [None])[0]))
        for layer, own in read.items()
    }
    visits: Counter[Layer] = Counter()
    expected: Counter[Layer] | None = None

    def observer(layer: Layer, step: Batch, start: int) -> Observer:
        name = named[layer]
        counted = step.counted(name, exclude_first=lens.exclude_first)
        numbers = ids[name][1][start : start + len(step)] if name in ids else None
        n_pos = step.streams[name].there.shape[1] if name in step.streams else None

        def see(arrival: Arrival) -> None:
            x = rearrange(arrival.x, "... d -> (...) d")
            if arrival.places is None or n_pos is None:
                each, rows = max(1, len(x) // len(step)), torch.arange(len(x))
            else:
                each, rows = n_pos, arrival.places.among(n_pos).cpu()
            if counted is not None:
                chosen = counted.cpu().reshape(-1)[rows]
                (x, _), rows = arrival.rows(counted), rows[chosen]
            where = torch.stack([start + rows // each, rows % each], dim=1)
            fits = numbers is not None and each == n_pos
            own = numbers.reshape(-1).cpu()[rows] if fits and numbers is not None else None
            seen[layer].update(x, where, own)
            visits[layer] += 1
            if expected is not None and all(visits[n] >= expected[n] for n in seen):
                raise _Enough

        return see

    start = 0
    with lens.suspended():
        for step in data.split(batch_size):
            visits.clear()
            with host.observe({layer: observer(layer, step, start) for layer in seen}):
                try:
                    host.run(step)
                except _Enough:
                    pass
            if expected is None:  # of a first pass, which goes to the end
                expected = Counter(visits)
            start += len(step)
    return seen


def _embedded(lens: Any, layer: Layer, read: _Read, ids: Tensor | None) -> Tensor | None:
    """[ids, k] activations of the embeddings of these tokens; None where there are none."""
    if ids is None:
        return None
    try:
        return embedding_activations(lens, layer, read.vectors, read.center, ids)
    except UnsupportedModel:
        return None
