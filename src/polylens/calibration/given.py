"""Input models that are given, or implied by the model's norms: nothing is run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from polylens.calibration.seen import naming
from polylens.calibration.telling import progress as bar
from polylens.checks import Layer, label
from polylens.errors import InvalidInputError
from polylens.fitting.fit import Inputs, fit
from polylens.hosts.base import Host, MLPSite, Norm
from polylens.inputs.gaussian import Gaussian
from polylens.polynomials.joint import Fitted


@dataclass(frozen=True)
class FromNorm:
    """Fit every layer under the Gaussian that the norm in front of it implies: needs no data.

    A first look, exact about the norm and ignorant of the text. No tokens are read.

    Cost: d_in^2 float64 of memory and one product cov @ W for each layer.
    """

    def models(self, host: Host, sites: Mapping[Layer, MLPSite]) -> Mapping[Layer, Inputs]:
        """The input model of every layer."""
        return norm_inputs(host, sites)

    def describe(self) -> str:
        return "data-free Gaussian implied by the norm"


@dataclass(frozen=True)
class FromInputs:
    """Fit every layer under input models of one's own. No tokens are read.

    Args:
        inputs: a Gaussian, GaussianMixture or Samples, or {layer: one}.

    Raises:
        InvalidInputError: something else.

    Cost: d_in^2 float64 of memory and one product cov @ W for each layer.
    """

    inputs: Inputs | Mapping[Layer, Inputs]

    def __post_init__(self) -> None:
        values: Iterable[Any] = [self.inputs]
        if isinstance(self.inputs, Mapping):
            values = self.inputs.values()
        for value in values:
            if not isinstance(value, Inputs):
                raise InvalidInputError(
                    f"FromInputs takes a Gaussian, or a mapping from layer to Gaussian, got "
                    f"{value!r:.80}; Gaussian.from_samples(x) is that of activations x, and "
                    "FromNorm() the one that the model's norms imply"
                )

    def models(self, host: Host, sites: Mapping[Layer, MLPSite]) -> Mapping[Layer, Inputs]:
        """The input model of every layer; InvalidInputError if one has none."""
        if not isinstance(self.inputs, Mapping):
            return dict.fromkeys(sites, self.inputs)
        missing = [layer for layer in sites if layer not in self.inputs]
        if missing:
            raise InvalidInputError(
                f"inputs has no entry for layers {_listed(missing)}; give one for each of "
                f"{_listed(sites)}, or restrict layers="
            )
        return self.inputs

    def describe(self) -> str:
        if isinstance(self.inputs, Mapping):
            return "given input models"
        return f"given {type(self.inputs).__name__}"


def under_models(
    models: Mapping[Layer, Inputs], sites: Mapping[Layer, MLPSite], degree: int, progress: bool
) -> dict[Layer, Fitted]:
    """The polynomial of every layer under its input model."""
    found: dict[Layer, Fitted] = {}
    for layer, site in bar(sites.items(), "fitting", show=progress):
        with naming(layer, site):
            weights = site.weights()
            found[layer] = fit(weights, models[layer], degree).over(weights)
    return found


def norm_inputs(host: Host, sites: Mapping[Layer, MLPSite]) -> dict[Layer, Gaussian]:
    """The maximum-entropy Gaussian that the normalisation in front of a layer implies.

    RMSNorm outputs have mean square one: N(0, I); LayerNorm removes the mean direction too:
    N(0, I - 11^T / d). Weight w and bias b that are not folded give diag(w) cov diag(w) and b.
    """
    device = host.device
    return {n: _gaussian_after(host.norm(site), site.d_in, device) for n, site in sites.items()}


def _gaussian_after(norm: Norm, d: int, device: torch.device) -> Gaussian:
    weight = torch.ones(d, device=device) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros(d, device=device) if norm.bias is None else norm.bias.detach()
    weight, bias = weight.double(), bias.double()
    if not norm.centred:
        return Gaussian(bias, weight.square())
    return Gaussian(bias, torch.diag(weight.square()) - torch.outer(weight, weight) / d)


def _listed(layers: Mapping[Layer, object] | list[Layer]) -> str:
    return f"[{', '.join(map(label, layers))}]"
