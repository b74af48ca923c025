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
    for name in ("digits", "images", "interactions", "mnist"):
        sys.modules.pop(name, None)


def test_digits_reproduce_the_claims(examples, tmp_path):
    import digits
    from images import Setting, run
    from rich.console import Console

    setting = Setting(hidden=48, epochs=8, activations=("relu",), norms=(0.5, 1.0))
    with (tmp_path / "tables.txt").open("w") as file:
        (result,) = run(digits.load(), setting, tmp_path, Console(file=file, width=150))
    assert result.accuracy > 0.8
    for name in ("gaussian", "class mixture", "sampled"):
        assert abs(result.accuracies[name][2] - result.accuracy) < 0.02
        assert result.r2[name][2] > 0.98
        assert result.r2[name][3] > 0.99
    attacks = result.attacks
    assert attacks.success("linear")[1.0] > 5 * attacks.success("random")[1.0]
    assert float(result.transfer.min()) > attacks.success("random")[0.5]
    assert len(list(tmp_path.glob("relu-*.png"))) == 4
    assert "deg 4" in (tmp_path / "tables.txt").read_text()


def write_idx(path, array):
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.more
def test_mnist_script_on_idx_files(examples, tmp_path, monkeypatch):
    """The script end to end, on digits blown up to MNIST's 28 x 28."""
    import mnist
    from sklearn.datasets import load_digits

    small = load_digits().images
    pixels = np.zeros((len(small), 28, 28), np.uint8)
    pixels[:, 2:26, 2:26] = small.repeat(3, 1).repeat(3, 2) * (255 / 16)
    labels = load_digits().target.astype(np.uint8)
    files = {
        "--images": write_idx(tmp_path / "a.gz", pixels[:1500]),
        "--labels": write_idx(tmp_path / "b.gz", labels[:1500]),
        "--test-images": write_idx(tmp_path / "c", pixels[1500:]),
        "--test-labels": write_idx(tmp_path / "d", labels[1500:]),
    }
    given = [part for pair in files.items() for part in pair]
    tiny = ["--hidden", "24", "--epochs", "6", "--degree", "3", "--out", str(tmp_path / "out")]
    (result,) = mnist.main([*given, *tiny, "--activations", "swiglu", "--gate-bias", "1"])
    linear = result.trace.series(0)[:, 1]
    assert result.accuracy > 0.75
    assert abs(result.accuracies["gaussian"][2] - result.accuracy) < 0.03
    assert float(linear.max()) > float(linear[0])
    assert result.r2["gaussian"][3] > result.r2["gaussian"][1]
    assert len(list((tmp_path / "out").glob("swiglu-*.png"))) == 4
    assert float(result.network.gate.bias.detach().mean()) > 0.5
    # The loader gives what the files give.
    both = pixels.reshape(len(pixels), -1)
    order = np.r_[np.resize(np.arange(1500), 60_000), 1500 + np.resize(np.arange(297), 10_000)]
    monkeypatch.setattr(
        "sklearn.datasets.fetch_openml",
        lambda name, **_: (both[order], labels[order].astype(str)),
    )
    downloaded, loaded = mnist.download(), mnist.load(*map(Path, files.values()))
    assert (downloaded.train[:1500] == loaded.train).all()
    assert (downloaded.test_labels[:297] == loaded.test_labels).all()
    with pytest.raises(SystemExit):
        mnist.main(given[:4])
    swapped = [*given[:2], "--labels", files["--test-labels"], *given[4:]]
    with pytest.raises(SystemExit, match="one label for each"):
        mnist.main(swapped)
    with pytest.raises(SystemExit, match="cannot be read"):
        mnist.main([*given[:7], str(tmp_path / "missing")])


def test_interactions_script(examples, tmp_path):
    """The quadratic form says something about the true MLP, and about the whole model."""
    import interactions

    out = tmp_path / "figure.png"
    arguments = ["--layers", "0", "2", "3", "--sequences", "3", "--positions", "30", "90"]
    rows = interactions.main([*arguments, "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["R² degree 2"] > 0.75
        assert row["r"] > 0.5
        assert row["same sign, top 1%"] > 0.75
    # behind the last layer there is only the final norm
    last = rows[-1]
    assert last["strongest"]["r"] > 0.7
    assert last["strongest"]["same sign"] > 0.85
    assert last["strongest"]["size"] > 5 * last["random"]["size"]


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
