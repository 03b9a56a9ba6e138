"""The trellis encoder: optimal, the same on both backends, and worth its while."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.errors import QuantizationError
from weightvid.quantize import rdoq, trellis_search, trellis_viterbi
from weightvid.quantize.params import MAX_LEVEL, TRELLIS_STATES
from weightvid.quantize.rate import RateModel, entropy_bits
from weightvid.quantize.trellis import dequantize_index, dequantize_index_reference
from weightvid.quantize.trellis_search import TrellisConfig, TrellisJob, quantize, quantize_many


@pytest.mark.parametrize("states", TRELLIS_STATES)
@pytest.mark.parametrize("lam", [0.0, 0.09, 0.4])
@pytest.mark.parametrize("zero", [False, True])
def test_no_sequence_is_cheaper(states: int, lam: float, zero: bool) -> None:
    config = TrellisConfig(states=states, lam=lam)
    model = RateModel.laplacian(0.8)

    def costs(run: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """What the encoder minimises, for step 1/2 and many candidate rows of levels."""
        values = dequantize_index_reference(levels, states, 1, zero) * 0.5
        return ((run - values) ** 2).sum(axis=1) + 4.0 * lam * model.of(levels).sum(axis=1)

    every = np.array(list(itertools.product(range(-2, 3), repeat=5)))
    for run in np.random.default_rng(states).normal(0, 1.6, (12, 5)).astype(np.float32):
        found = quantize(run[None], 0.5, config, model, zero)
        # Costs are looked up by cells of 1/32, so a level may be off by a hair at a threshold.
        assert costs(run, found)[0] <= costs(run, every).min() + 0.02


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(0, 5), st.integers(0, 30)), elements=st.integers(-90, 90)
    ),
    st.sampled_from(TRELLIS_STATES),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_codeable_values_are_found(levels: np.ndarray, states: int, axis: int, zero: bool) -> None:
    """Without a price for bits, weights that some levels hit exactly come back exactly."""
    step = np.float32(0.37)
    values = dequantize_index(levels, states, axis, zero).astype(np.float32) * step
    config = TrellisConfig(states=states, lam=0.0, axis=axis)
    found = quantize(values, float(step), config, zero=zero)
    assert found.shape == levels.shape
    back = dequantize_index(found, states, axis, zero).astype(np.float32) * step
    assert np.array_equal(back, values)


def _jobs() -> list[TrellisJob]:
    rng = np.random.default_rng(7)
    jobs = []
    for shape in [(16, 27), (5, 144), (70, 90), (3, 1), (0, 4), (4, 0), (130, 100)]:
        weights = rng.laplace(size=shape).astype(np.float32)
        jobs.append(TrellisJob(weights, 0.2))
    spiky = rng.normal(size=(9, 140)).astype(np.float32)
    spiky[2, 5], spiky[8, 139], spiky[0, 0] = 900.0, -333.0, 130.0
    jobs.append(TrellisJob(spiky, 0.25, None, RateModel.laplacian(1.1)))
    sparse = np.where(rng.random((40, 60)) < 0.8, 0.0, rng.normal(size=(40, 60)))
    jobs.append(TrellisJob(sparse.astype(np.float32), 0.1))
    jobs.append(TrellisJob(np.zeros((3, 8), np.float32), 0.1, True))
    return jobs


@pytest.mark.parametrize("states", [4, 8, 64])
def test_company_changes_nothing(states: int) -> None:
    config = TrellisConfig(states=states)
    together = quantize_many(_jobs(), config)
    for job, found in zip(_jobs(), together, strict=True):
        alone = quantize(job.weights, job.step, config, job.rate_model, found.zero)
        assert np.array_equal(found.levels, alone)


def test_numbering_is_chosen() -> None:
    found = quantize_many(_jobs())
    assert not found[2].zero
    assert found[-2].zero
    assert found[-1].zero
    assert not found[-1].levels.any()


def test_blocks_of_lanes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_many(_jobs())
    monkeypatch.setattr(trellis_search, "_LANES", 7)
    monkeypatch.setattr(trellis_search, "_DECISION_BYTES", 1)
    monkeypatch.setattr(trellis_viterbi, "_CHUNK_WEIGHTS", 32)
    monkeypatch.setattr(trellis_search, "_MIN_LANES", 1)
    for one, other in zip(whole, quantize_many(_jobs()), strict=True):
        assert one.zero == other.zero
        assert np.array_equal(one.levels, other.levels)


@pytest.mark.parametrize("states", [4, 8, 32])
def test_torch_gives_the_same_levels(states: int) -> None:
    pytest.importorskip("torch")
    config = TrellisConfig(states=states)
    for one, other in zip(
        quantize_many(_jobs(), config, "numpy"),
        quantize_many(_jobs(), config, "torch"),
        strict=True,
    ):
        assert one.zero == other.zero
        assert np.array_equal(one.levels, other.levels)


def test_outliers_keep_their_value() -> None:
    weights = np.zeros((2, 6), np.float32)
    weights[0, 3], weights[1, 0] = 4.0e6, -5000.0
    index = dequantize_index(quantize(weights, 0.5), 8)
    assert abs(index[0, 3] * 0.5 - 4.0e6) <= 3.0
    assert abs(index[1, 0] * 0.5 + 5000.0) <= 3.0


def test_axis_is_a_transposition() -> None:
    weights = np.random.default_rng(1).normal(size=(30, 50)).astype(np.float32)
    rows = quantize(weights.T.copy(), 0.1, TrellisConfig(axis=1))
    assert np.array_equal(quantize(weights, 0.1, TrellisConfig(axis=0)), rows.T)


def _sqnr_db(weights: np.ndarray, values: np.ndarray) -> float:
    error = weights - values
    return float(10 * np.log10((weights**2).sum() / (error**2).sum()))


@pytest.mark.parametrize(
    ("source", "plain_step"), [("normal", 0.55), ("normal", 1.1), ("laplace", 0.9)]
)
@pytest.mark.parametrize(("states", "least_db"), [(4, 0.8), (8, 0.88), (64, 1.0)])
def test_gain_over_ecsq(source: str, plain_step: float, states: int, least_db: float) -> None:
    """Decibels over the plain quantizer with rate-aware rounding, at equal rate."""
    weights = getattr(np.random.default_rng(11), source)(size=(400, 250)).astype(np.float32)
    plain = rdoq.quantize(weights, plain_step)
    ours = quantize(weights, plain_step / 4, TrellisConfig(states=states))
    index = dequantize_index(ours, states)
    plain_db = _sqnr_db(weights, plain * plain_step)
    ours_db = _sqnr_db(weights, index * (plain_step / 4))
    slope = 6.02 if source == "normal" else 5.4
    gain_db = (ours_db - plain_db) - slope * (entropy_bits(ours) - entropy_bits(plain))
    assert gain_db > least_db


def test_eight_states_save_five_percent_of_a_gaussian() -> None:
    weights = np.random.default_rng(5).normal(size=(512, 300)).astype(np.float32)
    levels = quantize(weights, 0.13)
    quality = _sqnr_db(weights, dequantize_index(levels, 8) * np.float32(0.13))
    steps = [0.4, 0.45, 0.5]
    plain = [rdoq.quantize(weights, step) for step in steps]
    at = [_sqnr_db(weights, q * step) for q, step in zip(plain, steps, strict=True)]
    assert at[-1] < quality < at[0]
    rate = np.interp(quality, at[::-1], [entropy_bits(q) for q in plain][::-1])
    assert 1 - entropy_bits(levels) / rate > 0.05


def test_refusals() -> None:
    good = np.ones((2, 2), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            quantize(np.array([[1.0, bad]], np.float32), 0.1)
    with pytest.raises(QuantizationError, match="too small"):
        quantize(good, 1.0 / (4.1 * MAX_LEVEL))
    with pytest.raises(QuantizationError, match="step must be finite"):
        quantize(good, 0.0)
    with pytest.raises(QuantizationError, match="matrix"):
        quantize(good[0], 0.1)
    with pytest.raises(QuantizationError, match="backend"):
        quantize_many([TrellisJob(good, 0.1)], backend="abacus")
    with pytest.raises(QuantizationError, match="states"):
        TrellisConfig(states=5)
    with pytest.raises(QuantizationError, match="lam"):
        TrellisConfig(lam=-1.0)
    with pytest.raises(QuantizationError, match="axis"):
        TrellisConfig(axis=3)


def test_levels_stay_in_bounds() -> None:
    step = 0.25
    peak = np.float32(step * 4 * (MAX_LEVEL - 2))
    levels = quantize(np.array([[peak, -peak, peak, 0.0, -peak]], np.float32), step)
    assert int(np.abs(levels).max()) <= MAX_LEVEL
