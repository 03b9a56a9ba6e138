"""Rounding: to the nearest, and with errors that cancel in the mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_models import weights

from weightvid.errors import QuantizationError
from weightvid.levels.rounding import MEAN_COUPLING, balanced, uniform
from weightvid.loader import MAX_LEVEL


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=st.floats(-MAX_LEVEL, MAX_LEVEL, width=32),
    )
)
def test_levels_are_the_nearest_integers(scaled: np.ndarray) -> None:
    levels = uniform(scaled)
    assert levels.dtype == np.int32
    assert levels.shape == scaled.shape
    exact = scaled.astype(np.float64)
    assert (np.abs(exact - levels) <= 0.5).all()
    ties = np.abs(exact - levels) == 0.5
    assert not (levels[ties] & 1).any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        uniform(np.array([1.0, wrong, -2.0], np.float32))


@pytest.mark.parametrize("sign", [1, -1])
def test_levels_end_at_two_to_the_22(sign: int) -> None:
    assert uniform(np.array([sign * MAX_LEVEL], np.float32)) == sign * MAX_LEVEL
    with pytest.raises(QuantizationError, match="4194304 are allowed"):
        uniform(np.array([sign * (MAX_LEVEL + 1.0)], np.float32))


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


def test_of_one_channel_it_is_rounding() -> None:
    matrix = weights(1, 8, 30, scale=3)
    assert np.array_equal(balanced(matrix, 1), uniform(matrix))
    with pytest.raises(QuantizationError):
        balanced(np.full((2, 4), np.nan, np.float32), 4)
