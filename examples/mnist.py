"""The paper's experiments on MNIST: hidden width 512, AdamW, 6 epochs.

    python examples/mnist.py --images train-images-idx3-ubyte --labels train-labels-idx1-ubyte \\
        --test-images t10k-images-idx3-ubyte --test-labels t10k-labels-idx1-ubyte

The four files are MNIST's own, gzipped or not.
"""

import argparse
import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from images import Images, Setting, run


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in the idx format: a magic number, the sizes, the bytes."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is no idx file of unsigned bytes: it starts with {data[:4]!r}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    start = 4 + 4 * data[3]
    if len(data) - start != math.prod(shape):
        raise SystemExit(f"{path} should hold {shape} bytes and holds {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def load(images: Path, labels: Path, test_images: Path, test_labels: Path) -> Images:
    """Pixels in 0 ... 1."""
    train, test = (read_idx(path) for path in (images, test_images))

    def pixels(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array.reshape(len(array), -1)).float() / 255

    def classes(path: Path) -> torch.Tensor:
        return torch.tensor(read_idx(path)).long()

    height, width = train.shape[1:]
    return Images(
        pixels(train), classes(labels), pixels(test), classes(test_labels), (height, width)
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--images", "--labels", "--test-images", "--test-labels"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("mnist-figures"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    options = parser.parse_args(arguments)
    images = load(options.images, options.labels, options.test_images, options.test_labels)
    norms = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    setting = Setting(hidden=options.hidden, epochs=options.epochs, norms=norms)
    run(images, setting, options.out)


if __name__ == "__main__":
    main()
