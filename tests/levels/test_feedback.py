"""Error feedback, for the uniform quantizer and for the trellis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightvid.errors import QuantizationError
from weightvid.levels import feedback as module
from weightvid.levels.feedback import (
    FeedbackConfig,
    Method,
    factorize,
    feedback,
    fit,
    lost_gain,
    output_error,
    quantize_rows,
)
from weightvid.levels.rounding import uniform
from weightvid.levels.steps import MOST_GAIN
from weightvid.levels.trellis import entropy_bits, trellis
from weightvid.loader import trellis_index

METHODS: tuple[Method, ...] = ("uniform", "trellis")


def layer(rows: int = 24, columns: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the second moment of inputs that are alike, positive and of few directions."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns // 3, columns))
    inputs = np.maximum(rng.standard_normal((400, columns // 3)) @ mixing, 0) + 0.3
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    return weights / np.float32(0.7), inputs.T @ inputs / len(inputs)


def values_of(levels: np.ndarray, method: Method) -> np.ndarray:
    return trellis_index(levels) / 4 if method == "trellis" else levels


def test_the_factor_gives_back_the_moment() -> None:
    _, moment = layer()
    factor = factorize(moment, 1e-9, by_energy=True)
    lower = factor.feedback.astype(np.float64) * np.sqrt(factor.cost)[:, None]
    made = lower.T @ lower
    expected = moment[np.ix_(factor.order, factor.order)]
    np.testing.assert_allclose(made / made.max(), expected / expected.max(), atol=1e-5)
    assert not np.triu(factor.feedback, 1).any()
    assert (np.diff(np.diagonal(moment)[factor.order]) <= 0).all()


def test_columns_are_rounded_in_order_to_their_targets() -> None:
    scaled, moment = layer(columns=150)
    config = FeedbackConfig(lam=0.0)
    factor = factorize(moment, config.damping, by_energy=True)
    ordered = scaled[:, factor.order].astype(np.float64)
    levels = np.zeros(ordered.shape)
    for column in range(ordered.shape[1]):
        error = ordered[:, :column] - levels[:, :column]
        levels[:, column] = np.rint(ordered[:, column] + error @ factor.feedback[column, :column])
    found = feedback(scaled, moment, config)
    # float32 sums in another order turn a few.
    assert (found[:, factor.order] != levels).mean() < 0.02


def test_the_output_is_better_at_no_more_bits() -> None:
    scaled, moment = layer(columns=150)
    plain = uniform(scaled)
    levels = feedback(scaled, moment)
    assert entropy_bits(levels) < entropy_bits(plain) + 0.05
    there = output_error(scaled - plain, moment)
    here = output_error(scaled - levels, moment)
    assert here < 0.5 * there
    best = feedback(scaled, moment, method="trellis")
    gained = here / output_error(scaled - values_of(best, "trellis"), moment)
    assert 0.5 * np.log2(gained) + entropy_bits(levels) - entropy_bits(best) > 0.05


def test_bits_have_a_price() -> None:
    scaled, moment = layer()
    for method in METHODS:
        bits = [
            entropy_bits(feedback(scaled, moment, FeedbackConfig(lam=lam), method))
            for lam in (0.0, 0.1, 0.3)
        ]
        assert bits[0] > bits[1] + 0.03 > bits[2] + 0.06


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_white_inputs_leave_the_plain_search(lam: float) -> None:
    scaled, _ = layer(columns=200)
    levels = feedback(scaled, np.eye(200), FeedbackConfig(lam=lam), "trellis")
    # Apart from weights between two cells, and where paths part for longer than the window.
    error = np.square(scaled - values_of(levels, "trellis")).mean()
    expected = trellis(scaled, lam)
    assert error == pytest.approx(np.square(scaled - trellis_index(expected) / 4).mean(), rel=0.01)
    assert (levels != expected).mean() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_rows_make_up_for_one_another(method: Method) -> None:
    scaled, moment = layer(rows=60)
    turn = np.random.default_rng(1).standard_normal((60, 15))
    outputs = turn @ turn.T / 15 + 0.1 * np.eye(60)
    outputs[0] = outputs[:, 0] = 0  # an output that nothing depends on
    cost, bits = {}, {}
    for together in (False, True):
        levels = feedback(scaled, moment, method=method, outputs=outputs if together else None)
        error = scaled - values_of(levels, method)
        cost[together] = np.trace(outputs @ error @ moment @ error.T)
        bits[together] = entropy_bits(levels)
    assert cost[True] < 0.6 * cost[False]
    assert bits[True] < bits[False] + 0.05


@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_have_nothing_in_common_are_quantized_alone(method: Method) -> None:
    scaled, moment = layer(rows=200)
    alone, both = (feedback(scaled, moment, None, method, g) for g in (None, 3 * np.eye(200)))
    assert (alone == both).mean() > 0.999  # products may be summed in another order


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_layers_of_their_own(method: Method) -> None:
    scaled, moment = layer(rows=8)
    _, other = layer(seed=1)
    config = FeedbackConfig(lam=0.0)
    both = feedback(np.tile(scaled, (2, 1)), np.stack([moment, other]), config, method)
    assert np.array_equal(both[:8], feedback(scaled, moment, config, method))
    assert np.array_equal(both[8:], feedback(scaled, other, config, method))


@pytest.mark.parametrize("method", METHODS)
def test_prices_of_groups_come_from_rows_that_were_quantized(method: Method) -> None:
    """More rows than the sample: equal groups must get what they would get as one."""
    scaled, moment = layer(rows=4096)
    levels = feedback(scaled, np.stack([moment, moment]), method=method)
    together = feedback(scaled, moment, method=method)
    assert (levels == 0).mean() == pytest.approx((together == 0).mean(), abs=0.005)
    fitted = fit(scaled, np.stack([moment, moment]), method=method)
    places = fitted.classes.of_places(scaled)
    for kind in np.flatnonzero(np.bincount(places.ravel()) > 4096):
        share = np.exp2(-fitted.price[kind, 127] / FeedbackConfig().lam)
        assert share == pytest.approx((levels[places == kind] == 0).mean(), abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_level_costs_what_it_does_among_its_like(method: Method) -> None:
    """Of columns that differ by orders, each gets what a matrix of such columns would get."""
    rng = np.random.default_rng(2)
    scaled = rng.laplace(0, np.repeat([0.25, 4.0], 32), (2048, 64)).astype(np.float32)
    config = FeedbackConfig(lam=0.2)
    together = feedback(scaled, np.eye(64), config, method)
    for columns in (slice(0, 32), slice(32, 64)):
        alone = feedback(scaled[:, columns], np.eye(32), config, method)
        assert (together[:, columns] == alone).mean() > 0.9
    assert np.abs(together[:, :32]).mean() < 0.9 * np.abs(np.rint(scaled[:, :32])).mean()


def test_the_gain_makes_up_for_what_outputs_lack_in_common() -> None:
    scaled, moment = layer(rows=64)
    noise = np.random.default_rng(5).normal(0, 0.1, scaled.shape)
    noise -= scaled * np.vdot(scaled @ moment, noise) / np.vdot(scaled @ moment, scaled)
    assert lost_gain(scaled, 0.98 * scaled + noise, moment) == pytest.approx(1 / 0.98, rel=1e-5)
    assert lost_gain(scaled, 0 * scaled, moment) == 1.0
    assert lost_gain(scaled, 0.1 * scaled, moment) == MOST_GAIN
    twice = np.concatenate([scaled, scaled]), np.stack([moment, 2 * moment])
    assert lost_gain(twice[0], 0.97 * twice[0], twice[1]) == pytest.approx(1 / 0.97, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_rows_change_nothing(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled, moment = layer(rows=700, columns=330)
    scaled[5, 5] = 300.0
    fitted = fit(scaled, moment, method=method)
    whole = feedback(scaled, moment, method=method)
    blocks = [quantize_rows(block, fitted) for block in np.split(scaled, [1, 90, 640])]
    assert np.array_equal(np.concatenate(blocks), whole)
    monkeypatch.setattr(module, "_LANES", 128)
    assert np.array_equal(quantize_rows(scaled, fitted), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_any_shape_and_moment(rows: int, columns: int, seed: int, rank_one: bool) -> None:
    rng = np.random.default_rng(seed)
    scaled = (rng.standard_normal((rows, columns)) * 10 ** rng.uniform(-3, 2)).astype(np.float32)
    seen = rng.standard_normal((1 if rank_one else 2 * columns, columns))
    moment = seen.T @ seen
    for method in METHODS:
        levels = feedback(scaled, moment, method=method)
        assert levels.shape == scaled.shape
        assert levels.dtype == np.int32
        assert np.array_equal(levels, feedback(scaled, moment, method=method))


def test_outliers_far_beyond_the_table() -> None:
    scaled, moment = layer()
    scaled[3, 5], scaled[4, 6] = 400.0, -3000.0
    for method in METHODS:
        made = values_of(feedback(scaled, moment, method=method), method)
        assert abs(made[3, 5] - 400) < 8
        assert abs(made[4, 6] + 3000) < 8


def test_nothing_seen_is_plain_rounding() -> None:
    scaled, _ = layer()
    levels = feedback(scaled, np.zeros((70, 70)), FeedbackConfig(lam=0.0))
    assert np.array_equal(levels, uniform(scaled))
    for method in METHODS:
        assert feedback(scaled[:0], np.zeros((70, 70)), method=method).shape == (0, 70)
        assert not feedback(0 * scaled, np.eye(70), method=method).any()


def test_refusals() -> None:
    scaled, moment = layer()
    for wrong in (moment[:-1, :-1], np.stack([moment] * 5), moment[0], moment[None, None]):
        with pytest.raises(QuantizationError, match="don't belong"):
            feedback(scaled, wrong)
    with pytest.raises(QuantizationError, match="NaN"):
        feedback(scaled, np.full((70, 70), np.nan))
    with pytest.raises(QuantizationError, match="semidefinite"):
        feedback(scaled, np.eye(70) - 2 * np.ones((70, 70)) / 70)
    for weight in (np.nan, 3e6):
        scaled[0, 0] = weight
        with pytest.raises(QuantizationError):
            feedback(scaled, moment, method="trellis")
    for bad in ({"damping": 0.0}, {"damping": np.nan}, {"lam": -1.0}):
        with pytest.raises(QuantizationError):
            FeedbackConfig(**bad)
