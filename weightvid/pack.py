"""Checkpoint to archive: survey, plans, levels, frames, packets, file.

    checkpoint -> tensor -> [kernel transform] -> steps -> levels -> energy order -> frames
               -> video encoder -> fragmented MP4

Two passes over the source, a few parts of tensors in memory at a time: a survey (statistics, from
which the steps follow), then quantizing, laying out and encoding; a target takes the second pass a
few times. The archive is written under a temporary name, decoded and checked, and renamed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import inf, log10
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, cast

import numpy as np

from weightvid.archives import stored_pieces
from weightvid.atomic import AtomicFile
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.checkpoint.base import shorten
from weightvid.container import ArchiveWriter, exact_elements, likeness
from weightvid.errors import CheckpointError, FormatError, QuantizationError
from weightvid.levels import exact
from weightvid.levels.code import CodedPart, Quality, code_part, compare_rows, part_rows
from weightvid.levels.frames import Frame, choose_frame_size, lay_out, ribbon_columns
from weightvid.levels.steps import (
    MIN_WEIGHTS,
    Moments,
    TensorPlan,
    TensorStats,
    forecast,
    is_codable,
    plan_tensor,
    recipe,
    recipe_factor,
    sample_step,
    speaks,
    tensor_stats,
    units,
)
from weightvid.levels.transform import dct, view_of
from weightvid.loader import (
    MAX_AXES,
    MAX_NAME_BYTES,
    TENSOR_SHA_BYTES,
    Array,
    Assembler,
    Bytes,
    Decoder,
    End,
    Floats,
    Header,
    Sidecar,
    TensorSpec,
    Track,
    from_float32,
    open_archive,
    tensor_sha256,
    to_float32,
)
from weightvid.progress import Progress, Report, quiet
from weightvid.repair import add_parity, check_share
from weightvid.spec import PACKABLE
from weightvid.targets import Target, Trial, search
from weightvid.version import __version__
from weightvid.video import CODECS, Video, hevc_level, open_encoder, with_level
from weightvid.workers import Piece, Workers, open_workers

if TYPE_CHECKING:
    from weightvid.calibrate import Calibration, Evaluation

__all__ = ["PackOptions", "PackReport", "Target", "pack_checkpoint"]

#: elements that the survey looks at in one go.
_SURVEY_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PackOptions:
    """Settings of one packing.

    Attributes
    ----------
    recipe : str
        ``balanced``, ``small`` or ``fine``.
    step_factor : float or None
        k of the step rule, instead of the recipe's.
    fidelity : str
        ``outputs``: steps that keep the network's outputs; ``weights``: one step for all tensors,
        the least squared error of the weights; ``integers``: plain integers times a step.
    target : Target or None
        Search the step factor for a size, a rate or an SQNR.
    calibration : Calibration or None
        Statistics of this very model, or the model with example inputs.
    evaluation : Evaluation or None
        Search the step factor for a bound of the user's own measure.
    prune : float or None
        Set weights to zero that are smaller than the mean magnitude of their tensor times this.
    keep : tuple of str
        Shell-style patterns of tensor names that are kept exactly.
    first : tuple of str
        Patterns of names that come first in the file, in this order.
    lossless : bool
        Keep all tensors exactly, and code floats bit for bit.
    parity : float
        Share of the file that is added to repair it by: 0.01 is 1 %; 0: none.
    side_files : bool
        Store the small other files of a folder: configuration, tokenizer.
    video : Video
        Codec, preset, and the QP of a lossy codec.
    workers : str, Executor or None
        See `weightvid.workers.open_workers`.
    jobs : int
        Workers; 0: one per core.
    force : bool
        Replace an existing file.
    verify : bool
        Decode the archive and check it before it gets its name.
    """

    recipe: str = "balanced"
    step_factor: float | None = None
    fidelity: str = "outputs"
    target: Target | None = None
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    prune: float | None = None
    keep: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    lossless: bool = False
    parity: float = 0.0
    side_files: bool = True
    video: Video = field(default_factory=Video)
    workers: str | Executor | None = None
    jobs: int = 0
    force: bool = False
    verify: bool = True

    def check(self) -> None:
        """Refuse settings that contradict each other or themselves.

        Raises
        ------
        QuantizationError
        """
        recipe(self.recipe)
        units((), self.fidelity)
        if self.parity:
            check_share(self.parity)
        if self.step_factor is not None and not 0 < self.step_factor < inf:
            raise QuantizationError(
                f"the step factor must be a positive number, not {self.step_factor}"
            )
        if self.prune is not None and not 0 < self.prune < inf:
            raise QuantizationError(
                f"the factor of pruning must be a positive number, not {self.prune}"
            )
        if self.prune is not None and (self.calibration is not None or self.video.qp is not None):
            raise QuantizationError("pruning and a calibration or a QP exclude each other")
        searched = [
            name
            for name, value in (
                ("a step factor", self.step_factor), ("a target", self.target),
                ("an evaluation", self.evaluation), ("a QP", self.video.qp),
            )
            if value is not None
        ]  # fmt: skip
        if len(searched) > 1:
            raise QuantizationError(f"{searched[0]} and {searched[1]} exclude each other")
        if self.jobs < 0:
            raise QuantizationError(f"the number of jobs must not be negative, as {self.jobs} is")


class TensorReport(NamedTuple):
    """What became of one tensor: SQNR in dB, its worst row, escapes and outliers."""

    name: str
    sqnr_db: float
    worst_row: int
    worst_row_db: float
    escapes: int
    outliers: int


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a packing did.

    Attributes
    ----------
    file_bytes, source_bytes, packet_bytes : int
        Of the archive, of all tensors of the source, and of the video in the archive.
    weights, coded_weights : int
        Elements of all floating-point tensors, and of those that were quantized.
    sqnr_db : float or None
        Over all quantized weights; None if nothing was lost.
    tensors : tuple of TensorReport
        Of the quantized tensors.
    frames, width, height : int
    skipped : tuple of str
        Entries of the source that are no tensors.
    unused_keeps : tuple of str
        Patterns of ``keep`` that no tensor matches.
    side_files : tuple of str
    step_factor : float
    encodings : int
        Whole encodings that a search took; 1 without one.
    seconds : float
    notes : tuple of str
        What calibration and evaluation found.
    """

    file_bytes: int
    source_bytes: int
    packet_bytes: int
    weights: int
    coded_weights: int
    sqnr_db: float | None
    tensors: tuple[TensorReport, ...]
    frames: int
    width: int
    height: int
    skipped: tuple[str, ...]
    unused_keeps: tuple[str, ...]
    side_files: tuple[str, ...]
    step_factor: float
    encodings: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """8 x whole file / weights; 0 without weights."""
        return 8 * self.file_bytes / self.weights if self.weights else 0.0

    @property
    def worst_tensor(self) -> TensorReport | None:
        """Tensor of the lowest SQNR."""
        return min(self.tensors, key=lambda tensor: tensor.sqnr_db, default=None)

    @property
    def worst_row(self) -> TensorReport | None:
        """Tensor that has the row of the lowest SQNR."""
        return min(self.tensors, key=lambda tensor: tensor.worst_row_db, default=None)


# --- the pipeline ---------------------------------------------------------------------------------


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
    destination : path
        Appears whole, or not at all.
    options : PackOptions
    progress : callable
        Told about the stages ``survey``, ``encode`` and ``verify`` (and ``download``).

    Raises
    ------
    CheckpointError, QuantizationError, CodecError, OutputError, RemoteError
    """
    chosen = options or PackOptions()
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
    if options.lossless:
        options = replace(options, keep=("*",))
    output = AtomicFile(destination, force=options.force)
    try:
        with open_workers(options.workers, options.jobs) as workers:
            survey = survey_checkpoint(reader, options, workers, progress)
            encoder = Encoder(survey, cast(BinaryIO, output.file), workers, progress)
            made, encodings, notes = _choose(survey, encoder, progress)
        if options.verify:
            _verify(cast(BinaryIO, output.file), reader, options.jobs, progress)
    except BaseException:
        output.abort()
        raise
    output.commit()
    contents = reader.contents
    return PackReport(
        file_bytes=made.file_bytes,
        source_bytes=sum(spec.stored_bytes for spec in contents.tensors),
        packet_bytes=made.packet_bytes,
        weights=survey.weights,
        coded_weights=made.coded_weights,
        sqnr_db=made.sqnr_db,
        tensors=made.tensors,
        frames=made.frames,
        width=made.width,
        height=made.height,
        skipped=contents.skipped,
        unused_keeps=tuple(
            pattern
            for pattern in options.keep
            if not any(fnmatchcase(spec.name, pattern) for spec in contents.tensors)
        ),
        side_files=tuple(file.path for file in contents.files) if options.side_files else (),
        step_factor=made.factor,
        encodings=encodings,
        seconds=perf_counter() - began,
        notes=(*survey.notes, *(notes or survey.warning(made.factor))),
    )


def _refuse_unholdable(reader: CheckpointReader) -> None:
    """Raise where the format has no room for a name or a shape, before any work is done."""
    for name, spec in reader.contents.rows():
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            said = f"the name {name[:40]!r}... is longer than {MAX_NAME_BYTES} bytes; rename it"
        elif len(spec.shape) > MAX_AXES:
            said = f"{name!r} has {len(spec.shape)} axes, and an archive {MAX_AXES} at most"
        else:
            continue
        raise CheckpointError(f"a tensor cannot be packed: {said}")


def _refuse_remains(reader: CheckpointReader) -> None:
    """Raise where the weights are left out: an archive of the rest would pass for the model."""
    contents = reader.contents
    packed = [entry for entry in contents.skipped if "_packed_params" in entry]
    weights = sum(spec.size for spec in contents.tensors if spec.dtype in PACKABLE or spec.size > 1)
    place = reader.location or "the checkpoint"
    if packed:
        raise CheckpointError(
            f"{place} holds weights that cannot be packed: {shorten(packed, 4)}; pack the float "
            "model, from before it was quantized dynamically"
        )
    if contents.skipped and not weights:
        raise CheckpointError(
            f"{place} holds no weights that can be packed; left out: {shorten(contents.skipped, 4)}"
        )


def _choose(
    survey: Survey, encoder: Encoder, progress: Report
) -> tuple[Written, int, tuple[str, ...]]:
    """Encode until the archive is as it was asked for."""
    options = survey.options
    notes: tuple[str, ...] = ()
    calibration, evaluation = options.calibration, options.evaluation
    if evaluation is not None:
        made, encodings, notes = evaluation.search(survey, encoder.encode, encoder.file, progress)
        return made, encodings, notes
    if options.target is not None:
        made, encodings = search(
            survey.weights, survey.first_factor, options.target, encoder.encode
        )
    else:
        made, encodings = encoder.encode(survey.first_factor), 1
    if calibration is not None:
        made, more, notes = calibration.refine(survey, made, encoder, progress)
        encodings += more
    return made, encodings, notes


# --- the survey -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint whose tensors have all been looked at once.

    Attributes
    ----------
    reader : CheckpointReader
    options : PackOptions
    stats : mapping of int to TensorStats
        Of the tensors that are worth quantizing, by number, in order.
    units : mapping of int to float
        Step of each at k = 1, before any limit.
    moments : mapping of int to Moments
        What calibration knows of the inputs of a tensor.
    apart : frozenset of str
        Names of tensors that are kept bit for bit because they are no weights.
    notes : tuple of str
        What people should know of the model.
    """

    reader: CheckpointReader
    options: PackOptions
    stats: Mapping[int, TensorStats]
    units: Mapping[int, float]
    moments: Mapping[int, Moments] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors; a tensor's number is its place."""
        return self.reader.contents.tensors

    @property
    def weights(self) -> int:
        """Elements of all floating-point tensors."""
        return sum(spec.size for spec in self.specs if spec.dtype in PACKABLE)

    @property
    def first_factor(self) -> float:
        """The step factor asked for: the option, or else what the recipe means for this model."""
        options, stats = self.options, list(self.stats.values())
        return options.step_factor or recipe_factor(
            options.recipe, stats, [self.units[number] for number in self.stats], options.fidelity
        )

    def warning(self, factor: float) -> tuple[str, ...]:
        """What to expect of the outputs, if it is worse than ``balanced`` would be."""
        options, stats = self.options, list(self.stats.values())
        units = [self.units[number] for number in self.stats]
        noise = forecast(factor, stats, units, options.fidelity)
        usual = recipe("balanced")
        if noise <= 1.5 * (usual.language_noise if speaks(stats) else usual.noise):
            return ()
        return (
            f"the outputs will be about {noise:.1f} times as far off as with int8 per channel: "
            "check them, or choose the recipe balanced or an evaluation",
        )

    def keeps(self, name: str) -> bool:
        """Whether a tensor that is not quantized is kept bit for bit."""
        return name in self.apart or any(fnmatchcase(name, p) for p in self.options.keep)

    def plans(self, factor: float) -> dict[int, TensorPlan]:
        """Plan of each tensor that is quantized, at a step factor."""
        found = {}
        for number, stats in self.stats.items():
            unit, fidelity = self.units[number], self.options.fidelity
            if self.options.video.qp is not None:
                plan = plan_tensor(stats, sample_step(unit, stats), "integers")
            elif self.options.prune is not None:
                plan = plan_tensor(stats, factor * unit, "integers")
                if plan is not None:
                    plan = replace(plan, threshold=self.options.prune * stats.mean_magnitude)
            else:
                moments = self.moments.get(number)
                plan = plan_tensor(stats, factor * unit, fidelity, moments=moments)
            if plan is not None:
                found[number] = plan
        return found


class _Looked(NamedTuple):
    spec: TensorSpec
    pieces: tuple[Piece, ...]


def survey_checkpoint(
    reader: CheckpointReader, options: PackOptions, workers: Workers, progress: Report = quiet
) -> Survey:
    """Read every tensor once.

    Raises
    ------
    CheckpointError
        The source is damaged, or the calibration statistics are of another model.
    """
    _refuse_remains(reader)
    _refuse_unholdable(reader)
    specs = reader.contents.tensors
    scales, tables = exact.scales_of(specs), exact.tables_of(specs)
    states = exact.optimizer_state(specs)
    wanted = {
        number: spec
        for number, spec in enumerate(specs)
        if may_code(spec, options.keep) and spec.name not in scales | tables
    }
    total = sum(spec.size for spec in wanted.values())
    done, stats = 0, {}
    tasks = (_Looked(spec, _pieces(reader, spec, workers)) for spec in wanted.values())
    for number, found in zip(wanted, workers.map(_look_at, tasks), strict=True):
        done += found.spec.size
        progress(Progress("survey", done, total))
        if exact.is_sinusoid(found):
            tables.add(found.spec.name)
        elif is_codable(found.spec, found):
            stats[number] = found
    steps = dict(zip(stats, units(list(stats.values()), options.fidelity), strict=True))
    notes = [
        f"{what}: {shorten(sorted(names))}"
        for what, names in (
            ("kept bit for bit, as scales of packed integers", scales),
            ("kept bit for bit, as constant tables", tables),
            ("an optimizer's state, which no loader needs, is packed, too", states),
        )
        if names
    ]
    survey = Survey(
        reader, options, stats, steps, apart=frozenset(scales | tables), notes=tuple(notes)
    )
    if options.calibration is not None:
        survey = options.calibration.apply(survey, progress)
    return survey


def may_code(spec: TensorSpec, keep: Sequence[str] = ()) -> bool:
    """Whether a tensor may be quantized: not few floats, of two axes, that nobody wants exactly."""
    return (
        spec.dtype in PACKABLE
        and spec.size >= MIN_WEIGHTS
        and sum(size > 1 for size in spec.shape) >= 2
        and not any(fnmatchcase(spec.name, pattern) for pattern in keep)
    )


def _pieces(reader: CheckpointReader, spec: TensorSpec, workers: Workers) -> tuple[Piece, ...]:
    """Blocks of whole rows of a tensor's matrix."""
    columns = view_of(spec.shape).columns
    count = max(1, _SURVEY_BLOCK // columns) * columns
    return tuple(
        workers.piece(reader, spec.name, first, min(count, spec.size - first))
        for first in range(0, spec.size, count)
    )


def _look_at(task: _Looked) -> TensorStats:
    return tensor_stats(task.spec, (piece.read() for piece in task.pieces))


# --- encoding -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written(Trial):
    """An archive that was written: what `Trial` says, and what the report needs."""

    packet_bytes: int = 0
    coded_weights: int = 0
    frames: int = 0
    width: int = 0
    height: int = 0
    tensors: tuple[TensorReport, ...] = ()


class PartTask(NamedTuple):
    """Rows of a tensor to be quantized, and what they are added to."""

    piece: Piece
    plan: TensorPlan
    number: int
    first_row: int
    moments: Moments | None
    below: Array | None = None


class FrameTask(NamedTuple):
    """A picture to be coded."""

    luma: Bytes
    video: Video


class _Packet(NamedTuple):
    data: bytes
    sha256: bytes
    luma: Bytes | None


class Encoder:
    """Writes archives over each other, until one is as it should be.

    Parameters
    ----------
    survey : Survey
    file : binary file object
        Holds the last archive.
    workers : Workers
    progress : callable
    """

    def __init__(
        self, survey: Survey, file: BinaryIO, workers: Workers, progress: Report = quiet
    ) -> None:
        self.file, self._survey, self._workers, self._progress = file, survey, workers, progress

    def encode(
        self,
        factor: float,
        coded: Mapping[int, Sequence[CodedPart]] | None = None,
    ) -> Written:
        """Write the archive of a step factor.

        Parameters
        ----------
        factor : float
        coded : mapping of int to sequence of CodedPart, optional
            Tensors that are quantized already.
        """
        survey = self._survey
        plans = survey.plans(factor)
        run = _Run(survey, plans, coded or {}, self._workers, self._progress)
        self.file.seek(0)
        self.file.truncate()
        made, parity = run.write(self.file, factor), survey.options.parity
        return replace(made, file_bytes=add_parity(self.file, parity)) if parity else made


class _Run:
    """One pass from tensors to file."""

    def __init__(
        self,
        survey: Survey,
        plans: Mapping[int, TensorPlan],
        coded: Mapping[int, Sequence[CodedPart]],
        workers: Workers,
        progress: Report,
    ) -> None:
        self._survey, self._plans, self._coded = survey, plans, coded
        self._workers, self._progress = workers, progress
        #: by the number of a bias: what the weights of its layer have taken from the mean outputs.
        self._shifts: dict[int, Floats] = {}
        sizes = sorted({size for plan in plans.values() for size in plan.kernel})
        self._bases = {size: number for number, size in enumerate(sizes)}
        self._plans = {number: plans[number] for number in sorted(plans, key=self._turn)}
        self._hashes: dict[int, Any] = {}
        self._reports: dict[int, Tally] = {}
        self._done = 0
        self._total = sum(plan.spec.size for plan in plans.values())
        self._video = survey.options.video.for_levels(self._total)

    def write(self, file: BinaryIO, factor: float) -> Written:
        """Write the whole archive."""
        survey, options = self._survey, self._survey.options
        rows = {number: part_rows(plan) for number, plan in self._plans.items()}
        columns = sum(
            ribbon_columns(count * self._plans[number].view.columns)
            for number, parts in rows.items()
            for _, count in parts
        )
        size = choose_frame_size(columns)
        record = open_encoder(self._video, *size).record
        track = Track(size.width, size.height, CODECS[options.video.codec].entry, record)
        contents = survey.reader.contents
        numbers = {spec.name: number for number, spec in enumerate(survey.specs)}
        header = Header(
            survey.specs,
            {alias: numbers[name] for alias, name in contents.aliases.items()},
            contents.metadata,
            (),
            tuple(dct(kernel) for kernel in self._bases),
            about_packing(options) | ({"calibrated": "yes"} if survey.moments else {}),
        )
        writer = ArchiveWriter(file, track, header, contents.files if options.side_files else ())
        frames = lay_out(self._code(rows), size)
        decoded = Assembler(header) if options.video.qp is not None else None
        count = 0
        for frame, packet in self._encode(frames):
            sidecar = self._sidecar(frame, packet)
            if decoded is not None and packet.luma is not None:
                sidecar = self._decoded(sidecar, decoded, packet.luma)
            writer.add_frame(sidecar, packet.data)
            count += 1
        writer.add_exact(self._exact(), options.lossless)
        file_bytes = writer.finish()
        if count and track.entry == b"hvc1":
            level = hevc_level(*size, writer.largest_packet, writer.first_packet)
            writer.replace_record(with_level(record, level.level_idc))
        tallies = [self._reports[number] for number in self._plans]
        signal, noise = sum(t.signal for t in tallies), sum(t.noise for t in tallies)
        return Written(
            factor, file_bytes, 10 * log10(signal / noise) if signal and noise else None,
            writer.packet_bytes, self._total, count, *size,
            tuple(tally.report() for tally in tallies),
        )  # fmt: skip

    # --- tensors to samples

    def _code(
        self, rows: Mapping[int, Sequence[tuple[int, int]]]
    ) -> Iterator[tuple[CodedPart, Bytes]]:
        """Coded parts in the order of the ribbon, with their samples."""
        tasks = (task for number in rows for task in self._tasks(number, rows[number]))
        results = self._workers.map(code_task, tasks)
        for number, parts in rows.items():
            plan, tally = self._plans[number], Tally(self._plans[number].spec.name)
            self._reports[number] = tally
            digest = self._hashes[number] = hashlib.sha256()
            for place in range(len(parts)):
                part = self._coded[number][place] if number in self._coded else next(results)
                digest.update(np.ascontiguousarray(part.stored).data)
                tally.add(part)
                if part.shift is not None:
                    self._shift(self._survey.moments[number], part.shift)
                self._done += part.stored.size
                self._progress(Progress("encode", self._done, self._total))
                yield replace(part, stored=np.empty((0,))), part.samples
            del plan

    def _shift(self, moments: Moments, shift: Floats) -> None:
        if moments.bias is not None and np.isfinite(shift).all():
            before = self._shifts.get(moments.bias, np.float32(0))
            self._shifts[moments.bias] = before + moments.bias_sign * shift

    def _tasks(self, number: int, parts: Sequence[tuple[int, int]]) -> Iterator[PartTask]:
        if number in self._coded:
            return
        plan, columns = self._plans[number], self._plans[number].view.columns
        for first, count in parts:
            piece = self._workers.piece(
                self._survey.reader, plan.spec.name, first * columns, count * columns
            )
            yield PartTask(piece, plan, number, first, self._survey.moments.get(number))

    # --- samples to packets

    def _encode(
        self, frames: Iterator[Frame[CodedPart]]
    ) -> Iterator[tuple[Frame[CodedPart], _Packet]]:
        waiting: list[Frame[CodedPart]] = []

        def tasks() -> Iterator[FrameTask]:
            for frame in frames:
                waiting.append(frame._replace(luma=np.empty((0, 0), np.uint8)))
                yield FrameTask(frame.luma, self._video)

        for packet in self._workers.map(encode_frame, tasks()):
            yield waiting.pop(0), packet

    def _sidecar(self, frame: Frame[CodedPart], packet: _Packet) -> Sidecar:
        parts = []
        for coded, column in frame.starts:
            kernel = self._plans[coded.part.tensor].kernel
            bases = tuple(self._bases[size] for size in kernel)
            parts.append(replace(coded.part, column=column, bases=bases))
        ends = []
        for coded in frame.ends:
            plan = self._plans[coded.part.tensor]
            if coded.part.first_row + coded.part.rows == plan.view.rows:
                number = coded.part.tensor
                digest = self._hashes.pop(number).digest()[:TENSOR_SHA_BYTES]
                ends.append(End(number, digest, self._reports[number].sqnr_db))
        return Sidecar(frame.number, packet.sha256, tuple(parts), tuple(ends))

    def _decoded(self, sidecar: Sidecar, assembler: Assembler, luma: Bytes) -> Sidecar:
        """Sidecar of a lossy frame: hashes and qualities are those of what came back."""
        ends = []
        for number, array in assembler.add(sidecar, luma):
            spec, plan = self._survey.specs[number], self._plans[number]
            tally = Tally(spec.name)
            original, shape = self._survey.reader.read(spec.name), (-1, plan.view.columns)
            tally.add_quality(
                compare_rows(original.reshape(shape), array.reshape(shape), spec.dtype)
            )
            self._reports[number] = tally
            ends.append(End(number, tensor_sha256(array)[:TENSOR_SHA_BYTES], tally.sqnr_db))
        return sidecar._replace(ends=tuple(ends))

    def _turn(self, number: int) -> int:
        """When a tensor comes: the place of the first pattern that it matches."""
        name, patterns = self._survey.specs[number].name, self._survey.options.first
        matches = (place for place, glob in enumerate(patterns) if fnmatchcase(name, glob))
        return next(matches, len(patterns))

    # --- what is kept exactly

    def _exact(self) -> Iterator[tuple[int, Array]]:
        options, reader = self._survey.options, self._survey.reader
        bits = recipe(options.recipe).mantissa_bits
        left = [n for n in range(len(self._survey.specs)) if n not in self._plans]
        likely = sorted(left, key=lambda n: likeness(self._survey.specs[n]))
        for number in sorted(likely, key=self._turn):
            spec = self._survey.specs[number]
            array = reader.read(spec.name)
            if number in self._shifts:
                values = to_float32(array, spec.dtype) + self._shifts[number]
                array = from_float32(values, spec.dtype)
            kept = self._survey.keeps(spec.name)
            yield number, array if kept else exact_elements(array, spec, bits)


class Tally:
    """Sums over the parts of one tensor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.signal = self.noise = 0.0
        self._worst = (inf, 0)
        self._escapes = self._outliers = 0

    def add(self, coded: CodedPart) -> None:
        """Count a part."""
        self.add_quality(coded.quality)
        self._escapes += 0 if coded.part.escapes is None else len(coded.part.escapes[0])
        self._outliers += coded.outliers

    def add_quality(self, quality: Quality) -> None:
        """Count how near a part is to its weights."""
        self.signal += quality.signal
        self.noise += quality.noise
        self._worst = min(self._worst, (quality.worst_db, quality.worst_row))

    @property
    def sqnr_db(self) -> float | None:
        """Signal over noise; None without either."""
        return 10 * log10(self.signal / self.noise) if self.signal and self.noise else None

    def report(self) -> TensorReport:
        """What the sums say."""
        sqnr = inf if self.sqnr_db is None else self.sqnr_db
        return TensorReport(
            self.name, sqnr, self._worst[1], self._worst[0], self._escapes, self._outliers
        )


def code_task(task: PartTask) -> CodedPart:
    """Quantize the rows of a task."""
    piece, plan, number, first_row, moments, below = task
    return code_part(piece.read(), plan, number, first_row, moments, below)


_LOCAL = threading.local()


def encode_frame(task: FrameTask) -> _Packet:
    """Packet of a frame and SHA-256 of what it decodes to; of a lossy one also what that is."""
    height, width = task.luma.shape
    key = (task.video, width, height)
    if getattr(_LOCAL, "key", None) != key:
        _LOCAL.key, _LOCAL.encoder = key, open_encoder(task.video, width, height)
    encoder = _LOCAL.encoder
    data = encoder.encode(task.luma)
    if task.video.qp is None:
        return _Packet(data, hashlib.sha256(task.luma.data).digest(), None)
    track = Track(width, height, CODECS[task.video.codec].entry, encoder.record)
    decoder = Decoder(track)
    decoded = [*decoder.decode(0, data), *decoder.decode(0, None)]
    luma = np.ascontiguousarray(decoded[0][1])
    return _Packet(data, hashlib.sha256(luma.data).digest(), luma)


def about_packing(options: PackOptions) -> dict[str, str]:
    """What the header says to people about the making of the archive."""
    made = options.recipe if options.step_factor is None else f"step {options.step_factor:g}"
    if options.target is not None:
        made = f"target {options.target}"
    if options.video.qp is not None:
        made = f"lossy video, QP {options.video.qp}"
    about = {"generator": f"weightvid {__version__}", "recipe": made}
    if options.fidelity != "outputs":
        about["fidelity"] = options.fidelity
    if options.video.codec != "x265":
        about["encoder"] = options.video.codec
    return about


def _verify(file: BinaryIO, reader: CheckpointReader, threads: int, progress: Report) -> None:
    """Decode the archive and compare every hash in it."""
    file.flush()
    file.seek(0)
    total = sum(spec.size for spec in reader.contents.tensors)
    done = 0
    try:
        for _, _, elements in stored_pieces(open_archive(file, threads=threads)):
            done += elements.size
            progress(Progress("verify", done, total))
    except FormatError as error:
        raise FormatError(
            "the archive does not decode to what was packed, and has been discarded: "
            f"{error.args[0]}",
            code=error.code,
        ) from error
