"""The paper's experiments on scikit-learn's digits (8 x 8 pixels), offline and under a minute.

python examples/digits.py [--out figures] [--epochs 100]
"""

import torch
from images import Images, Result, chosen, parser, run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def load(seed: int = 0) -> Images:
    """1,347 training and 450 test images, pixels in 0 ... 1."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels / 16, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    train, test, train_labels, test_labels = (torch.tensor(part) for part in parts)
    return Images(train.float(), train_labels, test.float(), test_labels, (8, 8))


def main(arguments: list[str] | None = None) -> list[Result]:
    options = parser(__doc__, "digits-figures").parse_args(arguments)
    return run(load(), chosen(options, learning_rate=3e-3), options.out)


if __name__ == "__main__":
    main()
