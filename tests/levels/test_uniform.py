"""The uniform quantizer and its range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.errors import QuantizationError
from weightvid.levels.uniform import uniform
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
