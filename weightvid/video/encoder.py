"""Frames to samples of an MP4 track, by PyAV's encoders.

Every frame gets an encoder that has seen no other: so its packet depends on the frame and the
settings alone, and frames may be coded in any order and place. That costs about a hundredth of the
time.

Sources: ISO/IEC 14496-15 5.3.3 and 8.3.3; AV1 Codec ISO Media File Format Binding 2.3 and 2.4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import gcd
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import av
import numpy as np
from av.codec.context import Flags
from av.video.frame import PictureType

from weightvid.errors import CodecError
from weightvid.loader import MAX_SAMPLES, MAX_SIDE, MIN_SIDE, ZERO_SAMPLE, Bytes
from weightvid.video.level import hevc_level, unescape, with_level


@dataclass(frozen=True, slots=True)
class VideoCodec:
    """An encoder and the kind of track that it makes.

    Attributes
    ----------
    name, standard : str
        Our name and the standard's: ``x265`` writes ``HEVC``.
    encoder : str
        FFmpeg's name.
    entry : bytes
        Type of the sample entry.
    presets : tuple of str
        From fast to slow.
    default_preset, large_preset : str
        What small models are coded with, and what large ones, where time matters more.
    lossy : tuple of int
        Smallest and largest QP.
    """

    name: str
    standard: str
    encoder: str
    entry: bytes
    presets: tuple[str, ...]
    default_preset: str
    large_preset: str
    lossy: tuple[int, int]


#: levels of a model that is large.
LARGE_MODEL: Final = 1 << 22

#: Of x265's and x264's presets, those that differ for levels. x264's superfast predicts by DC more
#: often than slower presets do, which is best for noise.
_ROWS: Final = (
    VideoCodec("x265", "HEVC", "libx265", b"hvc1",
               ("ultrafast", "superfast", "medium", "slower"), "superfast", "ultrafast",
               (0, 51)),
    VideoCodec("svt-av1", "AV1", "libsvtav1", b"av01",
               tuple(str(n) for n in range(12, -1, -1)), "8", "8", (1, 63)),
    VideoCodec("x264", "H.264", "libx264", b"avc1",
               ("superfast", "medium", "slower"), "superfast", "superfast", (1, 51)),
)  # fmt: skip

#: every codec of archives, by name.
CODECS: Final[Mapping[str, VideoCodec]] = MappingProxyType({row.name: row for row in _ROWS})


@dataclass(frozen=True, slots=True)
class Video:
    """How frames are coded.

    Attributes
    ----------
    codec : str
        A name of :data:`CODECS`.
    preset : str
        One of the codec's; empty: as the model's size asks for.
    qp : int or None
        Quantization parameter of every block; None: lossless.

    Raises
    ------
    CodecError
        The codec, preset or QP does not exist.
    """

    codec: str = "x265"
    preset: str = ""
    qp: int | None = None

    def __post_init__(self) -> None:
        row = CODECS.get(self.codec)
        if row is None:
            raise CodecError(f"unknown codec {self.codec!r}; choose one of {', '.join(CODECS)}")
        if self.preset and self.preset not in row.presets:
            raise CodecError(
                f"{row.name} has no preset {self.preset!r}; choose one of {', '.join(row.presets)}"
            )
        low, high = row.lossy
        if self.qp is not None and not (isinstance(self.qp, int) and low <= self.qp <= high):
            raise CodecError(
                f"{row.name} takes an integer QP from {low} to {high}, not {self.qp!r}"
            )

    def for_levels(self, count: int) -> Video:
        """The same with a preset, for a model of so many levels."""
        row = CODECS[self.codec]
        usual = row.default_preset if count <= LARGE_MODEL else row.large_preset
        return replace(self, preset=self.preset or usual)


_SIDE_STEP: Final = 64
#: bits of a sample that the level claims to suffice for before the packets are known.
_USUAL_BITS: Final = 6
_TASKS: Final = Path("/proc/self/task")

#: The device profile, and nothing that refers to other pictures. keyint=1 would signal the Range
#: Extensions profile; open-gop would turn IDR into CRA pictures.
_X265_PROFILE: Final = (
    "keyint=2:min-keyint=1:open-gop=0:bframes=0:b-adapt=0:scenecut=0:rc-lookahead=0:cutree=0"
    ":ref=1:temporal-mvp=0:weightp=0:ctu=64:no-deblock=1:no-sao=1:amp=0:rect=0:signhide=0:tskip=0"
    ":strong-intra-smoothing=0:constrained-intra=0:scaling-list=off:aq-mode=0:slices=1:info=0"
    ":wpp=0:pools=none:frame-threads=1:log-level=none"
)
#: smallest coding unit, and how far the encoder looks, by preset; measured for levels: a deeper
#: tree of transform blocks pays, more exact rate estimates do not.
_X265_LOSSLESS: Final = {
    "ultrafast": (32, "rd=1:tu-intra-depth=2"),
    "superfast": (16, "rd=1:tu-intra-depth=3"),
    "medium": (16, "rd=3:tu-intra-depth=4"),
    "slower": (8, "rd=3:tu-intra-depth=4"),
}
#: lossless blocks have no QP, but the picture's sets the prices of modes and where the arithmetic
#: code's contexts start: 26 takes 0.1 to 0.4 % less than x265's 4. Only a zone may say so.
_X265_START: Final = "zones=0,1,q=26"
#: the codec's own decisions about what an eye would miss are of no use to weights.
_X265_LOSSY: Final = "psy-rd=0:psy-rdoq=0:rdoq-level=2:ipratio=1"
#: most samples of a picture, and the lowest level, as FFmpeg names it, that allows them at 14 bits
#: a sample and one picture a second: more than lossless pictures of uniform noise take.
_OTHER_LEVELS: Final = {
    "svt-av1": (
        (428_571, "30"), (714_285, "31"), (857_142, "40"), (1_428_571, "41"), (2_142_857, "50"),
        (MAX_SAMPLES, "51"),
    ),
    "x264": ((921_600, "31"), (1_310_720, "32"), (2_097_152, "41"), (MAX_SAMPLES, "42")),
}  # fmt: skip


def _options(video: Video, width: int, height: int) -> dict[str, str]:
    """What FFmpeg is told besides the preset."""
    if video.codec == "x265":
        if video.qp is None:
            least, search = _X265_LOSSLESS[video.preset]
            # Sides that are multiples of it need no padding and no conformance window.
            mode = f"lossless=1:min-cu-size={gcd(width, height, least)}:{search}:{_X265_START}"
        else:
            mode = f"qp={video.qp}:min-cu-size=8:{_X265_LOSSY}"
        return {"x265-params": f"{mode}:{_X265_PROFILE}", "forced-idr": "1"}
    level = next(name for most, name in _OTHER_LEVELS[video.codec] if width * height <= most)
    if video.codec == "x264":
        return {
            "qp": str(video.qp or 0), "bf": "0", "aq-mode": "0", "psy": "0", "level": level,
            "x264-params": "ipratio=1",
        }  # fmt: skip
    mode = "lossless=1" if video.qp is None else f"rc=0:aq-mode=0:qp={video.qp}"
    return {"svtav1-params": f"{mode}:pred-struct=1:lp=1", "level": level}


def open_encoder(video: Video, width: int, height: int) -> Encoder:
    """An encoder of frames of one size.

    Parameters
    ----------
    video : Video
    width, height : int
        Multiples of 64 from 192 to 2176; at most 2,228,224 samples.

    Raises
    ------
    CodecError
        The size is not allowed, or this PyAV has no such encoder.
    """
    good = all(MIN_SIDE <= n <= MAX_SIDE and not n % _SIDE_STEP for n in (width, height))
    if not good or width * height > MAX_SAMPLES:
        raise CodecError(
            f"frames of {width} x {height} cannot be coded; sides are multiples of {_SIDE_STEP} "
            f"from {MIN_SIDE} to {MAX_SIDE}, with at most {MAX_SAMPLES} samples"
        )
    return Encoder(video, width, height)


class Encoder:
    """Codes frames; made by :func:`open_encoder`. One thread uses it at a time.

    Attributes
    ----------
    record : bytes
        Payload of the track's configuration box. That of HEVC claims a level for packets of up to
        6 bits a sample: put the right one in with :func:`.level.with_level`.
    """

    def __init__(self, video: Video, width: int, height: int) -> None:
        self._video, self._codec = video.for_levels(0), CODECS[video.codec]
        self._shape = height, width
        self.record = self._headers = _headers(self._video, width, height)
        if self._codec.entry == b"hvc1":
            most = width * height * _USUAL_BITS // 8
            self.record = with_level(self._headers, hevc_level(width, height, most, most).level_idc)

    def encode(self, luma: Bytes) -> bytes:
        """Code one frame to one sample of the track.

        Parameters
        ----------
        luma : ndarray of uint8, shape (height, width)

        Returns
        -------
        bytes
            HEVC and H.264: the slices of one IDR picture, each NAL unit after its length of 4
            bytes. AV1: a temporal unit without its delimiter.

        Raises
        ------
        CodecError
            The frame has another shape or type, or the encoder failed.
        """
        if luma.shape != self._shape or luma.dtype != np.uint8:
            raise CodecError(
                f"a frame is {luma.dtype} of shape {luma.shape}; the encoder was opened for uint8 "
                f"of shape {self._shape}"
            )
        headers, sample = _encode(self._video, luma)
        if headers != self._headers:
            raise CodecError(f"{self._codec.name} wrote other headers for this frame than before")
        return sample


@lru_cache
def _headers(video: Video, width: int, height: int) -> bytes:
    """Record of frames of one size; only a picture shows it, as SVT-AV1 announces another one."""
    return _encode(video, np.full((height, width), ZERO_SAMPLE, np.uint8))[0]


def _encode(video: Video, luma: Bytes) -> tuple[bytes, bytes]:
    """Record and sample of one frame, by an encoder of its own."""
    (height, width), codec = luma.shape, CODECS[video.codec]
    chroma = np.full((height // 2, width), ZERO_SAMPLE, np.uint8)
    frame = av.VideoFrame.from_ndarray(np.concatenate((luma, chroma)), "yuv420p")
    frame.pts, frame.pict_type = 0, PictureType.I
    try:
        context = _open(video, width, height)
        packets = [*context.encode(frame), *context.encode(None)]
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise CodecError(
            f"{codec.name} failed on a frame of {width} x {height}: {error}; "
            f"is this PyAV built with {codec.encoder}?"
        ) from error
    if len(packets) != 1:
        raise CodecError(f"{codec.name} gave {len(packets)} packets for one frame")
    return _WRAPPERS[codec.entry](bytes(context.extradata or b""), bytes(packets[0]))


def _open(video: Video, width: int, height: int) -> Any:
    # SVT-AV1 would print a banner; FFmpeg's log level does not reach it.
    os.environ.setdefault("SVT_LOG", "0")
    context: Any = av.CodecContext.create(CODECS[video.codec].encoder, "w")
    context.width, context.height = width, height
    context.pix_fmt = "yuv420p"
    context.color_range = 2  # full
    context.time_base = context.framerate = Fraction(1, 1)
    context.thread_count = context.gop_size = 1
    context.flags |= Flags.global_header
    context.options = {"preset": video.preset, **_options(video, width, height)}
    with usual_priority():
        context.open()
    return context


@contextmanager
def usual_priority() -> Iterator[None]:
    """Give this thread, and those started meanwhile, the scheduling that this thread had before.

    SVT-AV1, when root runs it on Linux, makes all its threads and the one that opens it real-time
    ones (SCHED_FIFO, 99), and nothing else on the machine would get a turn.
    """
    if not hasattr(os, "sched_setscheduler") or not _TASKS.is_dir():
        yield
        return
    known = {*_TASKS.iterdir()}
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in (0, *(int(path.name) for path in {*_TASKS.iterdir()} - known)):
            with suppress(OSError):  # a thread may have ended meanwhile
                if os.sched_getscheduler(thread) != policy:
                    os.sched_setscheduler(thread, policy, priority)


def _wrap_hevc(extradata: bytes, packet: bytes) -> tuple[bytes, bytes]:
    sets = _nal_units(extradata)
    if [unit[0] >> 1 for unit in sets] != [32, 33, 34]:
        raise CodecError("x265 gave other parameter sets than one VPS, SPS and PPS")
    record = b"\x01" + unescape(sets[1])[3:15]  # profile, tier and level
    record += b"\xf0\x00\xfc"  # unknown segmentation and parallelism
    record += b"\xfd\xf8\xf8\x00\x00"  # 4:2:0, 8 bits, unspecified frame rate
    record += b"\x0f\x03"  # one temporal layer, nested; lengths of 4 bytes; three arrays
    for unit in sets:
        record += bytes((0x80 | unit[0] >> 1, 0, 1)) + len(unit).to_bytes(2, "big") + unit
    units = _nal_units(packet)
    return record, _sample(units, [unit[0] >> 1 in (19, 20) for unit in units])


def _wrap_avc(extradata: bytes, packet: bytes) -> tuple[bytes, bytes]:
    sets = _nal_units(extradata)
    if [unit[0] & 0x1F for unit in sets] != [7, 8]:
        raise CodecError("x264 gave other parameter sets than one SPS and PPS")
    record = b"\x01" + sets[0][1:4] + b"\xff\xe1" + len(sets[0]).to_bytes(2, "big") + sets[0]
    record += b"\x01" + len(sets[1]).to_bytes(2, "big") + sets[1]
    record += b"\xfd\xf8\xf8\x00"  # 4:2:0, 8 bits, no SPS extension
    units = [unit for unit in _nal_units(packet) if unit[0] & 0x1F != 6]  # SEI
    return record, _sample(units, [unit[0] & 0x1F == 5 for unit in units])


def _wrap_av1(_: bytes, packet: bytes) -> tuple[bytes, bytes]:
    # Temporal delimiter, sequence header, frame; the first two have sizes of one byte.
    end = 4 + packet[3]
    if packet[:3] != b"\x12\x00\x0a" or packet[3] & 0x80 or packet[end] != 0x32:
        raise CodecError("SVT-AV1 gave another packet than one sequence header and one frame")
    # Profile Main and the level; Main tier, 8 bits, 4:2:0, unknown chroma position; no delay.
    return bytes((0x81, packet[7] >> 3, 0x0C, 0)) + packet[2:end], packet[2:]


def _nal_units(stream: bytes) -> list[bytes]:
    """NAL units of an Annex B byte stream, without start codes and trailing zero bytes."""
    return [unit for part in stream.split(b"\0\0\1") if (unit := part.rstrip(b"\0"))]


def _sample(units: list[bytes], idr: list[bool]) -> bytes:
    """The only unit of a picture, after its length."""
    if idr != [True]:
        raise CodecError("the encoder gave another picture than an IDR picture of one slice")
    return len(units[0]).to_bytes(4, "big") + units[0]


_WRAPPERS: Final = {b"hvc1": _wrap_hevc, b"avc1": _wrap_avc, b"av01": _wrap_av1}
