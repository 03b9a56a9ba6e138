"""Tensors that are kept: mantissas of 1-D floats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.errors import QuantizationError
from weightvid.exact import exact_elements, round_mantissa, rounds_mantissas
from weightvid.loader import TensorSpec


@given(hnp.arrays(np.float32, 9), st.integers(1, 23))
def test_mantissas(values: np.ndarray, bits: int) -> None:
    found = round_mantissa(values, bits)
    finite = np.isfinite(values)
    assert found[~finite].tobytes() == values[~finite].tobytes()
    assert np.isfinite(found[finite]).all()
    normal = finite & (np.abs(values) >= 2.0**-126) & (np.abs(values) < 2.0**126)
    wide, exact = found[normal].astype(np.float64), values[normal].astype(np.float64)
    assert (np.abs(wide - exact) <= 2.0 ** -(bits + 1) * np.abs(exact)).all()
    kept = found[normal].view(np.uint32) & np.uint32((1 << (23 - bits)) - 1)
    assert not kept.any()
    assert np.array_equal(round_mantissa(found, bits), found, equal_nan=True)


def test_ties_go_to_even() -> None:
    values = np.array([1 + 2.0**-9, 1 + 3 * 2.0**-9, -1 - 2.0**-9], np.float32)
    assert round_mantissa(values, 8).tolist() == [1.0, 1 + 2.0**-7, -1.0]
    for bits in (0, 24):
        with pytest.raises(QuantizationError, match=r"1\.\.23"):
            round_mantissa(values, bits)


@pytest.mark.parametrize(
    ("dtype", "shape", "rounded"),
    [("F32", (9,), True), ("F32", (1, 9, 1), True), ("F32", (), True), ("F32", (0,), False),
     ("F32", (3, 3), False), ("F16", (9,), False), ("I32", (9,), False)],
)  # fmt: skip
def test_what_is_rounded(dtype: str, shape: tuple[int, ...], rounded: bool) -> None:
    spec = TensorSpec("w", dtype, shape)
    assert rounds_mantissas(spec) == rounded
    values = np.full(shape, 1 / 3, np.float32) if dtype == "F32" else np.ones(shape, np.int32)
    changed = not np.array_equal(exact_elements(values, spec, 8), values)
    assert changed == rounded
    assert exact_elements(values, spec, 23) is values
