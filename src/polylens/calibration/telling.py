"""What is told while layers are fitted: progress that is gone afterwards, each warning once."""

import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from polylens.checks import Layer, label
from polylens.errors import NumericalWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about notebooks without widgets, which have no bars
    from tqdm.auto import tqdm

# Seconds that something takes before it has a bar.
PATIENCE = 1.0

_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")


def progress(iterable: Any = None, title: str = "", *, show: bool, **options: Any) -> Any:
    """tqdm's bar over an iterable, or of a `total`: of what takes seconds, and gone afterwards.

    On terminals and in notebooks only, not in files that output goes to.
    """
    disable = None if show else True
    return tqdm(iterable, title, disable=disable, leave=False, delay=PATIENCE, **options)


class OfLayer(NumericalWarning):
    """A warning of the fit of one layer, which `told_once` counts.

    Attributes:
        layer: which; where: the same with its path; what: the warning itself.
    """

    def __init__(self, layer: Layer, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.layer, self.where, self.what = layer, where, what


@contextmanager
def told_once() -> Generator[None, None, None]:
    """Warnings of layers that differ in numbers only become one, which names the layers."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OfLayer)
            yield
    finally:
        alike: dict[str, list[OfLayer]] = {}
        for each in caught:
            if isinstance(each.message, OfLayer):
                alike.setdefault(_NUMBER.sub("#", each.message.what), []).append(each.message)
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        for first, *others in alike.values():
            layers = ", ".join(label(other.layer) for other in others)
            plural = "s" if len(others) > 1 else ""
            more = f" (and so layer{plural} {layers})" if others else ""
            warnings.warn(f"{first}{more}", NumericalWarning, stacklevel=5)
