"""Codecs that an archive's track may be coded with: one row each.

A row says how the track is named, which sample entry and configuration box it has, which decoder
reads it, and how an encoder's output becomes one. Encoders are in :mod:`.registry`; a loader needs
this table alone. FORMAT.md section 10 is the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from weightvid.codec import av1, avc, hevc, stills, vp9, vvc
from weightvid.codec.form import Claim, Form


@dataclass(frozen=True, slots=True)
class TrackCodec:
    """A codec of tracks.

    Attributes
    ----------
    name : str
        ``track.codec`` of the model header.
    standard : str
        In words.
    entry, box : bytes
        Types of the sample entry, and of the box in it that holds the configuration record.
    decoder : str
        FFmpeg's name.
    formats : mapping of int to tuple of str
        FFmpeg's pixel formats by the bits of a sample; what a decoder may give.
    wrap : callable
        ``(extradata, packet, form)`` of an encoder to configuration record and sample.
    describe : callable
        What a configuration record claims.
    check : callable
        Refuses a configuration record that contradicts the track, by a CodecError.
    extradata : callable
        What of the configuration record the decoder is told.
    """

    name: str
    standard: str
    entry: bytes
    box: bytes
    decoder: str
    formats: Mapping[int, tuple[str, ...]]
    wrap: Callable[[bytes, bytes, Form], tuple[bytes, bytes]]
    describe: Callable[[bytes], Claim]
    check: Callable[[bytes, Form], None]
    extradata: Callable[[bytes], bytes] = bytes

    @property
    def depths(self) -> tuple[int, ...]:
        """Bits that a sample may have."""
        return tuple(self.formats)


def _nothing(record: bytes) -> bytes:
    """The packets say all."""
    return b""


DEFAULT_CODEC: Final = "hevc"
_DEEP: Final = {8: ("yuv420p", "yuvj420p"), 10: ("yuv420p10le",)}
_EIGHT: Final = {8: ("yuv420p", "yuvj420p")}
_GRAY: Final = {8: ("gray",)}

_ROWS: Final = (
    TrackCodec("hevc", "HEVC", b"hvc1", b"hvcC", "hevc", _DEEP,
               hevc.wrap, hevc.describe, hevc.check),
    TrackCodec("avc", "H.264", b"avc1", b"avcC", "h264", _DEEP,
               avc.wrap, avc.describe, avc.check),
    TrackCodec("av1", "AV1", b"av01", b"av1C", "libdav1d", _DEEP,
               av1.wrap, av1.describe, av1.check),
    TrackCodec("vp9", "VP9", b"vp09", b"vpcC", "vp9", _EIGHT,
               vp9.wrap, vp9.describe, vp9.check, extradata=_nothing),
    TrackCodec("vvc", "VVC", b"vvc1", b"vvcC", "vvc", {10: ("yuv420p10le",)},
               vvc.wrap, vvc.describe, vvc.check, vvc.extradata),
    TrackCodec("ffv1", "FFV1", b"FFV1", b"glbl", "ffv1", _GRAY,
               stills.wrap_ffv1, stills.describe, stills.check_ffv1),
    TrackCodec("png", "PNG", b"mp4v", b"esds", "png", _GRAY,
               stills.wrap_png, stills.describe, stills.check_png, extradata=_nothing),
    TrackCodec("jpeg2000", "JPEG 2000", b"mp4v", b"esds", "jpeg2000", _GRAY,
               stills.wrap_jpeg2000, stills.describe, stills.check_jpeg2000,
               extradata=_nothing),
)  # fmt: skip

#: every codec, by name.
TRACKS: Final[Mapping[str, TrackCodec]] = MappingProxyType({row.name: row for row in _ROWS})
