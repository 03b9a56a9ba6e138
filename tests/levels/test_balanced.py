"""Rounding whose errors cancel in the mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import weights

from weightvid.errors import QuantizationError
from weightvid.levels.balanced import MEAN_COUPLING, balanced
from weightvid.levels.uniform import uniform


def cost(matrix: np.ndarray, levels: np.ndarray, channels: int) -> np.ndarray:
    """``e' (I + b J) e`` of each row."""
    error = matrix.astype(np.float64) - levels
    return np.square(error).sum(axis=1) + MEAN_COUPLING * error[:, :channels].sum(axis=1) ** 2


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
def test_never_dearer_than_rounding(rows: int, channels: int, kernel: int, seed: int) -> None:
    matrix = weights(seed, rows, channels * kernel, scale=3)
    levels, plain = balanced(matrix, channels), uniform(matrix)
    assert levels.dtype == np.int32
    assert (cost(matrix, levels, channels) <= cost(matrix, plain, channels) + 1e-4).all()
    assert np.array_equal(levels[:, channels:], plain[:, channels:])
    assert np.abs(levels - matrix).max() < 1.5


def test_sums_of_errors_nearly_vanish() -> None:
    matrix = weights(1, 64, 256, scale=3)
    before, after = (
        np.abs((matrix - levels).sum(axis=1)).mean()
        for levels in (uniform(matrix), balanced(matrix, 256))
    )
    assert after < 0.5 * before


def test_without_coupling_it_is_rounding() -> None:
    matrix = weights(1, 8, 30, scale=3)
    assert np.array_equal(balanced(matrix, 30, 0.0), uniform(matrix))
    assert np.array_equal(balanced(matrix, 1), uniform(matrix))
    with pytest.raises(QuantizationError):
        balanced(np.full((2, 4), np.nan, np.float32), 4)
