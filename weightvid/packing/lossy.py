"""Frames that a lossy codec quantizes: what it gives back are the tensor's levels.

The samples of a frame are levels of a fine uniform quantizer. The codec changes them; its decoded
pictures, which every conforming decoder gives bit for bit, are what sidecars, hashes and SQNR are
made from. A reader sees nothing but levels, so it needs to know nothing of it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.codec.decode import Decoder, DecoderSettings
from weightvid.codec.encode import EncoderSettings, open_encoder
from weightvid.container.records import TENSOR_HASH_BYTES, Sidecar, TensorEnd, TensorStart
from weightvid.container.sidecar import sidecar_payload
from weightvid.container.writer import ArchiveWriter, CodedFrame
from weightvid.dtypes import to_float32
from weightvid.errors import CodecError
from weightvid.packing.layout import choose_layout, kernel_size
from weightvid.packing.quantized import CodedTensor, matrix_of, restore, split_levels
from weightvid.packing.quantizer import Request, naming
from weightvid.packing.schedule import Kept
from weightvid.packing.workers import Outbox, Work, Workers
from weightvid.quantize import uniform
from weightvid.tile import BAND, FrameGeometry, Samples
from weightvid.tile.fold import FOLDED_BITS, plain_levels, plain_samples

#: int8, or int16 of samples of more than 8 bits.
Levels = npt.NDArray[Any]
Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A tensor as fine samples: its id, what its sidecar will say, and its levels in order.

    Its hash and noise are still unknown: they depend on what the codec gives back.
    """

    number: int
    tensor: CodedTensor
    sequence: Levels


def sample_tensor(request: Request, bits: int) -> Sampled:
    """Round a tensor to its fine steps: a pure function, for any worker.

    Parameters
    ----------
    request : Request
        Its quantizer is uniform.
    bits : int
        Of a sample.

    Raises
    ------
    QuantizationError
        The tensor cannot be quantized; it is named.
    """
    spec, params = request.spec, request.params
    with naming([request]):
        matrix = to_float32(matrix_of(request.read(), spec), spec.dtype)
        levels, escapes = split_levels(uniform.quantize(matrix, params.step), (1 << bits - 1) - 1)
    layout = choose_layout(levels, kernel_size(spec.shape)).unfolded()
    tensor = CodedTensor(spec, params, escapes, layout, b"", 0.0, 0.0)
    return Sampled(request.number, tensor, tile.to_sequence(levels, layout.order))


def sample_tensors(
    requests: Iterable[Request | Kept], workers: Workers, bits: int
) -> Iterator[Sampled | Kept]:
    """Sample tensors, in order; the next one is under way while one is laid out."""
    ahead: deque[Work[Sampled] | Kept] = deque()
    for request in requests:
        if isinstance(request, Kept):
            ahead.append(request)
        else:
            size = request.spec.size
            ahead.append(workers.submit(sample_tensor, request, bits, weights=size))
        if len(ahead) > 1:
            yield _done(ahead.popleft())
    while ahead:
        yield _done(ahead.popleft())


def _done(found: Work[Sampled] | Kept) -> Sampled | Kept:
    return found if isinstance(found, Kept) else found.result()


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor on one frame: its id, first ribbon column there, and its levels."""

    tensor: int
    column: int
    levels: Levels


@dataclass(slots=True)
class LossyWork:
    """A frame to be coded."""

    number: int
    starts: list[TensorStart] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LossyFrame:
    """A coded frame, and the picture that every decoder makes of it."""

    work: LossyWork
    packet: bytes
    luma: Samples


def encode_lossy(settings: EncoderSettings, work: LossyWork) -> LossyFrame:
    """Code one frame by an encoder that has seen no other: a pure function, for any worker.

    Raises
    ------
    CodecError
    """
    geometry = FrameGeometry(settings.width, settings.height)
    bits = settings.form.bits
    dtype, zero = np.uint8 if bits == FOLDED_BITS else np.uint16, tile.zero_sample(bits)
    ribbon = np.full((BAND, geometry.columns), zero, dtype)
    for part in work.parts:
        count = -(-part.levels.size // BAND)
        samples = np.full(count * BAND, zero, dtype)
        samples[: part.levels.size] = plain_samples(part.levels, bits)
        ribbon[:, part.column : part.column + count] = samples.reshape(count, BAND).T
    encoder = open_encoder(settings)
    packet = encoder.encode(tile.frame_from_ribbon(ribbon, geometry))
    track = settings.video.track.name
    decoder = Decoder(DecoderSettings(encoder.record, settings.form, track, threads=1))
    ((_, luma),) = [(n, shown.copy()) for n, shown in decoder.decode([(0, packet)])]
    return LossyFrame(work, packet, luma)


@dataclass(slots=True)
class _Open:
    """A tensor of which frames are still to come back."""

    coded: CodedTensor
    sequence: Levels
    filled: int = 0


class LossyWriter:
    """Takes tensors in ribbon order and writes lossy frames to an archive.

    Parameters
    ----------
    writer : ArchiveWriter
    settings : EncoderSettings
    outbox : Outbox
    read : callable
        Stored elements of a tensor, by id.
    finished : callable
        Told each tensor as it was restored.
    """

    def __init__(
        self,
        writer: ArchiveWriter,
        settings: EncoderSettings,
        outbox: Outbox,
        read: Callable[[int], Array],
        finished: Callable[[CodedTensor], None],
    ) -> None:
        self._writer = writer
        self._settings = settings
        self._geometry = FrameGeometry(settings.width, settings.height)
        self._outbox = outbox
        self._read = read
        self._finished = finished
        self._tensors: dict[int, _Open] = {}
        self._work = LossyWork(0)
        self._filled = 0

    def add(self, sampled: Sampled) -> None:
        """Lay a tensor on the ribbon behind the last one."""
        tensor, coded, whole = sampled.number, sampled.tensor, sampled.sequence
        size = coded.spec.size
        self._tensors[tensor] = _Open(coded, np.empty(size, whole.dtype))
        self._work.starts.append(TensorStart(tensor, coded.params, coded.escapes, coded.layout))
        at, count = 0, tile.ribbon_columns(*coded.shape)
        while at < count:
            run = min(count - at, self._geometry.columns - self._filled)
            begin, end = at * BAND, min((at + run) * BAND, size)
            if end > begin:
                self._work.parts.append(Part(tensor, self._filled, whole[begin:end]))
            at, self._filled = at + run, self._filled + run
            if at == count:
                self._work.ends.append(tensor)
            if self._filled == self._geometry.columns:
                self._submit()

    def finish(self) -> None:
        """Hand out the last, partly filled frame; it is written in its turn."""
        if self._filled:
            self._submit()

    def _submit(self) -> None:
        work = self._work
        self._work, self._filled = LossyWork(work.number + 1), 0
        self._outbox.put(self._write, encode_lossy, self._settings, work)

    def _write(self, frame: LossyFrame) -> None:
        work = frame.work
        for part in work.parts:
            known = self._tensors[part.tensor]
            count = -(-part.levels.size // BAND)
            samples = tile.sequence_from_frame(frame.luma, part.column, count)
            end = known.filled + part.levels.size
            levels = plain_levels(samples, self._settings.form.bits)
            known.sequence[known.filled : end] = levels[: part.levels.size]
            known.filled = end
        ends = tuple(self._end(tensor) for tensor in work.ends)
        sidecar = Sidecar(work.number, tuple(work.starts), ends)
        starts = tuple(start.tensor for start in work.starts)
        payload = sidecar_payload(sidecar, frame.luma)
        self._writer.write_frame(CodedFrame(work.number, payload, frame.packet, starts, 0))

    def _end(self, tensor: int) -> TensorEnd:
        """Restore a tensor as a reader will."""
        known = self._tensors.pop(tensor)
        coded = known.coded
        if known.filled != coded.spec.size:
            raise CodecError(f"tensor {coded.spec.name!r} lost a part on its way through frames")
        levels = tile.from_sequence(known.sequence, coded.shape, coded.layout.order)
        array = self._read(tensor).reshape(coded.shape)
        found = restore(array, coded.spec.dtype, coded.params, levels, coded.escapes)
        digest = hashlib.sha256()
        for block in found.stored:
            digest.update(np.ascontiguousarray(block).data)
        sha256 = digest.digest()[:TENSOR_HASH_BYTES]
        done = replace(coded, sha256=sha256, noise=found.noise, power=found.power)
        self._finished(done)
        return TensorEnd(tensor, done.sha256, done.sqnr_db)
