"""What differs between devices: which there are, how much is done at once, waiting, memory."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polylens.errors import InvalidInputError, OutOfMemory

# Devices with a cache that blocks should fit into; others want plenty of work at once.
CACHED = {"cpu"}


def usable_device(device: torch.device | str) -> torch.device:
    """The device of this name; InvalidInputError if this machine has none such."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0].strip() if str(error) else type(error).__name__
        raise InvalidInputError(
            f"device {str(device)!r} cannot be used here: {first}; cpu always can"
        ) from error
    return found


def per_block(device: torch.device, cached: int, other: int) -> int:
    """How many numbers, rows or neurons to take at a time on this device."""
    return cached if device.type in CACHED else other


def numbers(*tensors: Tensor) -> list[Any]:
    """The entries of these tensors of one dtype, one after the other, as Python numbers.

    One copy however many there are. Each wait costs a GPU its queue, so nothing is read where it
    would be read again for more neurons, tokens or degrees.
    """
    flat: Any = torch.cat([t.detach().reshape(-1) for t in tensors])
    return flat.tolist()


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device; None where nothing says it.

    On a GPU what the driver and torch's own cache have left, on a Linux CPU what the kernel calls
    available, or less where the limit of a control group (a container) is nearer.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
    except (OSError, ValueError):  # no limit
        return free
    return min(free, max(0, limit - used))


def require_room(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """OutOfMemory, before the work, for more bytes than are free on a device."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise OutOfMemory(
            f"{what}: {_size(needed)} on {device}, where {_size(free)} are free; {remedy}"
        )


@contextmanager
def memory_named(what: str, remedy: str) -> Generator[None, None, None]:
    """Within the context an allocation that fails is OutOfMemory, which says what to do."""
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        own = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (own or "can't allocate memory" in str(error)):
            raise
        first = (str(error) or "out of memory").splitlines()[0]
        raise OutOfMemory(f"{what} ran out of memory; {remedy} ({first})") from error


def _size(n: int) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e7 else f"{n:,} bytes"
