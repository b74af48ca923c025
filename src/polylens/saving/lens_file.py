"""The polynomials of a model in one file, without the model's weights."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from polylens.activations.recognition import activation_of, activation_record
from polylens.checks import Layer, label, labelled
from polylens.errors import ArtifactError
from polylens.files import format as storage
from polylens.hosts.base import MLPSite, Weights
from polylens.normal_forms.fingerprint import Fingerprint, fingerprint, same_weights
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import Fitted, JointPolynomial

KIND = "lens"
# What of one layer goes into a file: its entry in the header, and its tensors.
Entry = tuple[dict[str, Any], dict[str, Tensor]]


def entry(site: MLPSite, polynomial: Fitted, sums: Fingerprint | None = None) -> Entry:
    """What a file keeps of one layer: the coefficients, and what identifies the weights.

    Of a polynomial only m, s and the coefficients that are not zero by definition are kept, in
    float64: (degree + 1)(degree + 2) / 2 + degree (degree + 1) / 2 + 2 numbers for a neuron of
    a GLU. Of the weights a SHA-256 of their values and three sums are kept.

    Args:
        sums: the fingerprint of the polynomial's weights, where it is known.
    """
    weights, name = polynomial.weights, label(site.layer)
    sums = fingerprint(weights) if sums is None else sums
    act, values = activation_record(weights.act)
    own = polynomial.base if isinstance(polynomial, JointPolynomial) else polynomial
    record = {
        "layer": name,
        "path": site.path,
        "kind": site.kind,
        "sizes": [site.d_in, site.d_mlp, site.d_out],
        "degree": polynomial.degree,
        "ridge": own.ridge,
        "asymptotes": own.asymptotes,
        "activation": act,
        "weights": {
            "dtype": str(weights.dtype),
            "sha256": storage.sha256(weights.tensors().items()),
            "sums": {role: list(each) for role, each in sums.items()},
        },
    }
    tensors = storage.prefixed(_tables(polynomial), f"{name}:")
    return record, tensors | storage.prefixed(values, f"{name}:activation.")


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], entries: Iterable[Entry]
) -> None:
    """Write the entries of all layers to one file.

    Args:
        header: what else belongs to the lens; anything JSON can hold.

    Raises:
        ArtifactError, OSError: see `polylens.files.format.write`.
    """
    layers, tensors = [], {}
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
    there = {site.layer: site for site in sites}
    found = {}
    for record in header["layers"]:
        layer = labelled(record["layer"])
        if layer not in there:
            reason = refused.get(layer, f"it has layers {list(map(label, there))}")
            raise ArtifactError(
                f"{path} has a polynomial for layer {record['layer']} ({record['path']}), which "
                f"cannot be read in this model: {reason}"
            )
        mine = storage.within(tensors, f"{record['layer']}:")
        found[layer] = _polynomial(f"{path}, layer {record['layer']}", there[layer], record, mine)
    return found


def _polynomial(
    where: str, site: MLPSite, record: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Fitted:
    weights = site.weights()
    act = activation_of(record["activation"], storage.within(tensors, "activation."))
    saved = (record["kind"], record["sizes"], act.name)
    here = (site.kind, [site.d_in, site.d_mlp, site.d_out], weights.act.name)
    if saved != here:
        raise ArtifactError(
            f"{where}: saved for (kind, [d_in, d_mlp, d_out], activation) = {saved}, the model "
            f"has {here} at {site.path}; it is another model"
        )
    _require_same_weights(where, weights, record["weights"])
    n = record["degree"]
    tensors = {name: tensor.to(weights.device) for name, tensor in tensors.items()}
    P = _unpacked(tensors["P"], n + 1, n + 1, 1)
    Q = _unpacked(tensors["Q"], n + 1, n, 0) if "Q" in tensors else None
    own = (tensors["m"], tensors["s"], P, Q, tensors.get("y_range"))
    asymptotes = record.get("asymptotes", False)
    polynomial = Polynomial(weights, *own, ridge=record["ridge"], asymptotes=asymptotes)
    return JointPolynomial.on(polynomial, tensors) if "center" in tensors else polynomial


def _tables(polynomial: Fitted) -> dict[str, Tensor]:
    """The coefficients, and for a joint fit its readouts, each as large as the layer's own."""
    if isinstance(polynomial, JointPolynomial):
        return _tables(polynomial.base) | polynomial.tables()
    kept = {"m": polynomial.m, "s": polynomial.s, "P": _packed(polynomial.P, 1)}
    kept |= {} if polynomial.Q is None else {"Q": _packed(polynomial.Q, 0)}
    return kept | ({} if polynomial.ends is None else {"y_range": polynomial.ends})


def _require_same_weights(where: str, weights: Weights, record: Mapping[str, Any]) -> None:
    if str(weights.dtype) == record["dtype"]:
        same = storage.sha256(weights.tensors().items()) == record["sha256"]
    else:
        eps = torch.finfo(getattr(torch, record["dtype"].removeprefix("torch."))).eps
        same = same_weights(record["sums"], fingerprint(weights), weights, eps)
    if not same:
        raise ArtifactError(
            f"{where}: the model's weights are not those that the polynomial was fitted to "
            "(another checkpoint, folded norms, training or an edit); load the model as it was "
            "when the lens was saved, or attach anew"
        )


def _packed(table: Tensor, extra: int) -> Tensor:
    """[numbers, d_mlp] of table [n + 1, ., d_mlp], whose row k has k + extra entries."""
    return torch.cat([row[: k + extra] for k, row in enumerate(table)])


def _unpacked(packed: Tensor, rows: int, columns: int, extra: int) -> Tensor:
    """Inverse of `_packed`."""
    table = packed.new_zeros(rows, columns, packed.shape[1])
    start = 0
    for k in range(rows):
        table[k, : k + extra] = packed[start : start + k + extra]
        start += k + extra
    return table
