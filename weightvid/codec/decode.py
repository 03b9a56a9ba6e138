"""Packets of a track to luma frames, by the one decoder that the track names."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, cast

import av
import numpy as np
import numpy.typing as npt

from weightvid.beside import Side
from weightvid.codec.form import Form
from weightvid.codec.tracks import DEFAULT_CODEC, TRACKS
from weightvid.errors import CodecError

#: packets that wait for the decoder, or their frames for whoever takes them.
_AHEAD: Final = 4
#: luma of one frame: uint8 for 8-bit samples, else uint16.
Samples = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """What a decoder must know before the first packet.

    Attributes
    ----------
    record : bytes
        The track's configuration record.
    form : Form
        Of the frames; a stream of another size is refused, and never allocated.
    codec : str
        A name of :data:`.tracks.TRACKS`.
    threads : int
        Frames decoded at the same time; 0: one per core.
    """

    record: bytes
    form: Form
    codec: str = DEFAULT_CODEC
    threads: int = 0


def _packet(data: bytes, number: int) -> av.Packet[Any]:
    """Packet in FFmpeg's own memory.

    A packet around a Python object is freed under Python's lock. A decoding thread would wait for
    that lock while the thread that drops the decoder holds it and waits for the decoding thread.
    """
    if not data:
        raise CodecError(f"frame {number} has no packet")
    packet: av.Packet[Any] = av.Packet(len(data))
    packet.update(data)
    return packet


class Decoder:
    """Decodes pictures that need no other, in order; several may be on their way at a time.

    Parameters
    ----------
    settings : DecoderSettings

    Raises
    ------
    CodecError
        This FFmpeg has no decoder for the track.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        form, track = settings.form, TRACKS[settings.codec]
        self._form = form
        self._threads = settings.threads
        self._formats = track.formats[form.bits]
        try:
            context: Any = av.CodecContext.create(track.decoder, "r")
        except (av.FFmpegError, ValueError):
            raise CodecError(
                f"the track is {track.standard}, and this PyAV ({av.__version__}) has no "
                f"{track.decoder} to decode it"
            ) from None
        if told := track.extradata(settings.record):
            context.extradata = told
        # FFV1 has the size from the container alone; the others bring theirs.
        context.width, context.height = form.width, form.height
        context.thread_type = "FRAME"
        context.thread_count = settings.threads
        context.options = {"max_pixels": str(form.width * form.height)}
        self._context = context

    def decode(self, packets: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Samples]]:
        """Decode numbered packets.

        Parameters
        ----------
        packets : iterable of (int, bytes)
            Frame number and one sample of the track.

        Yields
        ------
        (int, ndarray of uint8 or uint16, shape (height, width))
            Frame number and luma, in the order of the packets. The array is a view that is valid
            until the next one is asked for.

        Raises
        ------
        CodecError
            A packet cannot be decoded, or decodes to something else than one frame of the
            declared size and format.
        """
        pending: list[int] = []
        for frame in self._frames(packets, pending):
            yield self._next(pending, frame)
        if pending:
            raise CodecError(f"frame {pending[0]} cannot be decoded")

    def _frames(
        self, packets: Iterable[tuple[int, bytes]], pending: list[int]
    ) -> Iterator[av.VideoFrame]:
        """Whatever comes out; ``pending`` gets the numbers of what goes in.

        With several threads the decoder runs beside whoever takes the frames, a few ahead: it need
        not stand still while a large tensor is finished. The first frames are not held back, nor
        any where the decoder waits for a slow source.
        """
        side = Side(self._threads)
        running: deque[Future[list[av.VideoFrame]]] = deque()
        given = 0
        try:
            for number, data in packets:
                packet = _packet(data, number)
                packet.pts = packet.dts = number
                # FFmpeg's PNG decoder would take another frame for a difference to the last one.
                packet.is_keyframe = True
                pending.append(number)
                waited = not running or running[-1].done()
                running.append(side.do(self._run, packet, number))
                while len(running) > (min(given, 1) if waited else min(given, _AHEAD)):
                    yield from (found := running.popleft().result())
                    given += len(found)
            running.append(side.do(self._run, None, pending[0] if pending else -1))
            while running:
                yield from running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            side.close()

    def _run(self, packet: av.Packet[Any] | None, number: int) -> list[av.VideoFrame]:
        try:
            found: list[av.VideoFrame] = self._context.decode(packet)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise CodecError(f"the decoder failed near frame {number}: {error}") from error
        return found

    def _next(self, pending: list[int], frame: av.VideoFrame) -> tuple[int, Samples]:
        want = self._form
        if not pending or frame.pts != pending[0]:
            number = pending[0] if pending else frame.pts
            raise CodecError(f"frame {number} cannot be decoded")
        found = (frame.width, frame.height, frame.format.name)
        if found[:2] != (want.width, want.height) or found[2] not in self._formats:
            raise CodecError(
                f"frame {pending[0]} is {found[0]} x {found[1]} {found[2]}, "
                f"not {want.width} x {want.height} {self._formats[0]}"
            )
        plane = frame.planes[0]
        rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
        if want.bits > 8:
            return pending.pop(0), rows.view("<u2")[:, : plane.width]
        return pending.pop(0), rows[:, : plane.width]
