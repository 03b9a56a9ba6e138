"""Running a model on example inputs, in as many passes as memory asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch

from weightvid.calibrate.accumulate import Accumulator
from weightvid.calibrate.domain import NormCheck
from weightvid.calibrate.outputs import call, first_output, samples_of
from weightvid.calibrate.sensitivity import choose_batches, sensitivities
from weightvid.calibrate.trial import finish
from weightvid.calibrate.watch import Seen, Watch
from weightvid.calibrate.whole import whole_gain_db
from weightvid.calibration import CalibrationStats, TensorMoments, model_hash
from weightvid.checkpoint.base import shorten
from weightvid.dtypes import to_float32
from weightvid.errors import QuantizationError
from weightvid.progress import Progress, Report, quiet
from weightvid.torch import TensorReader

#: batches that show which tensors are used, and how.
_LOOK_BATCHES: Final = 2


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """How to calibrate.

    Attributes
    ----------
    memory_bytes : int
        Limit of the sums of one pass; more layers take more passes over the inputs. A layer that
        is larger alone gets no statistics.
    held_back : float
        Part of the inputs that the statistics are checked on, 0 to 0.5; 0: no check.
    dampings : tuple of float
        Tried on held-back inputs; the first one when there is no check.
    domain_limit : float
        Divergence in nats of what BatchNorm layers see from what they remember of training,
        above which the inputs are taken for foreign and the statistics are not used.
    sensitivity_samples : int
        About so many samples, evenly spaced, tell how much the outputs care for each tensor's
        error; 0: the steps are those of an archive without statistics.
    trust_inputs : bool
        The inputs are known to be of the kind that the model is used on. Otherwise only the
        model's BatchNorm layers can confirm it, and where they don't, such losses are not
        measured and weights are not fitted anew: both do harm where inputs are of another kind.
    """

    memory_bytes: int = 1 << 30
    held_back: float = 0.2
    dampings: tuple[float, ...] = (0.01, 0.1, 1.0)
    domain_limit: float = 0.1
    sensitivity_samples: int = 128
    trust_inputs: bool = False

    def __post_init__(self) -> None:
        if self.memory_bytes < 1:
            raise QuantizationError("the memory limit must be positive")
        if not 0.0 <= self.held_back <= 0.5:
            raise QuantizationError(f"the part held back must be 0 to 0.5, not {self.held_back}")
        if not self.dampings or not all(0.0 < d < np.inf for d in self.dampings):
            raise QuantizationError("dampings must be positive")


def calibrate(
    module: torch.nn.Module,
    inputs: Iterable[Any],
    *,
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
    chosen = config or CalibrationConfig()
    batches = list(inputs)
    if not batches:
        raise QuantizationError("no example inputs: calibration needs at least one batch")
    tensors = dict(module.state_dict(keep_vars=True))
    reader = TensorReader({name: tensor.detach() for name, tensor in tensors.items()}, {})
    with reader, ready(module):
        found = _gather(_Subject(module, tensors, reader), batches, chosen, progress)
        moments, notes, refused = found.moments, found.notes, found.foreign
        unused = [n for n, m in moments.items() if m.moment is not None and not m.useful]
        if unused and not refused:
            notes.append(f"no better than without, on held-back inputs: {shorten(unused)}")
        measured: dict[str, float] = {}
        if chosen.sensitivity_samples and found.confirmed and not refused:
            some = choose_batches(batches, chosen.sensitivity_samples)
            measured = sensitivities(module, reader, moments, some, progress)
        if not refused:
            held_back = _held_back(batches, chosen)
            refused = _is_worse(module, found.trial, measured, held_back, progress)
        if refused:
            moments = {n: replace(m, damping=0.0) for n, m in moments.items()}
            measured = {}
            notes.append(f"{refused}; the statistics will not be used")
        return CalibrationStats(
            model_hash(reader, moments),
            sum(samples_of(batch) for batch in batches),
            {name: moments[name] for name in sorted(moments)},
            tuple(notes),
            measured,
            refused,
            found.confirmed and not found.foreign,
        )


@dataclass(frozen=True, slots=True)
class _Subject:
    """The module, and its tensors by name."""

    module: torch.nn.Module
    tensors: Mapping[str, torch.Tensor]
    reader: TensorReader


@dataclass(slots=True)
class _Gathered:
    """What all passes over the inputs gave.

    Attributes
    ----------
    moments, trial : dict of str to TensorMoments
        From all inputs, and from those that are not held back, for checks on the others.
    notes : list of str
    confirmed : bool
        The model knows the inputs, or whoever calls does.
    foreign : str
        In what the inputs are unlike those of training; empty: in nothing.
    """

    moments: dict[str, TensorMoments] = field(default_factory=dict)
    trial: dict[str, TensorMoments] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    confirmed: bool = False
    foreign: str = ""


def _gather(
    subject: _Subject, batches: Sequence[Any], config: CalibrationConfig, progress: Report
) -> _Gathered:
    """Run the model as often as memory asks for."""
    module, tensors, reader = subject.module, subject.tensors, subject.reader
    found = _Gathered(confirmed=config.trust_inputs)
    sizes = {name: len(t) for name, t in tensors.items() if t.ndim >= 1}
    needed, tables = _look_around(module, batches[:_LOOK_BATCHES], tensors)
    if not needed:
        raise QuantizationError(
            "no layer was seen at work: the module's forward uses none of its own weights "
            "(compiled and scripted modules cannot be watched)"
        )
    passes = _plan(needed, config, found.notes)
    done, total = 0, len(passes) * len(batches)
    for names in passes:
        accumulator = Accumulator(names, sizes)
        gradients = bool(names & tables)
        directions = torch.Generator().manual_seed(0)
        norms = NormCheck() if not done else None
        watch = Watch(tensors, accumulator.add, gradients, norms, names)
        with watch, torch.set_grad_enabled(gradients):
            for number, batch in enumerate(batches):
                accumulator.held_back = is_held_back(number, len(batches), config.held_back)
                result = call(module, batch)
                if gradients:
                    _send_back(result, directions)
                done += 1
                progress(Progress("calibrate", done, total, unit="batches"))
        if norms is not None:
            found.foreign = _is_foreign(norms, config)
            found.confirmed = found.confirmed or norms.divergence is not None
        for place, name in enumerate(sorted(names)):
            weights = to_float32(reader.read(name), reader.spec(name).dtype)
            made, part = finish(name, accumulator, weights, config.dampings)
            found.moments.update(made)
            found.trial.update(part)
            progress(Progress("check", place + 1, len(names), unit="tensors"))
    return found


def _is_foreign(norms: NormCheck, config: CalibrationConfig) -> str:
    """In what the inputs are unlike those of training, as far as BatchNorm layers know."""
    divergence = norms.divergence
    if divergence is None or divergence <= config.domain_limit:
        return ""
    return (
        "the example inputs are unlike those the model was trained on: its BatchNorm layers see "
        f"other means and variances than they remember ({divergence:.2f} nats apart; up to "
        f"{config.domain_limit:g} is usual)"
    )


def _is_worse(
    module: torch.nn.Module,
    moments: Mapping[str, TensorMoments],
    measured: Mapping[str, float],
    batches: Sequence[Any],
    progress: Report,
) -> str:
    """Whether the model as a whole is no better with the statistics."""
    if not batches or not any(m.useful for m in moments.values()):
        return ""
    gain = whole_gain_db(module, moments, measured, batches, progress)
    if gain is None or gain > 0.0:
        return ""
    return (
        "on held-back inputs the model as a whole is no better with calibration than without "
        f"({-gain:.1f} dB worse at an equal rate)"
    )


def _held_back(batches: Sequence[Any], config: CalibrationConfig) -> list[Any]:
    held = (is_held_back(n, len(batches), config.held_back) for n in range(len(batches)))
    return [batch for batch, back in zip(batches, held, strict=True) if back]


@contextmanager
def ready(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and none of the fast paths that hide the layers."""
    modes = [(m, m.training) for m in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for m, training in modes:
            stack.callback(setattr, m, "training", training)
        for parameter in module.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        module.eval()
        with torch.no_grad():
            yield


def _send_back(result: Any, directions: torch.Generator) -> None:
    """Gradients of the output along a random direction, where there is anything to derive."""
    output = first_output(result)
    if output is not None and output.requires_grad:
        direction = torch.randn(output.shape, generator=directions)
        (output * direction.to(output)).sum().backward()


def is_held_back(number: int, count: int, part: float) -> bool:
    """Evenly spaced batches, the last of each span; none where all would be."""
    if part <= 0.0 or count < 2:
        return False
    span = min(count, max(2, round(1 / part)))
    return number % span == span - 1


def _look_around(
    module: torch.nn.Module, batches: Sequence[Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, int], frozenset[str]]:
    """Bytes that the sums of each tensor in use will take, and which ones are embedding tables."""
    sizes: dict[str, int] = {}
    tables: set[str] = set()

    def note(seen: Seen) -> None:
        groups, columns = max(len(seen.inputs), seen.share[1]), seen.inputs.shape[-1]
        if seen.axis < 0:
            tables.add(seen.name)
            groups, columns = 1, tensors[seen.name].shape[-1]
        # Twice, as some inputs are held back.
        sizes[seen.name] = 16 * groups * columns * (columns + 1)

    with Watch(tensors, note):
        for batch in batches:
            call(module, batch)
    return sizes, frozenset(tables)


def _plan(
    sizes: Mapping[str, int], config: CalibrationConfig, notes: list[str]
) -> list[frozenset[str]]:
    """Tensors of each pass."""
    passes: list[list[str]] = []
    used = 0
    too_large = []
    for name, size in sizes.items():
        if size > config.memory_bytes:
            too_large.append(name)
            continue
        if not passes or used + size > config.memory_bytes:
            passes.append([])
            used = 0
        passes[-1].append(name)
        used += size
    if too_large:
        notes.append(f"beyond the memory limit of one pass: {shorten(too_large)}")
    if not passes:
        raise QuantizationError("every layer is beyond the memory limit; raise it")
    return [frozenset(names) for names in passes]
