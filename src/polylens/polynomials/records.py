"""How coefficients are kept in files: without known zeros, and checked when they come back."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from polylens.errors import ArtifactError


def packed(table: Tensor, extra: int) -> Tensor:
    """[numbers, d_mlp] of a table [n + 1, ., d_mlp], whose row k has k + extra entries."""
    return torch.cat([row[: k + extra] for k, row in enumerate(table)])


def unpacked(kept: Tensor, degree: int, extra: int) -> Tensor:
    """Inverse of `packed`; a whole table, as version 0.1 kept it, is left as it is."""
    if kept.dim() == 3:
        return kept
    table = kept.new_zeros(degree + 1, degree + extra, kept.shape[1])
    sizes = [k + extra for k in range(degree + 1)]
    if len(kept) != sum(sizes):
        raise ArtifactError(f"a table of degree {degree} has {sum(sizes)} rows, not {len(kept)}")
    for k, row in enumerate(torch.split(kept, sizes)):
        table[k, : k + extra] = row
    return table


def checked(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The tensors of these names, finite and in float64 as they were written.

    Raises:
        ArtifactError: one that is missing, or another one than could have been written.
    """
    found: list[Tensor] = []
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.float64 or tuple(tensor.shape) != shape:
            got = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ArtifactError(f"{name} is {got}, it must be float64 {shape}")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{name} has NaN or infinite entries")
        found.append(tensor)
    return found


@contextmanager
def reading(where: object) -> Generator[None]:
    """Says where, whatever turns out to be wrong with what is in a file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{where}: {text}") from error
