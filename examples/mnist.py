"""The paper's experiments on MNIST: hidden width 512, AdamW, 6 epochs.

    python examples/mnist.py --images train-images-idx3-ubyte --labels train-labels-idx1-ubyte \\
        --test-images t10k-images-idx3-ubyte --test-labels t10k-labels-idx1-ubyte

The four files are MNIST's own, gzipped or not; without them scikit-learn downloads the same.
"""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from images import Images, Result, chosen, parser, run

FILES = ("images", "labels", "test-images", "test-labels")
NORMS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in the idx format: a magic number, the sizes, the bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}") from error
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

    for name, array, marks in (("training", train, labels), ("test", test, test_labels)):
        if array.ndim != 3 or read_idx(marks).shape != array.shape[:1]:
            raise SystemExit(f"the {name} files do not hold images and one label for each")
    height, width = train.shape[1:]
    return Images(
        pixels(train), classes(labels), pixels(test), classes(test_labels), (height, width)
    )


def download() -> Images:
    """The same 60,000 and 10,000 images by scikit-learn's loader of OpenML (kept on disk)."""
    from sklearn.datasets import fetch_openml

    pixels, labels = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
    x, y = torch.tensor(pixels).float() / 255, torch.tensor(labels.astype(int))
    return Images(x[:60_000], y[:60_000], x[60_000:], y[60_000:], (28, 28))


def main(arguments: list[str] | None = None) -> list[Result]:
    options = parser(__doc__, "mnist-figures", epochs=6, hidden=512, batch=200)
    for name in FILES:
        options.add_argument(f"--{name}", type=Path)
    values = options.parse_args(arguments)
    paths = [getattr(values, name.replace("-", "_")) for name in FILES]
    if any(paths) and not all(paths):
        options.error(f"give all of --{', --'.join(FILES)}, or none to download them")
    images = load(*paths) if any(paths) else download()
    return run(images, chosen(values, norms=NORMS), values.out)


if __name__ == "__main__":
    main()
