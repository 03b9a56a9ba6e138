"""Rate-aware rounding and centroid shifts of the plain quantizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.errors import QuantizationError
from weightvid.quantize import rdoq, uniform
from weightvid.quantize.params import UniformParams
from weightvid.quantize.rate import TABLE_MAX, RateModel, entropy_bits, sign_coded_bits


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.float32,
        st.integers(0, 60),
        elements=st.floats(-140, 140, width=32, allow_subnormal=False),
    ),
    st.floats(0.2, 8.0),
    st.floats(0.0, 0.5),
)
def test_each_level_is_the_cheapest(scaled: np.ndarray, mean: float, lam: float) -> None:
    model = RateModel.laplacian(mean)
    found = rdoq.round_with_rate(scaled, model, lam)
    every = np.arange(-200, 201)
    cost = (scaled[:, None].astype(float) - every) ** 2 + lam * model.of(every)
    ours = (scaled.astype(float) - found) ** 2 + lam * model.of(found)
    # float32 thresholds: off by an ulp of 128, times the slope.
    assert (ours <= cost.min(axis=1) + 1e-3).all()


def test_histogram_with_gaps() -> None:
    """Empty bins are dear; the levels around them take over, in order."""
    levels = np.repeat([0, 1, 4, 90], [4000, 900, 900, 3])
    model = RateModel.from_levels(levels)
    threshold, best = rdoq.thresholds(model, 0.5)
    assert (np.diff(threshold) > 0).all()
    assert (np.diff(best) > 0).all()
    scaled = np.linspace(-130, 130, 9001, dtype=np.float32)
    found = rdoq.round_with_rate(scaled, model, 0.5)
    every = np.arange(-140, 141)
    cost = (scaled[:, None].astype(float) - every) ** 2 + 0.5 * model.of(every)
    ours = (scaled.astype(float) - found) ** 2 + 0.5 * model.of(found)
    assert (ours <= cost.min(axis=1) + 1e-3).all()


def test_without_price_it_rounds_to_nearest() -> None:
    weights = np.random.default_rng(2).normal(size=5000).astype(np.float32)
    found = rdoq.quantize(weights, 0.01, lam=0.0)
    assert np.abs(found - weights / np.float32(0.01)).max() <= 0.5 + 1e-4
    assert int(np.abs(found).max()) > TABLE_MAX


def test_shifts_match_the_dequantizer() -> None:
    weights = np.random.default_rng(3).laplace(size=40000).astype(np.float32)
    step = 1.0
    levels = rdoq.quantize(weights, step, lam=0.0)
    shifts = rdoq.centroid_shifts(weights, levels, step)
    assert all(shift > 0 for shift in shifts)
    plain = uniform.dequantize(levels, UniformParams(step))
    pulled = uniform.dequantize(levels, UniformParams(step, shifts))
    assert ((weights - pulled) ** 2).sum() < ((weights - plain) ** 2).sum()
    for kind in (1, 2):
        members = np.abs(levels) == kind
        assert abs(np.mean(np.abs(weights[members]) - np.abs(pulled[members]))) < 1 / 400


def test_shifts_of_nothing() -> None:
    assert rdoq.centroid_shifts(np.zeros(0, np.float32), np.zeros(0, np.int32), 1.0) == (0, 0, 0)
    with pytest.raises(QuantizationError, match="weights but"):
        rdoq.centroid_shifts(np.zeros(2, np.float32), np.zeros(3, np.int32), 1.0)


def test_rate_falls_more_than_quality() -> None:
    weights = np.random.default_rng(4).laplace(size=60000).astype(np.float32)
    plain = rdoq.quantize(weights, 1.2, lam=0.0)
    ours = rdoq.quantize(weights, 1.2, lam=0.12)
    saved_db = 6.02 * (entropy_bits(plain) - entropy_bits(ours))
    loss_db = 10 * np.log10(
        ((weights - ours * np.float32(1.2)) ** 2).sum()
        / ((weights - plain * np.float32(1.2)) ** 2).sum()
    )
    assert saved_db > loss_db + 0.2


def test_refusals() -> None:
    with pytest.raises(QuantizationError, match="NaN"):
        rdoq.quantize(np.array([np.nan], np.float32), 0.1)
    with pytest.raises(QuantizationError, match="too small"):
        rdoq.quantize(np.array([1.0], np.float32), 1e-9)
    with pytest.raises(QuantizationError, match="lam"):
        rdoq.quantize(np.array([1.0], np.float32), 0.1, lam=float("nan"))


def test_rate_model_is_a_code() -> None:
    levels = np.random.default_rng(5).integers(-3, 4, 1000)
    model = RateModel.from_levels(levels)
    every = np.arange(-TABLE_MAX, TABLE_MAX + 1)
    assert np.exp2(-model.of(every)).sum() == pytest.approx(1.0, abs=1e-6)
    assert model.of(levels).mean() == pytest.approx(entropy_bits(levels), rel=0.02)
    assert entropy_bits(np.zeros(0, np.int32)) == 0.0
    assert entropy_bits(np.array([-(1 << 22), 1 << 22])) == 1.0


def test_signs_cost_one_bit() -> None:
    levels = np.random.default_rng(6).integers(0, 4, 4000)
    model = RateModel.from_levels(levels)
    assert np.array_equal(model.bits, model.bits[::-1])
    assert model.of(levels).mean() == pytest.approx(sign_coded_bits(levels), rel=0.01)
    assert sign_coded_bits(np.zeros(0, np.int32)) == 0.0
