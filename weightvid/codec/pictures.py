"""Frames to packets and back by any codec of the registry that PyAV brings along."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags
from av.video.frame import PictureType

from weightvid.codec.priority import usual_priority
from weightvid.codec.registry import Coding, VideoCodec
from weightvid.errors import CodecError

#: luma of one frame: uint8 for 8-bit samples, else uint16.
Luma = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
#: some encoders demand an ordinary frame rate; nothing depends on it.
RATE = 25
#: side of the picture that shows whether a machine has the device of an encoder.
_TRIAL_PX = 256
_SVT_FATAL = "0"


@dataclass(frozen=True, slots=True)
class Stream:
    """Coded frames.

    Attributes
    ----------
    packets : tuple of bytes
        In coding order, which is the order of the frames.
    extradata : bytes
        Parameter sets and the like, stored once beside the packets.
    """

    packets: tuple[bytes, ...]
    extradata: bytes = b""

    @property
    def packet_bytes(self) -> int:
        """Bytes of all packets."""
        return sum(map(len, self.packets))


def missing(codec: VideoCodec) -> str | None:
    """Why this PyAV cannot run the encoder or its decoder, or None where it can."""
    for name, mode in ((codec.encoder, "w"), (codec.decoder, "r")):
        try:
            av.Codec(name, cast(Any, mode))
        except (av.FFmpegError, ValueError):
            return f"this PyAV ({av.__version__}) has no {name}"
    if codec.device:
        mode, about = next(iter(codec.modes.items()))
        coding = Coding(codec, mode, about.values[0] if about.values else None)
        try:
            _encoder(coding, _TRIAL_PX, _TRIAL_PX)
        except (av.FFmpegError, ValueError):
            return f"{codec.encoder} needs {codec.device}, and finds none here"
    return None


def encode(frames: Sequence[Luma], coding: Coding) -> Stream:
    """Code frames by one single-threaded encoder.

    Parameters
    ----------
    frames : sequence of ndarray, shape (height, width)
        uint8 for 8-bit pixel formats, uint16 for deeper ones. Chroma is the middle of the range.
    coding : Coding

    Raises
    ------
    CodecError
        No such encoder here, or it failed.
    """
    height, width = frames[0].shape
    try:
        context = _encoder(coding, width, height)
        packets: list[av.Packet[Any]] = []
        for number, luma in enumerate(frames):
            frame = _frame(luma, coding.pixel_format)
            frame.pts = number
            if not coding.inter:
                frame.pict_type = PictureType.I
            packets += context.encode(frame)
        packets += context.encode(None)
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise CodecError(f"{coding.codec.encoder} failed ({coding.label}): {error}") from error
    if len(packets) != len(frames):
        raise CodecError(
            f"{coding.codec.encoder} gave {len(packets)} packets for {len(frames)} frames"
        )
    if not coding.inter and not all(packet.is_keyframe for packet in packets):
        raise CodecError(f"{coding.codec.encoder} predicted frames that were to be coded alone")
    return Stream(tuple(map(bytes, packets)), bytes(context.extradata or b""))


def _encoder(coding: Coding, width: int, height: int) -> Any:
    # SVT-AV1 would tell the terminal about itself; FFmpeg has no say in it.
    os.environ.setdefault("SVT_LOG", _SVT_FATAL)
    context: Any = av.CodecContext.create(coding.codec.encoder, "w")
    context.width, context.height = width, height
    context.pix_fmt = coding.pixel_format
    context.time_base, context.framerate = Fraction(1, RATE), Fraction(RATE, 1)
    context.thread_count = 1
    context.gop_size = 9999 if coding.inter else 1
    context.flags |= Flags.global_header
    context.options = coding.options
    with usual_priority():
        context.open()
    return context


def _frame(luma: Luma, pixel_format: str) -> av.VideoFrame:
    height, width = luma.shape
    frame = av.VideoFrame(width, height, pixel_format)
    for number, plane in enumerate(frame.planes):
        rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
        samples = rows.view(luma.dtype)[:, : plane.width]
        samples[...] = luma if number == 0 else middle(pixel_format)
    return frame


def middle(pixel_format: str) -> int:
    """Sample in the middle of the range.

    Examples
    --------
    >>> middle("gray"), middle("yuv420p10le")
    (128, 512)
    """
    return 512 if pixel_format.endswith("10le") else 2048 if pixel_format.endswith("12le") else 128


def decode(stream: Stream, coding: Coding, shape: tuple[int, int]) -> list[Luma]:
    """Decode what :func:`encode` made, by one single-threaded decoder.

    Parameters
    ----------
    stream : Stream
    coding : Coding
    shape : tuple of int
        (height, width) of every frame.

    Returns
    -------
    list of ndarray
        Luma of each frame.

    Raises
    ------
    CodecError
        The stream does not decode to as many frames of that size as it has packets.
    """
    frames: list[Luma] = []
    try:
        context: Any = av.CodecContext.create(coding.codec.decoder, "r")
        context.width, context.height = shape[1], shape[0]
        context.extradata = stream.extradata or None
        context.thread_count = 1
        for number, data in enumerate(stream.packets):
            # A packet in FFmpeg's own memory (see codec/decode.py).
            packet: av.Packet[Any] = av.Packet(len(data))
            packet.update(data)
            packet.pts = packet.dts = number
            # FFmpeg's PNG decoder would take another frame for a difference to the last one.
            packet.is_keyframe = number == 0 or not coding.inter
            frames += [_luma(frame) for frame in context.decode(packet)]
        frames += [_luma(frame) for frame in context.decode(None)]
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise CodecError(f"{coding.codec.decoder} failed ({coding.label}): {error}") from error
    if len(frames) != len(stream.packets) or any(frame.shape != shape for frame in frames):
        sizes = {frame.shape for frame in frames}
        raise CodecError(
            f"{coding.codec.decoder} gave {len(frames)} frames of {sizes} for "
            f"{len(stream.packets)} packets of {shape}"
        )
    return frames


def _luma(frame: av.VideoFrame) -> Luma:
    plane = frame.planes[0]
    rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
    dtype = np.uint8 if frame.format.components[0].bits <= 8 else np.uint16
    return cast(Luma, rows.view(dtype)[:, : plane.width].copy())
