"""What workers do for a packing, a part of a tensor or a frame at a time, and the sums over it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from weightvid.errors import QuantizationError
from weightvid.levels.code import CodedPart, Quality, code_part, decibels
from weightvid.levels.frames import Frame
from weightvid.levels.steps import Moments, TensorPlan
from weightvid.loader import Array, Bytes, Decoder, Track
from weightvid.options import PackReport, TensorReport
from weightvid.targets import Trial
from weightvid.video import CODECS, Video, hevc_level, open_encoder, with_level
from weightvid.workers import Piece, Workers
from weightvid.writer import ArchiveWriter

if TYPE_CHECKING:
    from weightvid.survey import Survey


class PartTask(NamedTuple):
    """Rows of a tensor to be quantized, and what they are added to."""

    piece: Piece
    plan: TensorPlan
    number: int
    first_row: int
    moments: Moments | None
    below: Array | None = None


class Packet(NamedTuple):
    """An encoded frame; ``luma`` is what a lossy encoder makes of it, else None."""

    data: bytes
    sha256: bytes
    luma: Bytes | None


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
        return decibels(self.signal, self.noise)

    def report(self) -> TensorReport:
        """What the sums say."""
        sqnr = inf if self.sqnr_db is None else self.sqnr_db
        return TensorReport(
            self.name, sqnr, self._worst[1], self._worst[0], self._escapes, self._outliers
        )


def code_task(task: PartTask) -> CodedPart:
    """Quantize the rows of a task."""
    piece, plan, number, first_row, moments, below = task
    try:
        return code_part(piece.read(), plan, number, first_row, moments, below)
    except QuantizationError as error:
        raise QuantizationError(f"tensor {plan.spec.name!r}: {error}") from None


def encode_frame(video: Video, luma: Bytes) -> Packet:
    """Packet of a frame and SHA-256 of what it decodes to; of a lossy one also what that is."""
    height, width = luma.shape
    data = open_encoder(video, width, height).encode(luma)
    if video.qp is None:
        return Packet(data, hashlib.sha256(luma.data).digest(), None)
    decoder = Decoder(track_of(video, width, height))
    decoded = [*decoder.decode(0, data), *decoder.decode(0, None)]
    lossy = np.ascontiguousarray(decoded[0][1])
    return Packet(data, hashlib.sha256(lossy.data).digest(), lossy)


def encode_frames(
    frames: Iterator[Frame[CodedPart]], video: Video, workers: Workers
) -> Iterator[tuple[Frame[CodedPart], Packet]]:
    """Packets of frames, which come without their pictures."""
    waiting: list[Frame[CodedPart]] = []

    def pictures() -> Iterator[Bytes]:
        for frame in frames:
            waiting.append(frame._replace(luma=np.empty((0, 0), np.uint8)))
            yield frame.luma

    for packet in workers.map(partial(encode_frame, video), pictures()):
        yield waiting.pop(0), packet


def track_of(video: Video, width: int, height: int) -> Track:
    """Track of frames of one size."""
    record = open_encoder(video, width, height).record
    return Track(width, height, CODECS[video.codec].entry, record)


def finish(writer: ArchiveWriter) -> int:
    """Write the index, and the level that the packets ask for; gives the size of the file."""
    size, track = writer.finish(), writer.track
    if writer.packet_bytes and track.entry == b"hvc1":
        level = hevc_level(track.width, track.height, writer.largest_packet, writer.first_packet)
        writer.replace_record(with_level(track.record, level.level_idc))
    return size


@dataclass(frozen=True, slots=True)
class Written(Trial):
    """An archive that was written: what `Trial` says, and what the report needs."""

    packet_bytes: int = 0
    coded_weights: int = 0
    frames: int = 0
    width: int = 0
    height: int = 0
    tensors: tuple[TensorReport, ...] = ()

    @classmethod
    def close(
        cls, writer: ArchiveWriter, factor: float, weights: int, tallies: Sequence[Tally]
    ) -> Written:
        """Finish an archive of so many quantized weights."""
        signal, noise = sum(t.signal for t in tallies), sum(t.noise for t in tallies)
        return cls(
            factor, finish(writer), decibels(signal, noise), writer.packet_bytes, weights,
            len(writer.frames), *writer.track[:2], tuple(tally.report() for tally in tallies),
        )  # fmt: skip

    def report(
        self, survey: Survey, encodings: int, seconds: float, notes: Sequence[str]
    ) -> PackReport:
        """What a packing did that ended with this archive."""
        contents, side_files = survey.reader.contents, survey.options.side_files
        return PackReport(
            file_bytes=self.file_bytes,
            source_bytes=sum(spec.stored_bytes for spec in contents.tensors),
            packet_bytes=self.packet_bytes,
            weights=survey.weights,
            coded_weights=self.coded_weights,
            sqnr_db=self.sqnr_db,
            tensors=self.tensors,
            frames=self.frames,
            width=self.width,
            height=self.height,
            skipped=contents.skipped,
            unused_keeps=survey.unused_keeps,
            side_files=tuple(file.path for file in contents.files) if side_files else (),
            step_factor=self.factor,
            encodings=encodings,
            seconds=seconds,
            notes=(*survey.notes, *notes),
        )
