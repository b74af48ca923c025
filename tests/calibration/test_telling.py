"""What is told while layers are fitted."""

import warnings

import pytest

from polylens.calibration.telling import OfLayer, told_once
from polylens.errors import NumericalWarning


def warn(*messages, error=None):
    with told_once():
        for message in messages:
            warnings.warn(message, stacklevel=1)
        if error is not None:
            raise error


def test_thirty_layers_that_are_alike_are_one_warning():
    alike = [OfLayer(n, f"layer {n} (mlp)", f"ridge of {n}e-9 added") for n in range(30)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(*alike, OfLayer(3, "layer 3 (mlp)", "something else"), "of somebody else")
    said = [str(each.message) for each in caught]
    assert len(said) == 3
    assert said[0] == "of somebody else"
    assert said[1].startswith("layer 0 (mlp): ridge of 0e-9 added (and so layers 1, 2, 3")
    assert said[2] == "layer 3 (mlp): something else"
    assert [each.category for each in caught] == [UserWarning, NumericalWarning, NumericalWarning]


def test_warnings_before_an_error_are_told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="no"):
            warn(OfLayer(1, "layer 1", "degenerate"), error=ValueError("no"))
    assert [str(each.message) for each in caught] == ["layer 1: degenerate"]
