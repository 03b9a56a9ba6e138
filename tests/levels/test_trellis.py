"""The trellis encoder: optimal, the same in any batches, and worth its while."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.errors import QuantizationError
from weightvid.levels import trellis as module
from weightvid.levels.rounding import uniform
from weightvid.levels.trellis import (
    TABLE_MAX,
    entropy_bits,
    fit_bits,
    histogram_bits,
    laplacian_bits,
    next_state,
    sample_of,
    second_quantizer,
    sign_coded_bits,
    spread,
    trellis,
)
from weightvid.loader import MAX_LEVEL, trellis_index


def values_of(levels: np.ndarray) -> np.ndarray:
    return trellis_index(levels) / 4


@pytest.mark.parametrize("lam", [0.0, 0.09, 0.4])
def test_no_sequence_is_cheaper(lam: float) -> None:
    bits = laplacian_bits(0.8)

    def costs(run: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Cost of many candidate rows of levels, straight from the definition."""
        found = np.zeros(len(levels))
        for row, candidate in enumerate(levels.tolist()):
            state = 0
            for weight, level in zip(run.tolist(), candidate, strict=True):
                found[row] += (weight - level - 0.5 * second_quantizer(state)) ** 2
                state = next_state(state, level & 1)
        return found + lam * bits[levels + TABLE_MAX].sum(axis=1)

    every = np.array(list(itertools.product(range(-2, 3), repeat=5)))
    rng = np.random.default_rng(5)
    # The search sees weights at multiples of 1/64.
    for run in (np.rint(rng.normal(0, 0.8, (6, 5)) * 64) / 64).astype(np.float32):
        found = trellis(run[None], lam, bits)
        assert costs(run, found)[0] <= costs(run, every).min() + 1e-5


def test_finer_weights_lose_next_to_nothing() -> None:
    scaled = np.random.default_rng(1).normal(0, 1.5, (64, 200)).astype(np.float32)
    bits = laplacian_bits(1.2)

    def cost(weights: np.ndarray) -> float:
        levels = trellis(weights, 0.11, bits)
        error = np.square(scaled - values_of(levels)).sum()
        return float(error + 0.11 * bits[levels + TABLE_MAX].sum())

    # A thousandth of a step either way changes cells, but not what the result is worth.
    assert cost(scaled) == pytest.approx(cost(scaled + np.float32(1e-3)), rel=1e-3)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(0, 5), st.integers(0, 30)), elements=st.integers(-128, 127)
    )
)
def test_codeable_values_are_found(levels: np.ndarray) -> None:
    """Without a price for bits, weights that some levels hit exactly come back exactly."""
    values = values_of(levels).astype(np.float32)
    found = trellis(values, lam=0.0)
    assert found.shape == levels.shape
    assert np.array_equal(values_of(found), values)


def matrices() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = [(16, 27), (5, 144), (70, 90), (3, 1), (0, 4), (4, 0), (130, 100), (2, 1500)]
    found = [rng.laplace(size=shape) for shape in shapes]
    spiky = rng.normal(size=(9, 140))
    spiky[2, 5], spiky[8, 139], spiky[0, 0] = 900.0, -333.0, 130.0
    sparse = np.where(rng.random((40, 60)) < 0.8, 0.0, rng.normal(size=(40, 60)))
    found += [spiky, sparse, np.zeros((3, 8)), 1e-20 * rng.normal(size=(2, 6))]
    return [matrix.astype(np.float32) for matrix in found]


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [trellis(matrix) for matrix in matrices()]
    monkeypatch.setattr(module, "_LANES", 7)
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 32)
    for matrix, one in zip(matrices(), whole, strict=True):
        assert one.dtype == np.int32
        assert np.array_equal(one, trellis(matrix))


def test_tables_of_a_few_weights_are_parts_of_whole_ones() -> None:
    weights = (np.random.default_rng(3).standard_normal((9, 30)) * 50).astype(np.float32)
    weights[4, 5:7] = 500, -3000  # beyond the tables
    bits, many = laplacian_bits(2.0), np.tile(weights, (80, 1))
    few = trellis(weights, bits=bits)
    assert np.array_equal(trellis(many, bits=bits), np.tile(few, (80, 1)))


def test_blocks_of_rows_change_nothing() -> None:
    matrix = np.random.default_rng(3).laplace(0, 2, (300, 120)).astype(np.float32)
    matrix[7, 7] = 500.0
    bits = fit_bits(sample_of(matrix))
    blocks = [trellis(block, bits=bits) for block in np.split(matrix, [1, 8, 150])]
    assert np.array_equal(np.concatenate(blocks), trellis(matrix))


def test_samples_are_out_of_step_with_the_matrix() -> None:
    """Rows of zeros at any period neither fill the sample nor miss it."""
    for period in range(2, 33):
        matrix = np.ones((2048, 128), np.float32)
        matrix[::period] = 0.0
        sample = sample_of(matrix)
        assert 12_000 < sample.size <= 1 << 14
        assert sample.mean() == pytest.approx(1 - 1 / period, abs=0.1)
    assert sample_of(np.zeros((3, 1 << 20), np.float32)).shape == (16, 1024)
    assert (np.diff(spread(1000, 100)) > 0).all()


@pytest.mark.parametrize("weights", [np.zeros((5, 40)), np.full((5, 40), 0.04)])
def test_rows_far_below_the_step_are_zeros(weights: np.ndarray) -> None:
    mixed = np.random.default_rng(0).normal(size=(25, 40)).astype(np.float32)
    mixed[10:15] = weights
    assert not trellis(mixed)[10:15].any()
    assert not values_of(trellis(mixed))[10:15].any()


def test_outliers_keep_their_value() -> None:
    scaled = np.random.default_rng(2).normal(size=(3, 60)).astype(np.float32)
    expected = trellis(scaled)
    scaled[0, 3], scaled[1, 0], scaled[2, 59] = MAX_LEVEL - 2, -5000.25, 127.6
    found = trellis(scaled)
    error = values_of(found) - scaled
    assert np.abs(error[[0, 1, 2], [3, 0, 59]]).max() <= 1.0
    assert np.square(error).mean() < 0.2
    assert np.abs(found).max() <= MAX_LEVEL
    assert (found != expected).mean() < 0.2


@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_gain_over_plain_rounding(draw: str) -> None:
    """At equal entropy near 3 bits: 0.7 dB of SQNR or more over rounding to nearest."""
    weights = getattr(np.random.default_rng(4), draw)(size=(256, 384)).astype(np.float32)
    weights /= weights.std()

    def point(step: float, quantizer: str) -> tuple[float, float]:
        scaled = weights / np.float32(step)
        levels = trellis(scaled) if quantizer == "trellis" else uniform(scaled)
        values = values_of(levels) if quantizer == "trellis" else levels
        error = np.square(scaled - values).mean() * step**2
        return sign_coded_bits(levels), -10 * np.log10(error)

    plain = [point(step, "uniform") for step in (0.6, 0.5, 0.4, 0.3, 0.2)]
    bits, decibels = point(0.45, "trellis")
    assert 2.6 < bits < 3.4
    assert decibels - np.interp(bits, *zip(*plain, strict=True)) > 0.7


def test_rate_models() -> None:
    levels = np.random.default_rng(0).geometric(0.4, 50_000) * 3 - 4
    bits = histogram_bits(levels)
    assert bits == pytest.approx(bits[::-1])
    assert np.exp2(-bits).sum() == pytest.approx(1, abs=0.01)
    symmetric = np.concatenate([levels, -levels])
    assert bits[symmetric + TABLE_MAX].mean() == pytest.approx(entropy_bits(symmetric), rel=0.02)
    assert np.isfinite(histogram_bits(np.zeros(0, np.int32))).all()


def test_refusals() -> None:
    good = np.ones((2, 3), np.float32)
    for wrong in (np.nan, np.inf, MAX_LEVEL):
        bad = good.copy()
        bad[1, 1] = wrong
        with pytest.raises(QuantizationError):
            trellis(bad)
    with pytest.raises(QuantizationError, match="1-dimensional"):
        trellis(good[0])
    for lam in (-0.1, np.nan, np.inf):
        with pytest.raises(QuantizationError, match="lam"):
            trellis(good, lam)
