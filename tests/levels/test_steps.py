"""What is known of a tensor's weights, and the plan that follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_models import weights

from weightvid.errors import QuantizationError
from weightvid.levels import recipes, steps
from weightvid.levels.recipes import units
from weightvid.levels.stats import TensorStats, outlier_mask, tensor_stats
from weightvid.levels.steps import Moments, TensorPlan, is_codable, plan_tensor
from weightvid.loader import TRELLIS, UNIFORM, TensorSpec, from_float32

Array = np.ndarray[Any, Any]


def stats_of_values(values: Array, dtype: str = "F32", rows: int = 1 << 20) -> TensorStats:
    spec = TensorSpec("w", dtype, values.shape)
    stored = from_float32(values.astype(np.float32), dtype)
    flat = stored.reshape(len(values), -1)
    return tensor_stats(spec, (flat[at : at + rows] for at in range(0, len(flat), rows)))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_plain_weights_have_plain_scales(dtype: str, rows: int) -> None:
    values = weights(1, 64, 200)
    found = stats_of_values(values, dtype, rows)
    expected = np.sqrt(np.square(values.astype(np.float64)).mean(axis=1))
    np.testing.assert_allclose(found.row_scales, expected, rtol=1e-2 if dtype == "BF16" else 1e-3)
    assert found.sigma == pytest.approx(np.sqrt((expected**2).mean()), rel=1e-2)
    assert found.absmax == pytest.approx(np.abs(values).max(), rel=1e-2)
    assert (found.finite, found.outliers) == (True, 0)


@pytest.mark.parametrize("outlier", [100.0, -1e5, 2e19, 3e38])
def test_an_outlier_leaves_the_scales(outlier: float) -> None:
    values = weights(1, 128, 128)
    before = stats_of_values(values)
    values[3, 5] = outlier
    found = stats_of_values(values)
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
    found = stats_of_values(values)
    assert found.finite
    assert found.row_scales.shape == (found.view.rows,)
    assert found.absmax == np.abs(values).max()
    matrix = values.reshape(found.view.rows, -1)
    assert (found.row_scales <= 1.0001 * np.abs(matrix).max(axis=1)).all()
    assert found.outliers == np.count_nonzero(outlier_mask(matrix, found.row_scales))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    values = weights(1, 32, 40)
    found, plain = stats_of_values(values * np.float32(scale)), stats_of_values(values)
    np.testing.assert_allclose(found.row_scales, plain.row_scales * np.float32(scale), rtol=1e-5)
    assert found.sigma == pytest.approx(plain.sigma * scale, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad: float) -> None:
    values = weights(1, 16, 16)
    values[1, 1] = bad
    assert not stats_of_values(values).finite
    wide = np.full((16, 16), 1e300)
    assert not tensor_stats(TensorSpec("w", "F64", wide.shape), [wide]).finite


def test_zeros_and_sparse_rows() -> None:
    assert stats_of_values(np.zeros((8, 8))).sigma == 0
    values = np.zeros((4, 400))
    values[1, 7], values[2, ::50] = 1.0, 1.0
    found = stats_of_values(values)
    assert found.row_scales[[0, 3]].tolist() == [0, 0]
    assert found.typical_scale > 0
    # One weight in an empty row is a weight and no outlier: it is not worth 48 scales.
    assert found.outliers == 0


def stats_of(*shape: int, scale: float = 0.05, name: str = "w", dtype: str = "F32") -> TensorStats:
    values = weights(1, *shape, scale=scale).astype("f2" if dtype == "F16" else "f4")
    return tensor_stats(TensorSpec(name, dtype, shape), [values])


def planned(stats: TensorStats, step: float = 0.01, **more: Any) -> TensorPlan:
    plan = plan_tensor(stats, step, **more)
    assert plan is not None
    return plan


def test_units_go_with_sigma_and_the_root_of_the_size() -> None:
    small, large = stats_of(64, 100), stats_of(256, 100, scale=0.1)
    query, key = (stats_of(64, 100, name=f"a.{name}.weight") for name in ("q_proj", "other"))
    found = units([small, large, query, key])
    share = recipes.SMALLEST_SHARE
    sizes = np.array([6400, 25600, 6400, 6400]) / 11200
    expected = np.array([0.05, 0.1, 0.1, 0.05]) * np.sqrt(sizes + share)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    same = units([small, large], "weights")
    assert same[0] == same[1] == pytest.approx(np.sqrt((0.05**2 + 4 * 0.1**2) / 5), rel=0.02)
    assert units([]) == []
    with pytest.raises(QuantizationError, match="outputs, weights, integers"):
        units([small], "beauty")


def test_the_head_of_a_language_model_has_a_finer_step() -> None:
    body = [stats_of(64, 100, name=f"model.layers.{n}.mlp.up_proj.weight") for n in range(9)]
    table, head = (stats_of(64, 100, name=f"{n}.weight") for n in ("model.embed_tokens", "lm_head"))
    tied, plain = units([*body, table]), units([*body, stats_of(64, 100, name="encoder.weight")])
    assert tied[:9] == plain[:9]
    assert tied[9] * 3 == pytest.approx(plain[9])
    untied = units([*body, table, head])
    assert untied[9] == untied[0]
    assert untied[10] * np.sqrt(10) == pytest.approx(untied[0])


def test_the_last_convolution_of_a_classifier_has_a_coarser_step() -> None:
    kernels = [stats_of(64, 64, 3, 3, name=f"layer{n}.conv.weight") for n in (1, 10, 9)]
    single = [stats_of(64, 64, 1, 1, name=f"layer{n}.conv.weight") for n in (1, 10, 9)]
    head, gate = stats_of(10, 64, name="fc.weight"), stats_of(1, 64, 64, name="LSTM_3")
    for body, factor in (kernels, 3.0), (single, 2.0):
        usual, found = units([*body, head, gate]), units([*body, head])
        assert usual[1] / usual[2] == pytest.approx(body[1].scale / body[2].scale)
        assert found[1] / found[2] == pytest.approx(factor * body[1].scale / body[2].scale)


def test_a_recipe_says_how_much_worse_than_int8_it_is() -> None:
    matrices = [stats_of(64, 100, name="a.weight"), stats_of(256, 100, name="b.weight")]
    kernels = [stats_of(64, 10, 3, 3, name=name) for name in "ab"]
    spoken = [stats_of(64, 100, name="wte.weight"), stats_of(256, 100, name="h.0.weight")]
    for stats in (matrices, kernels, spoken):
        own, found = units(stats), {}
        for name, wanted in recipes.RECIPES.items():
            found[name] = recipes.recipe_factor(name, stats, own)
            noise = wanted.language_noise if stats is spoken else wanted.noise
            assert recipes.forecast(found[name], stats, own) == pytest.approx(noise, rel=0.01)
        assert found["fine"] < found["balanced"] < found["small"]
    # Steps as fine as int8's own do as much harm, where nothing makes up for it.
    one = matrices[:1]
    same = one[0].peak / 127 * one[0].sigma / units(one)[0]
    assert recipes.forecast(same, one, units(one), "integers") == pytest.approx(1, rel=0.01)
    assert recipes.forecast(1.0, [], []) == 0
    with pytest.raises(QuantizationError, match="balanced"):
        recipes.recipe_factor("huge", one, units(one))


@pytest.mark.parametrize(
    ("shape", "fidelity", "expected"),
    [
        ((64, 100), "outputs", (TRELLIS, 0, 0)), ((64, 100, 1, 1), "outputs", (UNIFORM, 0, 1)),
        ((64, 10, 3, 3), "outputs", (UNIFORM, 1, 1)), ((64, 100), "integers", (UNIFORM, 0, 0)),
        ((64, 10, 3, 3), "weights", (TRELLIS, 1, 0)), ((64, 9, 3, 3), "integers", (UNIFORM, 0, 0)),
    ],
)  # fmt: skip
def test_methods(shape: tuple[int, ...], fidelity: str, expected: tuple[int, int, int]) -> None:
    plan = planned(stats_of(*shape), fidelity=fidelity)
    assert (plan.method, plan.transformed, plan.balanced) == expected
    assert (plan.frequency_steps is not None) == (plan.transformed and fidelity == "outputs")
    assert plan.row_steps is None
    assert plan.kernel == (shape[2:] if plan.transformed else ())


def test_steps_stay_within_limits_and_are_short() -> None:
    stats = stats_of(64, 100)
    assert stats.peak == pytest.approx(2.6, abs=0.3)
    for asked, sigmas in ((1e-9, stats.peak / 127), (1e9, steps.COARSEST_SIGMAS)):
        assert planned(stats, asked).step == pytest.approx(sigmas * stats.sigma, rel=0.01)
    assert planned(stats, 1e9, fidelity="weights").step > planned(stats, 1e9).step
    for step in np.geomspace(1e-3, 1e-1, 50):
        found = planned(stats, float(step)).step
        assert found == np.float32(found)
        assert (found / 2.0 ** np.floor(np.log2(found)) * 128).is_integer()
        assert planned(stats).with_step(found).step == found


def test_steps_by_frequency() -> None:
    plan = planned(stats_of(64, 10, 3, 3))
    assert plan.frequency_steps is not None
    assert plan.frequency_steps.sum() == 0
    assert plan.frequency_steps[0] < plan.frequency_steps[1] < plan.frequency_steps[8]
    columns = plan.column_steps()
    assert columns.shape == (90,)
    assert len(set(columns.tolist())) == len(set(plan.frequency_steps.tolist()))
    assert columns[0] == pytest.approx(plan.step * 2 ** (plan.frequency_steps[0] / 4))
    own = Moments(np.eye(90)[None], 0.01, frequency_steps=np.arange(9, dtype=np.int8))
    told = planned(stats_of(64, 10, 3, 3), moments=own)
    assert told.frequency_steps is own.frequency_steps
    assert (told.method, told.balanced) == (TRELLIS, False)
    across = Moments(np.eye(64)[None], 0.01, axis=0)
    assert planned(stats_of(64, 100), moments=across).method == TRELLIS


def test_steps_by_row_where_scales_spread() -> None:
    values = weights(2, 64, 90) * np.exp2(np.arange(64) / 4 - 8, dtype=np.float32)[:, None]
    stats = tensor_stats(TensorSpec("w", "F32", (64, 90)), [values])
    plan = planned(stats)
    assert plan.row_steps is not None
    assert np.corrcoef(plan.row_steps, np.arange(64))[0, 1] > 0.99
    assert plan.row_steps[-1] - plan.row_steps[0] == pytest.approx(63, abs=2)
    for fidelity in ("weights", "integers"):
        assert planned(stats, fidelity=fidelity).row_steps is None


def test_vocabularies_in_the_order_of_frequency_have_finer_steps_at_their_start() -> None:
    values = weights(2, 2000, 8) * (1 + np.arange(2000, dtype=np.float32)[:, None] / 2000)
    name = "embeddings.word_embeddings.weight"

    def row_steps(name: str, values: Array) -> Any:
        return planned(tensor_stats(TensorSpec(name, "F32", values.shape), [values])).row_steps

    found = row_steps(name, values)
    assert (np.diff(found) >= 0).all()
    assert found[0] < -4 < 2 < found[-1]
    shuffled = np.random.default_rng(0).permutation(values)
    for other in ((name, shuffled), (name, values[:900]), ("users.weight", values)):
        assert row_steps(*other) is None


def test_an_outlier_is_not_spread_over_its_kernel() -> None:
    values = weights(3, 16, 8, 3, 3, scale=1)
    values[1, 2, 0, 0] = 1e4
    stats = tensor_stats(TensorSpec("w", "F32", values.shape), [values])
    assert stats.outliers == 1
    assert not planned(stats, 0.3).transformed


def test_what_is_kept_exactly() -> None:
    tiny = stats_of(15, 15)
    assert not is_codable(tiny.spec, tiny)
    assert is_codable(stats_of(16, 16).spec, stats_of(16, 16))
    for value in (0, 0.37, np.nan, np.inf):
        spec = TensorSpec("w", "F32", (32, 32))
        assert not is_codable(spec, tensor_stats(spec, [np.full((32, 32), value, np.float32)]))
    assert plan_tensor(stats_of(32, 32, scale=1e-36), 1e-37) is None
    assert plan_tensor(stats_of(32, 32, scale=1e37), 1e36) is None
    # Weights near the largest of their type might round to infinity.
    assert plan_tensor(stats_of(32, 32, scale=1.7e4, dtype="F16"), 4e3) is None
    assert plan_tensor(stats_of(32, 32, scale=5e3, dtype="F16"), 1e3) is not None
    # Numbers of outliers, and what they stand for, stay finite.
    for outlier in (2e19, 1e35, 1e37, float(np.finfo(np.float32).max)):
        values = weights(16, 16, 16)
        values[3, 4] = -outlier
        plan = plan_tensor(tensor_stats(TensorSpec("w", "F32", (16, 16)), [values]), 1e-3)
        assert (plan is None) == (outlier > 1e34)
    wide = TensorSpec("w", "F32", (2, 1 << 25))
    stats = TensorStats(wide, steps.View(2, 1 << 25), np.ones(2, np.float32), 1.0, 3.0, True)
    assert not is_codable(wide, stats), "a row must fit a part"


def test_measured_units_end_at_one_slope() -> None:
    stats = [stats_of(64, 100, name="a"), stats_of(64, 100, name="b"), stats_of(9, 99, name="c")]
    found = recipes.measured_units([1.0, 1.0, 7.0], stats, {"a": 4.0, "b": 1.0})
    assert found[0] * 2 == pytest.approx(found[1])
    assert found[0] * found[1] == pytest.approx(1.0)
    assert found[2] == 7.0
    assert recipes.measured_units([1.0], stats[:1], {}) == [1.0]
    far = recipes.measured_units([1.0, 1.0], stats[:2], {"a": 1e30, "b": 1.0})
    assert far[1] / far[0] == pytest.approx(recipes.LARGEST_CORRECTION**2)
