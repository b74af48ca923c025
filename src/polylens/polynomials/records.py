"""What layers and activations consist of, as metadata and tensors.

Every `*_record` gives (metadata, tensors) that JSON and safetensors hold exactly; every
`*_of` is its inverse, bit for bit.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polylens.activations.activation import FAMILIES, Activation, activation
from polylens.errors import ArtifactError, UnsupportedActivation
from polylens.files.format import Record, prefixed, within
from polylens.normal_forms.weights import ROLES, GLUWeights, MLPWeights

# Where an activation is evaluated to recognise it, and the rounding that libraries differ by.
PROBE, ROUNDING = torch.linspace(-5.0, 5.0, 41, dtype=torch.float64), 1e-12


def activation_record(act: Activation) -> Record:
    """Its name, the parameters of a parametrised one, and its values on a grid."""
    return {"name": act.name, "family": list(act.family)}, {"values": act(PROBE)}


def activation_of(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Activation:
    """The activation of a record.

    Raises:
        ArtifactError: a name that is unknown here, or means another function here.
    """
    name, family = metadata["name"], metadata["family"]
    try:
        act = replace(FAMILIES[family[0]](*family[1:]), name=name) if family else activation(name)
    except UnsupportedActivation as error:
        raise ArtifactError(
            f"this was saved with the activation {name!r}, which is not known here; register the "
            f"same function with polylens.register_activation({name!r}, ...) and load again"
        ) from error
    saved = tensors["values"]
    error = float(((act(PROBE) - saved).abs() / (1 + saved.abs())).max())
    if not error <= ROUNDING:
        raise ArtifactError(
            f"this was saved with an activation {name!r} that is another function than the one "
            f"known here under that name: they differ by {error:.3g}; register the right one "
            "under another name and save again, or start without the present one"
        )
    return act


def weights_record(weights: MLPWeights | GLUWeights) -> Record:
    """The form, the activation and the tensors of every role."""
    act, values = activation_record(weights.act)
    form = "glu" if isinstance(weights, GLUWeights) else "mlp"
    tensors = weights.tensors() | prefixed(values, "activation.")
    return {"form": form, "activation": act}, tensors


def weights_of(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> MLPWeights | GLUWeights:
    """The layer of a record; other tensors beside its own are ignored."""
    act = activation_of(metadata["activation"], within(tensors, "activation."))
    roles = {name: tensors[name] for name in ROLES if name in tensors}
    return (GLUWeights if metadata["form"] == "glu" else MLPWeights)(act=act, **roles)
