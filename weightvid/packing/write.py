"""Writing a whole archive by a plan: quantize, choose, lay out, encode, in one pass."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.calibration import TensorMoments
from weightvid.codec.encode import EncoderSettings, Video, open_encoder
from weightvid.container.records import Header, Index
from weightvid.container.writer import ArchiveWriter
from weightvid.packing.biases import Corrections, bias_numbers
from weightvid.packing.exact import ExactWriter
from weightvid.packing.frames import FrameWriter
from weightvid.packing.lossy import LossyWriter, sample_tensors
from weightvid.packing.names import is_affine
from weightvid.packing.quantized import CodedTensor, sqnr_db
from weightvid.packing.quantizer import Coded, Fixed, Request
from weightvid.packing.schedule import Kept, code_tensors
from weightvid.packing.source import Source, TensorRead
from weightvid.packing.workers import Outbox, Workers
from weightvid.progress import Progress, Report, quiet
from weightvid.quantize import Params
from weightvid.quantize.mantissa import FULL_BITS, round_mantissa
from weightvid.scratch import Scratch
from weightvid.spec import TensorSpec

Levels = npt.NDArray[np.int8]
Array = npt.NDArray[np.generic]

#: models of up to so many quantized weights are written both ways, and the smaller file is kept.
TRIAL_WEIGHTS: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class WritePlan:
    """All that the bytes of an archive depend on, besides the weights.

    Attributes
    ----------
    header : Header
        Its tensors are those of the source, in order.
    params : mapping of int to Params
        Quantizer of each tensor that is coded, by id; all others are kept exactly.
    video : Video
        How the frames are coded. If lossy, the codec quantizes; the levels are samples of fine
        steps.
    shaping : bool
        Round convolutions with noise shaping.
    mantissa_bits : int
        Stored mantissa bits that biases, norms and statistics keep.
    keep : tuple of str
        Patterns of names whose tensors keep all their bits.
    moments : mapping of int to TensorMoments
        Calibration statistics of tensors that are quantized with error feedback, by id.
    files : tuple of bytes
        Boxes of the side files that the header lists.
    fixed : mapping of int to Fixed
        Tensors whose levels are known already, by id.
    """

    header: Header
    params: Mapping[int, Params]
    video: Video
    shaping: bool = True
    mantissa_bits: int = FULL_BITS
    keep: tuple[str, ...] = ()
    moments: Mapping[int, TensorMoments] = field(default_factory=dict)
    files: tuple[bytes, ...] = ()
    fixed: Mapping[int, Fixed] = field(default_factory=dict)


@dataclass(slots=True)
class Written:
    """What came out.

    Attributes
    ----------
    noise, power : float
        Sums of squares over all quantized tensors.
    weights : int
        Weights that were quantized.
    frames : int
    packet_bytes, digit_bytes : int
        Of the video, and of the digits beside it.
    """

    noise: float = 0.0
    power: float = 0.0
    weights: int = 0
    frames: int = 0
    packet_bytes: int = 0
    digit_bytes: int = 0

    @property
    def sqnr_db(self) -> float | None:
        """Over all quantized tensors."""
        return sqnr_db(self.power, self.noise)

    def add(self, coded: CodedTensor) -> None:
        """Count a quantized tensor."""
        self.noise += coded.noise
        self.power += coded.power
        self.weights += coded.spec.size

    def finish(self, writer: ArchiveWriter, index: Index) -> None:
        """Count what the writer wrote."""
        self.frames = len(index.frames)
        overhead = self.frames * writer.fragment_overhead
        self.packet_bytes = sum(frame.fragment_bytes for frame in index.frames) - overhead
        self.digit_bytes = writer.digit_bytes


def write_archive(
    stream: BinaryIO,
    plan: WritePlan,
    source: Source,
    workers: Workers,
    progress: Report = quiet,
) -> Written:
    """Write an archive to a stream.

    Parameters
    ----------
    stream : binary file object
    plan : WritePlan
    source : Source
        The checkpoint, as the workers read it.
    workers : Workers
        They do not change the bytes.
    progress : callable
        Told about the stage ``encode``.

    Raises
    ------
    QuantizationError, CodecError, CheckpointError, ClusterError
    """
    weights = sum(plan.header.tensors[number].size for number in plan.params)
    task = Task(plan, source, workers)
    if weights > TRIAL_WEIGHTS or plan.video.lossy is not None:
        return _write(stream, task, progress)
    trials = []
    for video in (True, False):
        trial = io.BytesIO()
        written = _write(trial, task, progress, video=video)
        trials.append((trial.getbuffer(), written))
    data, written = min(trials, key=lambda trial: len(trial[0]))
    stream.write(data)
    stream.flush()
    return written


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be written, from where, and by whom."""

    plan: WritePlan
    source: Source
    workers: Workers

    def read(self, number: int) -> TensorRead:
        """A tensor of the source."""
        return TensorRead(self.source, self.plan.header.tensors[number])


def _write(stream: BinaryIO, task: Task, progress: Report, video: bool = True) -> Written:
    plan, workers = task.plan, task.workers
    geometry, tensors = plan.header.geometry, plan.header.tensors
    settings = EncoderSettings(geometry.width, geometry.height, plan.video)
    writer = ArchiveWriter(stream, plan.header, open_encoder(settings).record, plan.files)
    room = _Room(task, writer, Outbox(workers), settings)
    meter = _Meter([tensors[number] for number in plan.params], workers, progress)
    written = Written()
    lossy = plan.video.lossy is not None
    if lossy:
        _write_lossy(room, written, meter)
    else:
        _write_levels(room, written, meter, video)
    room.exact.flush()
    room.outbox.flush()
    meter.finish()
    written.finish(writer, writer.finish(written.sqnr_db if lossy else None))
    return written


class _Room:
    """Where the tensors of an archive go."""

    def __init__(
        self, task: Task, writer: ArchiveWriter, outbox: Outbox, settings: EncoderSettings
    ) -> None:
        self.task, self.writer, self.outbox, self.settings = task, writer, outbox, settings
        self.exact = ExactWriter(writer, task.plan.header.tensors, outbox)

    def keep(self, number: int, elements: Callable[[int, int], Array]) -> None:
        """Store a tensor that is not quantized, with the mantissas that it keeps."""
        self.exact.add(number, _rounded(self.task.plan, number, elements))


def _write_levels(room: _Room, written: Written, meter: _Meter, video: bool) -> None:
    """Levels, on frames that are lossless if ``video``, or in boxes."""
    task, plan = room.task, room.task.plan
    tensors = plan.header.tensors
    frames = FrameWriter(room.writer, room.settings, room.outbox, meter.encoded)
    biases = bias_numbers(tensors, plan.moments, plan.params.keys(), plan.keep)
    corrections = Corrections(tensors, biases)
    for coded in code_tensors(requests(task), task.workers, meter.quantized):
        if isinstance(coded, Kept):
            for number, read in corrections.kept(coded.number, task.read(coded.number).elements):
                room.keep(number, read)
            continue
        shift = None if coded.choice.coding == "exact" else coded.shift
        for number, read in corrections.quantized(coded.number, shift):
            room.keep(number, read)
        _store(coded, frames if video else None, room.exact, task)
        if coded.choice.coding != "exact":
            written.add(coded.tensor)
        if isinstance(coded.levels, Scratch):
            coded.levels.close()
    frames.finish()


def _write_lossy(room: _Room, written: Written, meter: _Meter) -> None:
    """Samples of fine steps, on frames of which the codec decides what becomes of them."""
    task = room.task
    frames = LossyWriter(
        room.writer, room.settings, room.outbox, partial(_whole, task), written.add
    )
    for sampled in sample_tensors(requests(task), task.workers, room.settings.form.bits):
        if isinstance(sampled, Kept):
            room.keep(sampled.number, task.read(sampled.number).elements)
        else:
            frames.add(sampled)
            meter.quantized(sampled.tensor.spec.size)
    frames.finish()


def _whole(task: Task, number: int) -> Array:
    return task.read(number)()


def _store(coded: Coded, frames: FrameWriter | None, exact: ExactWriter, task: Task) -> None:
    levels = coded.levels
    if coded.choice.coding == "exact" or levels is None:
        exact.add(coded.number, task.read(coded.number).elements)
    elif coded.choice.coding == "video" and frames is not None:
        frames.add(coded.number, coded.tensor, levels)
    else:
        rows = _by_rows(coded.tensor, levels) if coded.choice.coding == "video" else levels
        read = rows.read if isinstance(rows, Scratch) else lambda begin, end: rows[begin:end]
        exact.add_plain(coded.number, coded.tensor, read, coded.choice.video_bytes)


def _by_rows(coded: CodedTensor, sequence: npt.NDArray[np.int8] | Scratch) -> Levels:
    """Levels of a small tensor that was meant for video, row by row."""
    size = coded.spec.size
    whole = sequence.read(0, size) if isinstance(sequence, Scratch) else sequence
    return tile.from_sequence(whole, coded.shape, coded.layout.order).reshape(-1)


def requests(task: Task) -> Iterator[Request | Kept]:
    """All tensors, in order."""
    plan = task.plan
    for number, spec in enumerate(plan.header.tensors):
        params = plan.params.get(number)
        if params is None:
            yield Kept(number)
            continue
        shaped = plan.shaping and is_convolution(spec)
        moments, fixed = plan.moments.get(number), plan.fixed.get(number)
        yield Request(number, spec, params, task.read(number), shaped, moments, fixed)


def kept(task: Task, number: int) -> Callable[[int, int], Array]:
    """Reads ranges of a tensor that is not quantized, as an archive stores it."""
    return _rounded(task.plan, number, task.read(number).elements)


def _rounded(
    plan: WritePlan, number: int, elements: Callable[[int, int], Array]
) -> Callable[[int, int], Array]:
    """Reads ranges of a tensor that is not quantized, with the mantissas that it keeps."""
    if plan.mantissa_bits >= FULL_BITS or not _may_round(plan.header.tensors[number], plan.keep):
        return elements

    def rounded(first: int, count: int) -> Array:
        values = elements(first, count).astype(np.float32, copy=False)
        return round_mantissa(values, plan.mantissa_bits)

    return rounded


def is_convolution(spec: TensorSpec) -> bool:
    """Whether the weights of one input channel are several kernel positions."""
    return prod(spec.shape[2:]) > 1


def _may_round(spec: TensorSpec, keep: tuple[str, ...]) -> bool:
    """Whether a tensor is a bias, a norm or a statistic, by its name, and not to be kept."""
    return (
        spec.dtype == "F32"
        and len(spec.shape) == 1
        and is_affine(spec.name)
        and not any(fnmatchcase(spec.name, pattern) for pattern in keep)
    )


class _Meter:
    """Progress of one archive: half of the way is quantizing, half encoding."""

    def __init__(self, coded: Sequence[TensorSpec], workers: Workers, progress: Report) -> None:
        self._total = sum(spec.size for spec in coded)
        self._bytes = sum(spec.stored_bytes for spec in coded)
        self._workers = workers
        self._progress = progress
        self._quantized = self._encoded = 0

    def quantized(self, weights: int) -> None:
        """So many weights have levels."""
        self._quantized += weights
        self._report()

    def encoded(self, samples: int) -> None:
        """A frame of so many samples has been written."""
        self._encoded = min(self._quantized, self._encoded + samples)
        self._report()

    def finish(self) -> None:
        """Everything has been written, also what was no video in the end."""
        self._quantized = self._encoded = self._total
        self._report()

    def _report(self) -> None:
        done = (self._quantized + self._encoded) // 2
        done_bytes = self._bytes * done // max(1, self._total)
        self._progress(
            Progress("encode", done, self._total, done_bytes, self._bytes, self._workers.shares)
        )
