"""R2 from streamed sums: batches, weights, constants, what is not finite."""

import pytest
import torch

from polylens import InvalidInputError
from polylens.inputs.residuals import ResidualSums


def sums(y, predictions, w=None, size=7):
    found = ResidualSums()
    for i in range(0, len(y), size):
        part = slice(i, i + size)
        found.update(y[part], predictions[:, part], None if w is None else w[part])
    return found


@pytest.fixture
def rows():
    y = 1e4 + torch.randn(50, 3, dtype=torch.float64)
    return y, y + torch.randn(2, 50, 3, dtype=torch.float64) * torch.tensor([1.0, 0.1])[
        :, None, None
    ]


def test_equals_one_minus_residual_over_variance(rows):
    y, predictions = rows
    expected = 1 - (predictions - y).square().sum((1, 2)) / (y - y.mean(0)).square().sum()
    assert sums(y, predictions).r2("it") == pytest.approx(expected.tolist(), rel=1e-9)
    assert sums(y, predictions).last_r2() == pytest.approx(float(expected[-1]), rel=1e-9)


def test_a_weight_is_a_number_of_copies(rows):
    y, predictions = rows
    w = torch.arange(50) % 4
    weighted = sums(y, predictions, w.double())
    copies = sums(y.repeat_interleave(w, 0), predictions.repeat_interleave(w, 1))
    assert weighted.r2("it") == pytest.approx(copies.r2("it"), rel=1e-9)
    torch.testing.assert_close(weighted.mean, copies.mean)
    assert weighted.variance == pytest.approx(copies.variance, rel=1e-9)
    ones = sums(y, predictions, torch.ones(50)).r2("it")
    assert ones == pytest.approx(sums(y, predictions).r2("it"), rel=1e-9)


def test_a_constant_is_reproduced_or_not():
    y = torch.full((10, 2), 3.0)
    found = sums(y, torch.stack([y, y + 1]))
    assert found.constant
    assert found.r2("it") == (1, 0)


def test_few_rows_and_what_is_not_finite(rows):
    y, predictions = rows
    assert sums(y[:1], predictions[:, :1]).r2("it") is None
    broken = predictions.clone()
    broken[1, 3] = torch.nan
    with pytest.raises(InvalidInputError, match="layer 3: its polynomials of degree 1 are not"):
        sums(y, broken).r2("layer 3")
    assert sums(y, broken).last_r2() == float("-inf")
    with pytest.raises(InvalidInputError, match="its outputs"):
        sums(y * torch.inf, predictions).r2("layer 3")
