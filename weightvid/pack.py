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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO

import numpy as np

from weightvid import loader
from weightvid.archives import checked_tensors, open_chain, stored_pieces
from weightvid.atomic import atomic_output, is_source
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.errors import CheckpointError, FormatError
from weightvid.layers import encode_layers
from weightvid.levels.code import CodedPart, compare_rows, part_rows
from weightvid.levels.frames import Frame, choose_frame_size, lay_out, ribbon_columns
from weightvid.levels.steps import TensorPlan
from weightvid.loader import (
    Archive,
    Assembler,
    Bytes,
    End,
    Floats,
    Sidecar,
    open_archive,
    tensor_sha256,
)
from weightvid.options import PackOptions, PackReport
from weightvid.progress import Progress, Report, quiet
from weightvid.repair import add_parity
from weightvid.survey import Survey, survey_checkpoint
from weightvid.targets import Target, search
from weightvid.tasks import Packet, PartTask, Tally, Written, code_task, encode_frames, track_of
from weightvid.workers import Workers, open_workers
from weightvid.writer import ArchiveWriter

__all__ = ["PackOptions", "PackReport", "Target", "pack_checkpoint"]


def pack_checkpoint(
    source: str | os.PathLike[str] | CheckpointReader,
    destination: str | os.PathLike[str],
    options: PackOptions | None = None,
    progress: Report = quiet,
) -> PackReport:
    """Pack a checkpoint into an archive, also of several layers, or into an update to another.

    Layers and updates hold the model in memory.

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
    FormatError
        The base is damaged.
    """
    began, chosen = perf_counter(), options or PackOptions()
    chosen.check()
    if is_source(destination, source, *chosen.base):
        what = "the source or a base" if chosen.base else "the source"
        raise CheckpointError(f"{destination} is {what} itself, or a part of it")
    with ExitStack() as stack:
        reader = (
            source
            if isinstance(source, CheckpointReader)
            else stack.enter_context(open_checkpoint(source, progress))
        )
        before = _stamps(reader)
        base = stack.enter_context(open_chain(chosen.base))[-1] if chosen.base else None
        file = stack.enter_context(atomic_output(destination, force=chosen.force))
        with open_workers(chosen.workers, chosen.jobs) as workers:
            survey = survey_checkpoint(reader, chosen, workers, progress)
            if chosen.layered:
                made, encodings = encode_layers(survey, file, base, workers, progress), 1
                known = chosen.calibration
                notes = known.notes(survey, "layers are added to each other") if known else ()
            else:
                encoder = Encoder(survey, file, workers, progress)
                made, encodings, notes = _choose(survey, encoder, progress)
        if _stamps(reader) | before != before | _stamps(reader):
            raise CheckpointError(f"{reader.location} changed while it was packed: pack it again")
        if chosen.verify:
            _verify(file, base, survey, progress)
    told = notes or survey.warning(made.factor)
    if made.sqnr_db is not None and made.sqnr_db < 3:
        told = (*told, f"next to nothing is left of the weights, {made.sqnr_db:.1f} dB")
    return made.report(survey, encodings, perf_counter() - began, told)


def _stamps(reader: CheckpointReader) -> dict[Path, tuple[int, int]]:
    """Size and time of each file of a checkpoint: others, and somebody wrote to it."""
    path = Path(reader.location or os.devnull)
    files = filter(Path.is_file, path.rglob("*") if path.is_dir() else [path])
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def _choose(
    survey: Survey, encoder: Encoder, progress: Report
) -> tuple[Written, int, tuple[str, ...]]:
    """Encode until the archive is as it was asked for."""
    options, factor = survey.options, survey.first_factor
    known = options.calibration
    if options.evaluation is not None:
        found = options.evaluation.search(survey, encoder.encode, encoder.file, progress)
        notes = () if known is None else known.notes(survey, "an evaluation tries many steps")
        return *found[:2], (*notes, *found[2])
    if options.target is not None:
        made, encodings = search(survey.weights, factor, options.target, encoder.encode)
    else:
        made, encodings = encoder.encode(factor), 1
    if known is None:
        return made, encodings, ()
    made, more, notes = known.refine(survey, made, encoder, progress)
    return made, encodings + more, notes


class Encoder:
    """Writes archives over each other into a file, until one is as it should be."""

    def __init__(
        self, survey: Survey, file: BinaryIO, workers: Workers, progress: Report = quiet
    ) -> None:
        self.file, self._survey, self._workers, self._progress = file, survey, workers, progress

    def encode(
        self, factor: float, coded: Mapping[int, Sequence[CodedPart]] | None = None
    ) -> Written:
        """Write the archive of a step factor; ``coded`` are tensors that are quantized already."""
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
        self._survey, self._coded = survey, coded
        self._workers, self._progress = workers, progress
        #: by the number of a bias: what the weights of its layer have taken from the mean outputs.
        self._shifts: dict[int, Floats] = {}
        sizes = sorted({size for plan in plans.values() for size in plan.kernel})
        self._bases = {size: number for number, size in enumerate(sizes)}
        self._plans = {number: plans[number] for number in sorted(plans, key=survey.turn)}
        self._hashes: dict[int, Any] = {}
        self._reports: dict[int, Tally] = {}
        self._done = 0
        self._total = sum(plan.spec.size for plan in plans.values())
        self._video = survey.options.video.for_levels(self._total)

    def write(self, file: BinaryIO, factor: float) -> Written:
        survey, options = self._survey, self._survey.options
        rows = {number: part_rows(plan) for number, plan in self._plans.items()}
        columns = sum(
            ribbon_columns(count * self._plans[number].view.columns)
            for number, parts in rows.items()
            for _, count in parts
        )
        size = choose_frame_size(columns)
        header = survey.header(self._bases)
        files = survey.reader.contents.files if options.side_files else ()
        writer = ArchiveWriter(file, track_of(self._video, *size), header, files)
        frames = lay_out(self._code(rows), size)
        decoded = Assembler(header) if options.video.qp is not None else None
        for frame, packet in encode_frames(frames, self._video, self._workers):
            sidecar = self._sidecar(frame, packet)
            if decoded is not None and packet.luma is not None:
                sidecar = self._decoded(sidecar, decoded, packet.luma)
            writer.add_frame(sidecar, packet.data)
        kept = survey.exact_tensors(self._plans, self._shifts, survey.mantissa_bits(factor), {})
        writer.add_exact(kept, options.lossless)
        tallies = [self._reports[number] for number in self._plans]
        return Written.close(writer, factor, self._total, tallies)

    def _code(
        self, rows: Mapping[int, Sequence[tuple[int, int]]]
    ) -> Iterator[tuple[CodedPart, Bytes]]:
        """Coded parts in the order of the ribbon, with their samples."""
        tasks = (task for number in rows for task in self._tasks(number, rows[number]))
        results = self._workers.map(code_task, tasks)
        for number, parts in rows.items():
            tally = self._reports[number] = Tally(self._plans[number].spec.name)
            digest = self._hashes[number] = hashlib.sha256()
            for place in range(len(parts)):
                part = self._coded[number][place] if number in self._coded else next(results)
                digest.update(np.ascontiguousarray(part.stored).data)
                tally.add(part)
                if part.shift is not None:
                    self._survey.moments[number].add_shift(self._shifts, part.shift)
                self._done += part.stored.size
                self._progress(Progress("encode", self._done, self._total))
                yield replace(part, stored=np.empty((0,))), part.samples

    def _tasks(self, number: int, parts: Sequence[tuple[int, int]]) -> Iterator[PartTask]:
        if number in self._coded:
            return
        plan, columns = self._plans[number], self._plans[number].view.columns
        for first, count in parts:
            piece = self._workers.piece(
                self._survey.reader, plan.spec.name, first * columns, count * columns
            )
            yield PartTask(piece, plan, number, first, self._survey.moments.get(number))

    def _sidecar(self, frame: Frame[CodedPart], packet: Packet) -> Sidecar:
        parts = []
        for coded, column in frame.starts:
            kernel = self._plans[coded.part.tensor].kernel
            bases = tuple(self._bases[size] for size in kernel)
            parts.append(replace(coded.part, column=column, bases=bases))
        ends = []
        for coded in frame.ends:
            number = coded.part.tensor
            if coded.part.first_row + coded.part.rows == self._plans[number].view.rows:
                digest = self._hashes.pop(number).digest()[: loader.TENSOR_SHA_BYTES]
                ends.append(End(number, digest, self._reports[number].sqnr_db))
        return Sidecar(frame.number, packet.sha256, tuple(parts), tuple(ends))

    def _decoded(self, sidecar: Sidecar, assembler: Assembler, luma: Bytes) -> Sidecar:
        """Sidecar of a lossy frame: hashes and qualities are those of what came back."""
        ends = []
        for number, array in assembler.add(sidecar, luma):
            spec, shape = self._survey.specs[number], (-1, self._plans[number].view.columns)
            original = self._survey.reader.read(spec.name).reshape(shape)
            tally = self._reports[number] = Tally(spec.name)
            tally.add_quality(compare_rows(original, array.reshape(shape), spec.dtype))
            ends.append(End(number, tensor_sha256(array)[: loader.TENSOR_SHA_BYTES], tally.sqnr_db))
        return sidecar._replace(ends=tuple(ends))


def _verify(file: BinaryIO, base: Archive | None, survey: Survey, progress: Report) -> None:
    """Decode the archive and compare every hash in it."""
    file.flush()
    file.seek(0)
    done, total = 0, sum(spec.size for spec in survey.specs)
    try:
        archive = open_archive(file, base=base, threads=survey.options.jobs, check_tensors=True)
        check: Any = checked_tensors if archive.header.layers else stored_pieces
        for *_, elements in check(archive):
            done += elements.size
            progress(Progress("verify", done, total))
    except FormatError as error:
        raise FormatError(
            "the archive does not decode to what was packed, and has been discarded: "
            f"{error.args[0]}",
            code=error.code,
        ) from error
