"""Files that are there whole or not at all."""

import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from errno import EINVAL, EISDIR, ENOENT
from pathlib import Path


@contextmanager
def beside(path: str | os.PathLike[str]) -> Generator[Path]:
    """An empty file beside this one, which takes its place when the context ends without an error.

    A crash leaves either the old file or the new one, and links stay links.

    Raises:
        OSError: the destination cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(EISDIR, "a directory; give the name of a file in it", str(path))
    if is_device(target):
        message = "a device, pipe or socket, which a file would take the place of"
        raise OSError(EINVAL, f"{message}; give the name of a file", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(ENOENT, "no such directory", str(Path(path).absolute().parent))
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.open("xb").close()  # the usual OSError where this cannot be written
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def is_device(path: Path) -> bool:
    """A device, pipe or socket, which a file must not take the place of."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _sync_directory(directory: Path) -> None:
    """Makes the rename durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
