"""Running a model on example inputs, in as many passes as memory asks for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Final

import numpy as np
import torch

from weightvid.calibrate.layouts import Seen
from weightvid.calibrate.order import Order, look, pulls, stages, with_or_without
from weightvid.calibrate.state import (
    Batches,
    State,
    batches_of,
    count_samples,
    first_output,
    held_back,
    nats_apart,
    running,
    samples_of,
)
from weightvid.calibrate.stats import (
    CalibrationConfig,
    CalibrationStats,
    TensorMoments,
    model_hash,
    without_ones,
)
from weightvid.calibrate.sums import InputMeans, Sums
from weightvid.calibrate.trial import choose_damping, whole_gain
from weightvid.calibrate.watch import Watch
from weightvid.checkpoint.base import shorten
from weightvid.errors import QuantizationError
from weightvid.levels.feedback import factorize
from weightvid.levels.steps import steps_from_counts
from weightvid.loader import PACKABLE
from weightvid.progress import Progress, Report, quiet

#: divergence of what BatchNorm layers see from what they remember, above which inputs are foreign.
_FOREIGN_NATS: Final = 0.1
#: directions whose gradients are kept until inputs are laid out for them.
_AT_ONCE: Final = 4
#: of layers with more outputs, how they go together is not looked at.
_MOST_OUTPUTS: Final = 4096


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
        Batches: a tensor, a tuple or list (positional arguments) or a dict (keyword arguments), on
        any device. Batches of one sample or many; the first axis counts samples.
    config : CalibrationConfig, optional
    progress : callable
        Told about the stages ``calibrate``, ``check`` and ``whole``.

    Returns
    -------
    CalibrationStats
        The same for the same model, inputs, device and version of torch.

    Raises
    ------
    QuantizationError
        No inputs, no layer seen, or activations with NaN or infinity (the layer is named).
    """
    chosen = config or CalibrationConfig()
    batches = held_back(batches_of(inputs), chosen.held_back)
    samples = count_samples(batches)
    if not samples:
        raise QuantizationError("no example inputs: calibration needs at least one batch")
    with running(module) as state:
        order = look(state, batches)
        if not order.shapes:
            raise QuantizationError(
                "no layer was seen at work: the module's forward uses none of its own weights "
                "(scripted modules and recurrent layers cannot be watched)"
            )
        found = with_or_without(order, lambda: _passes(state, batches, order, chosen, progress))
        moments, notes, refused = found.moments, found.notes, found.foreign
        unused = [name for name, known in moments.items() if not known.useful]
        if unused and not refused:
            notes.append(f"no better than without, on inputs held back: {shorten(unused)}")
        measured = found.harms if found.confirmed and not refused else {}
        checks, gained = [batch for batch, back in batches if back], ""
        if not checks:
            gained = "nothing was held back, so what it gains is not known: give five batches"
        elif not refused and len(unused) < len(moments):
            gain = whole_gain(state, found.fitted, measured, checks, progress)
            if gain is not None and not gain[2]:
                moments = {n: replace(m, outputs=None) for n, m in moments.items()}
            if gain is not None and gain[0] <= 0.0:
                refused = (
                    "on inputs held back the model as a whole is no better with calibration than "
                    f"without ({-gain[0]:.1f} dB worse at an equal rate)"
                )
            elif gain is None:
                gained = "outputs cannot be compared, so what it gains is not known"
            else:
                gained = (
                    f"outputs on inputs held back, without -> with: {gain[1]} "
                    f"({gain[0]:.1f} dB at an equal rate)"
                )
        if refused:
            moments = {n: replace(m, damping=0.0) for n, m in moments.items()}
            measured = {}
            notes.append(f"{refused}; the statistics will not be used")
        rest = {s.name for s in state.reader.contents.tensors if s.dtype in PACKABLE} - {*moments}
        return CalibrationStats(
            model_hash(state.reader, moments), samples, moments, tuple(notes), measured, refused,
            found.confirmed and not found.foreign, gained,
            {name: model_hash(state.reader, [name]) for name in sorted(rest)},
        )  # fmt: skip


@dataclass(slots=True)
class _Gathered:
    """What all passes over the inputs give.

    ``moments`` are from all inputs, ``fitted`` from those that are not held back. ``confirmed``:
    the model knows the inputs, or whoever calls does. ``foreign``: in what the inputs are unlike
    those of training; empty: in nothing. ``harms``: of each tensor's errors, of a step of 1, if
    gradients told.
    """

    confirmed: bool
    foreign: str = ""
    moments: dict[str, TensorMoments] = field(default_factory=dict)
    fitted: dict[str, TensorMoments] = field(default_factory=dict)
    harms: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _passes(
    state: State, batches: Batches, order: Order, config: CalibrationConfig, progress: Report
) -> _Gathered:
    """Run the model as often as memory asks for."""
    found = _Gathered(config.trust_inputs or order.reads)
    if not order.differentiable:
        found.notes.append("outputs have no gradients that can be used, to say which errors matter")
    # Twice, as some inputs are held back.
    sizes = {name: 16 * g * c * (c + 1) for name, (g, c, _) in order.shapes.items()}
    across = _across(state, order, sizes, config.memory_bytes)
    for name, size in across.items():
        sizes[name] += size
    large = [name for name, size in sizes.items() if size > config.memory_bytes]
    if large:
        found.notes.append(f"beyond the memory limit of one pass: {shorten(large)}")
    passes = stages(sizes, config.memory_bytes)
    if not passes:
        raise QuantizationError(
            f"every layer is beyond the memory limit of {config.memory_bytes} bytes; raise it"
        )
    total = len(passes) * len(batches)
    for number, names in enumerate(passes):
        current = _Pass(state, names, order, across)
        current.run(batches, progress, number * len(batches), total)
        apart = current.divergence
        if apart is not None:
            found.confirmed = True
            if apart > _FOREIGN_NATS:
                found.foreign = (
                    "the example inputs are unlike those the model was trained on: its BatchNorm "
                    f"layers see other means and variances than they remember ({apart:.2f} nats "
                    f"apart; up to {_FOREIGN_NATS:g} is usual)"
                )
        for place, name in enumerate(sorted(names)):
            try:
                known = current.statistics(name, config.dampings, found.harms)
            except QuantizationError as error:
                found.notes.append(f"tensor {name!r} is left out: {error}")
                continue
            if known is not None:
                found.fitted[name], found.moments[name] = known
            progress(Progress("check", place + 1, len(names), unit="tensors"))
    return found


def _across(
    state: State, order: Order, sizes: Mapping[str, int], memory_bytes: int
) -> dict[str, int]:
    """Bytes of the outputs' moments, of tensors in which outputs may make up for one another.

    Rows of a table matter wherever they are looked up. What kernels do adds up over places, which a
    product of two moments cannot tell: on ResNets nothing is gained.
    """
    matrices = (n for n in sizes if n not in order.tables and state.tensors[n].ndim == 2)
    outputs = {name: state.tensors[name].numel() // order.shapes[name][1] for name in matrices}
    found = {name: 16 * size**2 for name, size in outputs.items() if size <= _MOST_OUTPUTS}
    return {name: size for name, size in found.items() if sizes[name] + size <= memory_bytes}


class _Pass:
    """One run over all inputs: sums of some tensors' inputs, and what BatchNorm layers see.

    A model with BatchNorm remembers: the running mean and variance of each channel are those of
    its training data. What the example inputs make of the same channels is compared with them,
    each as a normal distribution. On CIFAR and keyword models real inputs, even 16 of them, differ
    by 0.01 nats (median over channels, then over layers), blurred ones by 0.2, noise by 0.2 to 0.9.
    """

    def __init__(
        self, state: State, names: Collection[str], order: Order, across: Collection[str]
    ) -> None:
        self._state, self._names, self._order, self._back = state, names, order, False
        self._watch = Watch(state.tensors, self._add, order.differentiable, self._see_norm, names)
        self._watch.alone = order.reads
        self._sums = {(n, back): Sums(n in across) for n in names for back in (False, True)}
        #: used in two ways that don't go together, as in an autoencoder whose halves are tied.
        self._mixed: set[str] = set()
        #: squared gradients by what is looked up in tables that are output layers, too.
        self._looked_up: dict[str, float] = defaultdict(float)
        #: how often each row of a table is looked up.
        self._uses: dict[tuple[str, bool], torch.Tensor] = {}
        #: by the memory of the running mean: it and the variance; sums of inputs, squares, ones.
        self._norms: dict[int, list[Any]] = {}

    def run(self, batches: Batches, progress: Report, before: int, total: int) -> None:
        """Run the model on all batches; of all passes so many are done before, of so many."""
        draws, samples = torch.Generator().manual_seed(0), count_samples(batches)
        for place, (batch, self._back) in enumerate(batches):
            with self._watch, torch.set_grad_enabled(self._order.differentiable):
                output = first_output(self._state.run(batch))
            share = samples_of(batch) / samples
            for turn, _ in enumerate(pulls(output, self._order.reads, draws, share), 1):
                if turn % _AT_ONCE == 0:
                    self._watch.flush(end=False)
            self._watch.flush(end=True)
            progress(Progress("calibrate", before + place + 1, total, unit="batches"))

    def _add(self, seen: Seen) -> None:
        # Gradients of a table that is an output layer too (tied weights) are no part of its
        # statistics, as its rows matter wherever they are looked up.
        if seen.name not in self._names:
            return
        if seen.axis < 0:
            self._count(seen)
        elif seen.looked_up and seen.name in self._watch.calls:
            self._looked_up[seen.name] += float(seen.inputs.float().square().sum())
        elif not self._sums[seen.name, self._back].add(seen):
            self._mixed.add(seen.name)

    def _count(self, seen: Seen) -> None:
        # Rows in order are positions, of which those of longer inputs are seen too rarely.
        if seen.inputs.ndim and bool((seen.inputs.diff() > 0).all()):
            return
        rows = len(self._state.tensors[seen.name])
        uses = seen.inputs.flatten().cpu().remainder(rows).bincount(minlength=rows)
        self._uses[seen.name, self._back] = self._uses.get((seen.name, self._back), 0) + uses

    def _see_norm(self, inputs: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        known = torch.stack([mean, variance]).detach().cpu().double()
        rows = inputs.detach().movedim(1, -1).reshape(-1, inputs.shape[1]).float()
        sums = torch.stack([rows.sum(0), rows.square().sum(0)]).cpu().double()
        layer = self._norms.setdefault(mean.data_ptr(), [known, torch.zeros_like(known), 0])
        layer[1] += sums
        layer[2] += len(rows)

    @property
    def divergence(self) -> float | None:
        """Kullback-Leibler divergence in nats, medians as above; None without such layers."""
        found = []
        for known, sums, count in self._norms.values():
            mean, square = sums / max(count, 1)
            variance = (square - mean**2).clamp(min=0.0)
            found.append(float(nats_apart(mean, variance, *known).median()))
        return median(found) if found else None

    def statistics(
        self, name: str, dampings: Sequence[float], harms: dict[str, float]
    ) -> tuple[TensorMoments, TensorMoments] | None:
        """Statistics of a tensor over what is not held back, and over everything; and its harm."""
        sums, held = (
            found if found.form else None
            for found in (self._sums.pop((name, False)), self._sums.pop((name, True)))
        )
        if sums is None:
            sums, held = held, None
        if name in self._mixed:
            raise QuantizationError("it is used in two ways that don't go together")
        if sums is None or sums.form is None:
            return None
        bias, sign = self._watch.bias_of(name) or (None, 1)
        fitted = sums.means()
        known = TensorMoments(
            **_rounded(fitted), axis=sums.form[0], damping=dampings[0], bias=bias, bias_sign=sign
        )
        uses = [self._uses.pop((name, back), None) for back in (False, True)]
        if uses[0] is not None and uses[1] is not None:
            known = replace(known, row_steps=steps_from_counts(uses[0].numpy(), uses[1].numpy()))
        every = known
        if held is not None:
            means = fitted, held.means()
            damping, gain = choose_damping(self._state.reader, name, known, means, dampings)
            known = replace(known, damping=damping, gain_db=gain)
            sums.add_all(held)
            every = replace(known, **_rounded(sums.means()))
        if sums.weights is not None:
            # What error feedback leaves of errors of 1 in every weight.
            inner = without_ones(every.moment, every.mean if bias else None)
            damping = max(every.damping, dampings[0])
            left = [len(h) * factorize(h, damping, by_energy=False).mean for h in inner]
            harm = float(sums.weights @ left) + self._looked_up[name]
            harms |= {name: harm} if 0.0 < harm < np.inf else {}
        return known, every


def _rounded(means: InputMeans) -> dict[str, Any]:
    found = {"moment": means.moment, "mean": means.mean, "outputs": means.outputs}
    return {key: None if each is None else each.astype(np.float32) for key, each in found.items()}
