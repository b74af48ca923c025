"""The repr of results that hold tensors, on one line."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

LONGEST = 60


class Brief:
    """A dataclass whose repr has tensors by their shape and long values by their size.

    For a class under `@dataclass(repr=False)`.
    """

    def __repr__(self) -> str:
        own: Any = self
        shown = (f"{each.name}={brief(getattr(self, each.name))}" for each in fields(own))
        return f"{type(self).__name__}({', '.join(shown)})"


def brief(value: object) -> str:
    """A value in at most about LONGEST characters."""
    if isinstance(value, Tensor):
        return f"{value.item():.4g}" if value.dim() == 0 else f"Tensor{list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = repr(value)
    if len(text) <= LONGEST and "\n" not in text:
        return text
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return f"{type(value).__name__} of {len(value)}"
    return f"{text.split(chr(10))[0][:LONGEST]}..."
