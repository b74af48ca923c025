"""What one layer of a language model computes along a token's logit, in tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polylens.analysis.arguments import check_layer, check_lens
from polylens.analysis.features import EigenFeatures, eigenfeatures
from polylens.analysis.metric import gaussian_of
from polylens.analysis.readout import (
    before_norm,
    behind_norm,
    embedding_scores,
    single_token,
    token_direction,
    top_tokens,
    unembedding_scores,
)
from polylens.brief import Brief
from polylens.calibration.given import norm_inputs
from polylens.calibration.tokens import token_names
from polylens.checks import Layer, label, to_json
from polylens.errors import InvalidInputError
from polylens.hosts.base import Norm
from polylens.inputs.gaussian import Gaussian
from polylens.report.rendering import as_html

if TYPE_CHECKING:
    from rich.table import Table

TokenScores = list[tuple[str, float]]


@dataclass(frozen=True)
class FeatureRow:
    """One eigenfeature: it adds value * activation^2 to the token's logit.

    Attributes:
        value: eigenvalue under the covariance of the inputs.
        share: of the quadratic energy along the direction, this feature alone.
        residual: of the eigenpair, relative to the largest value.
        high, low: tokens whose embedding alone activates it most, either way, with the
            activation in standard deviations from its mean. They count alike: it enters squared.
    """

    value: float
    share: float
    residual: float
    high: TokenScores
    low: TokenScores


@dataclass(frozen=True, repr=False)
class LayerFeatures(Brief):
    """The eigenfeatures of one layer along one token's logit.

    Attributes:
        layer, token, against: token is raised against another one, None for the mean of all.
        rows: one per feature, by falling absolute value.
        features: the same as tensors.
    """

    layer: Layer
    token: str
    against: str | None
    rows: tuple[FeatureRow, ...]
    features: EigenFeatures = field(repr=False)

    def __rich__(self) -> "Table":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        against = "the mean of all tokens" if self.against is None else self.against
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left")
        table.title = (
            f"layer {label(self.layer)} along the logit of {self.token} against {against}: value × "
            "activation², activations of embeddings in standard deviations"
        )
        for title in ("", "value", "share", "one end", "other end"):
            table.add_column(title, justify="left" if "end" in title else "right")
        for i, row in enumerate(self.rows, 1):
            ends = ("  ".join(f"{n} {v:+.1f}" for n, v in end) for end in (row.high, row.low))
            table.add_row(str(i), f"{row.value:+.3g}", f"{row.share:.1%}", *map(Text, ends))
        return table

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        rows = [dict(vars(row)) for row in self.rows]
        return {
            "layer": to_json(self.layer),
            "token": self.token,
            "against": self.against,
            "rows": rows,
        }


@torch.no_grad()
def layer_features(
    lens: Any,
    layer: Layer,
    token: int | str,
    *,
    against: int | str | None = None,
    k: int = 8,
    n_tokens: int = 6,
    names: Callable[[int], str] | None = None,
) -> LayerFeatures:
    """The k eigenfeatures of a layer along a token's logit, each with the tokens it reads.

    The direction is `logit_direction`; the metric is that of `input_moments`, so that features are
    ordered by the variance they explain. A token's score is its embedding through the layer's own
    norm, less the mean input, along the feature.

    Args:
        lens: of a TransformerLens model, of degree 2 or more.
        layer: an attached layer.
        token, against: ids, or text that is one token each.
        k: features; n_tokens: named at either end of each.
        names: id -> text; by default the model's tokenizer, else ids.

    Raises:
        InvalidInputError: no such layer or token, k above the rank, a degree below 2.
        UnsupportedModel: another host; a layer that does not read a norm's output, such as one
            whose norm is folded away, or a model without a final norm.
    """
    layer = check_layer(lens, layer)
    token, against = _id(lens, token), None if against is None else _id(lens, against)
    names = names or token_names(lens.host.tokenizer)
    u = logit_direction(lens, layer, token, against)
    moments = input_moments(lens, layer)
    features = eigenfeatures(lens[layer], u, k, metric=moments)
    rows = feature_rows(lens, layer, features, moments.mean, n_tokens, names)
    return LayerFeatures(
        layer, names(token), None if against is None else names(against), rows, features
    )


@torch.no_grad()
def logit_direction(
    lens: Any, layer: Layer, token: int | str, against: int | str | None = None
) -> Tensor:
    """[d_out] float64: u such that a layer's output f raises a token's logit by f . u / scales.

    `token_direction` through the final norm and, where there is one (Gemma, OLMo 2), the norm
    behind the layer, their scales frozen: `scales` is the product of what the two divide by. What
    later layers make of f is not in it.

    Args:
        lens: of a TransformerLens model.
        layer: an attached layer.
        token: id, or text that is one token; `against` another, or None for the mean of all.

    Raises:
        InvalidInputError: no such layer or token, or a token against itself.
        UnsupportedModel: another host, or a model without a final norm.
    """
    last, own = _norms_behind(lens, layer)
    ids = _id(lens, token), None if against is None else _id(lens, against)
    u = token_direction(lens.host.unembedding, *ids, centred=last.centred, weight=last.weight)
    return u if own is None else before_norm(u, centred=own.centred, weight=own.weight)


@torch.no_grad()
def feature_rows(
    lens: Any,
    layer: Layer,
    features: EigenFeatures,
    mean: Tensor,
    n_tokens: int,
    names: Callable[[int], str],
) -> tuple[FeatureRow, ...]:
    """Features of a layer along any direction, with the tokens they read as in `layer_features`.

    Args:
        mean: [d_in], of the layer's inputs.

    Raises:
        UnsupportedModel: as `layer_features`.
    """
    check_lens(lens)
    W_E, norm = lens.host.embedding, lens.host.norm(lens.sites[layer])
    scores = embedding_scores(
        features.vectors,
        W_E,
        centred=norm.centred,
        weight=norm.weight,
        bias=norm.bias,
    )
    scores = scores - mean.to(scores) @ features.vectors
    shares = features.values.square() / features.energy
    return tuple(
        FeatureRow(
            float(features.values[i]),
            float(shares[i]),
            float(features.residuals[i]),
            *top_tokens(scores[:, i], n_tokens, names),
        )
        for i in range(len(features))
    )


def input_moments(lens: Any, layer: Layer) -> Gaussian:
    """Mean and covariance of a layer's inputs, under what its polynomial was fitted to.

    A fit to samples has kept no moments, nor has a loaded lens: then those that the norm in front
    of the layer implies.

    Raises:
        UnsupportedModel: neither; the layer does not read a norm's output.
    """
    own = gaussian_of(lens[layer].inputs)
    return own or norm_inputs(lens.host, {layer: lens.sites[layer]})[layer]


@torch.no_grad()
def written_tokens(
    lens: Any, layer: Layer, u: Tensor, n_tokens: int, names: Callable[[int], str]
) -> tuple[TokenScores, TokenScores]:
    """(raised most, lowered most) when a layer writes u, through the norms behind it.

    Raises:
        UnsupportedModel: as `layer_features`.
    """
    last, own = _norms_behind(lens, layer)
    u = u if own is None else behind_norm(u, centred=own.centred, weight=own.weight)
    scores = unembedding_scores(u, lens.host.unembedding, centred=last.centred, weight=last.weight)
    return top_tokens(scores[:, 0], n_tokens, names)


def _id(lens: Any, token: int | str) -> int:
    """The id of a token that is given as such or as its text."""
    if not isinstance(token, str):
        return token
    check_lens(lens)
    tokenizer = lens.host.tokenizer
    if tokenizer is None:
        raise InvalidInputError(f"token {token!r}: this model has no tokenizer; give its id")
    return single_token(token, partial(tokenizer.encode, add_special_tokens=False))


def _norms_behind(lens: Any, layer: Layer) -> tuple[Norm, Norm | None]:
    """The final norm, and what the layer's output passes before the residual stream, if any."""
    layer = check_layer(lens, layer)
    return lens.host.final_norm(), lens.host.norms_behind([layer], "mlp").get(layer)
