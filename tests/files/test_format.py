"""The file format: the identity, bit for bit, or an error that says why."""

import json
import os

import pytest
import torch

from polylens import ArtifactError, PolylensError
from polylens.files import format as storage

METADATA = {"name": 'ünïcode "quotes" {}', "numbers": [1, 0.1, 1e-300, -(2**53)], "none": None}


def tensors():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    whole[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return {
        "float64": whole,
        "transposed": whole.T,
        "row of the same storage": whole[1],
        "float32": whole.float(),
        "bfloat16": whole.bfloat16(),
        "float16": whole.half(),
        "int64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(3, 0),
    }


def identical(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        )
    )


@pytest.fixture
def path(tmp_path):
    storage.write(tmp_path / "x.safetensors", "thing", METADATA, tensors())
    return tmp_path / "x.safetensors"


def test_what_is_written_is_read_bit_for_bit(path):
    metadata, read = storage.read(path, "thing")
    assert metadata == METADATA
    assert read.keys() == tensors().keys()
    assert all(identical(read[name], tensor) for name, tensor in tensors().items())


def test_nothing_but_the_file_is_left_and_its_bytes_repeat(path):
    before = path.read_bytes()
    storage.write(path, "thing", METADATA, tensors())
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_is_read_does_not_change_with_the_file(path):
    _, read = storage.read(path, "thing")
    path.write_bytes(bytes(path.stat().st_size))
    assert identical(read["float64"], tensors()["float64"])


def test_a_part_of_a_larger_storage_is_stored_alone(tmp_path):
    whole = torch.arange(10_000.0)
    storage.write(tmp_path / "x", "part", {}, {"part": whole[3:7]})
    assert identical(storage.read(tmp_path / "x", "part")[1]["part"], whole[3:7])
    assert (tmp_path / "x").stat().st_size < 1000


def test_no_tensors_and_no_metadata(tmp_path):
    storage.write(tmp_path / "x", "nothing", {}, {})
    assert storage.read(tmp_path / "x", "nothing") == ({}, {})


def test_every_damaged_byte_is_refused(path):
    """Every byte of the header's start, digest and end, and a sample of all others."""
    good = path.read_bytes()
    places = {*range(160), *range(len(good) - 40, len(good)), *range(0, len(good), 3)}
    assert len(places) > 500
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            storage.read(path, "thing")
    path.write_bytes(good)
    storage.read(path, "thing")


def test_truncation_and_appended_bytes_are_refused(path):
    good = path.read_bytes()
    for size in {*range(0, len(good), 7), len(good) - 1}:
        path.write_bytes(good[:size])
        with pytest.raises(ArtifactError, match=r"damaged|cut short"):
            storage.read(path, "thing")
    path.write_bytes(good + b"\0")
    with pytest.raises(ArtifactError, match="damaged"):
        storage.read(path, "thing")


def test_another_kind_a_later_format_and_other_files_are_refused(path, tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="holds a thing, not a lens"):
        storage.read(path, "lens")
    monkeypatch.setattr(storage, "SCHEMA", storage.SCHEMA + 1)
    storage.write(path, "thing", METADATA, tensors())
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="is of format 2, this polylens reads up to 1"):
        storage.read(path, "thing")
    other = tmp_path / "other"
    for contents in (b"", b"text", json.dumps({"a": 1}).encode() * 100, b"\x80\x04K\x01."):
        other.write_bytes(contents)
        with pytest.raises(ArtifactError, match="not a file that polylens saved"):
            storage.read(other, "thing")
    with pytest.raises(FileNotFoundError):
        storage.read(tmp_path / "missing", "thing")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x", metadata={"polylens": "{}"})
    with pytest.raises(ArtifactError, match="not a file that polylens saved"):
        storage.read(tmp_path / "x", "thing")


@pytest.mark.parametrize("bad", [float("nan"), torch.ones(1), {1, 2}, object(), (1,), {1: 2}])
def test_metadata_that_json_cannot_hold_is_refused_and_the_old_file_stays(path, bad):
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="cannot save a thing: its metadata"):
        storage.write(path, "thing", {"bad": bad}, {})
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_no_other(path, monkeypatch):
    before = path.read_bytes()

    def broken(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        storage.write(path, "thing", {}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        storage.write(path.parent / "no" / "such", "thing", {}, {})


def test_a_link_stays_a_link(path):
    link = path.with_name("link")
    link.symlink_to(path)
    storage.write(link, "thing", {"new": 1}, {})
    assert link.is_symlink()
    assert storage.read(path, "thing") == ({"new": 1}, {})


def test_prefixes_are_inverse():
    several = {**storage.prefixed(tensors(), "0."), **storage.prefixed(tensors(), "10.")}
    assert storage.within(several, "10.").keys() == tensors().keys()
    assert issubclass(ArtifactError, PolylensError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device, pipe or socket"):
        storage.write(tmp_path / "pipe", "thing", METADATA, tensors())
    assert [each.is_fifo() for each in tmp_path.iterdir()] == [True]
