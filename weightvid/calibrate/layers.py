"""Quantizing a model layer by layer, each for the inputs that the quantized layers before it make.

Both models run on the same batches: the original one shows what a layer is to put out, and the one
whose first layers are quantized already what the layer really gets. Layers with the same inputs are
watched in one pass; one that follows another needs a pass of its own, or it would make up for what
the other is about to make up for itself.

A layer was to put out ``W x``, but is given x' in place of x. The weights V that come nearest,
``E |W x - V x'|^2`` least, are ``W C (H')^-1`` with ``C = E[x x'^T]`` and ``H' = E[x' x'^T]``; with
damping they stay near W in directions that x' hardly visits. Where a bias takes the means, C and
H' are covariances. V is what is quantized then, with error feedback through H'. What is best is
tried on samples held back.

In language models a layer whose outputs are added to something makes up for the gap r between that
and the original model's, too: V is ``(W C + E[r x'^T]) (H')^-1`` (residual compensation, as in
WaterSIC).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import inf
from typing import Any, Final

import numpy as np
import torch

from weightvid.calibrate.layouts import Call, Seen
from weightvid.calibrate.order import Order, look, pulls, stages, with_or_without
from weightvid.calibrate.run import calibrate
from weightvid.calibrate.state import (
    Batches,
    State,
    are_read,
    batches_of,
    change_of,
    count_samples,
    describe_change,
    first_output,
    held_back,
    running,
    samples_of,
)
from weightvid.calibrate.stats import CalibrationConfig, CalibrationStats
from weightvid.calibrate.sums import InputMeans, Sums
from weightvid.calibrate.trial import Check, Coded, some_outputs, values_of
from weightvid.calibrate.watch import Enough, Watch
from weightvid.levels.code import CodedPart, quality_of
from weightvid.levels.steps import Moments, TensorPlan
from weightvid.loader import UNIFORM, Array, Floats, TensorSpec, from_float32
from weightvid.progress import Progress, Report
from weightvid.survey import Survey

#: dampings of the fit, as parts of the mean diagonal; the first leaves the weights what they are.
#: None: quantized for the inputs of the original model.
FITS: Final = (None, 1e6, 1.0, 0.1, 0.01)

Recalibrated = tuple[dict[int, list[CodedPart]], str]


class Examples:
    """A torch module and example inputs, at hand while its archive is made."""

    def __init__(
        self, module: torch.nn.Module, inputs: Iterable[Any], config: CalibrationConfig
    ) -> None:
        self._module, self._config, self._confirmed = module, config, False
        self._batches = held_back(batches_of(inputs), config.held_back)
        self._checks = [batch for batch, back in self._batches if back]
        self._expected: list[torch.Tensor | None] = []
        #: of the outputs, by the archive judged last.
        self._change = inf

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
                "neither BatchNorm nor text as the model would write it confirms that inputs are "
                "of the kind that it is used on (in Python, trust_inputs=True would say so)"
            )
        if not 0.0 < self._change < inf:
            return "outputs cannot be compared"
        batches, memory = self._batches, self._config.memory_bytes
        with running(self._module) as state:
            order = look(state, batches)

            def run() -> Recalibrated | str:
                state.forget()
                return _Sequence(state, survey, factor).run(order, batches, memory, progress)

            return with_or_without(order, run)

    def loss(self, tensors: Iterable[tuple[TensorSpec, Array]]) -> tuple[float, str]:
        """Change of the outputs on held-back inputs, see `change_of`, and the same in words."""
        with running(self._module) as state:
            self._expected = self._expected or state.outputs(self._checks)
            for spec, stored in tensors:
                state.put(spec, stored)
            with state.quantized():
                found = state.outputs(self._checks)
        samples, reads = sum(map(samples_of, self._checks)), are_read(self._checks, self._expected)
        said = describe_change(self._expected, found, samples, reads)
        self._change = change_of(self._expected, found, reads)
        return self._change, said


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A tensor, and all that is needed to quantize it.

    Its stored elements in its shape; its plan; its moments; means over the inputs to fit to, and
    over those to check on.
    """

    elements: Array
    plan: TensorPlan
    moments: Moments
    fitted: InputMeans
    held: InputMeans

    @property
    def check(self) -> Check:
        """What errors of its weights do."""
        weights = values_of(self.elements, self.plan.spec)
        return Check(weights, self.moments.axis, self.fitted, self.held)

    def code(self, fit: float | None, number: int = 0) -> Coded:
        """Quantize it, fitted anew with a damping or as it is."""
        elements, moments = self.elements, replace(self.moments, bias=None)
        if fit is not None:
            known = self.fitted.inner(self.moments.bias is not None)
            moments = replace(moments, moment=known.moment, mean=known.mean)
            elements = from_float32(refit(self.check, known, fit), self.plan.spec.dtype)
        return Coded(self.plan, number, elements, moments)

    def choose(self) -> float | None:
        """The fit with the least error on samples held back, tried on some of the outputs."""
        index = some_outputs(self.elements, len(self.fitted.mean), self.moments.axis)
        elements, plan, rows = self.elements[index], self.plan, index[0]
        channels = plan.view.channels * elements.shape[1] // self.elements.shape[1]
        plan = replace(
            plan,
            spec=plan.spec._replace(shape=elements.shape),
            view=replace(plan.view, rows=len(elements), channels=channels),
            method=plan.method if self.moments.axis else UNIFORM,  # which is faster
            row_scales=plan.row_scales[rows],
            row_steps=None if plan.row_steps is None else plan.row_steps[rows],
        )
        # A tensor for itself is judged by its inputs alone.
        moments = replace(self.moments, outputs=None)
        some = Layer(elements, plan, moments, self.fitted.of(index[-1]), self.held.of(index[-1]))
        check, corrected = some.check, self.moments.bias is not None
        return min(FITS, key=lambda fit: check.cost_db(some.code(fit), corrected))


def refit(check: Check, means: InputMeans, damping: float) -> Floats:
    """Weights that put out the same for the new inputs, as nearly as can be, as a matrix.

    And what makes up for a gap, if one is known.
    ``damping`` is a part of the mean diagonal of H', above 0.
    """
    found = []
    owed = 0.0 if means.gap is None else means.gap.cross
    shares = check.shares(check.weights)
    for part, moment, cross in zip(shares, means.moment, means.cross, strict=True):
        # Of constant inputs both are zeros, and the weights stay.
        damped = moment + (damping * np.diagonal(moment).mean() or 1.0) * np.eye(len(moment))
        lacking = part @ (cross - moment) + owed
        fitted = part + np.linalg.solve(damped, lacking.T).T
        found.append(fitted if check.axis else fitted.T)
    return np.concatenate(found).astype(np.float32)


def _pieces(calls: Sequence[Call], name: str) -> Iterator[Seen]:
    return (seen for call in calls if call.name == name for seen in call.seen())


class _Runs:
    """What a model gives its layers; of the original one for stages ahead, if there is room."""

    def __init__(self, state: State, order: Order, batches: Batches, memory_bytes: int) -> None:
        self.order, self.batches = order, batches
        self._state, self._room = state, memory_bytes / 2
        # Layers of a language model are fitted better to all tokens alike.
        self._pulled = order.differentiable and not order.reads
        self._draws = torch.Generator().manual_seed(0)
        self._names = set[str]()
        self._kept: list[list[Call]] = []

    def watched(
        self,
        batch: Any,
        wanted: Collection[str],
        keeps: Callable[[str, int, int], bool] = lambda *_: True,
        share: float = 0.0,
    ) -> list[Call]:
        """Calls of layers; for a batch that is a share of all, how outputs pull at them, too."""
        gradients = share > 0.0 and self._pulled
        watch = Watch(self._state.tensors, gradients=gradients, wanted=wanted)
        watch.keeps, watch.sums = keeps, self.order.reads
        if not gradients:
            watch.until = {name: self.order.calls.get(name, 0) for name in wanted}
        output = None
        with torch.set_grad_enabled(gradients), watch, suppress(Enough):
            output = first_output(self._state.run(batch))
        if not gradients:
            return watch.kept
        for _ in pulls(output, False, self._draws, share):
            pass
        return [call for call in watch.kept if call.pulls]

    def originals(self, stages: Sequence[Sequence[str]]) -> Iterator[list[Call]]:
        """Calls of the layers of the first of the stages that are left, batch by batch; once."""
        if not self._names.issuperset(stages[0]):
            self._run(stages)
        for number, calls in enumerate(self._kept):
            self._kept[number] = [call for call in calls if call.name not in stages[0]]
            yield [call for call in calls if call.name in stages[0]]

    def _run(self, stages: Sequence[Sequence[str]]) -> None:
        """Run all batches; the first of them tells how many layers there is room for."""
        samples, room = count_samples(self.batches), self._room
        self._names, self._kept = set(stages[0]), []

        def keeps(name: str, given: int, made: int) -> bool:
            nonlocal room
            size = given + made * (self.order.turns * self._pulled + self.order.reads)
            room -= size * samples / samples_of(self.batches[0][0])
            if room > 0:
                self._names.add(name)
            return name in self._names

        wanted: Collection[str] = {name for stage in stages for name in stage}
        for batch, _ in self.batches:
            self._kept.append(self.watched(batch, wanted, keeps, samples_of(batch) / samples))
            wanted, keeps = self._names, lambda *_: True


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
        self, order: Order, batches: Batches, memory_bytes: int, progress: Report
    ) -> Recalibrated | str:
        """Quantize everything."""
        moments, numbers = self._survey.moments, self._numbers
        # Three sums of squares, of those that fit and of those that are held back; both runs.
        sizes = {
            name: 48 * groups * columns * (columns + 1) + 8 * elements
            for name, (groups, columns, elements) in order.shapes.items()
            if name not in order.tables and numbers.get(name) in moments
        }
        plan = stages(sizes, memory_bytes, order.sources)
        if not plan:
            return "no layer could be followed at work"
        staged = {numbers[name] for stage in plan for name in stage}
        fits = [self._quantize(number, None) for number in self._plans if number not in staged]
        runs = _Runs(self._state, order, batches, memory_bytes)
        for done, stage in enumerate(plan):
            pairs = self._gather(plan[done:], runs)
            fits += [self._quantize(numbers[name], pairs.get(name)) for name in stage]
            progress(Progress("recalibrate", done + 1, len(plan), unit="stages"))
        sequential = [fit for fit in fits if fit is not None]
        refitted = sum(fit <= 1.0 for fit in sequential)
        return self._coded, f"{len(sequential)} of {len(fits)} tensors, {refitted} fitted anew"

    def _gather(
        self, stages: Sequence[Sequence[str]], runs: _Runs
    ) -> dict[str, tuple[InputMeans, InputMeans]]:
        """What both models give the layers of the first stage: to fit to, and to check on.

        What is quantized is fitted to the former alone, as the archive as a whole is judged on the
        latter. Layers whose two runs don't match are left out: what they see depends on the values
        themselves.
        """
        sums: dict[tuple[str, bool], Sums] = defaultdict(Sums)
        lost, stage = set[str](), stages[0]
        for (batch, back), original in zip(runs.batches, runs.originals(stages), strict=True):
            with self._state.quantized():
                quantized = runs.watched(batch, stage)
            for name in stage:
                for both in zip_longest(_pieces(quantized, name), _pieces(original, name)):
                    forms = [seen and (seen.axis, seen.share, seen.inputs.shape) for seen in both]
                    if forms[0] != forms[1] or not sums[name, back].add(*both):
                        lost.add(name)
                        break
        return {
            name: (sums[name, False].means(), sums[name, True].means())
            for name in stage
            if name not in lost and {(name, False), (name, True)} <= sums.keys()
        }

    def _quantize(self, number: int, pairs: tuple[InputMeans, InputMeans] | None) -> float | None:
        """Quantize a tensor as is best on held-back inputs, and let the model run with it."""
        survey, plan, moments = self._survey, self._plans[number], self._survey.moments.get(number)
        elements, fit = survey.reader.read(plan.spec.name), None
        if pairs is None or moments is None:
            coded = Coded(plan, number, elements, moments)
        else:
            layer = Layer(elements, plan, moments, *pairs)
            fit = layer.choose()
            coded = layer.code(fit, number)
            if moments.bias is not None:
                shift = layer.check.shift(coded.values).astype(np.float32)
                coded.parts[0] = replace(coded.parts[0], shift=shift)
            if fit is not None:
                coded.parts = [self._judged(part, elements) for part in coded.parts]
        self._coded[number] = coded.parts
        coded.put(self._state, survey)
        return fit

    def _judged(self, coded: CodedPart, elements: Array) -> CodedPart:
        """The quality of a part next to the original weights, not to those fitted anew."""
        part, plan = coded.part, self._plans[coded.part.tensor]
        rows = elements.reshape(-1, part.columns)[part.first_row : part.first_row + part.rows]
        weights = values_of(rows, plan.spec)
        quality = quality_of(weights, coded.stored, plan.spec.dtype, part.first_row)
        return replace(coded, quality=quality)
