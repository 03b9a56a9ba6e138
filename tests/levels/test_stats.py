"""Statistics of tensors: plain ones as numpy has them, robust ones where outliers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_models import weights

from weightvid.levels.stats import TensorStats, outlier_mask, tensor_stats
from weightvid.loader import TensorSpec, from_float32

Array = np.ndarray[Any, Any]


def stats_of(values: Array, dtype: str = "F32", rows: int = 1 << 20) -> TensorStats:
    spec = TensorSpec("w", dtype, values.shape)
    stored = from_float32(values.astype(np.float32), dtype)
    flat = stored.reshape(len(values), -1)
    return tensor_stats(spec, (flat[at : at + rows] for at in range(0, len(flat), rows)))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_plain_weights_have_plain_scales(dtype: str, rows: int) -> None:
    values = weights(1, 64, 200)
    found = stats_of(values, dtype, rows)
    expected = np.sqrt(np.square(values.astype(np.float64)).mean(axis=1))
    np.testing.assert_allclose(found.row_scales, expected, rtol=1e-2 if dtype == "BF16" else 1e-3)
    assert found.sigma == pytest.approx(np.sqrt((expected**2).mean()), rel=1e-2)
    assert found.absmax == pytest.approx(np.abs(values).max(), rel=1e-2)
    assert (found.finite, found.outliers) == (True, 0)


@pytest.mark.parametrize("outlier", [100.0, -1e5, 2e19, 3e38])
def test_an_outlier_leaves_the_scales(outlier: float) -> None:
    values = weights(1, 128, 128)
    before = stats_of(values)
    values[3, 5] = outlier
    found = stats_of(values)
    np.testing.assert_allclose(found.row_scales, before.row_scales, rtol=0.1)
    assert found.sigma == pytest.approx(before.sigma, rel=0.01)
    assert found.absmax == abs(np.float32(outlier))
    assert found.outliers == 1
    mask = outlier_mask(values, found.row_scales)
    assert np.argwhere(mask).tolist() == [[3, 5]]


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20),
               elements=st.floats(-(2.0**100), 2.0**100, width=32)),
)  # fmt: skip
def test_any_numbers(values: Array) -> None:
    found = stats_of(values)
    assert found.finite
    assert found.row_scales.shape == (found.view.rows,)
    assert found.absmax == np.abs(values).max()
    matrix = values.reshape(found.view.rows, -1)
    assert (found.row_scales <= 1.0001 * np.abs(matrix).max(axis=1)).all()
    assert found.outliers == np.count_nonzero(outlier_mask(matrix, found.row_scales))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    values = weights(1, 32, 40)
    found, plain = stats_of(values * np.float32(scale)), stats_of(values)
    np.testing.assert_allclose(found.row_scales, plain.row_scales * np.float32(scale), rtol=1e-5)
    assert found.sigma == pytest.approx(plain.sigma * scale, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad: float) -> None:
    values = weights(1, 16, 16)
    values[1, 1] = bad
    assert not stats_of(values).finite
    wide = np.full((16, 16), 1e300)
    assert not tensor_stats(TensorSpec("w", "F64", wide.shape), [wide]).finite


def test_zeros_and_sparse_rows() -> None:
    assert stats_of(np.zeros((8, 8))).sigma == 0
    values = np.zeros((4, 400))
    values[1, 7], values[2, ::50] = 1.0, 1.0
    found = stats_of(values)
    assert found.row_scales[[0, 3]].tolist() == [0, 0]
    assert found.typical_scale > 0
    # One weight in an empty row is a weight and no outlier: it is not worth 48 scales.
    assert found.outliers == 0
