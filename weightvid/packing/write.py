"""Writing a whole archive by a plan: quantize, choose, lay out, encode, in one pass."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from weightvid.calibration import TensorMoments
from weightvid.codec import bitstream
from weightvid.codec.encode import EncoderSettings, HevcEncoder
from weightvid.container.records import Header, Index
from weightvid.container.writer import ArchiveWriter
from weightvid.packing.exact import ExactWriter
from weightvid.packing.frames import FrameWriter
from weightvid.packing.quantized import CodedTensor, sqnr_db
from weightvid.packing.quantizer import Coded, Request, code_tensors
from weightvid.progress import Progress, Report, quiet
from weightvid.quantize import Params
from weightvid.quantize.mantissa import FULL_BITS, round_mantissa
from weightvid.spec import TensorSpec

Array = npt.NDArray[np.generic]

#: models of up to so many quantized weights are written both ways, and the smaller file is kept.
TRIAL_WEIGHTS: Final = 1 << 17
#: last parts of the names of 1-D tensors whose mantissas may be shortened. Others, such as rotary
#: frequencies or lookup tables, may be multiplied by large numbers, and stay as they are.
ROUNDED_NAMES: Final = frozenset(
    {"weight", "bias", "running_mean", "running_var", "gamma", "beta", "LayerNorm", "scale"}
)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """All that the bytes of an archive depend on, besides the weights.

    Attributes
    ----------
    header : Header
        Its tensors are those of the source, in order.
    params : mapping of int to Params
        Quantizer of each tensor that is coded, by id; all others are kept exactly.
    preset : str
        x265's preset.
    shaping : bool
        Round convolutions with noise shaping.
    mantissa_bits : int
        Stored mantissa bits that biases, norms and statistics keep.
    keep : tuple of str
        Patterns of names whose tensors keep all their bits.
    jobs : int
        Threads; 0: one per core. Does not change the bytes.
    moments : mapping of int to TensorMoments
        Calibration statistics of tensors that are quantized with error feedback, by id.
    files : tuple of bytes
        Boxes of the side files that the header lists.
    """

    header: Header
    params: Mapping[int, Params]
    preset: str
    shaping: bool = True
    mantissa_bits: int = FULL_BITS
    keep: tuple[str, ...] = ()
    jobs: int = 0
    moments: Mapping[int, TensorMoments] = field(default_factory=dict)
    files: tuple[bytes, ...] = ()


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
    read: Callable[[str], Array],
    progress: Report = quiet,
) -> Written:
    """Write an archive to a stream.

    Parameters
    ----------
    stream : binary file object
    plan : WritePlan
    read : callable
        Gives the stored elements of a tensor by name; called by one thread.
    progress : callable
        Told about the stage ``encode``.

    Raises
    ------
    QuantizationError, CodecError, CheckpointError
    """
    weights = sum(plan.header.tensors[number].size for number in plan.params)
    if weights > TRIAL_WEIGHTS:
        return _write(stream, plan, read, progress)
    trials = []
    for video in (True, False):
        trial = io.BytesIO()
        written = _write(trial, plan, read, progress, video=video)
        trials.append((trial.getbuffer(), written))
    data, written = min(trials, key=lambda trial: len(trial[0]))
    stream.write(data)
    stream.flush()
    return written


def _write(
    stream: BinaryIO,
    plan: WritePlan,
    read: Callable[[str], Array],
    progress: Report,
    video: bool = True,
) -> Written:
    geometry, tensors = plan.header.geometry, plan.header.tensors
    settings = EncoderSettings(geometry.width, geometry.height, plan.preset)
    hvcc = bitstream.hvcc(HevcEncoder(settings).parameter_sets)
    writer = ArchiveWriter(stream, plan.header, hvcc, plan.files)
    exact = ExactWriter(writer, tensors)
    jobs = plan.jobs or os.cpu_count() or 1
    meter = _Meter(sum(tensors[number].size for number in plan.params), progress)
    written = Written()
    with ThreadPoolExecutor(jobs, "weightvid-pack") as executor:
        frames = FrameWriter(writer, settings, executor, jobs, meter.add)
        try:
            for coded in code_tensors(_requests(plan, read, exact), executor, jobs):
                _store(coded, frames if video else None, exact, read)
                if coded.choice.coding != "exact":
                    written.add(coded.tensor)
            frames.flush()
            exact.flush()
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise
    written.finish(writer, writer.finish())
    return written


def _store(
    coded: Coded, frames: FrameWriter | None, exact: ExactWriter, read: Callable[[str], Array]
) -> None:
    if coded.choice.coding == "exact":
        exact.add(coded.number, read(coded.tensor.spec.name))
    elif coded.choice.coding == "plain" or frames is None:
        exact.add_plain(coded.number, coded.tensor, coded.choice.video_bytes)
    else:
        frames.add(coded.number, coded.tensor)


def _requests(
    plan: WritePlan, read: Callable[[str], Array], exact: ExactWriter
) -> Iterator[Request]:
    """Tensors to be quantized, in order; the others are handed to the exact writer on the way."""
    for number, spec in enumerate(plan.header.tensors):
        params = plan.params.get(number)
        if params is not None:
            shaped = plan.shaping and is_convolution(spec)
            moments = plan.moments.get(number)
            yield Request(number, spec, params, partial(read, spec.name), shaped, moments)
            continue
        array = read(spec.name)
        if plan.mantissa_bits < FULL_BITS and _may_round(spec, plan.keep):
            array = round_mantissa(array.astype(np.float32, copy=False), plan.mantissa_bits)
        exact.add(number, array)


def is_convolution(spec: TensorSpec) -> bool:
    """Whether the weights of one input channel are several kernel positions."""
    return prod(spec.shape[2:]) > 1


def _may_round(spec: TensorSpec, keep: tuple[str, ...]) -> bool:
    """Whether a tensor is a bias, a norm or a statistic, by its name, and not to be kept."""
    return (
        spec.dtype == "F32"
        and len(spec.shape) == 1
        and spec.name.rpartition(".")[2] in ROUNDED_NAMES
        and not any(fnmatchcase(spec.name, pattern) for pattern in keep)
    )


@dataclass(slots=True)
class _Meter:
    """Progress of encoding, in weights."""

    total: int
    progress: Report
    done: int = field(default=0)

    def add(self, samples: int) -> None:
        self.done = min(self.total, self.done + samples)
        self.progress(Progress("encode", self.done, self.total))
