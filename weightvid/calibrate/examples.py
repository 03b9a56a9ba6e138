"""A model with its example inputs, handed to packing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightvid.calibrate.outputs import call, first_output, samples_of
from weightvid.calibrate.run import CalibrationConfig, calibrate, is_held_back, ready
from weightvid.calibrate.sequential import LayerSequence
from weightvid.calibrate.state import State
from weightvid.calibration import CalibrationStats
from weightvid.planning.examples import Examples, Recalibrated
from weightvid.planning.survey import Survey
from weightvid.progress import Report


class ModuleExamples(Examples):
    """A torch module and example inputs, for ``PackOptions(calibration=...)``.

    Parameters
    ----------
    module : torch.nn.Module
        With the weights of the checkpoint that is packed. They change while it is, and are
        restored.
    inputs : iterable
        As for `weightvid.calibrate.calibrate`. Of two batches or more some are held back, to
        check on; with a single one nothing is quantized layer by layer.
    config : CalibrationConfig, optional
    """

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Iterable[Any],
        config: CalibrationConfig | None = None,
    ) -> None:
        self._module = module
        self._batches = list(inputs)
        self._config = config or CalibrationConfig()
        self._statistics: CalibrationStats | None = None
        self._expected: list[torch.Tensor | None] | None = None
        count = len(self._batches)
        self._held = [is_held_back(n, count, self._config.held_back) for n in range(count)]

    def statistics(self, progress: Report) -> CalibrationStats:
        """Statistics of the model as it is; gathered once."""
        if self._statistics is None:
            self._statistics = calibrate(
                self._module, self._batches, config=self._config, progress=progress
            )
        return self._statistics

    def recalibrate(
        self, surveyed: Survey, steps: Mapping[int, float], progress: Report
    ) -> Recalibrated | str:
        """Quantize at these steps, layer by layer."""
        if not any(self._held):
            return "a single batch leaves nothing to check on"
        if not self.statistics(progress).confirmed:
            return (
                "without BatchNorm nothing confirms that the inputs are of the kind that the model "
                "is used on (if you know, say that they can be trusted)"
            )
        batches = list(zip(self._batches, self._held, strict=True))
        with ready(self._module), State(self._module) as state:
            sequence = LayerSequence(self._module, surveyed, steps, state)
            found = sequence.run(batches, self._config.memory_bytes, progress)
        return "no layer could be followed at work" if found is None else found

    def loss(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> float:
        """Mean squared change of the outputs on held-back inputs, for tensors of an archive."""
        batches = [b for b, held in zip(self._batches, self._held, strict=True) if held]
        with ready(self._module):
            if self._expected is None:
                self._expected = [first_output(call(self._module, b)) for b in batches]
            with State(self._module) as state:
                for name, stored in tensors.items():
                    state.put(name, stored)
                state.quantized()
                found = [first_output(call(self._module, b)) for b in batches]
        total = 0.0
        for before, after in zip(self._expected, found, strict=True):
            if before is not None and after is not None:
                total += float((after.double() - before.double()).square().sum())
        return total / max(1, sum(samples_of(batch) for batch in batches))
