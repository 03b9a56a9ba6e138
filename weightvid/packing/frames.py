"""Levels to frames to the archive: fills the ribbon, encodes side by side, writes in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.codec.encode import Encoder, EncoderSettings, open_encoder
from weightvid.container.digits import DigitWriter, Kind
from weightvid.container.records import Sidecar, TensorEnd, TensorStart
from weightvid.container.sidecar import sidecar_payload
from weightvid.container.writer import ArchiveWriter, CodedFrame
from weightvid.packing.quantized import CodedTensor
from weightvid.packing.workers import Outbox
from weightvid.scratch import Scratch
from weightvid.tile import BAND, ZERO_SAMPLE, FrameGeometry, Samples
from weightvid.tile.fold import Fold, fold_levels
from weightvid.tile.layout import cut

Levels = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a tensor's sequence on one frame.

    Attributes
    ----------
    column : int
        Its first ribbon column within the frame.
    levels : ndarray of int8, shape (n,)
    folds : tuple of (int, int, Fold)
        Parts of the levels, and their folds.
    carried : bool
        The tensor began in an earlier frame.
    """

    column: int
    levels: Levels
    folds: tuple[tuple[int, int, Fold], ...]
    carried: bool


@dataclass(slots=True)
class FrameWork:
    """All that a frame's bytes depend on, besides the encoder's settings."""

    number: int
    starts: list[TensorStart] = field(default_factory=list)
    ends: list[TensorEnd] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)


class _Encoders(threading.local):
    """An encoder for each thread, of the settings it was last asked for."""

    settings: EncoderSettings | None = None
    encoder: Encoder | None = None

    def encode(self, settings: EncoderSettings, luma: Samples) -> bytes:
        """Packet of one frame."""
        if self.encoder is None or self.settings != settings:
            self.encoder, self.settings = open_encoder(settings), settings
        return self.encoder.encode(luma)


_ENCODERS = _Encoders()


def encode_frame(settings: EncoderSettings, work: FrameWork) -> CodedFrame:
    """Fold and encode one frame: a pure function, for any worker.

    Parameters
    ----------
    settings : EncoderSettings
    work : FrameWork

    Raises
    ------
    CodecError
    """
    geometry = FrameGeometry(settings.width, settings.height)
    ribbon = np.full((BAND, geometry.columns), ZERO_SAMPLE, np.uint8)
    digits = DigitWriter()
    carried: dict[Kind, int] = {}
    for stretch in work.stretches:
        count = -(-stretch.levels.size // BAND)
        samples = np.full(count * BAND, ZERO_SAMPLE, np.uint8)
        for first, last, fold in stretch.folds:
            part, core, tail = fold_levels(stretch.levels[first:last], fold)
            samples[first:last] = part
            digits.add(fold, core, tail)
        place = slice(stretch.column, stretch.column + count)
        ribbon[:, place] = samples.reshape(count, BAND).T
        if stretch.carried:
            carried = digits.counts()
    sidecar = Sidecar(work.number, tuple(work.starts), tuple(work.ends), digits.streams(), carried)
    luma = tile.frame_from_ribbon(ribbon, geometry)
    return CodedFrame(
        work.number,
        sidecar_payload(sidecar, luma),
        _ENCODERS.encode(settings, luma),
        tuple(start.tensor for start in work.starts),
        sum(map(len, sidecar.digits.values())),
    )


class FrameWriter:
    """Takes tensors in ribbon order and writes frames to an archive.

    Parameters
    ----------
    writer : ArchiveWriter
    settings : EncoderSettings
    outbox : Outbox
        At most as many frames as it holds, and the one being filled, are in memory.
    written : callable or None
        Called with the number of samples of each frame that has been written.
    """

    def __init__(
        self,
        writer: ArchiveWriter,
        settings: EncoderSettings,
        outbox: Outbox,
        written: Callable[[int], None] | None = None,
    ) -> None:
        self._writer = writer
        self._settings = settings
        self._geometry = FrameGeometry(settings.width, settings.height)
        self._outbox = outbox
        self._written = written
        self._open = FrameWork(0)
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
        rows, columns = coded.shape
        layout = coded.layout
        if not self._settings.video.folds:
            layout = layout.unfolded()
        segments = layout.segments(rows, columns)
        self._open.starts.append(TensorStart(tensor, coded.params, coded.escapes, layout))
        at, count = 0, tile.ribbon_columns(rows, columns)
        while at < count:
            run = min(count - at, self._geometry.columns - self._filled)
            begin, end = at * BAND, min((at + run) * BAND, rows * columns)
            if end > begin:
                read = sequence.read if isinstance(sequence, Scratch) else None
                levels = sequence[begin:end] if read is None else read(begin, end)  # type: ignore[index]
                folds = tuple(cut(segments, begin, end))
                self._open.stretches.append(Stretch(self._filled, levels, folds, at > 0))
            at, self._filled = at + run, self._filled + run
            if at == count:
                self._open.ends.append(TensorEnd(tensor, coded.sha256, coded.sqnr_db))
            if self._filled == self._geometry.columns:
                self._submit()

    def _submit(self) -> None:
        work = self._open
        self._open, self._filled = FrameWork(work.number + 1), 0
        self._outbox.put(self._write, encode_frame, self._settings, work)

    def _write(self, frame: CodedFrame) -> None:
        self._writer.write_frame(frame)
        if self._written is not None:
            self._written(self._geometry.columns * BAND)

    def finish(self) -> None:
        """Hand out the last, partly filled frame; it is written in its turn."""
        if self._filled:
            self._submit()
