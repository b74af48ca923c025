"""Input models for every layer of a model, measured in one pass or implied by its norms."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from polylens.errors import AttachmentError, InvalidInputError, PolylensError, UnsupportedModel
from polylens.hosts.base import Host, Layer, MLPSite, Norm
from polylens.inputs import Gaussian, Moments
from polylens.selection import label
from polylens.tokens import batches, kept_rows, rows, validate_inputs

SAMPLED_SEQUENCES, SAMPLED_LENGTH = 32, 128
FEW_TOKENS = 64


def measured_inputs(
    host: Host,
    sites: Mapping[Layer, MLPSite],
    tokens: Tensor,
    refused: dict[Layer, str],
    *,
    attention_mask: Tensor | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> Iterator[tuple[Layer, Gaussian]]:
    """(layer, Gaussian with the moments of the MLP's true inputs on these tokens).

    One forward pass over the tokens for all layers; float64 sums on the model's device, so
    memory is d_in^2 float64 per layer and one batch of activations. Layers are handed out one
    at a time and their sums freed, so that the caller can fit as it goes.

    An expert has the moments of the tokens that are routed to it. One that saw fewer than
    FEW_TOKENS is left out, and why is put into `refused`.

    Raises:
        InvalidInputError: unusable tokens, or NaN activations (which layer, how many features).
    """
    tokens, attention_mask = validate_inputs(tokens, attention_mask, reads_tokens=host.reads_tokens)
    require_deterministic(host.module)
    moments = {layer: Moments() for layer in sites}
    kept: Tensor | None = None

    def observer(layer: Layer):
        def observe(x: Tensor, y: Tensor) -> None:
            moments[layer].update(rows(x, kept))

        return observe

    steps = list(batches(tokens, attention_mask, batch_size))
    with torch.no_grad(), host.observe({layer: observer(layer) for layer in sites}):
        for batch, batch_mask in tqdm(steps, desc="calibrating", disable=not progress):
            kept = kept_rows(batch, batch_mask, exclude_first=exclude_first)
            host.run(batch, batch_mask)
    for layer, site in sites.items():
        seen = moments.pop(layer)
        if isinstance(layer, tuple) and seen.count < FEW_TOKENS:
            refused[layer] = (
                f"{site.path}: the router sent {seen.count} of these tokens there, at least "
                f"{FEW_TOKENS} are needed to fit an expert; give more tokens"
            )
        else:
            yield layer, seen.gaussian(f"layer {label(layer)} ({site.path})")


def norm_inputs(host: Host, sites: Mapping[Layer, MLPSite]) -> Iterator[tuple[Layer, Gaussian]]:
    """(layer, maximum-entropy Gaussian that the preceding normalisation implies), without data.

    RMSNorm outputs have mean square one: N(0, I); LayerNorm removes the mean direction too:
    N(0, I - 11^T / d). Weight w and bias b that are not folded give diag(w) cov diag(w) and b.
    """
    for layer, site in sites.items():
        yield layer, _gaussian_after(host.norm(site), site.d_in, host.device)


def _gaussian_after(norm: Norm, d: int, device: torch.device) -> Gaussian:
    weight = torch.ones(d, device=device) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros(d, device=device) if norm.bias is None else norm.bias.detach()
    weight, bias = weight.double(), bias.double()
    if not norm.centred:
        return Gaussian(bias, weight.square())
    return Gaussian(bias, torch.diag(weight.square()) - torch.outer(weight, weight) / d)


def given_inputs(
    inputs: Gaussian | Mapping[Layer, Gaussian], sites: Mapping[Layer, MLPSite]
) -> Iterator[tuple[Layer, Gaussian]]:
    """(layer, the input model that the user gave): one for all layers, or one for each."""
    if isinstance(inputs, Mapping):
        missing = sorted(set(sites) - set(inputs))
        if missing:
            raise InvalidInputError(
                f"inputs has no entry for layers {missing}; give one for each of {sorted(sites)}, "
                "or restrict layers="
            )
    for layer in sites:
        yield layer, inputs[layer] if isinstance(inputs, Mapping) else inputs


def require_deterministic(model: nn.Module) -> None:
    """AttachmentError if a forward pass would apply dropout."""
    if not model.training:
        return
    active = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    ]
    if active:
        raise AttachmentError(
            f"the model is in training mode with dropout ({active[0]} and {len(active) - 1} more), "
            "so its MLP inputs are random; call model.eval() first"
        )


@contextmanager
def naming(layer: Layer, site: MLPSite) -> Iterator[None]:
    """Add layer and path to whatever polylens raises inside."""
    try:
        yield
    except UnsupportedModel:
        raise
    except PolylensError as error:
        raise type(error)(f"layer {label(layer)} ({site.path}): {error}") from error
