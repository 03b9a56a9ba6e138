"""Statistics of one tensor from its sums, and whether they are of use on held-back inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log10
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.calibrate.accumulate import Accumulator, Sums
from weightvid.calibration import TensorMoments
from weightvid.quantize import feedback, shaped
from weightvid.quantize.feedback import FeedbackConfig

#: steps, in sigmas, and rows that the trial on held-back samples is made with.
_TRIAL_SIGMAS: Final = 0.5
_TRIAL_ROWS: Final = 64
_TRIAL_GROUPS: Final = 16
#: what the moment must gain on held-back samples to be used.
_LEAST_GAIN_DB: Final = 0.1


def finish(
    name: str,
    accumulator: Accumulator,
    array: npt.NDArray[np.float32],
    dampings: Sequence[float],
) -> tuple[dict[str, TensorMoments], dict[str, TensorMoments]]:
    """Statistics of a tensor from all inputs, and from those that are not held back.

    Parameters
    ----------
    name : str
    accumulator : Accumulator
        Its sums of this tensor are taken out.
    array : ndarray of float32
        The weights.
    dampings : sequence of float
        To be tried.
    """
    # The rows of a tied table all reach the output, looked up or not.
    counts = None if name in accumulator.direct else accumulator.counts.get(name)
    counted = None if counts is None else counts.numpy().astype(np.int64)
    fitted, held = accumulator.fitted.pop(name, None), accumulator.held.pop(name, None)
    if fitted is None:
        fitted, held = held, None
    if fitted is None:
        made = {} if counted is None else {name: TensorMoments(None, None, counts=counted)}
        return made, made
    damping, gain = dampings[0], None
    if held is not None:
        weights = array.reshape(len(array), -1)
        kernel = array.shape[2:] if fitted.axis and np.prod(array.shape[2:]) > 1 else ()
        turned = weights if fitted.axis else weights.T
        damping, gain = _try(turned, kernel, fitted, held, dampings)
    known = TensorMoments(
        None,
        None,
        axis=fitted.axis,
        damping=damping,
        gain_db=gain,
        counts=counted,
        bias=accumulator.biases.get(name),
    )
    parts = (fitted.plus(held), fitted)
    whole, part = (
        replace(
            known,
            moment=sums.mean_moment.astype(np.float32),
            mean=sums.mean.astype(np.float32),
            rows=max(sums.rows),
        )
        for sums in parts
    )
    return {name: whole}, {name: part}


def _try(
    weights: npt.NDArray[np.float32],
    kernel: tuple[int, ...],
    fitted: Sums,
    held: Sums,
    dampings: Sequence[float],
) -> tuple[float, float]:
    """Best damping on held-back inputs (0: none helps), and its gain in decibel.

    The rival is what `pack` does without statistics: shaped rounding of convolutions, plain
    rounding of the others.
    """
    step = float(np.float32(_TRIAL_SIGMAS * weights.std()))
    if not (np.isfinite(step) and step > 0.0):
        return dampings[0], 0.0
    shares = _shares(weights, fitted)
    checks = held.mean_moment
    without = with_best = 0.0
    best = 0.0
    trials = list(zip(shares, fitted.mean_moment, checks, strict=True))
    trials = trials[:: max(1, len(trials) // _TRIAL_GROUPS)]
    rows = [part[:: max(1, len(part) // _TRIAL_ROWS)] for part, _, _ in trials]
    for part, (_, _, check) in zip(rows, trials, strict=True):
        levels = shaped.quantize(part, step, kernel) if kernel else np.rint(part / step)
        without += feedback.output_error(part - levels * np.float32(step), check)
    for damping in dampings:
        config = FeedbackConfig(damping=damping, lam=0.0)
        error = 0.0
        for part, (_, moment, check) in zip(rows, trials, strict=True):
            levels = feedback.quantize(part, step, moment, config)
            error += feedback.output_error(part - levels * np.float32(step), check)
        if not best or error < with_best:
            best, with_best = damping, error
    if not (without > 0.0 and with_best > 0.0):
        return dampings[0], 0.0
    gain = 10 * log10(without / with_best)
    return (best if gain >= _LEAST_GAIN_DB else 0.0), round(gain, 2)


def _shares(weights: npt.NDArray[np.float32], sums: Sums) -> list[npt.NDArray[np.float32]]:
    """Weights that each group's inputs meet, inputs along the columns."""
    groups = len(sums.rows)
    if sums.axis:
        return np.split(weights, groups)
    return np.split(weights, groups, axis=1)
