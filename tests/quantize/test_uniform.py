"""The uniform quantizer against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.errors import QuantizationError
from weightvid.quantize import UniformParams, dequantize, uniform
from weightvid.quantize.params import MAX_LEVEL, SHIFT_UNITS, round_step

steps = st.floats(1e-3, 1e3).map(round_step)
weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=0),
    elements=st.floats(-1000, 1000, width=32),
)


@given(weights, steps)
def test_error_is_half_a_step_at_most(array: np.ndarray[Any, Any], step: float) -> None:
    levels = uniform.quantize(array, step)
    assert levels.dtype == np.int32
    assert levels.shape == array.shape
    error = np.abs(levels.astype(np.float64) * step - array.astype(np.float64))
    # float32 knows the quotient to 24 bits only.
    allowed = step / 2 + np.abs(array.astype(np.float64)) * 2.0**-22
    assert np.all(error <= allowed)


@given(weights, steps)
def test_levels_survive_a_second_round(array: np.ndarray[Any, Any], step: float) -> None:
    levels = uniform.quantize(array, step)
    again = uniform.quantize(uniform.dequantize(levels, UniformParams(step)), step)
    assert np.array_equal(again, levels)


@given(hnp.arrays(np.int32, (4, 5), elements=st.integers(-MAX_LEVEL, MAX_LEVEL)), steps)
def test_value_is_float32_of_level_times_step(levels: np.ndarray[Any, Any], step: float) -> None:
    found = dequantize(levels, UniformParams(step))
    expected = np.float32(levels) * np.float32(step)
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()


@given(
    hnp.arrays(np.int8, (3, 9), elements=st.integers(-128, 127)),
    steps,
    st.tuples(*[st.integers(-128, 127)] * 3),
)
def test_shifts_move_points_towards_zero(
    levels: np.ndarray[Any, Any], step: float, shifts: tuple[int, int, int]
) -> None:
    params = UniformParams(step, shifts)
    found = dequantize(levels, params)
    unit = np.float32(step / SHIFT_UNITS)
    for level, value in zip(levels.reshape(-1).tolist(), found.reshape(-1), strict=True):
        sign = (level > 0) - (level < 0)
        shift = (0, *shifts)[min(abs(level), 3)]
        assert value == np.float32(level * SHIFT_UNITS - sign * shift) * unit
    wide = dequantize(levels.astype(np.int32), params)
    assert wide.tobytes() == found.tobytes()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_every_level_type_gives_the_same_values(dtype: type) -> None:
    levels = np.arange(-128, 128).astype(dtype)
    for params in (UniformParams(0.1015625), UniformParams(0.1015625, (10, 5, -3))):
        expected = dequantize(levels.astype(np.int32), params)
        assert dequantize(levels, params).tobytes() == expected.tobytes()


def test_ties_go_to_even() -> None:
    found = uniform.quantize(np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32), 1.0)
    assert found.tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, float(MAX_LEVEL) * 2])
def test_what_has_no_level_is_refused(bad: float) -> None:
    with pytest.raises(QuantizationError, match="not finite or lies"):
        uniform.quantize(np.array([0.0, bad], np.float32), 1.0)


def test_overflow_of_the_quotient_is_refused_in_silence() -> None:
    with pytest.raises(QuantizationError):
        uniform.quantize(np.array([1e38], np.float32), 2.0**-20)


def test_largest_level() -> None:
    found = uniform.quantize(np.array([MAX_LEVEL, -MAX_LEVEL], np.float32), 1.0)
    assert found.tolist() == [MAX_LEVEL, -MAX_LEVEL]
    with pytest.raises(QuantizationError):
        uniform.quantize(np.array([MAX_LEVEL + 1], np.float32), 1.0)


def test_scalars_have_levels_too() -> None:
    assert uniform.quantize(np.array(0.6, np.float32), 0.5) == 1
