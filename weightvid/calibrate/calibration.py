"""`Calibration`: what packing takes to know what a model's layers see."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log
from typing import TYPE_CHECKING, Any, Final, Protocol

from weightvid.calibrate.moments import with_statistics
from weightvid.calibrate.stats import CalibrationConfig, CalibrationStats, load_stats
from weightvid.errors import QuantizationError
from weightvid.loader import Array, open_archive
from weightvid.progress import Report, quiet
from weightvid.targets import SIZE_TOLERANCE

if TYPE_CHECKING:
    import torch

    from weightvid.levels.code import CodedPart
    from weightvid.pack import Encoder, Survey, Written

#: harm goes with 4**-bits: what a bit for every weight is worth, in the logarithm of the harm.
_PER_BIT: Final = 2 * log(2)
#: a size that is missed is corrected twice at most.
_MOST_TRIES: Final = 3
_AIM: Final = 1 - 0.4 * SIZE_TOLERANCE


class Examples(Protocol):
    """A model and example inputs, at hand while its archive is made."""

    def recalibrate(
        self, survey: Survey, factor: float, progress: Report
    ) -> tuple[dict[int, list[CodedPart]], str] | str:
        """All tensors quantized layer by layer, and what was done; or why not."""

    def loss(self, tensors: dict[str, Array]) -> tuple[float, str]:
        """Squared change of the outputs on held-back inputs, and that and the KL in words."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Statistics of one model, and the model itself with example inputs if they are at hand.

    Attributes
    ----------
    stats : CalibrationStats
    examples : Examples or None
        With a model, tensors are quantized layer by layer, each for the inputs that the quantized
        layers before it make, if that is better on held-back inputs.
    """

    stats: CalibrationStats
    examples: Examples | None = field(default=None, compare=False)

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

        Parameters
        ----------
        module : torch.nn.Module
            With the weights of the checkpoint that is packed. They change while it is, and are
            restored.
        inputs : iterable
            As for `weightvid.calibrate.calibrate`. Of two batches or more some are held back.
        config : CalibrationConfig, optional
        progress : callable

        Raises
        ------
        QuantizationError
            As `weightvid.calibrate.calibrate`.
        """
        from weightvid.calibrate.sequence import ModuleExamples

        examples = ModuleExamples(module, list(inputs), config or CalibrationConfig())
        return cls(examples.statistics(progress), examples)

    def __str__(self) -> str:
        way = "" if self.examples is None else ", layer by layer"
        return f"{self.stats.samples} samples of model {self.stats.model_sha256[:12]}{way}"

    def apply(self, survey: Survey, progress: Report = quiet) -> Survey:
        """The survey of the checkpoint that these statistics are of, with what they say.

        Raises
        ------
        CheckpointError
            They are of another model.
        QuantizationError
            Options that calibration contradicts.
        """
        if survey.options.fidelity == "weights":
            raise QuantizationError(
                "calibration keeps the outputs of a model, which fidelity 'weights' gives up: "
                "choose 'outputs' or 'integers', or pack without calibration"
            )
        if survey.options.video.qp is not None:
            raise QuantizationError(
                "calibration chooses levels, which a QP gives up: leave one of both out"
            )
        self.stats.check(survey.reader)
        if self.stats.refused:
            return survey
        return with_statistics(survey, self.stats.tensors, self.stats.sensitivity)

    def refine(
        self, survey: Survey, made: Written, encoder: Encoder, progress: Report = quiet
    ) -> tuple[Written, int, tuple[str, ...]]:
        """Better an archive that has just been written from the statistics, if it can be.

        Returns
        -------
        tuple of Written, int, tuple of str
            What the encoder's file holds now; further encodings; what was done, and its gain.
        """
        if self.stats.refused:
            return made, 0, (f"calibration was not used: {self.stats.refused}",)
        notes = (f"calibrated: {len(survey.moments)} of {len(survey.stats)} tensors",)
        target, bound = survey.options.target, None
        if self.examples is None:
            return made, 0, notes
        if target is not None:
            if target.kind == "sqnr":
                why = "a target of SQNR is about the weights alone"
                return made, 0, (*notes, f"not layer by layer: {why}")
            bound = target.value * (survey.weights / 8 if target.kind == "bpw" else 1.0)
        before, first = _loss(self.examples, encoder)
        factor, tries = made.factor, 0
        while True:
            found = self.examples.recalibrate(survey, factor, progress)
            if isinstance(found, str):
                return made, 0, (*notes, f"not layer by layer: {found}")
            better, tries = encoder.encode(factor, found[0]), tries + 1
            if bound is None or tries == _MOST_TRIES:
                break
            if bound * (1 - SIZE_TOLERANCE) <= better.file_bytes <= bound:
                break
            # A bit for every quantized weight halves the step.
            beyond = 8 * (better.file_bytes - _AIM * bound)
            factor *= 2 ** (beyond / max(1, better.coded_weights))
        after, second = _loss(self.examples, encoder)
        old, new = (8 * each.file_bytes / max(1, survey.weights) for each in (made, better))
        facts = f"on held-back inputs {first} -> {second}, {old:.3f} -> {new:.3f} bits per weight"
        gained = log(max(before, 1e-300) / max(after, 1e-300)) - _PER_BIT * (new - old)
        if (bound is None or better.file_bytes <= bound) and gained > 0:
            return better, tries, (*notes, f"layer by layer: {found[1]}; {facts}")
        again = encoder.encode(made.factor)
        return again, tries + 1, (*notes, f"not layer by layer, which is no better: {facts}")


def _loss(examples: Examples, encoder: Encoder) -> tuple[float, str]:
    """Of the archive that the encoder's file holds, really decoded."""
    encoder.file.seek(0)
    items = open_archive(encoder.file).stored_items()
    return examples.loss({spec.name: array for spec, array in items})
