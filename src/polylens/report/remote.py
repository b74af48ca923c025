"""R2 of the layers of a model that is only on another machine."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from polylens.checks import Layer, Layers, check_at_least, check_layers
from polylens.devices import numbers
from polylens.errors import InvalidInputError, UnsupportedModel
from polylens.fitting.estimator import require_degree
from polylens.hosts.passage import require_free
from polylens.inputs.residuals import share_explained
from polylens.report.report import LayerRow, Report

NOTE = (
    "fitted and measured where the model is (remote={remote!r}): about {size:,} bytes were sent, "
    "code and token ids, and {count} numbers of each layer came back"
)
FIRST = "the first position of each sequence is left out: attention sink"


def remote_report(
    model: Any,
    tokens: Tensor,
    held_out: Tensor,
    *,
    degree: int = 3,
    layers: Layers | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    remote: bool | str = True,
) -> Report:
    """How well polynomials do in a model that is only there remotely (NDIF, by nnsight).

        model = nnsight.TransformersModel("meta-llama/Llama-3.1-70B")  # no weights here
        polylens.remote_report(model, tokens, held_out)

    Fits every layer to `tokens` and measures R2 on `held_out`, in one request: for each neuron the
    least-squares polynomial of what its preactivations were, of every degree, without ends, as
    attach(method=TrueStream("samples", tails=None)) has it. The fits stay where the model is. What
    is sent is code (about 25 kB) and 9 bytes for each token, whatever the size of the model, and
    what comes back are the figures; the machine there needs no polylens. It holds
    8 (2 degree + 2)^2 d_mlp bytes for each layer of a GLU.

    Nothing is replaced, so there are no losses: for those, and for ends, fit a lens where the
    weights are. MLPs are found without weights, by data flow through random ones, where a module of
    their own computes them from one tensor; experts are not.

    Args:
        model: an nnsight.TransformersModel without a lens.
        tokens, held_out: token ids [batch, pos], no padding.
        degree: highest degree.
        layers: which, all by default.
        exclude_first: leave out the first position of each sequence.
        batch_size: sequences in one pass.
        remote: True for NDIF; "local" for nnsight's simulation of it here; False to run here.

    Raises:
        InvalidInputError: tokens, degree or layers that cannot be used, activations that are not
            finite. UnsupportedModel: another model, or none of its layers was found.
        AttachmentError: a lens is attached to the model.
    """
    if not hasattr(model, "_remoteable_model_key"):
        raise UnsupportedModel(
            f"{type(model).__name__} does not run remotely; give an nnsight.TransformersModel, or "
            "attach to a model whose weights are here"
        )
    from polylens.hosts.nnsight.remote import find_maps, fit_and_measure

    require_degree(degree)
    check_at_least("batch_size", batch_size, 1)
    fitting, measuring = (
        _batches(name, value, exclude_first, batch_size)
        for name, value in (("tokens", tokens), ("held_out", held_out))
    )
    require_free(model._module)
    maps, tried = find_maps(model._module)
    if not maps:
        raise UnsupportedModel(
            f"{type(model._module).__name__} has no component that is an MLP or GLU of one tensor "
            f"(tried: {', '.join(tried) or 'none'}); attach to it where its weights are"
        )
    chosen = check_layers(layers, list[Layer](maps), {}, " in this model")
    some = [maps[layer] for layer in chosen if isinstance(layer, int)]
    figures, size = fit_and_measure(model, some, degree, fitting, measuring, remote)
    rows = []
    for layer, (_, seen, variance, square, mse) in zip(chosen, figures, strict=True):
        if not all(map(isfinite, [variance, *numbers(mse)])):
            raise InvalidInputError(
                f"layer {layer}: its activations are not finite on these inputs, so R2 would be NaN"
            )
        r2 = tuple(numbers(share_explained(mse, variance, square)))
        rows.append(LayerRow(layer, r2, n_tokens=seen))
    config = model._module.config
    notes = [NOTE.format(remote=remote, size=size, count=degree + 5)]
    return Report(
        model=getattr(config, "_name_or_path", "") or type(model._module).__name__,
        host="nnsight, remote",
        inputs=f"samples per neuron, {figures[0][0]:,} activations",
        degree=degree,
        fitted_degree=degree,
        n_tokens=figures[0][1],
        n_targets=None,
        base_ce=None,
        rows=tuple(rows),
        notes=(*notes, FIRST) if exclude_first else tuple(notes),
    )


def _batches(
    name: str, tokens: Any, exclude_first: bool, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Token ids and which of them count, batch by batch."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidInputError(f"{name} must be a tensor of token ids [batch, pos], got {got}")
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if exclude_first:
        counted[:, :1] = False
    if int(counted.sum()) < 2:
        raise InvalidInputError(
            f"{name}: fewer than 2 activations are left of {tuple(tokens.shape)}; give longer "
            "sequences, or more of them"
        )
    parts = zip(tokens.cpu().split(batch_size), counted.cpu().split(batch_size), strict=True)
    return [(ids.clone(), kept.clone()) for ids, kept in parts]  # a view is sent with all it is of
