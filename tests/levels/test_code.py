"""Parts to samples and back: what the loader gives is what the packer says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import weights

from weightvid import loader
from weightvid.levels import code
from weightvid.levels.code import CodedPart, code_part, decibels, part_rows
from weightvid.levels.stats import outlier_mask, tensor_stats
from weightvid.levels.steps import Moments, TensorPlan, plan_tensor
from weightvid.levels.transform import dct
from weightvid.levels.trellis import entropy_bits
from weightvid.loader import TensorSpec, dequantize, from_float32, from_sequence, to_float32

Array = np.ndarray[Any, Any]


def coded(
    values: Array, k: float = 0.2, dtype: str = "F32", **more: Any
) -> tuple[TensorPlan, CodedPart]:
    spec = TensorSpec("w", dtype, values.shape)
    stored = from_float32(values.astype(np.float32), dtype)
    stats = tensor_stats(spec, [stored])
    plan = plan_tensor(stats, k * stats.typical_scale, **more)
    assert plan is not None
    return plan, code_part(stored, plan, 3, 0)


def decoded(plan: TensorPlan, made: CodedPart) -> Array:
    """As the loader does it."""
    matrix = from_sequence((made.samples ^ 128).view(np.int8), made.part)
    values = dequantize(matrix, made.part, [dct(size) for size in plan.kernel])
    return from_float32(values, plan.spec.dtype)


def row_db(values: Array, found: Array) -> Array:
    wide = values.reshape(len(found), -1).astype(np.float64)
    errors = np.square(wide - found).sum(axis=1)
    return np.asarray(10 * np.log10(np.square(wide).sum(axis=1) / errors))


@settings(max_examples=40)
@given(
    st.sampled_from([(40, 30), (24, 10, 3, 3), (32, 1, 3, 3), (20, 16, 5), (30, 20, 1, 1)]),
    st.sampled_from(["outputs", "weights", "integers"]),
    st.sampled_from(["F64", "F32", "F16", "BF16"]),
    st.sampled_from(["plain", "outlier", "rows", "heavy"]),
    st.floats(0.05, 1.4),
)
def test_the_loader_gives_what_is_reported(
    shape: tuple[int, ...], fidelity: str, dtype: str, kind: str, k: float
) -> None:
    values = weights(1, *shape)
    if kind == "outlier":
        values[3].flat[1] = 30
    elif kind == "rows":
        values *= np.exp2(np.arange(len(values)) / 3 - 5).reshape(-1, *[1] * (len(shape) - 1))
    elif kind == "heavy":
        values **= 3
    plan, made = coded(values, k, dtype, fidelity=fidelity)
    found = decoded(plan, made)
    assert found.tobytes() == made.stored.tobytes()
    assert (made.part.tensor, made.part.rows, made.part.columns) == (3, *found.shape)
    exact = to_float32(from_float32(values.astype(np.float32), dtype), dtype).reshape(found.shape)
    errors = np.square(exact.astype(np.float64) - to_float32(found, dtype))
    others = ~outlier_mask(exact, plan.row_scales)
    assert made.outliers == np.count_nonzero(~others)
    assert made.outliers == 1 or kind != "outlier"
    assert made.quality.noise == pytest.approx(errors[others].sum(), rel=1e-6)
    assert made.quality.signal == pytest.approx(np.square(exact[others], dtype=float).sum())
    ratios = np.square(exact * others, dtype=float).sum(axis=1) / (errors * others).sum(axis=1)
    assert made.quality.worst_db == pytest.approx(10 * np.log10(ratios.min()), abs=1e-3)
    assert made.quality.worst_row == np.argmin(ratios)


@pytest.mark.parametrize("outlier", [100.0, 1e5, 2e19])
@pytest.mark.parametrize("fidelity", ["outputs", "weights", "integers"])
def test_an_outlier_leaves_the_others_alone(outlier: float, fidelity: str) -> None:
    values = weights(1, 128, 128)
    _, plain = coded(values, fidelity=fidelity)
    values[5, 7] = outlier
    plan, made = coded(values, fidelity=fidelity)
    before, after = (decibels(*each.quality[:2]) for each in (plain, made))
    assert before is not None and after is not None
    assert 20 < after == pytest.approx(before, abs=0.3)
    assert made.outliers == 1
    assert made.stored[5, 7] == pytest.approx(outlier, rel=1e-4)
    assert made.part.escapes is not None
    assert made.part.escapes[0].tolist() == [5 * 128 + 7]
    assert decoded(plan, made).tobytes() == made.stored.tobytes()


@pytest.mark.parametrize("shape", [(256, 256), (256, 64, 1, 1), (256, 1, 3, 3), (256, 16, 3, 3)])
@pytest.mark.parametrize("kind", ["log-normal", "one row x 1000"])
def test_rows_of_any_scale_keep_their_weights(shape: tuple[int, ...], kind: str) -> None:
    values, random = weights(1, *shape), np.random.default_rng(4)
    scales = np.exp(2 * random.standard_normal(256)) if kind == "log-normal" else np.ones(256)
    scales[7] *= 1000 if kind != "log-normal" else 1
    values *= scales.reshape(-1, *[1] * (len(shape) - 1))
    _, made = coded(values, 0.18)
    assert row_db(values, made.stored).min() > 12
    assert made.quality.worst_db == pytest.approx(row_db(values, made.stored).min(), abs=0.01)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_giant_weights_have_the_right_quality(scale: float) -> None:
    values = weights(1, 64, 64) * scale
    _, made = coded(values)
    errors = np.square((values.astype(np.float32).astype(float) - made.stored) / scale).sum()
    expected = 10 * np.log10(np.square(values / scale).sum() / errors)
    assert decibels(*made.quality[:2]) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("shape", [(512, 192), (1, 512, 192), (512, 1, 192), (1, 1, 512, 192)])
def test_a_table_of_sinusoids_is_a_matrix_whatever_its_shape(shape: tuple[int, ...]) -> None:
    angles = np.arange(512)[:, None] / 10000 ** (np.arange(96) / 96)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    plan, made = coded(table.reshape(shape), 0.18)
    assert plan.kernel == ()
    assert made.quality[:2] == coded(table, 0.18)[1].quality[:2]
    reached = decibels(*made.quality[:2])
    assert reached is not None and reached > 20


def test_escapes_keep_the_parity_of_their_levels() -> None:
    """The machine of the trellis walks over the levels: those of samples must turn it alike."""
    values = weights(1, 16, 300)
    values[::3, ::7] *= 25  # within 48 scales, beyond 127 steps
    plan, made = coded(values, 0.05, fidelity="weights")
    assert plan.method == loader.TRELLIS
    assert made.part.escapes is not None
    places, numbers = made.part.escapes
    assert len(places) > 20
    levels = from_sequence((made.samples ^ 128).view(np.int8), made.part)
    assert int(np.abs(levels.astype(int)).max()) <= 127
    walked = loader.trellis_index(levels).reshape(-1)[places]
    # Same parity of the level, same quantizer: numbers differ by a multiple of 8.
    assert ((numbers - walked) % 8 == 0).all()
    assert np.abs(made.stored - values).max() < 2 * plan.step


def test_parts_of_long_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "PART_WEIGHTS", 1000)
    values = weights(1, 50, 90) * np.exp2(np.arange(50) / 3)[:, None]
    plan, _ = coded(values)
    assert part_rows(plan) == [(row, min(11, 50 - row)) for row in range(0, 50, 11)]
    parts = [
        code_part(values[a : a + n].astype(np.float32), plan, 0, a) for a, n in part_rows(plan)
    ]
    stored = np.concatenate([part.stored for part in parts])
    assert row_db(values, stored).min() > 12
    worst = min(parts, key=lambda part: part.quality.worst_db).quality
    assert worst.worst_row == np.argmin(row_db(values, stored))


@pytest.mark.parametrize("shape", [(48, 64), (48, 20, 3, 3), (48, 1, 3, 3)])
def test_calibrated_levels_put_out_as_much_as_the_weights(shape: tuple[int, ...]) -> None:
    values = weights(4, *shape)
    stats = tensor_stats(TensorSpec("w", "F32", values.shape), [values])
    groups, columns = 48 if shape[1] == 1 else 1, stats.view.columns
    inputs = np.maximum(np.random.default_rng(3).normal(0.2, 1, (groups, 4000, columns)), 0)
    moment = inputs.swapaxes(1, 2) @ inputs / 4000
    moments = Moments(moment, 0.01)
    plan = plan_tensor(stats, stats.typical_scale, moments=moments)
    assert plan is not None
    made = code_part(values, plan, 0, 0, moments)
    assert 1 < made.part.step / plan.step < 1.1
    assert decoded(plan, made).tobytes() == made.stored.tobytes()
    matrix = values.reshape(groups, -1, columns).astype(np.float64)
    seen = matrix @ moment
    assert np.vdot(seen, made.stored) == pytest.approx(np.vdot(seen, matrix), rel=1e-3)


@pytest.mark.parametrize("known", [True, False])
def test_inputs_along_the_rows_cost_what_they_do_along_the_columns(known: bool) -> None:
    """``x @ W``, as GPT-2 has it: the trellis goes along the outputs."""
    rng, values = np.random.default_rng(5), weights(6, 96, 160)
    inputs = np.maximum(rng.standard_normal((900, 40)) @ rng.standard_normal((40, 160)), 0) + 0.3
    moment, turn = inputs.T @ inputs / 900, rng.standard_normal((96, 24))
    outputs = turn @ turn.T / 24 + 0.1 * np.eye(96)
    costs, bits = [], []
    for axis, matrix in ((1, values), (0, np.ascontiguousarray(values.T))):
        moments = Moments(moment[None], 0.01, axis, outputs=outputs if known else None)
        stats = tensor_stats(TensorSpec("w", "F32", matrix.shape), [matrix])
        plan = plan_tensor(stats, 0.5 * stats.typical_scale, moments=moments)
        assert plan is not None
        assert plan.method == loader.TRELLIS
        made = code_part(matrix, plan, 0, 0, moments)
        assert decoded(plan, made).tobytes() == made.stored.tobytes()
        error = (made.stored if axis else made.stored.T) - values
        costs.append(np.trace((outputs if known else np.eye(96)) @ error @ moment @ error.T))
        bits.append(entropy_bits(made.samples))
    assert 10 * np.log10(costs[1] / costs[0]) + 6.02 * (bits[1] - bits[0]) < 0.5


@pytest.mark.parametrize("inputs", [3, 8])
def test_few_inputs_along_the_rows_make_up_for_one_another(inputs: int) -> None:
    """As those of transposed convolutions, which have much in common and no known outputs."""
    moment, values = 0.1 * np.eye(inputs) + 0.9, weights(7, inputs, 512)
    stats = tensor_stats(TensorSpec("w", "F32", values.shape), [values])
    costs = []
    for moments in (None, Moments(moment[None], 0.01, axis=0)):
        plan = plan_tensor(stats, 0.5 * stats.typical_scale, moments=moments)
        assert plan is not None
        made = code_part(values, plan, 0, 0, moments)
        error = (values - made.stored).astype(np.float64)
        costs.append(10 * np.log10(np.vdot(moment @ error, error)))
        costs[-1] += 6.02 * entropy_bits(made.samples)
    assert costs[1] < costs[0] - 3
