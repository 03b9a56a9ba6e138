"""Frames to the packets of an archive's track, by any encoder of the registry that fits one.

The packet of a frame depends on the frame and the settings alone. x265 can do that with one encoder
for many frames (:mod:`.x265`); of the others each frame gets an encoder that has seen no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Final, Protocol

import numpy as np

from weightvid.codec import pictures, program
from weightvid.codec.form import Form
from weightvid.codec.pictures import Luma, middle
from weightvid.codec.program import Program
from weightvid.codec.registry import Coding, VideoCodec, bit_depth, codec
from weightvid.codec.tracks import TRACKS, TrackCodec
from weightvid.codec.x265 import X265Encoder
from weightvid.errors import CodecError

DEFAULT_ENCODER: Final = "x265"


@dataclass(frozen=True, slots=True)
class Lossy:
    """How much a lossy codec may lose.

    Attributes
    ----------
    mode : str
        ``qp``: a quantization parameter for every block; ``crf``: the codec's constant rate factor.
    value : float
        A QP is an integer. The range is the codec's.
    """

    mode: str
    value: float

    def __post_init__(self) -> None:
        if self.mode not in ("qp", "crf"):
            raise CodecError(f"unknown lossy mode {self.mode!r}; known: qp, crf")
        if not isfinite(self.value) or (self.mode == "qp" and self.value % 1):
            what = "an integer" if self.mode == "qp" else "a number"
            raise CodecError(f"{self.mode} is {what}, not {self.value:g}")

    def __str__(self) -> str:
        return f"{self.mode} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Video:
    """How a track is to be coded, but for the size of its frames.

    Attributes
    ----------
    encoder : str
        A name of :data:`.registry.CODECS`.
    preset : str
        One of the encoder's; empty: its usual one.
    lossy : Lossy or None
        None: lossless.
    bits : int
        Of a sample; more than 8 only if lossy.
    program : Program or None
        The ffmpeg program, for encoders that PyAV lacks.
    whole : bool
        Every level is in the pictures, whatever the encoder codes best.

    Raises
    ------
    CodecError
        No such encoder or preset, no such mode of it, or its stream is no track of an archive.
    """

    encoder: str = DEFAULT_ENCODER
    preset: str = ""
    lossy: Lossy | None = None
    bits: int = 8
    program: Program | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        row = codec(self.encoder)
        if not row.track:
            raise CodecError(f"{row.name} is no codec of archives: {row.unfit}")
        if self.lossy is None and "lossless" not in row.modes:
            raise CodecError(f"{row.name} has no lossless mode: give it a --qp")
        if self.lossy is None and self.bits != 8:
            raise CodecError(
                "lossless archives have samples of 8 bits; deeper ones need a QP or CRF"
            )
        object.__setattr__(self, "preset", self.coding.preset)

    @property
    def coding(self) -> Coding:
        """The encoder's setting."""
        row = codec(self.encoder)
        if self.lossy is None:
            return Coding(row, "lossless", None, self.preset, _format(row, "lossless", 8))
        mode = self.lossy.mode
        if mode not in row.modes:
            raise CodecError(f"{row.name} has no {mode.upper()}; it has: {', '.join(row.modes)}")
        chosen = _format(row, mode, self.bits)
        return Coding(row, mode, float(self.lossy.value), self.preset, chosen)

    @property
    def folds(self) -> bool:
        """Whether the dense core of the levels lies beside the pictures."""
        return codec(self.encoder).folds and not self.whole

    @property
    def track(self) -> TrackCodec:
        """What the stream is."""
        return TRACKS[codec(self.encoder).track]


def _format(row: VideoCodec, mode: str, bits: int) -> str:
    """Pixel format of a track's frames, which the encoder must take.

    Raises
    ------
    CodecError
    """
    track = TRACKS[row.track]
    known = [f for f in row.modes[mode].formats if f in track.formats.get(bits, ())]
    if not known:
        shown = " or ".join(map(str, sorted(depths_of(row.name, mode))))
        raise CodecError(f"{row.name} codes samples of {shown} bits, not of {bits} (--bit-depth)")
    return known[0]


def depths_of(name: str, mode: str) -> set[int]:
    """Bits of a sample that an encoder takes in a mode, and archives have; of none, no mode.

    Parameters
    ----------
    name : str
        A name of :data:`.registry.CODECS` that archives can have.
    mode : str
        ``lossless``, ``qp`` or ``crf``.
    """
    row = codec(name)
    formats = row.modes[mode].formats if mode in row.modes else ()
    return {bit_depth(f) for f in formats} & {*TRACKS[row.track].depths}


def find_program(name: str, wanted: str | None = None) -> Program | None:
    """The ffmpeg program that an encoder needs; None for those of PyAV.

    Parameters
    ----------
    name : str
        A name of :data:`.registry.CODECS`.
    wanted : str or None
        Path of the program to use.

    Raises
    ------
    CodecError
        The encoder is not to be had here; the message says what is missing.
    """
    row = codec(name)
    if row.backend == "pyav":
        why = pictures.missing(row)
        if why is not None:
            raise CodecError(f"{name} cannot be used here: {why}")
        return None
    chosen = program.choose(row, program.programs(wanted))
    if isinstance(chosen, str):
        raise CodecError(f"{name} cannot be used here: {chosen}")
    return chosen


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What the packets depend on besides the frames.

    Attributes
    ----------
    width, height : int
        Frame size in samples; multiples of 64.
    video : Video
    """

    width: int
    height: int
    video: Video = Video()

    @property
    def form(self) -> Form:
        """What the packets decode to."""
        return Form(self.width, self.height, self.video.bits)


class Encoder(Protocol):
    """Codes frames; not for use by two threads at once."""

    @property
    def record(self) -> bytes:
        """The track's configuration record."""

    def encode(self, luma: Luma) -> bytes:
        """Packet of one frame, shape (height, width), as it lies in an MP4."""


def open_encoder(settings: EncoderSettings) -> Encoder:
    """An encoder of these settings.

    Raises
    ------
    CodecError
    """
    if settings.video.encoder == DEFAULT_ENCODER:
        return X265Encoder(settings.video.coding, settings.form)
    return FreshEncoder(settings)


class FreshEncoder:
    """Opens an encoder anew for each frame, so that a packet depends on its frame alone."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings

    @property
    def record(self) -> bytes:
        """The track's configuration record."""
        return _blank_record(self._settings)

    def encode(self, luma: Luma) -> bytes:
        """Packet of one frame.

        Raises
        ------
        CodecError
            The encoder failed, or made a picture that does not fit the track.
        """
        record, packet = _encode(self._settings, luma)
        if record != self.record:
            raise CodecError(
                f"{self._settings.video.encoder} wrote a frame with headers of its own, which do "
                "not fit the others'"
            )
        return packet


@lru_cache(maxsize=8)
def _blank_record(settings: EncoderSettings) -> bytes:
    """Configuration record of a track, as a frame without weights shows it."""
    form, pixel_format = settings.form, settings.video.coding.pixel_format
    dtype = np.uint8 if form.bits == 8 else np.uint16
    blank = np.full((form.height, form.width), middle(pixel_format), dtype)
    return _encode(settings, blank)[0]


def _encode(settings: EncoderSettings, luma: Luma) -> tuple[bytes, bytes]:
    video = settings.video
    if video.program is None:
        stream = pictures.encode([luma], video.coding)
    else:
        stream, _ = program.encode([luma], video.coding, video.program)
    if len(stream.packets) != 1:
        raise CodecError(f"{video.encoder} gave {len(stream.packets)} packets for one frame")
    return video.track.wrap(stream.extradata, stream.packets[0], settings.form)
