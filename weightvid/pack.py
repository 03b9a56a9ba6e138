"""Checkpoint to archive.

Two passes over the source, one tensor in memory at a time: a survey (statistics, from which the
steps follow), then quantizing, tiling and encoding; a target takes the second pass a few times.
The archive is written under a temporary name, decoded and checked against its own hashes, and
renamed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, cast

from weightvid.atomic import AtomicFile
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.errors import CheckpointError, FormatError, QuantizationError
from weightvid.loader import open_archive
from weightvid.loader.stream import Spill
from weightvid.packing.engines import open_workers
from weightvid.packing.quantizer import Fixed
from weightvid.packing.workers import Workers
from weightvid.packing.write import WritePlan, Written, write_archive
from weightvid.planning.caution import cautions
from weightvid.planning.options import MIN_MANTISSA_BITS, Evaluation, PackOptions
from weightvid.planning.search import Trial, search
from weightvid.planning.sequential import Refiner
from weightvid.planning.survey import Survey, plan_archive, slopes, survey
from weightvid.planning.target import Target
from weightvid.progress import Progress, Report, quiet
from weightvid.remote import is_url
from weightvid.remote.upload import check_target, upload

__all__ = [
    "MIN_MANTISSA_BITS",
    "Evaluation",
    "PackOptions",
    "PackReport",
    "Target",
    "pack_checkpoint",
]


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a packing did.

    Attributes
    ----------
    file_bytes, source_bytes : int
        Of the archive, and of all tensors of the source.
    weights : int
        Elements of all floating-point tensors of the source.
    coded_weights : int
        Those that were quantized.
    stream_bytes : int
        Of the packets and of the digits beside them.
    sqnr_db : float or None
        Over all quantized tensors.
    frames : int
    width, height : int
        Of a frame, in samples.
    skipped : tuple of str
        Entries of the source that are no tensors.
    unused_keeps : tuple of str
        Patterns of ``keep`` that no tensor matches.
    seconds : float
    side_files : tuple of str
        Paths of the small other files that the archive keeps.
    step_factor : float
        k that the steps came from.
    encodings : int
        Whole encodings that a search took; 1 without one.
    warnings : tuple of str
        Why the accuracy should be checked.
    loss : float or None
        Of the decoded archive, by the evaluation: mean KL divergence of the logits, 1 - mean
        cosine of unit vectors, or the relative drop of a number.
    metric_before, metric : float or None
        What the evaluation measured of the original, and of the decoded archive.
    evaluations : int
        Calls of the evaluation.
    calibration : str
        With example inputs at hand: which of two calibrated archives was kept, and why.
    """

    file_bytes: int
    source_bytes: int
    weights: int
    coded_weights: int
    stream_bytes: int
    sqnr_db: float | None
    frames: int
    width: int
    height: int
    skipped: tuple[str, ...]
    unused_keeps: tuple[str, ...]
    seconds: float
    side_files: tuple[str, ...] = ()
    step_factor: float = 0.0
    encodings: int = 1
    warnings: tuple[str, ...] = ()
    loss: float | None = None
    metric_before: float | None = None
    metric: float | None = None
    evaluations: int = 0
    calibration: str = ""

    @property
    def bits_per_weight(self) -> float:
        """8 x whole file / weights; 0 without weights."""
        return 8 * self.file_bytes / self.weights if self.weights else 0.0

    @property
    def stream_bits_per_weight(self) -> float:
        """8 x (packets + digits) / quantized weights; 0 without any."""
        return 8 * self.stream_bytes / self.coded_weights if self.coded_weights else 0.0


def pack_checkpoint(
    source: str | os.PathLike[str] | CheckpointReader,
    destination: str | os.PathLike[str],
    options: PackOptions | None = None,
    progress: Report = quiet,
) -> PackReport:
    """Pack a checkpoint into an archive.

    Parameters
    ----------
    source : path, address or CheckpointReader
    destination : path or address
        Appears whole, or not at all. At an address (``s3://...``), after it was written and
        checked here.
    options : PackOptions
    progress : callable
        Told about the stages ``survey``, ``encode`` and ``verify`` (and ``download``).

    Raises
    ------
    CheckpointError, QuantizationError, CodecError, OutputError, RemoteError
    """
    chosen = options or PackOptions()
    if is_url(destination):
        chosen.check()
        check_target(destination, force=chosen.force)
        with tempfile.TemporaryDirectory(prefix="weightvid-") as folder:
            here = Path(folder, "archive.mp4")
            report = pack_checkpoint(source, here, chosen, progress)
            upload(here, destination)
        return report
    if isinstance(source, CheckpointReader):
        return _pack(source, destination, chosen, progress)
    if Path(destination).exists() and os.path.realpath(source) == os.path.realpath(destination):
        raise CheckpointError(f"{destination} is the source itself")
    with open_checkpoint(source, progress) as reader:
        return _pack(reader, destination, chosen, progress)


def _pack(
    reader: CheckpointReader,
    destination: str | os.PathLike[str],
    options: PackOptions,
    progress: Report,
) -> PackReport:
    began = perf_counter()
    options.check()
    output = AtomicFile(destination, force=options.force)
    try:
        feedback = options.calibration is not None
        with open_workers(options.cluster, options.jobs, algebra=feedback) as workers:
            workers.folder = output.temporary.parent
            surveyed = survey(reader, options, progress, workers)
            encoder = _Encoder(surveyed, cast(BinaryIO, output.file), workers, progress)
            encodings, verdict = 1, _Judged()
            if options.evaluation is not None:
                made, encodings, verdict = _measured(surveyed, encoder, progress)
            elif options.target is None:
                made = encoder.encode(options.first_factor)
            else:
                made, encodings = search(surveyed, options.target, encoder.encode)
            told = ""
            if options.examples is not None and surveyed.moments:
                refined = Refiner(
                    surveyed, options.examples, encoder.encode_fixed, encoder.stream, progress
                ).run(made)
                made, told = refined.made, refined.told
                encodings += refined.encodings
        if options.verify:
            _verify(encoder.stream, output.temporary.parent, reader, progress)
    except BaseException:
        output.abort()
        raise
    output.commit()
    tensors = reader.contents.tensors
    plan, written = encoder.plan, encoder.written
    return PackReport(
        file_bytes=made.file_bytes,
        source_bytes=sum(spec.stored_bytes for spec in tensors),
        weights=surveyed.weights,
        coded_weights=written.weights,
        stream_bytes=written.packet_bytes + written.digit_bytes,
        sqnr_db=written.sqnr_db,
        frames=written.frames,
        width=plan.header.geometry.width,
        height=plan.header.geometry.height,
        skipped=reader.contents.skipped,
        unused_keeps=tuple(
            pattern
            for pattern in options.keep
            if not any(fnmatchcase(spec.name, pattern) for spec in tensors)
        ),
        seconds=perf_counter() - began,
        side_files=tuple(entry.path for entry in plan.header.files),
        step_factor=made.factor,
        encodings=encodings,
        warnings=_warnings(surveyed, plan, made.factor),
        loss=verdict.loss,
        metric_before=verdict.metric_before,
        metric=verdict.metric,
        evaluations=verdict.calls,
        calibration=told,
    )


def _warnings(surveyed: Survey, plan: WritePlan, factor: float) -> tuple[str, ...]:
    """What to be wary of: sensitive models, unless they were judged; doubtful example inputs."""
    options, calibration = surveyed.options, surveyed.calibration
    tensors = surveyed.reader.contents.tensors
    found = () if options.evaluation else cautions(tensors, plan.params, factor)
    if calibration is None or options.examples is None:
        return found
    return (*found, *calibration.notes)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What an evaluation said of the archive."""

    loss: float | None = None
    metric_before: float | None = None
    metric: float | None = None
    calls: int = 0


def _measured(surveyed: Survey, encoder: _Encoder, progress: Report) -> tuple[Trial, int, _Judged]:
    from weightvid.planning.evaluate import Evaluator
    from weightvid.planning.measured import Planner

    evaluation = surveyed.options.evaluation
    if evaluation is None:
        raise QuantizationError("there is no evaluation to measure with")
    evaluator = Evaluator(surveyed, evaluation, progress)
    found = Planner(surveyed, evaluator, encoder.encode_steps, encoder.stream).run()
    judged = _Judged(found.verdict.loss, found.metric_before, found.verdict.metric, evaluator.calls)
    return found.made, found.encodings, judged


class _Encoder:
    """Writes archives over each other, until one is as it should be.

    Attributes
    ----------
    stream : binary file object
        Holds the last archive.
    plan : WritePlan
    written : Written
    """

    plan: WritePlan
    written: Written

    def __init__(
        self, surveyed: Survey, stream: BinaryIO, workers: Workers, progress: Report
    ) -> None:
        self.stream = stream
        self._surveyed = surveyed
        self._workers = workers
        self._progress = progress

    def encode(self, factor: float) -> Trial:
        """Write the archive of a step factor."""
        return self.encode_steps(self._surveyed.steps(factor), factor, {})

    def encode_fixed(
        self, factor: float, about: Mapping[str, Any], fixed: Mapping[int, Fixed] | None
    ) -> Trial:
        """Write the archive of a step factor; of some tensors the levels may be known."""
        return self.encode_steps(self._surveyed.steps(factor), factor, about, fixed)

    def encode_steps(
        self,
        steps: Mapping[int, float],
        factor: float,
        about: Mapping[str, Any],
        fixed: Mapping[int, Fixed] | None = None,
    ) -> Trial:
        """Write the archive of these steps."""
        if self._surveyed.options.lossy is None:
            about = {"slopes": slopes(steps, self._surveyed.units, factor), **about}
        self.plan = plan_archive(self._surveyed, steps, about, fixed)
        self.stream.seek(0)
        self.stream.truncate()
        source = self._workers.source(self._surveyed.reader)
        self.written = write_archive(self.stream, self.plan, source, self._workers, self._progress)
        return Trial(factor, self.stream.tell(), self.written.sqnr_db)


def _verify(stream: BinaryIO, folder: Path, reader: CheckpointReader, progress: Report) -> None:
    stream.seek(0)
    specs = reader.contents.tensors
    total, total_bytes = sum(s.size for s in specs), sum(s.stored_bytes for s in specs)
    done = done_bytes = 0
    progress(Progress("verify", 0, total, 0, total_bytes))
    try:
        with open_archive(stream, check_tensors=True) as archive:
            for _, parts in archive.iter_parts(spill=Spill(folder)):
                for part in parts:
                    done += part.size
                    done_bytes += part.nbytes
                    progress(Progress("verify", done, total, done_bytes, total_bytes))
    except FormatError as error:
        raise FormatError(
            f"the archive does not decode to what was packed, and has been discarded: {error}",
            code=error.code,
        ) from error
