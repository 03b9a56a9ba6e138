"""Whether the statistics are good for the model as a whole: tried on held-back inputs.

Checks tensor by tensor cannot see how errors of layers add up, nor whether steps that follow
measured losses fit inputs that they were not measured on. So the whole model is quantized at a
middling step, once as without statistics and once with them, and its outputs on held-back inputs
are compared. What no such check can see is inputs of a wrong kind: those held back are of that kind
as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any, Final

import numpy as np
import torch

from weightvid import allocate
from weightvid.calibrate.outputs import call, first_output
from weightvid.calibrate.sensitivity import TRIAL_FACTOR, change_of, quantizable, quantized
from weightvid.calibrate.state import State
from weightvid.calibration import TensorMoments
from weightvid.dtypes import from_float32
from weightvid.progress import Progress, Report
from weightvid.quantize.rate import entropy_bits

#: what a bit for every weight is worth.
_DB_PER_BIT: Final = 20 * log10(2)


def whole_gain_db(
    module: torch.nn.Module,
    moments: Mapping[str, TensorMoments],
    sensitivity: Mapping[str, float],
    batches: Sequence[Any],
    progress: Report,
) -> float | None:
    """By how much the outputs change less with statistics, at an equal rate.

    Parameters
    ----------
    module : torch.nn.Module
        In eval mode, without gradients. Its weights change on the way, and are restored.
    moments, sensitivity : mapping
        Statistics by name of the tensor.
    batches : sequence
        Inputs that the statistics were not gathered on.
    progress : callable
        Told about the stage ``whole``, in tensors.

    Returns
    -------
    float or None
        Decibels of the squared change, a bit for every weight counted as six; above 0: better
        with. None where nothing changes.
    """
    expected = [first_output(call(module, batch)) for batch in batches]
    changes, rates = [], []
    with State(module) as state:
        stats = quantizable(state.reader)
        plain = allocate.units(stats)
        measured = allocate.measured_units(plain, stats, sensitivity) if stats else []
        ways: list[tuple[list[float], Mapping[str, TensorMoments]]]
        ways = [(plain, {}), (measured, moments)]
        total, done = 2 * len(stats), 0
        for units, known in ways:
            bits = 0.0
            for unit, tensor in zip(units, stats, strict=True):
                step = allocate.limited(TRIAL_FACTOR * unit, tensor)
                spec = tensor.spec
                levels = quantized(state.reader, spec, step, known.get(spec.name))
                bits += entropy_bits(levels) * spec.size
                values = levels.astype(np.float32) * np.float32(step)
                state.put(spec.name, from_float32(values.reshape(spec.shape), spec.dtype))
                done += 1
                progress(Progress("whole", done, total, unit="tensors"))
            state.quantized()
            changes.append(change_of(module, batches, expected))
            rates.append(bits / max(1, sum(tensor.spec.size for tensor in stats)))
            state.original()
    if not (stats and min(changes) > 0.0 and np.isfinite(changes).all()):
        return None
    gain = 10 * log10(changes[0] / changes[1]) + _DB_PER_BIT * (rates[0] - rates[1])
    return round(gain, 2)
