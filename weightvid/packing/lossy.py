"""Frames that a lossy codec quantizes: what it gives back are the tensor's levels.

The samples of a frame are levels of a fine uniform quantizer. The codec changes them; its decoded
pictures, which every conforming decoder gives bit for bit, are what sidecars, hashes and SQNR are
made from. A reader sees nothing but levels, so it needs to know nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.codec.decode import Decoder, DecoderSettings
from weightvid.codec.encode import EncoderSettings, open_encoder
from weightvid.container.records import TENSOR_HASH_BYTES, Sidecar, TensorEnd, TensorStart
from weightvid.container.sidecar import sidecar_payload
from weightvid.container.writer import ArchiveWriter, CodedFrame
from weightvid.errors import CodecError
from weightvid.packing.quantized import CodedTensor, restore
from weightvid.packing.workers import Outbox
from weightvid.scratch import Scratch
from weightvid.tile import BAND, PLAIN, ZERO_SAMPLE, FrameGeometry, Samples

Levels = npt.NDArray[np.int8]
Array = npt.NDArray[np.generic]


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
    ribbon = np.full((BAND, geometry.columns), ZERO_SAMPLE, np.uint8)
    for part in work.parts:
        count = -(-part.levels.size // BAND)
        samples = np.full(count * BAND, ZERO_SAMPLE, np.uint8)
        samples[: part.levels.size] = part.levels.view(np.uint8) ^ np.uint8(ZERO_SAMPLE)
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

    def add(self, tensor: int, coded: CodedTensor, sequence: Levels | Scratch) -> None:
        """Lay a tensor on the ribbon behind the last one.

        Parameters
        ----------
        tensor : int
            Id.
        coded : CodedTensor
        sequence : ndarray of int8 or Scratch
            Its levels in the order of its layout.
        """
        size = coded.spec.size
        layout = replace(coded.layout, folds=(PLAIN,) * len(coded.layout.folds))
        coded = replace(coded, layout=layout)
        whole = sequence.read(0, size) if isinstance(sequence, Scratch) else sequence
        self._tensors[tensor] = _Open(coded, np.empty(size, np.int8))
        self._work.starts.append(TensorStart(tensor, coded.params, coded.escapes, layout))
        at, count = 0, tile.ribbon_columns(*coded.shape)
        while at < count:
            run = min(count - at, self._geometry.columns - self._filled)
            begin, end = at * BAND, min((at + run) * BAND, size)
            if end > begin:
                self._work.parts.append(Part(tensor, self._filled, whole[begin:end].view(np.int8)))
            at, self._filled = at + run, self._filled + run
            if at == count:
                self._work.ends.append(tensor)
            if self._filled == self._geometry.columns:
                self._submit()

    def flush(self) -> None:
        """Code the last, partly filled frame and write all that is waiting."""
        if self._filled:
            self._submit()
        self._outbox.flush()

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
            levels = (samples ^ np.uint8(ZERO_SAMPLE)).view(np.int8)[: part.levels.size]
            known.sequence[known.filled : end] = levels
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
