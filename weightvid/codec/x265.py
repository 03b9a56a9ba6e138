"""Frames to HEVC packets by x265, the usual encoder: Main or Main 10, every frame an IDR picture.

The packet of a frame depends on the frame and the settings alone, not on the frames before it or
on which encoder made it. So frames may be coded side by side, in any order.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final, cast

import av
import numpy as np
from av.codec.context import Flags
from av.video.frame import PictureType

from weightvid.codec import hevc
from weightvid.codec.form import Form
from weightvid.codec.pictures import Luma, middle
from weightvid.codec.registry import Coding
from weightvid.errors import CodecError

#: keyint=1 would signal the Range Extensions profile; open-gop would turn IDR into CRA pictures.
#: Without loop filters x265 has no reason to write its running pattern into the slice headers,
#: which would make a packet depend on its number. One thread each: we run encoders side by side.
_COMMON: Final = (
    "keyint=2:min-keyint=1:open-gop=0:bframes=0:b-adapt=0:scenecut=0:rc-lookahead=0"
    ":cutree=0:no-deblock=1:no-sao=1:info=0:wpp=0:pools=none:frame-threads=1:log-level=none"
)
#: of lossless frames: smaller blocks do not help them.
_LOSSLESS: Final = "lossless=1:ctu=64:min-cu-size=16"
#: of lossy ones: the codec's own decisions about what an eye would miss are of no use to weights.
_LOSSY: Final = "aq-mode=0:psy-rd=0:psy-rdoq=0:rdoq-level=2:ipratio=1:strong-intra-smoothing=0"


def x265_params(coding: Coding) -> str:
    """Options in x265's own words."""
    if coding.value is None:
        return f"{_LOSSLESS}:{_COMMON}"
    return f"{_LOSSY}:{coding.mode}={coding.value:g}:{_COMMON}"


class X265Encoder:
    """One x265 encoder; not for use by two threads at once.

    Parameters
    ----------
    coding : Coding
        Of the codec ``x265``.
    form : Form

    Attributes
    ----------
    record : bytes
        The ``hvcC`` record.

    Raises
    ------
    CodecError
        PyAV has no x265, or it refuses the form.
    """

    def __init__(self, coding: Coding, form: Form) -> None:
        self._count = 0
        self._middle = middle(coding.pixel_format)
        self._dtype = np.uint8 if form.bits == 8 else np.uint16
        try:
            context = av.CodecContext.create("libx265", "w")
            context.width, context.height = form.width, form.height
            context.pix_fmt = coding.pixel_format
            context.time_base = context.framerate = Fraction(1, 1)
            context.thread_count = 1
            context.flags |= Flags.global_header
            context.options = {
                "preset": coding.preset,
                "x265-params": x265_params(coding),
                "forced-idr": "1",
            }
            context.open()
        except (av.FFmpegError, ValueError) as error:
            raise CodecError(
                f"x265 cannot be opened for {form.width} x {form.height} frames: {error}; "
                "is this PyAV built with libx265?"
            ) from error
        self._context = context
        self._frame = av.VideoFrame(form.width, form.height, coding.pixel_format)
        level = hevc.choose_level(form.width, form.height, form.bits)
        sets = hevc.parameter_sets(context.extradata or b"", level)
        self.record = hevc.hvcc(sets, form.bits)

    def encode(self, luma: Luma) -> bytes:
        """Packet of one frame: slices of one IDR picture, NAL units with 4-byte lengths.

        Parameters
        ----------
        luma : ndarray of uint8 or uint16, shape (height, width)
        """
        frame: Any = self._frame
        frame.make_writable()
        for number, plane in enumerate(frame.planes):
            rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
            rows.view(self._dtype)[:, : plane.width] = luma if number == 0 else self._middle
        frame.pts = self._count
        frame.pict_type = PictureType.I
        self._count += 1
        try:
            packets = self._context.encode(frame)
        except av.FFmpegError as error:
            raise CodecError(f"x265 failed: {error}") from error
        if len(packets) != 1:
            raise CodecError(f"x265 gave {len(packets)} packets for one frame")
        return hevc.idr_sample(bytes(packets[0]))
