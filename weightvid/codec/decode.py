"""HEVC packets to luma frames, by FFmpeg's own decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt

from weightvid.errors import CodecError

Samples = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """What a decoder must know before the first packet.

    Attributes
    ----------
    extradata : bytes
        The track's ``hvcC`` record.
    width, height : int
        Frame size in samples; a stream of another size is refused, and never allocated.
    threads : int
        Frames decoded at the same time; 0: one per core.
    """

    extradata: bytes
    width: int
    height: int
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


class HevcDecoder:
    """Decodes whole IDR pictures in order; several frames may be on their way at a time."""

    def __init__(self, settings: DecoderSettings) -> None:
        self._settings = settings
        context = av.CodecContext.create("hevc", "r")
        context.extradata = settings.extradata
        context.thread_type = "FRAME"
        context.thread_count = settings.threads
        context.options = {"max_pixels": str(settings.width * settings.height)}
        self._context = context

    def decode(self, packets: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Samples]]:
        """Decode numbered packets.

        Parameters
        ----------
        packets : iterable of (int, bytes)
            Frame number and NAL units with 4-byte lengths.

        Yields
        ------
        (int, ndarray of uint8, shape (height, width))
            Frame number and luma, in the order of the packets. The array is a view that is valid
            until the next one is asked for.

        Raises
        ------
        CodecError
            A packet cannot be decoded, or decodes to something else than one frame of the
            declared size and format.
        """
        pending: list[int] = []
        for number, data in packets:
            packet = _packet(data, number)
            packet.pts = packet.dts = number
            pending.append(number)
            for frame in self._run(packet, number):
                yield self._next(pending, frame)
        for frame in self._run(None, pending[0] if pending else -1):
            yield self._next(pending, frame)
        if pending:
            raise CodecError(f"frame {pending[0]} cannot be decoded")

    def _run(self, packet: av.Packet[Any] | None, number: int) -> list[av.VideoFrame]:
        try:
            return self._context.decode(packet)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise CodecError(f"the decoder failed near frame {number}: {error}") from error

    def _next(self, pending: list[int], frame: av.VideoFrame) -> tuple[int, Samples]:
        want = self._settings
        if not pending or frame.pts != pending[0]:
            number = pending[0] if pending else frame.pts
            raise CodecError(f"frame {number} cannot be decoded")
        found = (frame.width, frame.height, frame.format.name)
        if found[:2] != (want.width, want.height) or found[2] not in ("yuv420p", "yuvj420p"):
            raise CodecError(
                f"frame {pending[0]} is {found[0]} x {found[1]} {found[2]}, "
                f"not {want.width} x {want.height} yuv420p"
            )
        plane = frame.planes[0]
        rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
        return pending.pop(0), rows[:, : plane.width]
