"""A part of a tensor to samples and back: scale, quantize, order, and what it cost."""

from dataclasses import dataclass, replace
from math import inf, log10, prod
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from weightvid import loader
from weightvid.levels.descent import balanced_moment, descend
from weightvid.levels.feedback import OUTPUT_DAMPING, FeedbackConfig, Method, feedback, lost_gain
from weightvid.levels.frames import choose_energies, to_sequence
from weightvid.levels.rounding import balanced, uniform
from weightvid.levels.stats import outlier_mask, row_scales
from weightvid.levels.steps import Moments, TensorPlan
from weightvid.levels.transform import dct, forward, forward_moment, precision
from weightvid.levels.trellis import trellis
from weightvid.loader import Array, Bytes, Floats, Part, from_float32, to_float32, trellis_index

#: weights of one part at most; rows longer than that make parts of one row.
PART_WEIGHTS: Final = 1 << 22
#: largest magnitude of a level that is a sample.
_SAMPLE_REACH: Final = 127


class Quality(NamedTuple):
    """Squared sums of a part: weights, errors; and its worst row: its SQNR in dB, its number."""

    signal: float
    noise: float
    worst_db: float
    worst_row: int


def decibels(signal: float, noise: float) -> float | None:
    """SQNR of squared sums; None if one of them is zero."""
    return 10 * log10(signal / noise) if signal and noise else None


@dataclass(frozen=True, slots=True, eq=False)
class CodedPart:
    """A quantized part.

    Attributes
    ----------
    part : Part
        Its ``column`` is not known yet.
    samples : ndarray of uint8, shape (rows * columns,)
        In coding order.
    stored : ndarray
        Elements that a loader will give, in the tensor's own type, shape (rows, columns).
    quality : Quality
    outliers : int
        Weights that are kept nearly exactly, as their rows' steps don't fit them.
    shift : ndarray of float32, shape (outputs,), or None
        By how much the errors of these rows lower the mean outputs of the layer.
    """

    part: Part
    samples: Bytes
    stored: Array
    quality: Quality
    outliers: int
    shift: Floats | None = None


def part_rows(plan: TensorPlan) -> list[tuple[int, int]]:
    """First row and number of rows of each part of a tensor."""
    step = max(1, PART_WEIGHTS // plan.view.columns)
    return [(row, min(step, plan.view.rows - row)) for row in range(0, plan.view.rows, step)]


def code_part(
    elements: Array,
    plan: TensorPlan,
    number: int,
    first_row: int,
    moments: Moments | None = None,
    below: Array | None = None,
) -> CodedPart:
    """Quantize consecutive rows of a tensor; a QuantizationError if a level is out of range.

    Parameters
    ----------
    elements : ndarray
        Stored elements of the rows (BF16 as uint16 bits).
    plan : TensorPlan
    number : int
        Of the tensor.
    first_row : int
    moments : Moments, optional
        Of the whole tensor; errors are fed back by them.
    below : ndarray, optional
        Stored elements of these rows that the weights are added to.
    """
    original = to_float32(elements.reshape(-1), plan.spec.dtype).reshape(-1, plan.view.columns)
    weights = original
    if below is not None:
        under = to_float32(below.reshape(-1), plan.spec.dtype).reshape(weights.shape)
        weights = original - under
    rows = slice(first_row, first_row + len(weights))
    outliers = outlier_mask(weights, plan.row_scales[rows])
    quiet = np.where(outliers, np.float32(0), weights) if outliers.any() else weights
    levels, gain = quantize(quiet, plan, rows, moments)
    plan = replace(plan, step=float(np.float32(plan.step * gain)))
    if plan.sign:  # feedback may cross zero
        levels = plan.sign * np.maximum(plan.sign * levels, 0)
    samples, escapes = _escapes(levels, weights, outliers, plan, rows)
    energies = choose_energies(samples, prod(plan.kernel))
    part = Part(
        tensor=number,
        column=0,
        first_row=first_row,
        rows=len(weights),
        columns=plan.view.columns,
        method=plan.method,
        step=plan.step,
        bases=tuple(range(len(plan.kernel))),
        shift=precision(plan.kernel, plan.frequency_steps) if plan.kernel else 0,
        frequency_steps=plan.frequency_steps,
        row_steps=None if plan.row_steps is None else plan.row_steps[rows],
        energies=energies,
        escapes=escapes,
    )
    found = loader.dequantize(samples, part, [dct(size) for size in plan.kernel])
    if below is not None:
        found += under
    stored = from_float32(found, plan.spec.dtype)
    if below is not None:
        quality = compare_rows(elements.reshape(stored.shape), stored, plan.spec.dtype, first_row)
    else:
        # Outliers would hide what became of all other weights.
        judged = np.where(outliers, quiet, found) if outliers.any() else found
        judged = from_float32(judged, plan.spec.dtype)
        quality = quality_of(quiet, judged, plan.spec.dtype, first_row)
    sequence = to_sequence(samples.view(np.uint8) ^ np.uint8(loader.ZERO_SAMPLE), energies)
    shift = None
    if moments is not None and moments.bias is not None:
        error = original - to_float32(stored, plan.spec.dtype)
        shift = mean_shift(error, moments, plan, first_row)
    return CodedPart(part, sequence, stored, quality, int(outliers.sum()), shift)


def quantize(
    weights: Floats, plan: TensorPlan, rows: slice, moments: Moments | None = None
) -> tuple[npt.NDArray[np.int32], float]:
    """Levels of some rows without outliers, in the columns of the transform; gain of their step."""
    if moments is None:  # else feedback knows what was pruned
        weights = np.where(np.abs(weights) < plan.threshold, np.float32(0), weights)
    coefficients = forward(weights, plan.kernel) if plan.kernel else weights
    scaled = coefficients / plan.column_steps()
    scaled /= plan.row_factors(rows)[:, None]
    if moments is None:
        if plan.price:
            moment = balanced_moment(scaled.shape[1], plan.view.channels if plan.balanced else 0)
            return descend(scaled, moment, 0.0, plan.price), 1.0
        if plan.method == loader.TRELLIS:
            return trellis(scaled), 1.0
        return balanced(scaled, plan.view.channels) if plan.balanced else uniform(scaled), 1.0
    return _fed_back(scaled, plan, rows, moments)


def _fed_back(
    scaled: Floats, plan: TensorPlan, rows: slice, moments: Moments
) -> tuple[npt.NDArray[np.int32], float]:
    """Levels with error feedback, and the gain of their step; rows and columns in steps."""
    row_factors = plan.row_factors(rows).astype(np.float64)
    config = FeedbackConfig(damping=moments.damping, dead=plan.threshold / plan.step)
    method: Method = "trellis" if plan.method == loader.TRELLIS else "uniform"

    def fed_back(
        part: Floats, moment: npt.NDArray[np.floating], method: Method
    ) -> npt.NDArray[np.int32]:
        if plan.price:
            return descend(part, moment, moments.damping, plan.price)
        return feedback(part, moment, config, method)

    first, last = rows.start or 0, (rows.start or 0) + len(scaled)
    moment, steps = moments.moment, plan.column_steps()
    if moments.axis == 0:
        moment = block_diagonal(moment)[first:last, first:last]
        moment = moment * (row_factors * row_factors[:, None])
        if method == "uniform":
            turned = fed_back(np.ascontiguousarray(scaled.T), moment, method)
            return np.ascontiguousarray(turned.T), 1.0
        # The trellis goes along the outputs, and rows make up for the errors of other inputs.
        config, along = FeedbackConfig(across=moments.damping), moments.outputs
        if along is None:
            along = np.eye(scaled.shape[1], dtype=np.float32)
        else:
            config = replace(config, damping=OUTPUT_DAMPING)
        levels = feedback(scaled, along * (steps * steps[:, None]), config, method, moment)
        found = trellis_index(levels) / 4 * steps
        return levels, lost_gain((scaled * steps).T, found.T, moment)
    share = plan.view.rows // len(moment)
    if len(moment) > 1 and len(scaled) < plan.view.rows:
        moment = moment[first // share : -(-last // share)]
    if plan.kernel:
        moment = forward_moment(moment, plan.kernel)
    moment = moment * (steps * steps[:, None])
    if len(scaled) % len(moment):  # a part that begins or ends within a group
        ends = [min(last, share * (first // share + g + 1)) - first for g in range(len(moment))]
        parts = zip([0, *ends[:-1]], ends, moment, strict=True)
        return np.concatenate([fed_back(scaled[a:b], h, method) for a, b, h in parts]), 1.0
    if moments.outputs is not None and not (plan.price or plan.threshold):
        outputs = moments.outputs[first:last, first:last] * (row_factors * row_factors[:, None])
        levels = feedback(scaled, moment, config, method, outputs)
    else:
        levels = fed_back(scaled, moment, method)
    if method == "uniform":  # integers, of which all parts of a tensor share a step
        return levels, 1.0
    values = trellis_index(levels) / 4 * row_factors[:, None]
    return levels, lost_gain(scaled * row_factors[:, None], values, moment)


def block_diagonal(moment: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """One moment of all inputs of a grouped layer: those of different groups never meet."""
    groups, columns, _ = moment.shape
    whole = np.zeros((groups, columns, groups, columns), moment.dtype)
    whole[np.arange(groups), :, np.arange(groups), :] = moment
    return whole.reshape(groups * columns, groups * columns)


def mean_shift(error: Floats, moments: Moments, plan: TensorPlan, first_row: int = 0) -> Floats:
    """By how much errors of some rows (original less restored) lower the mean outputs.

    Parameters
    ----------
    error : ndarray of float32, shape (R, C)
    moments : Moments
        With mean inputs.
    plan : TensorPlan
    first_row : int

    Returns
    -------
    ndarray of float32, shape (outputs,)
        Of all outputs of the layer; those of other rows are 0.
    """
    mean = np.asarray(moments.mean, np.float32)
    rows = np.arange(first_row, first_row + len(error))
    if moments.axis == 0:
        return np.asarray(mean.reshape(-1)[rows] @ error)
    shift = np.zeros(plan.view.rows, np.float32)
    share = plan.view.rows // len(mean)
    for group in np.unique(rows // share):
        own = rows // share == group
        shift[rows[own]] = error[own] @ mean[group]
    return shift


def _escapes(
    levels: npt.NDArray[np.int32],
    weights: Floats,
    outliers: npt.NDArray[np.bool_],
    plan: TensorPlan,
    rows: slice,
) -> tuple[npt.NDArray[np.int8], tuple[Array, Array] | None]:
    """Levels that fit a sample, of the same parity; and what is listed instead of the others."""
    small = levels.astype(np.int8)
    places = np.flatnonzero((np.abs(levels) > _SAMPLE_REACH) | outliers)
    if not places.size:
        return small, None
    far = levels.reshape(-1)[places]
    reach = _SAMPLE_REACH - (far & 1 ^ 1)
    small.reshape(-1)[places] = np.clip(far, -reach, reach)
    trellis = plan.method == loader.TRELLIS
    numbers = (trellis_index(levels) if trellis else levels).reshape(-1)[places].astype(np.float32)
    listed = outliers.reshape(-1)[places]
    units = np.broadcast_to(plan.column_steps() / (4 if trellis else 1), levels.shape)
    steps = units.astype(np.float64) * plan.row_factors(rows)[:, None]
    nearest = np.rint(weights.reshape(-1)[places] / steps.reshape(-1)[places])
    numbers[listed] = nearest[listed]
    return small, (places, numbers)


def compare_rows(original: Array, restored: Array, dtype: str, first_row: int = 0) -> Quality:
    """SQNR as weightvid counts it everywhere: over all weights of a matrix but its outliers.

    A few outliers, which are kept nearly exactly, would hide what became of all other weights.

    Parameters
    ----------
    original, restored : ndarray
        Stored elements, shape (R, C). NaN and infinities count as zeros.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weights, found = (
            np.nan_to_num(to_float32(each, dtype), nan=0.0, posinf=0.0, neginf=0.0)
            for each in (original, restored)
        )
    outliers = outlier_mask(weights, row_scales(weights, np.abs(weights).max(axis=1)))
    if outliers.any():
        weights, found = (np.where(outliers, np.float32(0), each) for each in (weights, found))
    return quality_of(weights, found, "F32", first_row)


def quality_of(weights: Floats, stored: Array, dtype: str, first_row: int) -> Quality:
    """How near stored elements are to the weights, both of shape (R, C)."""
    signal = noise = 0.0
    worst = (inf, first_row)
    step = max(1, (1 << 16) // max(1, weights.shape[1]))
    for begin in range(0, len(weights), step):
        block = weights[begin : begin + step].astype(np.float64)
        values = to_float32(stored[begin : begin + step], dtype)
        errors = np.square(values - block).sum(axis=1)
        squares = np.square(block).sum(axis=1)
        signal += float(squares.sum())
        noise += float(errors.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where((errors > 0) & (squares > 0), squares / errors, inf)
        row = int(np.argmin(ratios))
        worst = min(worst, (float(ratios[row]), first_row + begin + row))
    worst_db = 10 * log10(worst[0]) if 0 < worst[0] < inf else inf
    return Quality(signal, noise, worst_db, worst[1])
