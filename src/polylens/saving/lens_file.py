"""The polynomials of a model in one file, without the model's weights."""

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from polylens.activations.recognition import activation_of, activation_record
from polylens.checks import Layer, label, labelled
from polylens.errors import ArtifactError
from polylens.files import format as storage
from polylens.hosts.base import MLPSite, Weights
from polylens.inputs.model import from_record
from polylens.inputs.seen import without_moments
from polylens.normal_forms.fingerprint import Fingerprint, fingerprint, same_weights
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import Fitted, JointPolynomial
from polylens.polynomials.records import reading

KIND = "lens"
KINDS: dict[str, type[Fitted]] = {cls.kind: cls for cls in (Polynomial, JointPolynomial)}
# What of one layer goes into a file: its entry in the header, and its tensors.
Entry = tuple[dict[str, Any], dict[str, Tensor]]


def entry(
    site: MLPSite,
    polynomial: Fitted,
    sums: Fingerprint | None = None,
    moments: bool = False,
) -> Entry:
    """What a file keeps of one layer: the coefficients, and what identifies the weights.

    Of the polynomial its own `record` and `figures`, of the weights a SHA-256 of their values and
    three sums.

    Args:
        sums: the fingerprint of the polynomial's weights, where it is known.
        moments: also keep the input model.
    """
    weights, name = polynomial.weights, label(site.layer)
    sums = fingerprint(weights) if sums is None else sums
    act, values = activation_record(weights.act)
    metadata, tensors = polynomial.record()
    tensors |= polynomial.figures()
    inputs = polynomial.inputs
    if inputs is not None:
        kept, numbers = (inputs if moments else without_moments(inputs)).record()
        metadata["inputs"] = kept
        tensors |= storage.prefixed(numbers, "inputs.")
    record = {
        "layer": name,
        "path": site.path,
        "kind": site.kind,
        "sizes": [site.d_in, site.d_mlp, site.d_out],
        "polynomial": {"kind": polynomial.kind, **metadata},
        "activation": act,
        "weights": {
            "dtype": str(weights.dtype),
            "sha256": storage.sha256(weights.tensors().items()),
            "sums": {role: list(each) for role, each in sums.items()},
        },
    }
    return record, storage.prefixed(tensors, f"{name}:") | storage.prefixed(
        values, f"{name}:activation."
    )


def warn_of_starts(where: object) -> None:
    """UserWarning about a file of a version that kept the first position of sequences true."""
    warnings.warn(
        f"{where} was written when the first position of every call stayed true under "
        "replaced(); now it is replaced like the others, which costs loss unless the polynomials "
        'have ends; attach anew with estimator="samples"',
        stacklevel=4,
    )


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], entries: Iterable[Entry]
) -> None:
    """Write the entries of all layers to one file.

    Args:
        header: what else belongs to the lens; anything JSON can hold.

    Raises:
        ArtifactError, OSError: see `polylens.files.format.write`.
    """
    layers, tensors = list[dict[str, Any]](), dict[str, Tensor]()
    for record, mine in entries:
        layers.append(record)
        tensors |= mine
    storage.write(path, KIND, {**header, "layers": layers}, tensors)


def read(
    path: str | os.PathLike[str], sites: Iterable[MLPSite], refused: Mapping[Layer, str]
) -> tuple[dict[str, Any], dict[Layer, Fitted]]:
    """(header, polynomials over the weights that these sites have now).

    Args:
        sites, refused: of the model that the file is for.

    Raises:
        ArtifactError: a damaged file or one of another kind or a later format; a calibration
            that was not finished; a layer that the model has not, or of another size, kind or
            activation, or with other weights.
        OSError: no such file.
    """
    header, tensors = storage.read(path, KIND)
    if header.get("unfinished"):
        raise ArtifactError(
            f"{path} holds {len(header['layers'])} of {len(header['calibration']['layers'])} "
            "layers, of a calibration that was interrupted; attach(..., method="
            "Sequential(checkpoint=...)) with this file and the same arguments finishes it"
        )
    return header, decode(path, header, tensors, sites, refused)


def decode(
    path: str | os.PathLike[str],
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    sites: Iterable[MLPSite],
    refused: Mapping[Layer, str],
) -> dict[Layer, Fitted]:
    """The polynomials that are in a file's header and tensors; see `read`."""
    there, found = {site.layer: site for site in sites}, dict[Layer, Fitted]()
    with reading(path):
        layers = {labelled(record["layer"]): record for record in header["layers"]}
    for layer, record in layers.items():
        if layer not in there:
            reason = refused.get(layer, f"it has layers {list(map(label, there))}")
            raise ArtifactError(
                f"{path} has a polynomial for layer {label(layer)} ({record.get('path')}), which "
                f"cannot be read in this model: {reason}"
            )
        weights = there[layer].weights()
        with reading(f"{path}, layer {label(layer)}"):
            mine = storage.within(tensors, f"{label(layer)}:")
            found[layer] = _polynomial(there[layer], weights, record, mine)
    return found


def _polynomial(
    site: MLPSite, weights: Weights, record: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Fitted:
    act = activation_of(record["activation"], storage.within(tensors, "activation."))
    saved = (record["kind"], record["sizes"], act.name)
    here = (site.kind, [site.d_in, site.d_mlp, site.d_out], weights.act.name)
    if saved != here:
        raise ArtifactError(
            f"saved for (kind, [d_in, d_mlp, d_out], activation) = {saved}, the model has {here} "
            f"at {site.path}; it is another model"
        )
    _require_same_weights(weights, record["weights"])
    own = record.get("polynomial")
    if own is None:  # as 0.1 wrote it
        own = {**record, "kind": (JointPolynomial if "center" in tensors else Polynomial).kind}
    if own["kind"] not in KINDS:
        raise ArtifactError(f"a {own['kind']!r} is not known here")
    inputs = own.get("inputs", {"model": None, "left_out": "input model"})  # as of 0.1
    model = from_record(inputs, storage.within(tensors, "inputs."))
    found = KINDS[own["kind"]].of_record(weights, own, tensors, model)
    found.take_figures(tensors)
    return found


def _require_same_weights(weights: Weights, record: Mapping[str, Any]) -> None:
    if str(weights.dtype) == record["dtype"]:
        same = storage.sha256(weights.tensors().items()) == record["sha256"]
    else:
        dtype = getattr(torch, record["dtype"].removeprefix("torch."))
        same = same_weights(record["sums"], fingerprint(weights), weights, dtype)
    if not same:
        raise ArtifactError(
            "the model's weights are not those that the polynomial was fitted to "
            "(another checkpoint, folded norms, training or an edit); load the model as it was "
            "when the lens was saved, or attach anew"
        )
