"""The paper's experiments on small settings, and MNIST's file format."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("digits", "images", "mnist"):
        sys.modules.pop(name, None)


def test_digits_reproduce_the_claims(examples, tmp_path):
    import digits
    from images import Setting, run
    from rich.console import Console

    setting = Setting(hidden=48, epochs=8, activations=("relu", "swiglu"), norms=(0.5, 1.0))
    with (tmp_path / "tables.txt").open("w") as file:
        results = run(digits.load(), setting, tmp_path, Console(file=file, width=150))
    for result in results:
        accuracy, r2 = result.accuracy, result.r2["gaussian"]
        assert accuracy["network"] > 0.8
        assert abs(accuracy["degree 2"] - accuracy["network"]) < 0.02
        assert r2[2] > 0.98
        assert r2[3] > 0.99
        attacks = result.attacks
        assert attacks.success("linear")[1.0] > 5 * attacks.success("random")[1.0]
        assert float(result.transfer.min()) > attacks.success("random")[0.5]
        assert len(list(tmp_path.glob(f"{result.activation}-*.png"))) == 4
    assert "degree 4" in (tmp_path / "tables.txt").read_text()


def test_idx_files(examples, tmp_path):
    import mnist

    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    images = b"\x00\x00\x08\x03" + struct.pack(">3I", 2, 3, 4) + pixels.tobytes()
    (tmp_path / "images").write_bytes(images)
    (tmp_path / "labels.gz").write_bytes(
        gzip.compress(b"\x00\x00\x08\x01" + struct.pack(">I", 2) + b"\x07\x01")
    )
    loaded = mnist.load(*[tmp_path / "images", tmp_path / "labels.gz"] * 2)
    assert loaded.shape == (3, 4)
    assert loaded.train_labels.tolist() == [7, 1]
    np.testing.assert_allclose(loaded.test.numpy(), pixels.reshape(2, 12) / 255, rtol=1e-6)
    (tmp_path / "short").write_bytes(images[:-1])
    with pytest.raises(SystemExit, match="should hold"):
        mnist.read_idx(tmp_path / "short")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SystemExit, match="no idx file"):
        mnist.read_idx(tmp_path / "text")
