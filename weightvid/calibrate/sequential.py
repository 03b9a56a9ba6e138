"""Quantizing a model layer by layer, each for the inputs that the quantized layers before it make.

Both models run on the same batches: the original one shows what a layer is to put out, and the one
whose first layers are quantized already what the layer really gets. Layers of a stage are watched
in one pass. A pass ends as soon as nothing more can come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from weightvid.calibrate import refit
from weightvid.calibrate.order import LOOK_BATCHES, Order, look, stages
from weightvid.calibrate.outputs import call
from weightvid.calibrate.pairs import PairCollector, PairMoments, check_finite
from weightvid.calibrate.state import State
from weightvid.calibrate.watch import Enough, Seen, Watch
from weightvid.dtypes import from_float32, to_float32
from weightvid.packing.biases import bias_numbers
from weightvid.packing.quantizer import Fixed, Request
from weightvid.packing.restored import quantized
from weightvid.packing.source import ReaderSource, Source, TensorRead
from weightvid.packing.write import is_convolution
from weightvid.planning.examples import Recalibrated
from weightvid.planning.survey import Survey
from weightvid.progress import Progress, Report
from weightvid.quantize import Params
from weightvid.spec import TensorSpec

Array = npt.NDArray[np.generic]
Matrix = npt.NDArray[np.float32]

#: stages at most, if memory allows: each runs both models once.
MOST_STAGES: Final = 64


@dataclass(frozen=True, slots=True)
class _Memory(Source):
    """One tensor that lies in memory."""

    array: Array

    def read(self, spec: TensorSpec) -> Array:
        """All of it."""
        return self.array.reshape(spec.shape)

    def read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        """Some consecutive elements."""
        return self.array.reshape(-1)[first : first + count]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Means over the pairs of one tensor: those fitted to, and those held back for checks.

    What is quantized is fitted to the former alone, as the archive as a whole is judged on the
    latter.
    """

    fitted: PairMoments
    held: PairMoments


@dataclass(frozen=True, slots=True)
class _Plan:
    """A tensor to be quantized, in what way, and what its shift follows from."""

    request: Request
    way: refit.Way = refit.Way("plain")  # noqa: RUF009 - frozen
    weights: Matrix | None = None
    fitted: PairMoments | None = None


class LayerSequence:
    """Quantizes a module layer by layer.

    Parameters
    ----------
    module : torch.nn.Module
        In eval mode. Its weights change on the way, and are restored.
    surveyed : Survey
    steps : mapping of int to float
        Of every tensor that is quantized.
    state : State
        Of the module.
    """

    def __init__(
        self, module: torch.nn.Module, surveyed: Survey, steps: Mapping[int, float], state: State
    ) -> None:
        self._module = module
        self._surveyed = surveyed
        self._state = state
        self._source = ReaderSource(surveyed.reader)
        self._params: dict[int, Params] = {}
        for number, step in steps.items():
            params = surveyed.quantizer(number, step)
            if params is not None:
                self._params[number] = params
        self._numbers = {surveyed.specs[number].name: number for number in self._params}
        for alias, name in surveyed.reader.contents.aliases.items():
            if name in self._numbers:
                self._numbers.setdefault(alias, self._numbers[name])
        self._biases = bias_numbers(
            surveyed.specs, surveyed.moments, self._params.keys(), surveyed.options.keep
        )
        self._fixed: dict[int, Fixed] = {}
        self._done = self._total = 0

    def run(
        self, batches: Sequence[tuple[Any, bool]], memory_bytes: int, progress: Report
    ) -> Recalibrated | None:
        """Quantize everything.

        Parameters
        ----------
        batches : sequence of (batch, bool)
            Whether it is held back.
        memory_bytes : int
            Of one stage.
        progress : callable
            Told about the stage ``recalibrate``, in batches.

        Returns
        -------
        Recalibrated or None
            None: no layer was seen at work.
        """
        order = look(self._module, [batch for batch, _ in batches[:LOOK_BATCHES]], self._tensors)
        wanted = {
            name
            for name in order.layers
            if self._numbers.get(name) in self._surveyed.moments and name not in order.tables
        }
        plan = stages(order, wanted, memory_bytes, MOST_STAGES)
        if not plan:
            return None
        self._total = len(plan) * len(batches)
        staged = {self._numbers[name] for stage in plan for name in stage}
        jobs = self._surveyed.options.jobs or os.cpu_count() or 1
        layers = refitted = 0
        with ThreadPoolExecutor(jobs, "weightvid-quantize") as workers:
            self._quantize([_Plan(self._request(n)) for n in self._params if n not in staged],
                           workers)  # fmt: skip
            for stage in plan:
                pairs = self._gather(stage, order, batches, progress)
                plans = [self._plan(name, pairs.get(name)) for name in stage]
                self._quantize(plans, workers)
                layers += sum(p.way.kind == "sequential" for p in plans)
                refitted += sum(p.way.fit is not None for p in plans)
        return Recalibrated(self._fixed, layers, refitted)

    @property
    def _tensors(self) -> Mapping[str, torch.Tensor]:
        return self._state.tensors

    def _request(self, number: int) -> Request:
        """A tensor as it is quantized with the original model's statistics, if any."""
        surveyed, spec = self._surveyed, self._surveyed.specs[number]
        read = TensorRead(self._source, spec)
        moments = surveyed.moments.get(number)
        return Request(number, spec, self._params[number], read, surveyed.shaped(number), moments)

    def _gather(
        self,
        stage: Sequence[str],
        order: Order,
        batches: Sequence[tuple[Any, bool]],
        progress: Report,
    ) -> dict[str, _Pairs]:
        """What both models give the layers of a stage."""
        collector = PairCollector(stage)
        end = order.first_after(stage)
        for place, (batch, held_back) in enumerate(batches):
            seen: dict[bool, dict[str, list[Seen]]] = {}
            # Every second batch the other way round, so that weights change hands once a batch.
            for original in (True, False) if place % 2 == 0 else (False, True):
                (self._state.original if original else self._state.quantized)()
                seen[original] = self._watched(batch, stage, collector, end)
            collector.add(seen[True], seen[False], held_back)
            self._done += 1
            progress(Progress("recalibrate", self._done, self._total, unit="batches"))
        found = {}
        for name in stage:
            fitted, held = collector.fitted.pop(name, None), collector.held.pop(name, None)
            if fitted is None or held is None or name in collector.lost:
                continue
            found[name] = _Pairs(fitted.means(), held.means())
            check_finite(name, found[name].fitted)
        return found

    def _watched(
        self, batch: Any, stage: Sequence[str], collector: PairCollector, end: str | None
    ) -> dict[str, list[Seen]]:
        kept: dict[str, list[Seen]] = {}

        def note(seen: Seen) -> None:
            collector.record(seen, kept)

        with suppress(Enough), Watch(self._tensors, note, wanted=stage, stop=end):
            call(self._module, batch)
        return kept

    def _plan(self, name: str, pairs: _Pairs | None) -> _Plan:
        """How a layer is to be quantized: as what is best on held-back inputs."""
        request = self._request(self._numbers[name])
        plain = request.moments
        if pairs is None or plain is None:
            return _Plan(request)
        fitted, shape = pairs.fitted, request.spec.shape
        groups = len(fitted.moment)
        array = to_float32(request.read(), request.spec.dtype)
        weights = refit.turned(array, groups, fitted.axis)
        kernel = shape[2:] if fitted.axis and np.prod(shape[2:]) > 1 else ()
        biased = request.number in self._biases
        trial = refit.Trial(weights, request.params.step, kernel, biased, plain, fitted, pairs.held)
        way = refit.choose(trial)
        if way.kind == "none":
            shaped = self._surveyed.options.shapes_noise and is_convolution(request.spec)
            request = replace(request, moments=None, shaped=shaped)
        elif way.kind == "sequential":
            target = weights if way.fit is None else refit.refit(weights, fitted, way.fit)
            whole = refit.turned_back(target, groups, fitted.axis, shape)
            spec = replace(request.spec, dtype="F32")
            moments = replace(plain, moment=fitted.moment.astype(np.float32))
            request = replace(
                request, spec=spec, read=TensorRead(_Memory(whole), spec), moments=moments
            )
        return _Plan(request, way, weights, fitted)

    def _quantize(self, plans: Sequence[_Plan], workers: ThreadPoolExecutor) -> None:
        """Quantize tensors, and let the model run with what comes back."""
        found = quantized([plan.request for plan in plans], workers.map)
        for plan, (fixed, stored) in zip(plans, found, strict=True):
            number, fitted = plan.request.number, plan.fitted
            spec, shift = self._surveyed.specs[number], fixed.shift
            values = to_float32(stored, plan.request.spec.dtype)
            if fitted is not None and plan.weights is not None:
                restored = refit.turned(values, len(fitted.moment), fitted.axis)
                shift = refit.shift(plan.weights, restored, fitted)
            self._fixed[number] = replace(fixed, shift=shift)
            self._state.put(spec.name, from_float32(values, spec.dtype))
            if number in self._biases and shift is not None:
                self._put_bias(self._biases[number], shift)

    def _put_bias(self, number: int, shift: Matrix) -> None:
        spec = self._surveyed.specs[number]
        values = to_float32(self._surveyed.reader.read(spec.name), spec.dtype)
        if shift.shape == values.shape and np.isfinite(shift).all():
            self._state.put(spec.name, from_float32(values + shift, spec.dtype))
