"""Tensors quantized in memory, and what that does to outputs.

A tensor's statistics are tried on held-back inputs. Checks tensor by tensor cannot see how errors
of layers add up, so the whole model is quantized as well, once as without statistics and once with
them. What no such check sees is inputs of a wrong kind: those held back are of that kind as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.calibrate.calibration import DB_PER_BIT, packing_moments, with_statistics
from weightvid.calibrate.state import State, are_read, change_of, describe_change, samples_of
from weightvid.calibrate.stats import TensorMoments
from weightvid.calibrate.sums import InputMeans
from weightvid.checkpoint import CheckpointReader
from weightvid.levels.code import CodedPart, code_part, part_rows
from weightvid.levels.stats import tensor_stats
from weightvid.levels.steps import Moments, TensorPlan, is_codable, plan_tensor
from weightvid.levels.trellis import entropy_bits
from weightvid.loader import UNIFORM, Array, Floats, TensorSpec, from_float32, to_float32
from weightvid.pack import PackOptions
from weightvid.progress import Progress, Report
from weightvid.survey import Survey, may_code, survey_checkpoint
from weightvid.workers import Workers

#: step factor of the trial of a model, a middling one; step of those of single tensors, in sigmas.
_TRIAL_FACTOR: Final = 0.25
_TRIAL_SIGMAS: Final = 0.5
#: outputs that the trial of a single tensor is made with.
_SAMPLE_OUTPUTS: Final = 64
#: what a moment must gain on held-back samples to be used.
_LEAST_GAIN_DB: Final = 0.1


class Coded:
    """A whole tensor that is quantized in memory.

    ``stored`` are the elements that a loader will give, in the tensor's own type and shape, and
    ``values`` the same as numbers.
    """

    def __init__(
        self, plan: TensorPlan, number: int, elements: Array, moments: Moments | None
    ) -> None:
        rows = elements.reshape(plan.view.rows, plan.view.columns)
        self.parts: list[CodedPart] = [
            code_part(rows[first : first + count], plan, number, first, moments)
            for first, count in part_rows(plan)
        ]
        stored = np.concatenate([part.stored for part in self.parts])
        self._spec, self._number = plan.spec, number
        self.stored: Array = stored.reshape(plan.spec.shape)
        self.values = values_of(self.stored, plan.spec)

    @property
    def bits(self) -> float:
        """Entropy of the levels, per weight."""
        return entropy_bits(np.concatenate([part.samples for part in self.parts]))

    def put(self, state: State, survey: Survey) -> None:
        """Give it to the quantized model, with the bias that makes up for its shift."""
        state.put(self._spec, self.stored)
        shifts = [part.shift for part in self.parts if part.shift is not None]
        moments = survey.moments.get(self._number)
        if moments is not None and moments.bias is not None and np.isfinite(shifts).all():
            spec = survey.specs[moments.bias]
            values = values_of(survey.reader.read(spec.name), spec)
            values = values + moments.bias_sign * sum(shifts)
            state.put(spec, from_float32(values, spec.dtype))


def values_of(stored: Array, spec: TensorSpec) -> Floats:
    """Stored elements as float32, in their shape."""
    return to_float32(stored.reshape(-1), spec.dtype).reshape(stored.shape)


def some_outputs(tensor: Array, groups: int, axis: int) -> tuple[slice, ...]:
    """Index of what a trial is made with: some outputs of a layer of one group, in the last place.

    ``axis`` is that along which its inputs lie.
    """
    step = max(1, tensor.shape[1 - axis] // _SAMPLE_OUTPUTS) if groups == 1 else 1
    some = slice(None, None, step)
    return (some,) if axis else (slice(None), some)


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """What errors of a tensor's weights do to what its layer puts out.

    Its weights in their shape; the axis along which inputs lie; means over inputs that levels are
    fitted to, and over those held back.
    """

    weights: Floats
    axis: int
    fitted: InputMeans
    held: InputMeans

    def shares(self, weights: Floats) -> list[npt.NDArray[np.float64]]:
        """Matrices of outputs by inputs, one for each group."""
        matrix = weights.reshape(len(weights), -1).astype(np.float64)
        parts = np.split(matrix, len(self.held.mean))
        return parts if self.axis else [part.T for part in parts]

    def shift(self, values: Floats) -> npt.NDArray[np.float64]:
        """By how much the mean outputs of other weights lie below, shape (outputs,)."""
        means = zip(self.fitted.original_mean, self.fitted.mean, strict=True)
        runs = zip(self.shares(self.weights), self.shares(values), means, strict=True)
        found = np.concatenate([w @ before - v @ after for w, v, (before, after) in runs])
        return found if self.fitted.gap is None else found + self.fitted.gap.cross[:, -1]

    def cost_db(self, coded: Coded, corrected: bool) -> float:
        """Squared error of the outputs held back in decibels, a bit for every weight counted as 6.

        ``corrected``: a bias takes the shift of the means that is known from the inputs fitted to.
        """
        lost, held = 0.0, self.held
        shares = self.shares(self.weights), self.shares(coded.values)
        shifts = np.split(self.shift(coded.values) * corrected, len(held.mean))
        for g, (before, after, shift) in enumerate(zip(*shares, shifts, strict=True)):
            w, v = np.column_stack([before, 0 * shift]), np.column_stack([after, shift])
            lost += float(np.vdot(w @ held.original[g], w) + np.vdot(v @ held.moment[g], v))
            lost -= 2 * float(np.vdot(w @ held.cross[g], v))
            if held.gap is not None:
                lost += float(held.gap.power.sum() + 2 * np.vdot(held.gap.original, w))
                lost -= 2 * float(np.vdot(held.gap.cross, v))
        return 10 * log10(max(lost, 1e-300)) + DB_PER_BIT * coded.bits


def choose_damping(
    reader: CheckpointReader,
    name: str,
    known: TensorMoments,
    means: tuple[InputMeans, InputMeans],
    dampings: Sequence[float],
) -> tuple[float, float]:
    """Best damping on held-back inputs (0: none helps), and its gain in decibels.

    ``means`` are over the inputs fitted to, and over those held back. The rival is what packing
    does without statistics; rates count as well.
    """
    spec = reader.spec(name)
    if not may_code(spec):
        return dampings[0], 0.0
    array = reader.read(name)
    array = array[some_outputs(array, len(known.mean), known.axis)]
    spec = TensorSpec(name, spec.dtype, array.shape)
    stats = tensor_stats(spec, [array])
    if not is_codable(spec, stats) or packing_moments(known, spec, None) is None:
        return dampings[0], 0.0
    check = Check(values_of(array, spec), known.axis, *means)

    def cost_db(damping: float) -> float:
        bias = None if known.bias is None else 0
        moments = packing_moments(replace(known, damping=damping, outputs=None), spec, bias)
        plan = plan_tensor(stats, _TRIAL_SIGMAS * stats.typical_scale, moments=moments)
        if plan is None:
            return 0.0
        plan = plan if known.axis else replace(plan, method=UNIFORM)  # which is faster
        corrected = moments is not None and moments.bias is not None
        return check.cost_db(Coded(plan, 0, array, moments), corrected)

    costs = {damping: cost_db(damping) for damping in dampings}
    best = min(dampings, key=lambda damping: costs[damping])
    gain = cost_db(0.0) - costs[best]
    return (best if gain >= _LEAST_GAIN_DB else 0.0), round(gain, 2)


def whole_gain(
    state: State,
    moments: Mapping[str, TensorMoments],
    sensitivity: Mapping[str, float],
    batches: Sequence[Any],
    progress: Report,
) -> tuple[float, str, bool] | None:
    """By how much the outputs change less with statistics, in decibels.

    A bit for every weight counts as six; above 0: better with. And what changes without and with,
    in words; and whether outputs had better make up for one another. None where nothing changes.
    The batches are such as the statistics were not gathered on.
    """
    expected = state.outputs(batches)
    reads = are_read(batches, expected)
    plain = survey_checkpoint(state.reader, PackOptions(), Workers(None, 1))
    alone = {name: replace(known, outputs=None) for name, known in moments.items()}
    ways = [plain, with_statistics(plain, alone, sensitivity)]
    if any(known.outputs is not None for known in moments.values()):
        ways.append(with_statistics(plain, moments, sensitivity))
    changes, costs, words = list[float](), list[float](), list[str]()
    for survey in ways:
        bits, plans = 0.0, survey.plans(_TRIAL_FACTOR)
        for number, plan in plans.items():
            known = survey.moments.get(number)
            coded = Coded(plan, number, state.reader.read(plan.spec.name), known)
            coded.put(state, survey)
            bits += plan.spec.size * coded.bits
        with state.quantized():
            found = state.outputs(batches)
        state.forget()
        changes.append(change_of(expected, found, reads))
        rate = bits / max(1, sum(plan.spec.size for plan in plans.values()))
        costs.append(10 * log10(max(changes[-1], 1e-300)) + DB_PER_BIT * rate)
        words.append(describe_change(expected, found, sum(map(samples_of, batches)), reads))
        progress(Progress("whole", len(changes), len(ways), unit="trials"))
    if not (min(changes) > 0.0 and np.isfinite(changes).all()):
        return None
    best = 2 if costs[-1] < costs[1] - _LEAST_GAIN_DB else 1
    shown = f"{words[0]} -> {words[best]} at step factor {_TRIAL_FACTOR:g}"
    return costs[0] - costs[best], shown, best > 1
