"""Quantizing a model layer by layer, each for the inputs that the quantized layers before it make.

Both models run on the same batches: the original one shows what a layer is to put out, and the one
whose first layers are quantized already what the layer really gets. Layers of a stage are watched
in one pass. A pass ends as soon as nothing more can come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import torch

from weightvid.calibrate.judge import divergence, is_unit
from weightvid.calibrate.moments import Coded, values_of
from weightvid.calibrate.refit import Layer, Way, choose
from weightvid.calibrate.run import Order, calibrate, held_back, look
from weightvid.calibrate.state import State, call, change_of, outputs, ready, samples_of
from weightvid.calibrate.stats import CalibrationConfig, CalibrationStats
from weightvid.calibrate.sums import Collector, InputMeans
from weightvid.calibrate.watch import Enough, Seen, Watch
from weightvid.levels.code import CodedPart, quality_of
from weightvid.levels.steps import plan_tensor
from weightvid.loader import Array
from weightvid.pack import Survey
from weightvid.progress import Progress, Report

#: stages at most, if memory allows: each runs both models once.
_MOST_STAGES: Final = 64

Recalibrated = tuple[dict[int, list[CodedPart]], str]


class ModuleExamples:
    """A torch module and example inputs, as `Calibration` wants them."""

    def __init__(
        self, module: torch.nn.Module, batches: Sequence[Any], config: CalibrationConfig
    ) -> None:
        self._module, self._config, self._confirmed = module, config, False
        held = held_back(len(batches), config.held_back)
        self._batches = list(zip(batches, held, strict=True))
        self._checks = [batch for batch, back in self._batches if back]
        self._expected: list[torch.Tensor | None] = []

    def statistics(self, progress: Report) -> CalibrationStats:
        """Statistics of the model as it is."""
        batches = [batch for batch, _ in self._batches]
        found = calibrate(self._module, batches, self._config, progress)
        self._confirmed = found.confirmed
        return found

    def recalibrate(self, survey: Survey, factor: float, progress: Report) -> Recalibrated | str:
        """All tensors quantized layer by layer, and what was done; or why not."""
        if not self._checks:
            return "a single batch leaves nothing to check on"
        if not self._confirmed:
            return (
                "without BatchNorm nothing confirms that the inputs are of the kind that the model "
                "is used on (if you know, say that they can be trusted)"
            )
        with ready(self._module), State(self._module) as state:
            sequence = _Sequence(state, survey, factor)
            return sequence.run(self._batches, self._config.memory_bytes, progress)

    def loss(self, tensors: dict[str, Array]) -> tuple[float, str]:
        """Squared change of the outputs on held-back inputs, for tensors of an archive."""
        with ready(self._module), State(self._module) as state:
            self._expected = self._expected or outputs(self._module, self._checks)
            for name, stored in tensors.items():
                state.put(name, stored)
            state.quantized()
            found = outputs(self._module, self._checks)
        change = change_of(self._expected, found) / max(1, sum(map(samples_of, self._checks)))
        said = f"mean squared change {change:.3g}"
        pairs = zip(self._expected, found, strict=True)
        known = [(b.numpy(), a.numpy()) for b, a in pairs if b is not None and a is not None]
        if known and all(b.ndim == 2 and b.shape[1] > 1 and not is_unit(b) for b, _ in known):
            total = sum(divergence(b, a) * len(b) for b, a in known)
            said = f"KL divergence {total / sum(len(b) for b, _ in known):.3g}, {said}"
        return change, said


def stages(sizes: Mapping[str, int], memory_bytes: int, most: int) -> list[tuple[str, ...]]:
    """Layers that are taken together, stage after stage, by the bytes that each takes.

    One that is larger alone has no stage. Neighbours are joined where there are too many.

    Examples
    --------
    >>> stages(dict.fromkeys("qkvo", 10), 20, 3), stages({"q": 10, "k": 30}, 20, 9)
    ([('q', 'k'), ('v', 'o')], [('q',)])
    """
    fitting = [name for name, size in sizes.items() if size <= memory_bytes]
    least = -(-len(fitting) // most)
    found: list[list[str]] = []
    for name in fitting:
        last = found[-1] if found else []
        room = sum(sizes[other] for other in last) + sizes[name] <= memory_bytes
        if found and room and len(last) < least:
            last.append(name)
        else:
            found.append([name])
    return [tuple(stage) for stage in found]


class _Sequence:
    """Quantizes the module of a state at a step factor, layer by layer."""

    def __init__(self, state: State, survey: Survey, factor: float) -> None:
        self._state, self._survey = state, survey
        self._plans = survey.plans(factor)
        self._numbers = {survey.specs[number].name: number for number in self._plans}
        for alias, name in survey.reader.contents.aliases.items():
            if name in self._numbers:
                self._numbers.setdefault(alias, self._numbers[name])
        self._coded: dict[int, list[CodedPart]] = {}

    def run(
        self, batches: Sequence[tuple[Any, bool]], memory_bytes: int, progress: Report
    ) -> Recalibrated | str:
        """Quantize everything; of the batches it is known whether they are held back."""
        order = look(self._state, [batch for batch, _ in batches])
        moments, numbers = self._survey.moments, self._numbers
        # Three sums of squares, of those that fit and of those that are held back; both runs.
        sizes = {
            name: 48 * groups * columns * (columns + 1) + 8 * elements
            for name, (groups, columns, elements) in order.shapes.items()
            if name not in order.tables
            and numbers.get(name) in moments
            and moments[numbers[name]].axis
        }
        plan = stages(sizes, memory_bytes, _MOST_STAGES)
        if not plan:
            return "no layer could be followed at work"
        staged = {numbers[name] for stage in plan for name in stage}
        ways = [self._quantize(number, None) for number in self._plans if number not in staged]
        for done, stage in enumerate(plan):
            pairs = self._gather(stage, order, batches)
            ways += [self._quantize(numbers[name], pairs.get(name)) for name in stage]
            progress(Progress("recalibrate", done + 1, len(plan), unit="stages"))
        sequential = sum(way.kind == "sequential" for way in ways)
        refitted = sum(way.fit is not None for way in ways)
        return self._coded, f"{sequential} of {len(self._plans)} tensors, {refitted} fitted anew"

    def _gather(
        self, stage: Sequence[str], order: Order, batches: Sequence[tuple[Any, bool]]
    ) -> dict[str, tuple[InputMeans, InputMeans]]:
        """What both models give the layers of a stage: to fit to, and to check on.

        What is quantized is fitted to the former alone, as the archive as a whole is judged on the
        latter.
        """
        collector, end = Collector(), order.first_after(stage)
        for place, (batch, back) in enumerate(batches):
            seen: dict[bool, dict[str, list[Seen]]] = {}
            # Every second batch the other way round, so that weights change hands once a batch.
            for original in (True, False) if place % 2 == 0 else (False, True):
                (self._state.original if original else self._state.quantized)()
                seen[original] = self._watched(batch, stage, end)
            collector.held_back = back
            collector.add_pairs(seen[True], seen[False])
        return {
            name: (collector.fitted[name].means(), collector.held[name].means())
            for name in stage
            if name in collector.fitted and name in collector.held and name not in collector.lost
        }

    def _watched(self, batch: Any, stage: Sequence[str], end: str | None) -> dict[str, list[Seen]]:
        kept: dict[str, list[Seen]] = {}

        def note(seen: Seen) -> None:
            if seen.axis >= 0 and seen.name in stage:
                copied = replace(seen, inputs=seen.inputs.clone())
                kept.setdefault(seen.name, []).append(copied)

        with suppress(Enough), Watch(self._state.tensors, note, wanted=stage, stop=end):
            call(self._state.module, batch)
        return kept

    def _quantize(self, number: int, pairs: tuple[InputMeans, InputMeans] | None) -> Way:
        """Quantize a tensor as is best on held-back inputs, and let the model run with it."""
        survey, plan, moments = self._survey, self._plans[number], self._survey.moments.get(number)
        elements = survey.reader.read(plan.spec.name)
        if pairs is None or moments is None:
            way, coded = Way("plain"), Coded(plan, number, elements, moments)
        else:
            rival = plan_tensor(survey.stats[number], plan.step, survey.options.fidelity)
            layer = Layer(elements, plan, rival or plan, moments, *pairs)
            way = choose(layer)
            coded = layer.code(way, number)
            shift = None if moments.bias is None else layer.shift(coded.values)
            coded.parts[0] = replace(coded.parts[0], shift=shift)
            if way.fit is not None:
                coded.parts = [self._judged(part, elements) for part in coded.parts]
        self._coded[number] = coded.parts
        bias = coded.corrected_bias(survey, moments)
        self._state.put(plan.spec.name, coded.stored)
        if bias is not None:
            self._state.put(*bias)
        return way

    def _judged(self, coded: CodedPart, elements: Array) -> CodedPart:
        """The quality of a part next to the original weights, not to those fitted anew."""
        part, plan = coded.part, self._plans[coded.part.tensor]
        rows = elements.reshape(-1, part.columns)[part.first_row : part.first_row + part.rows]
        weights = values_of(rows, plan.spec)
        quality = quality_of(weights, coded.stored, plan.spec.dtype, part.first_row)
        return replace(coded, quality=quality)
