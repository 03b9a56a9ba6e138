"""Running a model on example inputs, in as many passes as memory asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Final

import torch

from weightvid.calibrate.state import State, call, first_output, ready, samples_of
from weightvid.calibrate.stats import (
    CalibrationConfig,
    CalibrationStats,
    TensorMoments,
    model_hash,
)
from weightvid.calibrate.sums import Collector
from weightvid.calibrate.trial import choose_damping, sensitivities, whole_gain_db
from weightvid.calibrate.watch import Seen, Watch
from weightvid.checkpoint.common import shorten
from weightvid.errors import QuantizationError
from weightvid.progress import Progress, Report, quiet

#: batches that show which tensors are used, and how.
_LOOK_BATCHES: Final = 2


def calibrate(
    module: torch.nn.Module,
    inputs: Iterable[Any],
    config: CalibrationConfig | None = None,
    progress: Report = quiet,
) -> CalibrationStats:
    """Statistics of a model's layers on example inputs.

    Parameters
    ----------
    module : torch.nn.Module
        With its weights, on any device. It runs in eval mode; its mode is restored.
    inputs : iterable
        Batches: a tensor, a tuple (positional arguments) or a dict (keyword arguments), on any
        device. Batches of one sample or many; the first axis counts samples.
    config : CalibrationConfig, optional
    progress : callable
        Told about the stages ``calibrate`` (batches), ``check``, ``sensitivity`` and ``whole``
        (tensors).

    Returns
    -------
    CalibrationStats
        The same for the same model, inputs, device and version of torch.

    Raises
    ------
    QuantizationError
        No inputs, no layer seen, or activations with NaN or infinity (the layer is named).
    """
    chosen, batches = config or CalibrationConfig(), list(inputs)
    if not batches:
        raise QuantizationError("no example inputs: calibration needs at least one batch")
    held = held_back(len(batches), chosen.held_back)
    with ready(module), State(module) as state:
        found = _Gathering(state, chosen, progress)
        found.run(list(zip(batches, held, strict=True)))
        moments, notes, refused = found.moments, found.notes, found.foreign
        unused = [name for name, known in moments.items() if not known.useful]
        if unused and not refused:
            notes.append(f"no better than without, on held-back inputs: {shorten(unused)}")
        measured: dict[str, float] = {}
        if chosen.sensitivity_samples and found.confirmed and not refused:
            total = sum(map(samples_of, batches))
            some = batches[:: max(1, total // chosen.sensitivity_samples)]
            measured = sensitivities(state, moments, some, progress)
        checks = [batch for batch, back in zip(batches, held, strict=True) if back]
        if not refused and checks and len(unused) < len(moments):
            gain = whole_gain_db(state, found.trial, measured, checks, progress)
            if gain is not None and gain <= 0.0:
                refused = (
                    "on held-back inputs the model as a whole is no better with calibration than "
                    f"without ({-gain:.1f} dB worse at an equal rate)"
                )
        if refused:
            moments = {n: replace(m, damping=0.0) for n, m in moments.items()}
            measured = {}
            notes.append(f"{refused}; the statistics will not be used")
        return CalibrationStats(
            model_hash(state.reader, moments),
            sum(map(samples_of, batches)),
            moments,
            tuple(notes),
            measured,
            refused,
            found.confirmed and not found.foreign,
        )


def held_back(count: int, part: float) -> list[bool]:
    """Which batches are held back: evenly spaced, the last of each span; none where all would be.

    Examples
    --------
    >>> held_back(5, 0.5), held_back(1, 0.5)
    ([False, True, False, True, False], [False])
    """
    if part <= 0.0 or count < 2:
        return [False] * count
    span = min(count, max(2, round(1 / part)))
    return [number % span == span - 1 for number in range(count)]


class _Gathering:
    """What all passes over the inputs give.

    ``moments`` are from all inputs, ``trial`` from those that are not held back. ``confirmed``:
    the model knows the inputs, or whoever calls does. ``foreign``: in what the inputs are unlike
    those of training; empty: in nothing.
    """

    def __init__(self, state: State, config: CalibrationConfig, progress: Report) -> None:
        self._state, self._config, self._progress = state, config, progress
        self.moments: dict[str, TensorMoments] = {}
        self.trial: dict[str, TensorMoments] = {}
        self.notes: list[str] = []
        self.confirmed, self.foreign = config.trust_inputs, ""

    def run(self, batches: Sequence[tuple[Any, bool]]) -> None:
        """Run the model as often as memory asks for; of batches, whether they are held back."""
        order = look(self._state, [batch for batch, _ in batches])
        if not order.shapes:
            raise QuantizationError(
                "no layer was seen at work: the module's forward uses none of its own weights "
                "(compiled and scripted modules cannot be watched)"
            )
        # Twice, as some inputs are held back.
        sizes = {name: 16 * g * c * (c + 1) for name, (g, c, _) in order.shapes.items()}
        passes = _plan(sizes, self._config, self.notes)
        for number, names in enumerate(passes):
            collector, norms = Collector(), NormCheck()
            gradients = bool(names & order.tables)
            directions = torch.Generator().manual_seed(0)
            watch = Watch(self._state.tensors, collector.add, gradients, norms.see, names)
            with watch, torch.set_grad_enabled(gradients):
                for place, (batch, back) in enumerate(batches):
                    collector.held_back = back
                    result = call(self._state.module, batch)
                    if gradients:
                        _send_back(result, directions)
                    done, total = number * len(batches) + place + 1, len(passes) * len(batches)
                    self._progress(Progress("calibrate", done, total, unit="batches"))
            self._compare(norms.divergence)
            for place, name in enumerate(sorted(names)):
                self._finish(collector, watch, name)
                self._progress(Progress("check", place + 1, len(names), unit="tensors"))

    def _compare(self, apart: float | None) -> None:
        """Take note of what BatchNorm layers say of the inputs."""
        self.confirmed = self.confirmed or apart is not None
        if apart is not None and apart > self._config.domain_limit:
            self.foreign = (
                "the example inputs are unlike those the model was trained on: its BatchNorm "
                f"layers see other means and variances than they remember ({apart:.2f} nats "
                f"apart; up to {self._config.domain_limit:g} is usual)"
            )

    def _finish(self, collector: Collector, watch: Watch, name: str) -> None:
        """Statistics of a tensor from its sums."""
        fitted, held = collector.fitted.pop(name, None), collector.held.pop(name, None)
        if fitted is None:
            fitted, held = held, None
        if fitted is None:
            return
        bias, sign = watch.bias_of(name) or (None, 1)
        moment, mean = fitted.rounded()
        dampings = self._config.dampings
        known = TensorMoments(moment, mean, fitted.axis, dampings[0], None, bias, sign)
        if held is not None:
            damping, gain = choose_damping(self._state.reader, name, known, held.means(), dampings)
            known = replace(known, damping=damping, gain_db=gain)
            moment, mean = fitted.plus(held).rounded()
        self.trial[name] = known
        self.moments[name] = replace(known, moment=moment, mean=mean)


def _send_back(result: Any, directions: torch.Generator) -> None:
    """Gradients of the output along a random direction, where there is anything to derive."""
    output = first_output(result)
    if output is not None and output.requires_grad:
        direction = torch.randn(output.shape, generator=directions)
        (output * direction.to(output)).sum().backward()


@dataclass(slots=True)
class Order:
    """What a look at a few batches shows: tensors in the order of first use, all last calls.

    ``shapes`` gives groups, columns, and elements of the inputs of one call.
    """

    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def first_after(self, names: Collection[str]) -> str | None:
        """A tensor that is used first after the last use of these: nothing of theirs comes then."""
        last = max((i for i, name in enumerate(self.calls) if name in names), default=-1)
        before = set(self.calls[: last + 1])
        return next((name for name in self.calls[last + 1 :] if name not in before), None)


def look(state: State, batches: Sequence[Any]) -> Order:
    """Run a few batches and note what is used."""
    order = Order()

    def note(seen: Seen) -> None:
        order.calls.append(seen.name)
        if seen.axis < 0:
            order.tables.add(seen.name)
            order.shapes[seen.name] = 1, state.tensors[seen.name].shape[-1], 0
        elif seen.name not in order.tables:
            size = seen.inputs.numel(), order.shapes.get(seen.name, (0, 0, 0))[2]
            order.shapes[seen.name] = seen.groups, seen.inputs.shape[-1], max(size)

    with Watch(state.tensors, note):
        for batch in batches[:_LOOK_BATCHES]:
            order.calls.clear()
            call(state.module, batch)
    return order


def _plan(
    sizes: Mapping[str, int], config: CalibrationConfig, notes: list[str]
) -> list[frozenset[str]]:
    """Tensors of each pass."""
    passes: list[list[str]] = []
    room = 0
    large = [name for name, size in sizes.items() if size > config.memory_bytes]
    for name in sizes:
        if name in large:
            continue
        room -= sizes[name]
        if not passes or room < 0:
            passes.append([])
            room = config.memory_bytes - sizes[name]
        passes[-1].append(name)
    if large:
        notes.append(f"beyond the memory limit of one pass: {shorten(large)}")
    if not passes:
        raise QuantizationError(
            f"every layer is beyond the memory limit of {config.memory_bytes} bytes; raise it"
        )
    return [frozenset(names) for names in passes]


class NormCheck:
    """Whether the example inputs are of the kind that the model was trained on.

    A model with BatchNorm remembers: the running mean and variance of each channel are those of
    its training data. What the example inputs make of the same channels is compared with them,
    each as a normal distribution. On CIFAR and keyword models real inputs, even 16 of them, differ
    by 0.01 nats (median over channels, then over layers), blurred ones by 0.2, noise by 0.2 to 0.9.
    """

    def __init__(self) -> None:
        #: by the memory of the running mean: it and the variance; sums of inputs and squares.
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor, list[int]]] = {}

    def see(self, inputs: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Look at the inputs of a layer, and at what it remembers."""
        known = torch.stack([mean, variance]).detach().cpu().double()
        layer = self._layers.setdefault(mean.data_ptr(), (known, torch.zeros_like(known), [0]))
        rows = inputs.detach().movedim(1, -1).reshape(-1, inputs.shape[1]).float()
        layer[1].add_(torch.stack([rows.sum(0), rows.square().sum(0)]).cpu().double())
        layer[2][0] += len(rows)

    @property
    def divergence(self) -> float | None:
        """Kullback-Leibler divergence in nats, medians as above; None without such layers."""
        found = []
        for known, sums, (count,) in self._layers.values():
            mean, square = sums / max(count, 1)
            variance = known[1] + 1e-5
            ratio = ((square - mean**2).clamp(min=0.0) + 1e-5) / variance
            apart = (mean - known[0]) ** 2 / variance
            found.append(float((0.5 * (ratio + apart - 1.0 - ratio.log())).median()))
        return median(found) if found else None
