"""Weights that are elsewhere than in memory, and fetched whenever they are read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polylens.activations.activation import Activation
from polylens.normal_forms.weights import GLUWeights, MLPWeights, require_finite

# The tensor of a role, in memory that nobody else holds on to.
Fetch = Callable[[str], Tensor | None]


def fetched(name: str) -> Any:
    """A property that reads the tensor of this role wherever the object's `source` has it."""

    def read(self: Any) -> Tensor | None:
        return self.source.read(name)

    return property(read)


class Source:
    """Where the tensors of a layer are.

    Args:
        fetch: gives the tensor of a role.
        like: by role, tensors without values (torch's "meta") of the same shapes and dtypes.
        device: on which they are read.
    """

    def __init__(self, fetch: Fetch, like: Mapping[str, Tensor], device: torch.device) -> None:
        self._fetch, self.like, self.device = fetch, dict(like), device

    @property
    def dtype(self) -> torch.dtype:
        return self.like["W_in"].dtype

    def read(self, name: str) -> Tensor | None:
        tensor = self._fetch(name) if name in self.like else None
        return None if tensor is None else tensor.detach().to(self.device, self.like[name].dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Source":
        """The same tensors, read on another device or in another dtype."""
        return Source(self._fetch, {name: t.to(dtype) for name, t in self.like.items()}, device)

    def __deepcopy__(self, memo: dict[int, object]) -> "Source":
        return self


class _Fetched:
    """A normal form of which nothing is in memory but what is being read."""

    source: Source
    act: Activation
    W_in: Tensor = fetched("W_in")
    W_out: Tensor = fetched("W_out")
    W_gate: Tensor | None = fetched("W_gate")
    b_gate: Tensor | None = fetched("b_gate")
    b_in: Tensor | None = fetched("b_in")
    b_out: Tensor | None = fetched("b_out")

    def __init__(self, act: Activation, source: Source) -> None:
        object.__setattr__(self, "act", act)
        object.__setattr__(self, "source", source)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def d_in(self) -> int:
        return self.source.like["W_in"].shape[0]

    @property
    def d_mlp(self) -> int:
        return self.source.like["W_in"].shape[1]

    @property
    def d_out(self) -> int:
        return self.source.like["W_out"].shape[1]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return type(self)(self.act, self.source.to(like.device, like.dtype))


class FetchedMLP(_Fetched, MLPWeights):
    """`MLPWeights` whose tensors are fetched at every use."""


class FetchedGLU(_Fetched, GLUWeights):  # type: ignore[misc]
    """`GLUWeights` whose tensors are fetched at every use."""


def from_source(act: Activation, source: Source) -> MLPWeights | GLUWeights:
    """The normal form of a source, validated role by role.

    Raises:
        InvalidInputError: as the normal forms themselves.

    Cost: every tensor is fetched once.
    """
    glu = "W_gate" in source.like
    plain, kind = (GLUWeights, FetchedGLU) if glu else (MLPWeights, FetchedMLP)
    plain(act=act, **source.like)  # shapes and dtypes
    for name in source.like:
        tensor = source.read(name)
        assert tensor is not None
        require_finite({name: tensor})
    return kind(act, source)


def is_fetched(weights: object) -> bool:
    """Whether nothing of these weights is in memory."""
    return isinstance(weights, _Fetched)


def resident(weights: MLPWeights | GLUWeights) -> MLPWeights | GLUWeights:
    """The same weights in memory, in a copy."""
    kind = GLUWeights if isinstance(weights, GLUWeights) else MLPWeights
    return kind.trusted(weights.act, **{n: t.clone() for n, t in weights.tensors().items()})
