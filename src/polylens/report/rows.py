"""What a report says of one layer and of one token."""

from dataclasses import dataclass

from polylens.checks import Layer, label


@dataclass(frozen=True)
class LayerRow:
    """One layer of a report; losses in nats per token, None where they were not measured.

    Attributes:
        layer: index, an Expert, or None for the row in which all are replaced at once.
        r2: held-out R2 of the optimum of degree 0, 1, ..., fitted degree, one polynomial without
            ends each; None for that last row. Of an output that does not vary it is 1 where it is
            reproduced, else 0.
        delta_ce: next-token cross entropy (of each token itself, in a model that reads both ways)
            with the polynomial minus without.
        kl: mean over positions of KL(true model || model with the polynomial).
        ablation_delta_ce: the same as delta_ce with the output's mean in place of the polynomial.
        loss_recovered: 1 - delta_ce / ablation_delta_ce; None where the ablation is harmless.
        n_tokens: activations that R2 counts; of an expert those that were routed to it.
        delta_ce_se: standard error of delta_ce, paired and with sequences as its units.
        agreement: share of positions whose most likely token is that of the true model.
        prefix_delta_ce, prefix_kl: with this and every earlier listed layer replaced; of a block
            of experts in the row of the last one.
        r2_replacement: held-out R2 of what replaces the layer, of the replacing degree with its
            ends; None without ends, where it is that of the optimum.
        beyond: share of the layer's preactivations beyond these ends.
        unseen: share of the layer's preactivations outside the range that the fit saw of each
            neuron; None where nothing says what it saw.
        unlike: how many inputs have more than 5 % of their preactivations outside that range.
        cosine, norm_ratio: means over inputs of <y, f> / (|y| |f|) and |f| / |y|, of the layer's
            output y and the replacement's f.
        jacobian_cosine: cosine between the derivatives of both as vectors of all their entries,
            estimated along random directions, see `polylens.report.likeness`; None where the
            activation has none.
        zero_delta_ce: the same as delta_ce with zero in place of the polynomial.
        r2_replaced: R2 of the replacing degree against the true MLP, on the stream that it has
            when all listed layers are replaced; -inf where that diverges.
    """

    layer: Layer | None
    r2: tuple[float, ...] | None
    delta_ce: float | None = None
    kl: float | None = None
    ablation_delta_ce: float | None = None
    loss_recovered: float | None = None
    n_tokens: int | None = None
    delta_ce_se: float | None = None
    agreement: float | None = None
    prefix_delta_ce: float | None = None
    prefix_kl: float | None = None
    r2_replaced: float | None = None
    r2_replacement: float | None = None
    beyond: float | None = None
    unseen: float | None = None
    unlike: int | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    jacobian_cosine: float | None = None
    zero_delta_ce: float | None = None

    @property
    def label(self) -> str:
        return row_label(self.layer)


def row_label(layer: Layer | None) -> str:
    """Of a layer, of an expert, or of all at once."""
    return "all" if layer is None else label(layer)


@dataclass(frozen=True)
class WorstToken:
    """A token whose cross entropy rises much when all listed layers are replaced, and why.

    The last four are about the position that predicts the token, on the stream of the replaced
    layers; None where no replaced layer or expert ran. Errors of layers below move its inputs,
    and what comes from other positions by attention is not traced, so that what stands out there
    is a hint, not a proof of where it began.

    Attributes:
        sequence, position: of the token among those that were measured.
        token: its id; text: the same as text; context: the tokens in front of it as text.
        true_ce, replaced_ce: nats, of the true model and with all layers replaced.
        kl: KL(true model || all replaced) of the prediction.
        layer: the one with the largest relative error there.
        error: |y - f(x)| / |y| of that layer.
        neuron: the one of that layer whose preactivation is farthest out.
        deviation: how far: (y - m) / s, with the m and s of its calibration.
    """

    sequence: int
    position: int
    token: int
    text: str
    context: str
    true_ce: float | None
    replaced_ce: float | None
    kl: float | None
    layer: Layer | None = None
    error: float | None = None
    neuron: int | None = None
    deviation: float | None = None
