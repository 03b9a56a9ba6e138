"""`Calibration`: what packing takes to know what a model's layers see."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import log10
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from weightvid.calibrate.stats import (
    CalibrationConfig,
    CalibrationStats,
    TensorMoments,
    load_stats,
    without_ones,
)
from weightvid.checkpoint.base import shorten
from weightvid.errors import EvaluationError
from weightvid.levels.feedback import OUTPUT_DAMPING, factorize
from weightvid.levels.recipes import measured_units
from weightvid.levels.steps import Moments, steps_from_costs
from weightvid.levels.transform import forward_moment, view_of
from weightvid.loader import PACKABLE, TensorSpec, open_archive
from weightvid.progress import Report, quiet
from weightvid.targets import SIZE_TOLERANCE

if TYPE_CHECKING:
    import torch

    from weightvid.calibrate.layers import Examples
    from weightvid.checkpoint import CheckpointReader
    from weightvid.pack import Encoder
    from weightvid.survey import Survey
    from weightvid.tasks import Written

#: what a bit for every weight is worth: harm goes with 4**-bits.
DB_PER_BIT: Final = 20 * log10(2)
#: a size that is missed is corrected twice at most.
_MOST_TRIES: Final = 3
_AIM: Final = 1 - 0.4 * SIZE_TOLERANCE


@dataclass(frozen=True, slots=True)
class Calibration:
    """Statistics of one model, and the model itself with example inputs if they are at hand.

    Attributes
    ----------
    stats : CalibrationStats
    examples : Examples or None
        With a model, tensors are quantized layer by layer, each for the inputs that the quantized
        layers before it make, if that is better on held-back inputs.
    inputs : str
        What the inputs are, where nobody gave any.
    """

    stats: CalibrationStats
    examples: Examples | None = field(default=None, compare=False)
    inputs: str = ""

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Calibration:
        """Statistics that `CalibrationStats.save` wrote, or a CheckpointError."""
        return cls(load_stats(path))

    @classmethod
    def from_examples(
        cls,
        module: torch.nn.Module,
        inputs: Iterable[Any],
        config: CalibrationConfig | None = None,
        progress: Report = quiet,
    ) -> Calibration:
        """Gather the statistics of a model now, and keep it to quantize layer by layer.

        All is as for `weightvid.calibrate.calibrate`. The module must have the weights of the
        checkpoint that is packed; they change while it is, and are restored. Of two batches or
        more some are held back.
        """
        from weightvid.calibrate.layers import Examples

        examples = Examples(module, inputs, config or CalibrationConfig())
        return cls(examples.statistics(progress), examples)

    @classmethod
    def from_checkpoint(
        cls,
        reader: CheckpointReader,
        module: torch.nn.Module | None = None,
        config: CalibrationConfig | None = None,
        progress: Report = quiet,
    ) -> Calibration:
        """As `from_examples`, on inputs that the network makes itself: no data is needed.

        Parameters
        ----------
        reader : CheckpointReader
            Its weights are loaded into the module.
        module : torch.nn.Module, optional
            The network, with any weights; default: what transformers builds from the checkpoint's
            folder.
        config : CalibrationConfig, optional
        progress : callable
            Also told about the stage ``inputs``.

        Raises
        ------
        CheckpointError
            The weights don't fit the network.
        EvaluationError
            Nothing says how the network is built, transformers cannot, or no inputs can be made for
            such a network.
        """
        from weightvid.calibrate.synthesis import build, fill, own_inputs, with_names_of

        module = build(reader.location) if module is None else module
        named = with_names_of(reader, module)
        foreign = fill(named, reader)
        try:
            inputs, what, trusted = own_inputs(module, reader.location, progress)
        except EvaluationError as error:
            if not foreign:
                raise
            why = f"the network has no place for {shorten(foreign)} of the checkpoint: is it that"
            raise EvaluationError(f"{why} of these weights? And {error}") from None
        config = config or CalibrationConfig()
        config = replace(config, trust_inputs=trusted or config.trust_inputs)
        found = cls.from_examples(named, inputs, config, progress)
        # Layer by layer, MiniLM errs 9 % more on English that is held back.
        return replace(found, inputs=what, examples=None if trusted else found.examples)

    def __str__(self) -> str:
        way = "" if self.examples is None else ", layer by layer"
        return f"{self.stats.samples} samples of model {self.stats.model_sha256[:12]}{way}"

    def notes(self, survey: Survey, why: str = "") -> tuple[str, ...]:
        """What the statistics were used for; and why they alone, if the model is at hand."""
        if self.stats.refused:
            return (f"calibration was not used: {self.stats.refused}",)
        used = f"calibrated: {len(survey.moments)} of {len(survey.stats)} tensors"
        used += f", on {self.inputs}" if self.inputs else ""
        used = "; ".join(filter(None, (used, self.stats.gained)))
        return (used, f"not layer by layer: {why}") if why and self.examples else (used,)

    def apply(self, survey: Survey, progress: Report = quiet) -> Survey:
        """The survey of the checkpoint that these statistics are of, with what they say.

        A CheckpointError says that they are of another model.
        """
        self.stats.check(survey.reader)
        if self.stats.refused:
            return survey
        return with_statistics(survey, self.stats.tensors, self.stats.sensitivity)

    def refine(
        self, survey: Survey, made: Written, encoder: Encoder, progress: Report = quiet
    ) -> tuple[Written, int, tuple[str, ...]]:
        """Better an archive that has just been written from the statistics, if it can be.

        Returned are what the encoder's file holds now; the number of further encodings; what was
        done, and its gain.
        """
        notes = self.notes(survey)
        target, bound = survey.options.target, None
        if self.examples is None or self.stats.refused:
            return made, 0, notes
        if target is not None:
            if target.kind == "sqnr":
                return made, 0, self.notes(survey, "a target of SQNR is about the weights alone")
            bound = target.value * (survey.weights / 8 if target.kind == "bpw" else 1.0)
        before, first = _loss(self.examples, encoder)
        factor, tries = made.factor, 0
        while tries < _MOST_TRIES:
            found = self.examples.recalibrate(survey, factor, progress)
            if isinstance(found, str):
                return made, 0, (*notes, f"not layer by layer: {found}")
            better, tries = encoder.encode(factor, found[0]), tries + 1
            if bound is None or bound * (1 - SIZE_TOLERANCE) <= better.file_bytes <= bound:
                break
            # A bit for every quantized weight halves the step.
            beyond = 8 * (better.file_bytes - _AIM * bound)
            factor *= 2 ** (beyond / max(1, better.coded_weights))
        after, second = _loss(self.examples, encoder)
        old, new = (8 * each.file_bytes / max(1, survey.weights) for each in (made, better))
        facts = f"on inputs held back {first} -> {second}, {old:.3f} -> {new:.3f} bits per weight"
        gain = 10 * log10(max(before, 1e-300) / max(after, 1e-300)) - DB_PER_BIT * (new - old)
        if (bound is None or better.file_bytes <= bound) and gain > 0:
            return better, tries, (*notes, f"layer by layer: {found[1]}; {facts}")
        again = encoder.encode(made.factor)
        return again, tries + 1, (*notes, f"not layer by layer, which is no better: {facts}")


def _loss(examples: Examples, encoder: Encoder) -> tuple[float, str]:
    """Of the archive that the encoder's file holds, really decoded."""
    encoder.file.seek(0)
    return examples.loss(open_archive(encoder.file).stored_items())


def with_statistics(
    survey: Survey, tensors: Mapping[str, TensorMoments], sensitivity: Mapping[str, float]
) -> Survey:
    """A survey whose tensors are quantized with statistics where they are useful.

    Both are by name in the state dict; an alias counts for what it stands for.
    """
    aliases = survey.reader.contents.aliases
    known = {aliases.get(name, name): found for name, found in tensors.items()}
    losses = {aliases.get(name, name): loss for name, loss in sensitivity.items()}
    numbers = {spec.name: number for number, spec in enumerate(survey.specs)}
    # Of all tensors: one that is not quantized has no shifts for a bias that it shares.
    takers = {name: _taker(survey, found, numbers) for name, found in known.items()}
    uses, moments = Counter(takers.values()), dict[int, Moments]()
    for number in (n for n in survey.stats if survey.specs[n].name in known):
        spec, taker = survey.specs[number], takers[survey.specs[number].name]
        made = packing_moments(known[spec.name], spec, taker if uses[taker] == 1 else None)
        moments |= {} if made is None else {number: made}
    for number, made in moments.items():
        name = survey.specs[number].name
        if made.outputs is not None and name in losses:
            # Of errors of 1 in every weight, with what damping adds taken off.
            left = factorize(made.outputs, OUTPUT_DAMPING, by_energy=True).mean
            losses[name] *= left / (1 + OUTPUT_DAMPING) / np.diagonal(made.outputs).mean()
    units = measured_units(list(survey.units.values()), list(survey.stats.values()), losses)
    return replace(survey, moments=moments, units=dict(zip(survey.stats, units, strict=True)))


def _taker(survey: Survey, known: TensorMoments, numbers: Mapping[str, int]) -> int | None:
    """Number of the exact tensor that may take the shifts of a layer's mean outputs."""
    name = known.bias or ""
    number = numbers.get(survey.reader.contents.aliases.get(name, name))
    if number is None or number in survey.stats or survey.specs[number].dtype not in PACKABLE:
        return None
    kept = any(fnmatchcase(survey.specs[number].name, p) for p in survey.options.keep)
    return None if kept else number


def packing_moments(known: TensorMoments, spec: TensorSpec, bias: int | None) -> Moments | None:
    """Statistics of a tensor as packing takes them; None where they are of no use.

    Where a bias makes up for shifts of the mean outputs, errors are fed back by the covariance of
    the inputs, as their mean no longer counts.
    """
    view, (groups, columns) = view_of(spec.shape), known.mean.shape
    if known.axis == 0:
        fits = view.rows == groups * columns
        bias = bias if groups == 1 else None
    else:
        fits = view.columns == columns and not view.rows % groups
    if not (fits and known.useful):
        return None
    moment = without_ones(known.moment, None if bias is None else known.mean)
    made = Moments(moment, known.damping, known.axis, known.mean, bias, known.bias_sign)
    if known.row_steps is not None and len(known.row_steps) == view.rows:
        made = replace(made, row_steps=known.row_steps)
    outputs = known.outputs if groups == 1 else None
    size = view.rows if known.axis else view.columns
    if outputs is not None and len(outputs) == size and outputs.any():
        made = replace(made, outputs=outputs)
    if not view.kernel or known.axis == 0:
        return made
    parts = forward_moment(moment, view.kernel)
    costs = np.stack([factorize(part, known.damping, by_energy=False).cost for part in parts])
    return replace(made, frequency_steps=steps_from_costs(costs, view.kernel))
