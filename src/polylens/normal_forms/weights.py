"""The two normal forms that polylens fits, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.activations.recognition import activation, activation_of, activation_record
from polylens.checks import check_features, floating
from polylens.devices import usable_device
from polylens.errors import ArtifactError, InvalidInputError
from polylens.files.format import Record, prefixed, within

AXES: dict[str, tuple[str, ...]] = {
    "W_in": ("d_in", "d_mlp"),
    "W_out": ("d_mlp", "d_out"),
    "W_gate": ("d_in", "d_mlp"),
    "b_gate": ("d_mlp",),
    "b_in": ("d_mlp",),
    "b_out": ("d_out",),
}
ROLES = tuple(AXES)

_W = TypeVar("_W", bound="_Weights")


class Sized:
    """The sizes of whatever has W_in [d_in, d_mlp] and W_out [d_mlp, d_out]."""

    W_in: Tensor
    W_out: Tensor

    @property
    def d_in(self) -> int:
        return self.W_in.shape[0]

    @property
    def d_mlp(self) -> int:
        return self.W_in.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_out.shape[1]


class _Declared(Sized):
    """What both forms have, as fields in an order of their own."""

    act: Activation
    b_out: Tensor | None


@dataclass(frozen=True, eq=False)
class _Weights(_Declared):
    W_in: Tensor
    W_out: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "act", activation(self.act))
        sizes: dict[str, tuple[int, str]] = {}
        for name in self._roles():
            tensor, axes = getattr(self, name), AXES[name]
            if tensor is None and name.startswith("b_"):
                continue
            tensor = floating(name, tensor, meta=True)
            object.__setattr__(self, name, tensor)
            if tensor.dim() != len(axes):
                raise InvalidInputError(
                    f"{name} must have shape [{', '.join(axes)}], got {tuple(tensor.shape)}"
                )
            for axis, size in zip(axes, tensor.shape, strict=True):
                known, where = sizes.setdefault(axis, (size, name))
                if size != known or size == 0:
                    raise InvalidInputError(
                        f"{name} {tuple(tensor.shape)} does not fit: {axis} is {size} here and "
                        f"{known} in {where}; weights are used as x @ W, "
                        f"{name} is [{', '.join(axes)}]"
                    )
            if tensor.device != self.W_in.device or tensor.dtype != self.W_in.dtype:
                raise InvalidInputError(
                    f"{name} is {tensor.dtype} on {tensor.device}, W_in is {self.W_in.dtype} on "
                    f"{self.W_in.device}; give all weights one dtype and one device"
                )

        if self.device.type != "meta":
            require_finite(self.tensors())

    @classmethod
    def trusted(cls: type[_W], act: Activation, **tensors: Tensor | None) -> _W:
        """Over tensors known to be valid, without looking at them again."""
        weights = object.__new__(cls)
        for name, value in {"act": act, **tensors}.items():
            object.__setattr__(weights, name, value)
        return weights

    @classmethod
    def _roles(cls) -> list[str]:
        """Those of this form, in the order of ROLES."""
        own = {field.name for field in fields(cls)}
        return [name for name in ROLES if name in own]

    def __call__(self, x: Tensor) -> Tensor:
        """The layer itself, [..., d_in] -> [..., d_out]."""
        return _affine(self.neurons(x)["h"], self.W_out, self.b_out)

    def neurons(self, x: Tensor) -> dict[str, Tensor]:
        """What its neurons compute, each [..., d_mlp]: h, which W_out maps to the output."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.W_in.dtype

    @property
    def device(self) -> torch.device:
        return self.W_in.device

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by role, in the order of ROLES."""
        roles = {name: getattr(self, name, None) for name in ROLES}
        return {name: tensor for name, tensor in roles.items() if tensor is not None}

    def record(self) -> Record:
        """The form, the activation and the tensors of every role; see `weights_of`."""
        act, values = activation_record(self.act)
        tensors = self.tensors() | prefixed(values, "activation.")
        form = "glu" if "W_gate" in self._roles() else "mlp"
        return {"form": form, "activation": act}, tensors

    def to(self: _W, *args: Any, **kwargs: Any) -> _W:
        """The same weights on another device or in another dtype, as `Tensor.to`."""
        for each in (*args, *kwargs.values()):
            if isinstance(each, str | torch.device):
                usable_device(each)
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in self._roles():
            if changed[name] is not None:
                changed[name] = changed[name].to(*args, **kwargs)
        return type(self)(**changed)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(d_in={self.d_in}, d_mlp={self.d_mlp}, d_out={self.d_out}, "
            f"act={self.act.name!r}, {self.dtype}, {self.device})"
        )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """InvalidInputError for weights of these names that are not finite."""
    if _finite(*tensors.values()):
        return
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise InvalidInputError(f"{name} has {bad} NaN or infinite entries")


def _finite(*tensors: Tensor) -> bool:
    # the sum is one pass without a temporary; it may overflow where no entry does
    if bool(torch.isfinite(torch.stack([t.sum() for t in tensors])).all()):
        return True
    return all(bool(torch.isfinite(t).all()) for t in tensors)


@dataclass(frozen=True, eq=False, repr=False)
class MLPWeights(_Weights):
    """f(x) = act(x W_in + b_in) W_out + b_out.

    Args:
        W_in: [d_in, d_mlp].
        W_out: [d_mlp, d_out].
        act: name, callable or Activation.
        b_in: [d_mlp] or None.
        b_out: [d_out] or None.

    Raises:
        InvalidInputError: shapes that do not fit, mixed dtypes or devices, NaN or infinity.
        UnsupportedActivation: an activation with unknown coefficients.

    >>> import polylens
    >>> layer = polylens.MLPWeights(W_in=torch.eye(2), W_out=torch.ones(2, 1), act="relu")
    >>> layer(torch.tensor([1.0, -2.0]))
    tensor([1.])
    """

    act: Activation
    b_in: Tensor | None = None
    b_out: Tensor | None = None

    def neurons(self, x: Tensor) -> dict[str, Tensor]:
        """y = x W_in + b_in and h = act(y), each [..., d_mlp]."""
        check_features(x, self.d_in, self.dtype, self.device)
        y = _affine(x, self.W_in, self.b_in)
        return {"y": y, "h": self.act(y)}


@dataclass(frozen=True, eq=False, repr=False)
class GLUWeights(_Weights):
    """f(x) = (act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out.

    Args:
        W_in: [d_in, d_mlp], the linear branch.
        W_out: [d_mlp, d_out].
        W_gate: [d_in, d_mlp], the activated branch.
        act: name, callable or Activation.
        b_gate, b_in: [d_mlp] or None.
        b_out: [d_out] or None.

    Raises:
        InvalidInputError: shapes that do not fit, mixed dtypes or devices, NaN or infinity.
        UnsupportedActivation: an activation with unknown coefficients.

    >>> import polylens
    >>> W = torch.tensor([[1.0], [1.0]])
    >>> layer = polylens.GLUWeights(W_in=W, W_out=torch.ones(1, 1), W_gate=W, act="relu")
    >>> layer(torch.tensor([1.0, 2.0]))  # relu(3) * 3
    tensor([9.])
    """

    W_gate: Tensor
    act: Activation
    b_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_out: Tensor | None = None

    def neurons(self, x: Tensor) -> dict[str, Tensor]:
        """y = x W_gate + b_gate, z = x W_in + b_in and h = act(y) * z, each [..., d_mlp]."""
        check_features(x, self.d_in, self.dtype, self.device)
        y, z = _affine(x, self.W_gate, self.b_gate), _affine(x, self.W_in, self.b_in)
        return {"y": y, "z": z, "h": self.act(y) * z}


def check_weights(weights: object) -> None:
    """InvalidInputError unless they are a layer's."""
    if not isinstance(weights, (MLPWeights, GLUWeights)):
        raise InvalidInputError(
            f"weights must be MLPWeights or GLUWeights, got {type(weights).__name__}; "
            "find_mlps(model) lists the layers of a model, site.weights() are those of one"
        )


def weights_of(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> MLPWeights | GLUWeights:
    """The layer of a record; other tensors beside its own are ignored.

    Raises:
        ArtifactError: an activation that is not known here; tensors that are no layer.
    """
    forms = {"mlp": MLPWeights, "glu": GLUWeights}
    act = activation_of(metadata["activation"], within(tensors, "activation."))
    roles = {name: tensors[name] for name in ROLES if name in tensors}
    try:
        return forms[metadata["form"]](act=act, **roles)
    except (KeyError, TypeError, InvalidInputError) as error:
        raise ArtifactError(f"the saved layer is none: {error}") from error


def _affine(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return x @ W if b is None else x @ W + b
