import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightvid.errors import QuantizationError
from weightvid.quantize import feedback, feedback_trellis
from weightvid.quantize.feedback import FeedbackConfig, factorize, output_error
from weightvid.quantize.rate import entropy_bits
from weightvid.quantize.trellis import dequantize_index
from weightvid.quantize.trellis_search import TrellisConfig
from weightvid.quantize.trellis_search import quantize as search


def layer(rows=24, columns=70, seed=0):
    """Weights, and the second moment of inputs that are alike, positive and of few directions."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns // 3, columns))
    inputs = np.maximum(rng.standard_normal((400, columns // 3)) @ mixing, 0) + 0.3
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    return weights, inputs.T @ inputs / len(inputs)


def test_the_factor_gives_back_the_moment():
    _, moment = layer()
    factor = factorize(moment, 1e-9, by_energy=True)
    lower = factor.feedback.astype(np.float64) * np.sqrt(factor.cost)[:, None]
    made = lower.T @ lower
    expected = moment[np.ix_(factor.order, factor.order)]
    np.testing.assert_allclose(made / made.max(), expected / expected.max(), atol=1e-5)
    assert np.array_equal(np.triu(factor.feedback, 1), np.zeros_like(moment))
    assert (np.diff(np.diagonal(moment)[factor.order]) <= 0).all()


def reference(weights, step, moment, config):
    """Column by column, straight from the definition, without prices."""
    factor = factorize(moment, config.damping, config.by_energy)
    scaled = (weights / np.float32(step))[:, factor.order].astype(np.float64)
    levels = np.zeros(scaled.shape)
    for column in range(scaled.shape[1]):
        error = scaled[:, :column] - levels[:, :column]
        target = scaled[:, column] + error @ factor.feedback[column, :column]
        levels[:, column] = np.rint(target)
    found = np.zeros(scaled.shape, np.int32)
    found[:, factor.order] = levels
    return found


@pytest.mark.parametrize("block", [1, 7, 64, 200])
@pytest.mark.parametrize("by_energy", [False, True])
def test_blocks_change_nothing(block, by_energy):
    weights, moment = layer()
    config = FeedbackConfig(lam=0.0, block=block, by_energy=by_energy)
    found = feedback.quantize(weights, 0.5, moment, config)
    expected = reference(weights, 0.5, moment, config)
    assert (found != expected).mean() < 0.01  # float32 sums in another order


def test_the_output_is_better_at_no_more_bits():
    weights, moment = layer()
    step = np.float32(0.7)
    plain = np.rint(weights / step)
    levels = feedback.quantize(weights, 0.7, moment)
    assert entropy_bits(levels) < entropy_bits(plain.astype(np.int32)) + 0.05
    there = output_error(weights - plain * step, moment)
    assert output_error(weights - levels * step, moment) < 0.5 * there


@pytest.mark.parametrize("states", [4, 8, 32])
@pytest.mark.parametrize("zero", [False, True])
def test_the_trellis_is_better_still(states, zero):
    weights, moment = layer(columns=150)
    step = 0.7
    plain = feedback.quantize(weights, step, moment, FeedbackConfig(by_energy=False))
    levels = feedback_trellis.quantize(weights, step / 4, moment, states=states, zero=zero)
    made = dequantize_index(levels, states, 1, zero) * np.float32(step / 4)
    gained = output_error(weights - plain * np.float32(step), moment)
    gained /= output_error(weights - made, moment)
    bits = entropy_bits(plain) - entropy_bits(levels)
    assert 0.5 * np.log2(gained) + bits > 0.05


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_white_inputs_leave_the_plain_search(lam, zero):
    weights, _ = layer(columns=200)
    moment = np.eye(200)
    config = FeedbackConfig(lam=lam)
    levels = feedback_trellis.quantize(weights, 0.1, moment, config, zero=zero)
    expected = search(weights, 0.1, TrellisConfig(lam=lam), zero=zero)
    assert (levels != expected).mean() < 0.05  # where paths part for longer than the window


def test_groups_are_layers_of_their_own():
    weights, moment = layer(rows=8)
    _, other = layer(seed=1)
    config = FeedbackConfig(lam=0.0)
    both = feedback.quantize(np.tile(weights, (2, 1)), 0.5, np.stack([moment, other]), config)
    np.testing.assert_array_equal(both[:8], feedback.quantize(weights, 0.5, moment, config))
    np.testing.assert_array_equal(both[8:], feedback.quantize(weights, 0.5, other, config))
    trellis = feedback_trellis.quantize(
        np.tile(weights, (2, 1)), 0.1, np.stack([moment, other]), config
    )
    alone = feedback_trellis.quantize(weights, 0.1, other, config)
    assert (trellis[8:] != alone).mean() < 0.02


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_any_shape_and_moment(rows, columns, seed, rank_one):
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((rows, columns)) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    seen = rng.standard_normal((1 if rank_one else 2 * columns, columns))
    moment = seen.T @ seen
    step = max(float(np.abs(weights).max()) / 5, 1e-6)
    levels = feedback.quantize(weights, step, moment)
    assert levels.shape == weights.shape
    first = feedback_trellis.quantize(weights, step / 4, moment, states=4)
    assert np.array_equal(first, feedback_trellis.quantize(weights, step / 4, moment, states=4))


def test_outliers_far_beyond_the_table():
    weights, moment = layer()
    weights[3, 5] = 400.0
    weights[4, 6] = -300.0
    levels = feedback_trellis.quantize(weights, 0.1, moment)
    made = dequantize_index(levels, 8) * np.float32(0.1)
    assert abs(made[3, 5] - 400) < 5
    assert abs(made[4, 6] + 300) < 5
    assert feedback.quantize(weights, 0.4, moment)[3, 5] > 900


def test_nothing_seen_is_plain_rounding():
    weights, _ = layer()
    config = FeedbackConfig(lam=0.0)
    levels = feedback.quantize(weights, 0.5, np.zeros((70, 70)), config)
    np.testing.assert_array_equal(levels, np.rint(weights / np.float32(0.5)))
    assert feedback.quantize(np.zeros((0, 70), np.float32), 0.5, np.zeros((70, 70))).size == 0


def test_refusals():
    weights, moment = layer()
    with pytest.raises(QuantizationError, match="don't belong"):
        feedback.quantize(weights, 0.5, moment[:-1, :-1])
    with pytest.raises(QuantizationError, match="don't belong"):
        feedback_trellis.quantize(weights, 0.5, np.stack([moment] * 5))
    with pytest.raises(QuantizationError, match="NaN"):
        feedback.quantize(weights, 0.5, np.full((70, 70), np.nan))
    with pytest.raises(QuantizationError, match="semidefinite"):
        feedback.quantize(weights, 0.5, np.eye(70) - 2 * np.ones((70, 70)) / 70)
    with pytest.raises(QuantizationError, match="square"):
        factorize(moment[:3])
    with pytest.raises(QuantizationError, match="step"):
        feedback.quantize(weights, 0.0, moment)
    for wrong in ({"damping": 0.0}, {"lam": -1.0}, {"block": 0}):
        with pytest.raises(QuantizationError):
            FeedbackConfig(**wrong)
