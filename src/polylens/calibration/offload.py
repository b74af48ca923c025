"""Activations of forward passes that wait, kept elsewhere than in the model's memory."""

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from polylens.errors import InvalidInputError


class Store(Protocol):
    """Where bytes are kept under a key until the next write under it; a context manager."""

    def __enter__(self) -> "Store": ...

    def __exit__(self, *exception: object) -> None: ...

    def takes(self, storage: torch.UntypedStorage) -> bool:
        """Whether it frees memory to keep the contents of this storage here."""
        ...

    def write(self, key: str, parts: Iterable[Tensor]) -> None:
        """Keep copies of these uint8 vectors, on any device."""
        ...

    def read(self, key: str, k: int) -> Tensor:
        """Part k, on the CPU."""
        ...


class Memory:
    """In CPU memory; what is there already stays where it is."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *exception: object) -> None:
        self._parts.clear()

    def takes(self, storage: torch.UntypedStorage) -> bool:
        return storage.device.type != "cpu"

    def write(self, key: str, parts: Iterable[Tensor]) -> None:
        self._parts[key] = [part.to("cpu", copy=True) for part in parts]

    def read(self, key: str, k: int) -> Tensor:
        return self._parts[key][k]


class Files:
    """In files, one for each key, in a new folder inside `directory` that is removed at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._starts: dict[str, list[int]] = {}

    def __enter__(self) -> "Files":
        self._folder = TemporaryDirectory(prefix="polylens-", dir=self._directory)
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def _path(self, key: str) -> Path:
        return Path(self._folder.name, key)

    def takes(self, storage: torch.UntypedStorage) -> bool:
        return True

    def write(self, key: str, parts: Iterable[Tensor]) -> None:
        starts = [0]
        try:
            with open(self._path(key), "wb") as file:
                for part in parts:
                    # a copy: memory that NumPy has seen can no longer be released
                    file.write(part.to("cpu", copy=True).numpy().data)
                    starts.append(starts[-1] + len(part))
        except OSError as error:
            raise OSError(
                error.errno,
                f"activations cannot be offloaded ({error.strerror}); give another directory as "
                "offload=, fewer tokens or a smaller batch_size",
                str(self._directory),
            ) from error
        self._starts[key] = starts

    def read(self, key: str, k: int) -> Tensor:
        start, end = self._starts[key][k : k + 2]
        part = torch.empty(end - start, dtype=torch.uint8, device="cpu")
        with open(self._path(key), "rb") as file:
            file.seek(start)
            if file.readinto(part.numpy().data) != end - start:
                raise OSError(f"offloaded activations in {self._path(key)} were cut short")
        return part


def store_for(offload: str | os.PathLike[str] | None) -> Store | None:
    """The store that `Sequential(offload=)` names, not entered yet.

    Raises:
        InvalidInputError: neither "cpu" nor an existing directory.
    """
    if offload is None:
        return None
    if offload == "cpu":
        return Memory()
    with suppress(TypeError):
        path = Path(offload)
        if path.is_dir():
            return Files(path)
    raise InvalidInputError(
        f"offload={offload!r} is no directory; give None, 'cpu' or an existing directory"
    )


class Resident:
    """Passes that keep what they hold in memory; the same methods as `Offloaded`."""

    def fill(self, i: int) -> None: ...

    def running(self, i: int) -> AbstractContextManager[None]:
        return nullcontext()

    def empty(self, i: int) -> None: ...

    def close(self) -> None: ...


class Offloaded(TorchDispatchMode):
    """Passes of which at most one holds its activations in memory.

    Nothing need be known about the model. While a pass is `running`, the storages that its
    operations create are noted; `empty` moves the contents of those still alive into the
    store, whoever holds them, and `fill` brings them back, bit for bit, so that every view
    of them is as before. Parameters, buffers and inputs are not made by the pass.

    A pass may make what all share, such as a table that the model keeps from its first use on.
    What an attribute of a module holds is not emptied while it does. What is kept elsewhere is
    filled as soon as an operation of another pass reads it, and from then on left alone;
    `close` fills what is still empty. Only what reads memory past PyTorch's dispatcher (a
    kernel of another library, `repr`) must not be given tensors of a pass that waits.

    Args:
        store: where the contents go.
        module: whose passes these are.
        passes: how many.
    """

    supports_higher_order_operators = True

    def __init__(self, store: Store, module: nn.Module, passes: int) -> None:
        super().__init__()  # pyright: ignore
        self._store, self._modules = store, list(module.modules())
        self._maker: Any = WeakIdKeyDictionary()
        # of each pass: storage -> key and number in the store, None while it is filled
        self._made: list[Any] = [WeakIdKeyDictionary() for _ in range(passes)]
        # waiting passes of which something is not emptied because a module holds it
        self._behind: set[int] = set()
        self._running = 0

    @contextmanager
    def running(self, i: int) -> Generator[None, None, None]:
        """Within the context the operations are those of pass i."""
        self._running = i
        with self:
            yield

    def fill(self, i: int) -> None:
        """Bring back what `empty` took."""
        self._behind.discard(i)
        for storage in list(self._made[i]):
            self._fill(i, storage)

    def empty(self, i: int) -> None:
        """Take what pass i has made, and is still alive, out of memory."""
        kept = self._kept_by_modules()
        self._behind.add(i)
        for j in sorted(self._behind):
            full = [s for s, place in self._made[j].items() if place is None and self._movable(s)]
            mine = [s for s in full if id(s) not in kept]
            if len(mine) == len(full):
                self._behind.discard(j)
            self._empty(j, f"{j}-{i}", mine)

    def _empty(self, i: int, key: str, storages: Sequence[torch.UntypedStorage]) -> None:
        if storages:
            self._store.write(key, map(_contents, storages))
        for k, storage in enumerate(storages):
            self._made[i][storage] = key, k
            storage.resize_(0)

    def close(self) -> None:
        """Bring back whatever has outlived its pass."""
        for i in range(len(self._made)):
            self.fill(i)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = _storages((args, kwargs))
        for storage in given:
            self._meet(storage)
        out = func(*args, **(kwargs or {}))
        before = set(map(id, given))
        for storage in _storages(out):
            if id(storage) not in before and not self._meet(storage):
                self._maker[storage] = self._running
                self._made[self._running][storage] = None
        return out

    def _meet(self, storage: torch.UntypedStorage) -> bool:
        """Whether a pass has made it; it is filled, and shared if that was another pass."""
        maker = self._maker.get(storage)
        if maker is None:
            return False
        self._fill(maker, storage)
        if maker != self._running:
            del self._maker[storage], self._made[maker][storage]
        return True

    def _fill(self, i: int, storage: torch.UntypedStorage) -> None:
        place = self._made[i][storage]
        if place is None:
            return
        contents = self._store.read(*place)
        storage.resize_(len(contents))
        _contents(storage).copy_(contents)
        self._made[i][storage] = None

    def _movable(self, storage: torch.UntypedStorage) -> bool:
        return storage.nbytes() > 0 and storage.resizable() and self._store.takes(storage)

    def _kept_by_modules(self) -> set[int]:
        values: list[object] = [
            value
            for module in self._modules
            for name, value in vars(module).items()
            if isinstance(value, Tensor | dict | list | tuple) and name != "_modules"
        ]
        return set(map(id, _storages(values)))


def _storages(tree: Any) -> Sequence[torch.UntypedStorage]:
    """Of all tensors in it that have memory of their own."""
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor)
        and leaf.layout == torch.strided
        and leaf.device.type != "meta"
        and not is_traceable_wrapper_subclass(leaf)
    ]


def _contents(storage: torch.UntypedStorage) -> Tensor:
    """A uint8 view of all of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
