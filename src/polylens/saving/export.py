"""A model whose MLPs are polynomials, as a model of its own: built, saved, loaded."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from polylens.checks import Layer, label
from polylens.errors import ArtifactError, AttachmentError
from polylens.hosts.base import TOLERANCE, relative_error
from polylens.hosts.recording import half
from polylens.hosts.torch.copying import GLUPlace, Place
from polylens.polynomials.evaluation import PerNeuron
from polylens.polynomials.factored import Polynomial
from polylens.polynomials.joint import Fitted
from polylens.saving.lens_file import warn_of_starts

FORMAT = 3
# Format 2 said whether position 0 of sequences stays true, which no longer is.
READABLE = (2, FORMAT)
# Of the weight files: what asks for a model without polynomials does not find them.
VARIANT = "polylens"


class NeuronPolynomial(PerNeuron):
    """P(v) + z Q(v) per neuron, v = y - mean, where the activation was: act(y), or act(y) z.

    Called as f(y) in an MLP, f(y, z) in a GLU; [batch, pos, d_mlp] each and what comes back.
    """

    def extra_repr(self) -> str:
        return f"degree={len(self.P) - 1}"

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        return super().forward(y, z).contiguous()


class PolynomialGLU(nn.Module):
    """f(x) = (P(y) + z Q(y)) W_out + b_out, with y and z the two branches of the GLU it was.

    Holds the children of that GLU under their names; one of them is a NeuronPolynomial in
    place of the activation. x [..., d_in] -> [..., d_out]. Dropout inside is left out.
    """

    def __init__(self, glu: nn.Module, place: GLUPlace) -> None:
        super().__init__()
        self._place = place  # the children may have any other name
        for name, child in glu._modules.items():
            self.add_module(name, child)
        self.train(glu.training)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self._modules
        (gate, first), (linear, second) = self._place.gate, self._place.linear
        y = parts[gate](x)
        z = y if linear == gate else parts[linear](x)
        return parts[self._place.out](parts[self._place.act](half(y, first), half(z, second)))


def built(
    model: nn.Module,
    places: Mapping[Layer, Place],
    polynomials: Mapping[Layer, Fitted],
    inputs: str,
) -> nn.Module:
    """The model itself, with polynomials in these places; `Lens.export`.

    Raises:
        AttachmentError: a joint polynomial, or a model that cannot be saved as a whole.
    """
    layers, tensors = {}, {}
    for layer, polynomial in polynomials.items():
        if not isinstance(polynomial, Polynomial):
            raise AttachmentError(
                f"layer {layer} has a joint polynomial, whose readouts have no place in the "
                'model; attach with estimator="samples" or "gaussian" to export'
            )
        place, name = places[layer], label(layer)
        tensors[name] = polynomial.evaluation_tables()
        layers[name] = {
            "act": place.act,
            "glu": None if place.glu is None else asdict(place.glu),
            "degree": polynomial.degree,
            "d_mlp": polynomial.d_mlp,
            "rows": {table: len(t) for table, t in tensors[name].items() if table != "mean"},
            "dtype": str(tensors[name]["P"].dtype).removeprefix("torch."),
        }
    record = {
        "format": FORMAT,
        "polylens": version("polylens"),
        "inputs": inputs,
        "layers": layers,
    }
    _install(model, record, tensors)
    if hasattr(model, "save_pretrained"):
        _make_savable(model, record)
    return model


def require_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """AttachmentError unless an exported model's outputs are those of the replaced one."""
    same = len(found) == len(expected)
    for a, b in zip(found, expected, strict=False):
        same = same and a.shape == b.shape and relative_error(a, b) <= TOLERANCE[b.dtype]
    if not same:
        raise AttachmentError(
            "the copy does not compute what this model computes under lens.replaced(): it does "
            "more in these layers than its MLPs' weights tell (or a hook of yours edits it); use "
            "lens.replaced()"
        )


def load_exported(
    path: str | os.PathLike[str], *, model_class: Any = None, **options: Any
) -> nn.Module:
    """The model that `lens.export().save_pretrained(path)` (or `.push_to_hub`) wrote.

    Args:
        path: a directory, or a repository on the Hugging Face Hub.
        model_class: of the model, where it is none of transformers' own.
        options: of transformers' `from_pretrained`: dtype (that of the file by default),
            device_map, revision, token, ...

    Returns:
        A Hugging Face model like any other, in eval mode; outputs are those before saving, bit
        for bit.

    Raises:
        ArtifactError: no exported model, of another format, or one with missing weights.
        OSError: no such directory or repository, or without weights.
    """
    import transformers

    asked = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
    hub = {name: options[name] for name in asked if name in options}
    config = transformers.AutoConfig.from_pretrained(path, **hub)
    record = getattr(config, "polylens", None)
    if not isinstance(record, dict):
        raise ArtifactError(
            f"{path} holds a {config.model_type} without polynomials; load it with transformers, "
            "or save the model that lens.export() returns"
        )
    if record["format"] not in READABLE:
        raise ArtifactError(
            f"{path} is of format {record['format']}, this polylens reads formats {READABLE}: of "
            "a later one, upgrade polylens; of an earlier one, export again"
        )
    if record.get("keep_first"):
        warn_of_starts(path)
    name = (config.architectures or ["?"])[0]
    cls = model_class or getattr(transformers, name, None)
    if cls is None:
        raise ArtifactError(f"{path}: transformers has no {name}; give its class, model_class=")

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        _install(self, record)

    # transformers fills whatever a model consists of after __init__; the class lasts till then
    namespace = {"__init__": start, "__module__": cls.__module__}
    if "torch_dtype" not in options:
        options = {"dtype": "auto", **options}
    options = {"variant": VARIANT, "use_safetensors": True, **options, "output_loading_info": True}
    loading = type(cls.__name__, (cls,), namespace)
    try:
        model, info = loading.from_pretrained(path, config=config, **options)
    except (AttributeError, KeyError) as error:
        raise ArtifactError(f"{path}: its polynomials do not fit into a {name}: {error}") from error
    if problems := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
        raise ArtifactError(f"{path} does not have the weights of its model: {problems}")
    model.__class__ = cls
    _make_savable(model, record)
    return model


def _install(
    model: nn.Module,
    record: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Put every polynomial of a record into the model, with unset coefficients by default."""
    for name, layer in record["layers"].items():
        values = _unset(layer) if tensors is None else tensors[name]
        parent, act = _parent(model, layer["act"])
        true = getattr(parent, act)
        polynomial = NeuronPolynomial(values)
        setattr(parent, act, polynomial.train(true.training))
        if layer["glu"] is not None:
            place = GLUPlace(**layer["glu"])
            owner, child = _parent(model, place.path)
            setattr(owner, child, PolynomialGLU(getattr(owner, child), place))


def _unset(layer: Mapping[str, Any]) -> dict[str, Tensor]:
    d_mlp, dtype = layer["d_mlp"], getattr(torch, layer["dtype"])
    tables = {name: torch.empty(n, d_mlp, dtype=dtype) for name, n in layer["rows"].items()}
    return {"mean": torch.empty(d_mlp, dtype=dtype), **tables}


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _make_savable(model: Any, record: Mapping[str, Any]) -> None:
    from transformers import PreTrainedModel

    adapted = getattr(model, "_hf_peft_config_loaded", False)
    if adapted or not isinstance(model, PreTrainedModel):
        raise AttachmentError(
            f"the save_pretrained of this {type(model).__name__} does not save a whole model of "
            "transformers; merge its adapter (merge_and_unload) and attach to what that returns"
        )
    _forget_quantization(model)
    model.config.polylens = dict(record)
    model.save_pretrained = partial(_save_pretrained, model)


def _forget_quantization(model: Any) -> None:
    """Let transformers save weights that it unpacked while loading, such as those of a GGUF file.

    Raises:
        AttachmentError: weights that are still packed, and cannot be saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_serializable():
        return
    packed = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if packed:
        method = type(quantizer).__name__.removesuffix("HfQuantizer")
        raise AttachmentError(
            f"transformers cannot save {method} weights that are still packed ({packed[0]} and "
            f"{len(packed) - 1} more); load the model dequantized and attach to that"
        )
    quantizer.remove_quantization_config(model)


def _save_pretrained(model: Any, *args: Any, **options: Any) -> Any:
    options = {"variant": VARIANT, **options}
    return type(model).save_pretrained(model, *args, **options)
