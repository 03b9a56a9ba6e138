"""Whether statistics are of use: dampings, measured losses, and the model as a whole.

A tensor's statistics are tried on held-back inputs. How much the outputs care for the error of a
tensor is tried one tensor at a time: it is quantized as packing would do it at a middling step, and
the model runs with it in place of its own. Checks tensor by tensor cannot see how errors of layers
add up, so the whole model is quantized as well, once as without statistics and once with them. What
no such check can see is inputs of a wrong kind: those held back are of that kind as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log10
from typing import Any, Final

import numpy as np

from weightvid.calibrate.moments import (
    DB_PER_BIT,
    Coded,
    packing_moments,
    sample_rows,
    values_of,
    with_statistics,
)
from weightvid.calibrate.state import State, change_of, outputs, samples_of
from weightvid.calibrate.stats import TensorMoments
from weightvid.calibrate.sums import InputMeans
from weightvid.checkpoint import CheckpointReader
from weightvid.levels.code import block_diagonal, mean_shift
from weightvid.levels.feedback import output_error
from weightvid.levels.steps import TensorPlan, is_codable, plan_tensor, tensor_stats
from weightvid.loader import TensorSpec
from weightvid.pack import PackOptions, Survey, may_code, survey_checkpoint
from weightvid.progress import Progress, Report
from weightvid.workers import Workers

#: step factor of trials, a middling one; and step of those of single tensors, in sigmas.
TRIAL_FACTOR: Final = 0.25
_TRIAL_SIGMAS: Final = 0.5
#: what the moment must gain on held-back samples to be used.
_LEAST_GAIN_DB: Final = 0.1


def choose_damping(
    reader: CheckpointReader,
    name: str,
    known: TensorMoments,
    held: InputMeans,
    dampings: Sequence[float],
) -> tuple[float, float]:
    """Best damping on held-back inputs (0: none helps), and its gain in decibels.

    The rival is what packing does without statistics; rates count as well.
    """
    spec, groups = reader.spec(name), len(known.mean)
    if not may_code(spec):
        return dampings[0], 0.0
    array = reader.read(name)
    array = array[sample_rows(len(array), groups, known.axis)]
    spec = TensorSpec(name, spec.dtype, array.shape)
    stats = tensor_stats(spec, [array])
    if not is_codable(spec, stats) or packing_moments(known, spec, None) is None:
        return dampings[0], 0.0
    weights = values_of(array, spec)

    def cost_db(damping: float) -> float:
        """Error of the outputs in decibels, a bit for every weight counted as six."""
        bias = None if known.bias is None else 0
        moments = packing_moments(replace(known, damping=damping), spec, bias)
        plan = plan_tensor(stats, _TRIAL_SIGMAS * stats.typical_scale, moments=moments)
        if plan is None:
            return 0.0
        coded = Coded(plan, 0, array, moments)
        error = (weights - coded.values).reshape(plan.view.rows, -1)
        if known.axis == 0:
            lost = output_error(error.T, block_diagonal(held.moment))
        else:
            lost = output_error(error, held.moment)
        if moments is not None and moments.bias is not None:
            # What the bias makes up for, s, leaves |d - s|^2 of a shift d: |d|^2 is there already.
            made_up = mean_shift(error, moments, plan).astype(np.float64)
            here = mean_shift(error, replace(moments, mean=held.mean), plan).astype(np.float64)
            lost += float(np.vdot(made_up, made_up - 2 * here))
        return 10 * log10(max(lost, 1e-300)) + DB_PER_BIT * coded.bits

    costs = {damping: cost_db(damping) for damping in dampings}
    best = min(dampings, key=lambda damping: costs[damping])
    gain = cost_db(0.0) - costs[best]
    return (best if gain >= _LEAST_GAIN_DB else 0.0), round(gain, 2)


def sensitivities(
    state: State, moments: Mapping[str, TensorMoments], batches: Sequence[Any], progress: Report
) -> dict[str, float]:
    """Squared change of the outputs, per sample and squared step of the quantizer.

    By name; tensors whose errors don't reach the outputs are left out.
    """
    survey = with_statistics(_survey(state), moments, {})
    samples, plans = sum(map(samples_of, batches)), survey.plans(TRIAL_FACTOR)
    expected = outputs(state.module, batches)
    found: dict[str, float] = {}
    for place, (number, plan) in enumerate(plans.items()):
        _quantize(state, survey, number, plan)
        state.quantized()
        change = change_of(expected, outputs(state.module, batches))
        if np.isfinite(change) and change > 0.0:
            found[plan.spec.name] = change / max(1, samples) / plan.step**2
        state.forget()
        progress(Progress("sensitivity", place + 1, len(plans), unit="tensors"))
    return found


def whole_gain_db(
    state: State,
    moments: Mapping[str, TensorMoments],
    sensitivity: Mapping[str, float],
    batches: Sequence[Any],
    progress: Report,
) -> float | None:
    """By how much the outputs change less with statistics, in decibels of the squared change.

    A bit for every weight counts as six; above 0: better with. None where nothing changes. The
    batches are such as the statistics were not gathered on.
    """
    expected, plain = outputs(state.module, batches), _survey(state)
    changes, rates, done = [], [], 0
    for survey in (plain, with_statistics(plain, moments, sensitivity)):
        plans, bits = survey.plans(TRIAL_FACTOR), 0.0
        for number, plan in plans.items():
            bits += plan.spec.size * _quantize(state, survey, number, plan).bits
            done += 1
            progress(Progress("whole", done, 2 * len(plans), unit="tensors"))
        state.quantized()
        changes.append(change_of(expected, outputs(state.module, batches)))
        rates.append(bits / max(1, sum(plan.spec.size for plan in plans.values())))
        state.forget()
    if not (min(changes) > 0.0 and np.isfinite(changes).all()):
        return None
    return round(10 * log10(changes[0] / changes[1]) + DB_PER_BIT * (rates[0] - rates[1]), 2)


def _survey(state: State) -> Survey:
    return survey_checkpoint(state.reader, PackOptions(), Workers(None, 1))


def _quantize(state: State, survey: Survey, number: int, plan: TensorPlan) -> Coded:
    """Give the quantized model a tensor, and the bias that makes up for its shift."""
    moments = survey.moments.get(number)
    coded = Coded(plan, number, state.reader.read(plan.spec.name), moments)
    bias = coded.corrected_bias(survey, moments)
    state.put(plan.spec.name, coded.stored)
    if bias is not None:
        state.put(*bias)
    return coded
