"""Statistics of tensors, against numpy's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.dtypes import from_float32, to_float32
from weightvid.quantize import stats
from weightvid.quantize.stats import tensor_stats
from weightvid.spec import TensorSpec


def of(array: np.ndarray[Any, Any], dtype: str = "F32") -> stats.TensorStats:
    return tensor_stats(array, TensorSpec("w", dtype, array.shape))


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_matches_numpy(array: np.ndarray[Any, Any]) -> None:
    found = of(array)
    assert found.finite
    wide = array.astype(np.float64)
    peak = float(np.abs(wide).max(initial=0.0))
    assert found.absmax == peak
    if wide.size:
        assert found.sigma == pytest.approx(float(wide.std()), rel=1e-6, abs=1e-6 * peak)
        assert found.rms == pytest.approx(float(np.sqrt((wide**2).mean())), rel=1e-9)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_packable_dtype(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    stored = from_float32(values, dtype)
    found = of(stored, dtype)
    assert found.finite
    assert found.sigma == pytest.approx(float(to_float32(stored, dtype).std()), rel=1e-5)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    whole = of(array)
    monkeypatch.setattr(stats, "BLOCK", 7)
    cut = of(array)
    assert cut.sigma == pytest.approx(whole.sigma, rel=1e-12)
    assert cut.absmax == whole.absmax


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad: float) -> None:
    array = np.zeros((3, 3), np.float32)
    array[1, 1] = bad
    assert not of(array).finite


def test_beyond_float32_is_not_finite() -> None:
    assert not of(np.array([[1e300, 0.0]]), "F64").finite


def test_constant_tensor_has_no_spread() -> None:
    assert of(np.full((64, 64), 3.0, np.float32)).sigma == 0


def test_other_types_have_no_statistics() -> None:
    found = of(np.arange(5), "I64")
    assert (found.sigma, found.absmax, found.finite) == (0.0, 0.0, False)
