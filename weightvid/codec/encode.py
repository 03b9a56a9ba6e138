"""Frames to HEVC packets: lossless x265, 8-bit 4:2:0 Main, every frame an IDR picture.

The packet of a frame depends on the frame and the settings alone, not on the frames before it or
on which encoder made it. So frames may be coded side by side, in any order.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, cast

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags
from av.video.frame import PictureType

from weightvid.codec import bitstream
from weightvid.errors import CodecError

#: x265's presets, fastest first. Lossless sizes differ by 0.1 % (tools/results/presets.md).
PRESETS: Final = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
    "placebo",
)
DEFAULT_PRESET: Final = "ultrafast"
NEUTRAL_CHROMA: Final = 128

#: keyint=1 would signal the Range Extensions profile; open-gop would turn IDR into CRA pictures.
#: Without loop filters x265 has no reason to write its running pattern into the slice headers,
#: which would make a packet depend on its number. One thread each: we run encoders side by side.
_X265_PARAMS: Final = (
    "keyint=2:min-keyint=1:open-gop=0:bframes=0:b-adapt=0:scenecut=0:rc-lookahead=0"
    ":cutree=0:no-deblock=1:no-sao=1:info=0:wpp=0:pools=none:frame-threads=1:log-level=none"
)
#: of lossless frames: smaller blocks do not help them.
_LOSSLESS: Final = "lossless=1:ctu=64:min-cu-size=16"
#: of lossy ones: the codec's own decisions about what an eye would miss are of no use to weights.
_LOSSY: Final = "aq-mode=0:psy-rd=0:psy-rdoq=0:rdoq-level=2:ipratio=1:strong-intra-smoothing=0"
MOST_QP: Final = 51.0


@dataclass(frozen=True, slots=True)
class Lossy:
    """How much a lossy codec may lose.

    Attributes
    ----------
    mode : str
        ``qp``: a quantization parameter for every block; ``crf``: x265's constant rate factor.
    value : float
        0..51; a QP is an integer.
    """

    mode: str
    value: float

    def __post_init__(self) -> None:
        if self.mode not in ("qp", "crf"):
            raise CodecError(f"unknown lossy mode {self.mode!r}; known: qp, crf")
        if not 0 <= self.value <= MOST_QP or (self.mode == "qp" and self.value % 1):
            what = "an integer" if self.mode == "qp" else "a number"
            raise CodecError(f"{self.mode} is {what} from 0 to {MOST_QP:g}, not {self.value:g}")

    def __str__(self) -> str:
        return f"{self.mode} {self.value:g}"


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What the packets depend on besides the frames.

    Attributes
    ----------
    width, height : int
        Frame size in samples; multiples of 64.
    preset : str
        x265's preset, one of :data:`PRESETS`.
    lossy : Lossy or None
        None: lossless.
    """

    width: int
    height: int
    preset: str = DEFAULT_PRESET
    lossy: Lossy | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise CodecError(f"unknown x265 preset {self.preset!r}; known: {', '.join(PRESETS)}")

    @property
    def x265_params(self) -> str:
        """Options in x265's own words."""
        if self.lossy is None:
            return f"{_LOSSLESS}:{_X265_PARAMS}"
        return f"{_LOSSY}:{self.lossy.mode}={self.lossy.value:g}:{_X265_PARAMS}"

    @property
    def level(self) -> str:
        """HEVC level that the stream claims and meets at one frame a second."""
        return bitstream.choose_level(self.width, self.height)


class HevcEncoder:
    """One x265 encoder; not for use by two threads at once."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._count = 0
        self._settings = settings
        try:
            context = av.CodecContext.create("libx265", "w")
            context.width, context.height = settings.width, settings.height
            context.pix_fmt = "yuv420p"
            context.time_base = context.framerate = Fraction(1, 1)
            context.thread_count = 1
            context.flags |= Flags.global_header
            context.options = {
                "preset": settings.preset,
                "x265-params": settings.x265_params,
                "forced-idr": "1",
            }
            context.open()
        except (av.FFmpegError, ValueError) as error:
            raise CodecError(
                f"x265 cannot be opened for {settings.width} x {settings.height} frames: {error}; "
                "is this PyAV built with libx265?"
            ) from error
        self._context = context
        self._frame = av.VideoFrame(settings.width, settings.height, "yuv420p")

    @property
    def parameter_sets(self) -> bitstream.ParameterSets:
        """VPS, SPS and PPS, claiming the level of the settings."""
        return bitstream.parameter_sets(self._context.extradata or b"", self._settings.level)

    def encode(self, luma: npt.NDArray[np.uint8]) -> bytes:
        """Packet of one frame.

        Parameters
        ----------
        luma : ndarray of uint8, shape (height, width)

        Returns
        -------
        bytes
            Slices of one IDR picture, NAL units with 4-byte lengths.
        """
        frame = self._frame
        frame.make_writable()
        chroma = np.uint8(NEUTRAL_CHROMA)
        for plane, samples in zip(frame.planes, (luma, chroma, chroma), strict=True):
            rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
            rows[:, : plane.width] = samples
        frame.pts = self._count
        frame.pict_type = PictureType.I
        self._count += 1
        try:
            packets = self._context.encode(frame)
        except av.FFmpegError as error:
            raise CodecError(f"x265 failed: {error}") from error
        if len(packets) != 1:
            raise CodecError(f"x265 gave {len(packets)} packets for one frame")
        return bitstream.idr_sample(bytes(packets[0]))


class EncoderPool(threading.local):
    """An encoder for each thread that asks, opened when first needed."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        self._encoder: HevcEncoder | None = None

    def encode(self, luma: npt.NDArray[np.uint8]) -> bytes:
        """Packet of one frame, made by this thread's encoder."""
        if self._encoder is None:
            self._encoder = HevcEncoder(self._settings)
        return self._encoder.encode(luma)
