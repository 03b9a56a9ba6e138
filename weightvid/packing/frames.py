"""Levels to frames to the archive: fills the ribbon, encodes side by side, writes in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.codec.encode import EncoderPool, EncoderSettings
from weightvid.container.digits import DigitWriter, Kind
from weightvid.container.records import Sidecar, TensorEnd, TensorStart
from weightvid.container.writer import ArchiveWriter
from weightvid.packing.quantized import CodedTensor
from weightvid.tile import BAND, ZERO_SAMPLE, FrameGeometry, Samples
from weightvid.tile.fold import fold_levels
from weightvid.tile.layout import Segment, cut


@dataclass(slots=True)
class _Open:
    """The frame that is being filled."""

    number: int
    ribbon: Samples
    starts: list[TensorStart] = field(default_factory=list)
    ends: list[TensorEnd] = field(default_factory=list)
    digits: DigitWriter = field(default_factory=DigitWriter)
    carried: dict[Kind, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A full frame on its way through an encoder."""

    sidecar: Sidecar
    luma: Samples
    packet: Future[bytes]


class FrameWriter:
    """Takes tensors in ribbon order and writes frames to an archive.

    At most a few frames more than there are workers are held at any time.

    Parameters
    ----------
    writer : ArchiveWriter
    settings : EncoderSettings
    executor : Executor
        Of threads; each opens an encoder of its own.
    workers : int
        Number of its threads.
    written : callable or None
        Called with the number of samples of each frame that has been written.
    """

    def __init__(
        self,
        writer: ArchiveWriter,
        settings: EncoderSettings,
        executor: Executor,
        workers: int,
        written: Callable[[int], None] | None = None,
    ) -> None:
        self._writer = writer
        self._geometry = FrameGeometry(settings.width, settings.height)
        self._encoders = EncoderPool(settings)
        self._executor = executor
        self._ahead = workers + 1
        self._waiting: deque[_Waiting] = deque()
        self._written = written
        self._open = self._blank(0)
        self._filled = 0

    def _blank(self, number: int) -> _Open:
        return _Open(number, np.full((BAND, self._geometry.columns), ZERO_SAMPLE, np.uint8))

    def add(self, tensor: int, coded: CodedTensor) -> None:
        """Lay a tensor on the ribbon behind the last one."""
        rows, columns = coded.levels.shape
        layout = coded.layout
        sequence = tile.to_sequence(coded.levels, layout.order)
        segments = layout.segments(rows, columns)
        self._open.starts.append(TensorStart(tensor, coded.params, coded.escapes, layout))
        at, count = 0, tile.ribbon_columns(rows, columns)
        while at < count:
            run = min(count - at, self._geometry.columns - self._filled)
            samples = self._fold(sequence, segments, at * BAND, (at + run) * BAND)
            place = slice(self._filled, self._filled + run)
            self._open.ribbon[:, place] = samples.reshape(run, BAND).T
            if at:
                self._open.carried = self._open.digits.counts()
            at, self._filled = at + run, self._filled + run
            if at == count:
                self._open.ends.append(TensorEnd(tensor, coded.sha256, coded.sqnr_db))
            if self._filled == self._geometry.columns:
                self._submit()

    def _fold(
        self, sequence: npt.NDArray[np.int8], segments: list[Segment], begin: int, end: int
    ) -> Samples:
        samples = np.full(end - begin, ZERO_SAMPLE, np.uint8)
        for first, last, fold in cut(segments, begin, end):
            part, core, tail = fold_levels(sequence[begin + first : begin + last], fold)
            samples[first:last] = part
            self._open.digits.add(fold, core, tail)
        return samples

    def _submit(self) -> None:
        done = self._open
        sidecar = Sidecar(
            done.number, tuple(done.starts), tuple(done.ends), done.digits.streams(), done.carried
        )
        luma = tile.frame_from_ribbon(done.ribbon, self._geometry)
        packet = self._executor.submit(self._encoders.encode, luma)
        self._waiting.append(_Waiting(sidecar, luma, packet))
        self._open, self._filled = self._blank(done.number + 1), 0
        while len(self._waiting) > self._ahead:
            self._write_first()

    def _write_first(self) -> None:
        first = self._waiting.popleft()
        self._writer.write_frame(first.sidecar, first.luma, first.packet.result())
        if self._written is not None:
            self._written(first.luma.size)

    def flush(self) -> None:
        """Encode the last, partly filled frame and write all that is waiting."""
        if self._filled:
            self._submit()
        while self._waiting:
            self._write_first()
