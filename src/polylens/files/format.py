"""The one file format of everything that polylens saves: safetensors with checked contents.

A file is an ordinary safetensors file. Its header's `__metadata__` holds one JSON object under
"polylens": the kind of thing saved, the version of the format, the caller's metadata, and the
SHA-256 of the whole file with the digest's own 64 characters read as zeros. So every damaged
byte, wherever it is, is noticed, and nothing is ever unpickled.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from polylens.errors import ArtifactError
from polylens.files.whole import beside

safetensors: Any = safetensors_torch  # without types

# What JSON and safetensors hold exactly of one thing, and its inverse finds again.
Record = tuple[dict[str, Any], dict[str, Tensor]]

SCHEMA = 1
KEY = "polylens"
BLANK = b"0" * 64
# What stands before the digest in the header, where JSON is within JSON.
MARK = rb"{\"sha256\": \""
CHUNK = 1 << 22
# What safetensors itself allows a header to have.
MAX_HEADER_BYTES = 100_000_000


def write(
    path: str | os.PathLike[str], kind: str, metadata: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write metadata and named tensors to one file, all of it or nothing.

    The file is written beside its destination and then renamed, so that a crash leaves either
    the old file or the new one. The same contents give the same bytes.

    Args:
        kind: what the file holds; `read` asks for it again.
        metadata: anything JSON can hold exactly (keys are strings, no NaN or infinity; put
            numbers that may be infinite into a tensor).
        tensors: on any device, of any layout and dtype that safetensors knows; tensors that
            share memory are stored apart.

    Raises:
        ArtifactError: metadata that JSON cannot hold.
        OSError: the destination cannot be written.

    Cost: memory for a CPU copy of the tensors that are not contiguous there already.
    """
    record = {"sha256": BLANK.decode(), "kind": kind, "schema": SCHEMA, "metadata": metadata}
    try:
        text = json.dumps(record, allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot save a {kind}: its metadata is not JSON: {error}") from error
    if json.loads(text)["metadata"] != metadata:
        raise ArtifactError(
            f"cannot save a {kind}: its metadata changes in JSON; use strings as keys and lists"
        )
    with beside(path) as temporary:
        safetensors.save_file(_apart(tensors), temporary, metadata={KEY: text})
        with temporary.open("r+b") as file:
            offset, _ = _stored_digest(file)
            digest = _digest(file, offset)
            file.seek(offset)
            file.write(digest)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, tensors on the CPU) of a file that `write` wrote with this kind.

    Raises:
        ArtifactError: not such a file, another kind, a later format, damaged or cut short.
        OSError: no such file, or one that cannot be read.

    Cost: two passes over the file; memory for its tensors.
    """
    with open(path, "rb") as file:
        try:
            offset, digest = _stored_digest(file)
        except ValueError as error:
            raise ArtifactError(
                f"{path} is not a file that polylens saved, or its header is damaged: {error}"
            ) from error
        if _digest(file, offset) != digest:
            raise ArtifactError(
                f"{path} is damaged or cut short: its contents do not have the checksum that was "
                "saved with them; copy it again or save it anew"
            )
        try:
            record = json.loads(json.loads(_header(file))["__metadata__"][KEY])
            schema, holds, metadata = (record[k] for k in ("schema", "kind", "metadata"))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} has a checksum but no record: {error!r}") from error
    if type(schema) is not int or not isinstance(metadata, dict):
        raise ArtifactError(f"{path} has a record without a format or without metadata")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path} is of format {schema}, this polylens reads up to {SCHEMA}; upgrade polylens"
        )
    if holds != kind:
        raise ArtifactError(f"{path} holds a {holds}, not a {kind}; load it as what it is")
    opened: Any = safe_open
    try:
        with opened(path, framework="pt") as file:
            # clone: what safe_open returns is a view of the file
            tensors: dict[str, Tensor] = {n: file.get_tensor(n).clone() for n in file.keys()}
    except SafetensorError as error:
        raise ArtifactError(f"{path} has no tensors that can be read: {error}") from error
    return cast("dict[str, Any]", metadata), tensors


def sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hexadecimal SHA-256 of names and values, as contiguous bytes whatever the device."""
    sha = hashlib.sha256()
    for name, tensor in named:
        sha.update(name.encode())
        contiguous = tensor.detach().contiguous().cpu()
        sha.update(contiguous.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors with longer names, so that several things fit into one file."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with prefix, without it: the inverse of `prefixed`."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of one storage."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def _header(file: BinaryIO) -> bytes:
    file.seek(0)
    start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < size <= MAX_HEADER_BYTES:
        raise ValueError("no safetensors header")
    return file.read(size)


def _stored_digest(file: BinaryIO) -> tuple[int, bytes]:
    """Where in the file the digest stands, and what it is."""
    header = _header(file)
    start = header.find(MARK) + len(MARK)
    if start < len(MARK):
        raise ValueError("no checksum")
    return 8 + start, header[start : start + len(BLANK)]


def _digest(file: BinaryIO, offset: int) -> bytes:
    """Hexadecimal SHA-256 of the file, with the digest at offset read as zeros."""
    file.seek(0)
    sha = hashlib.sha256(file.read(offset))
    sha.update(BLANK)
    file.seek(len(BLANK), os.SEEK_CUR)
    while chunk := file.read(CHUNK):
        sha.update(chunk)
    return sha.hexdigest().encode()
