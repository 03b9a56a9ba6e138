"""The MP4 side of an archive: ftyp, moov, one fragment a frame, and mfra.

Source: ISO/IEC 14496-12 (boxes); for sample entries see :mod:`weightvid.codec.tracks`. Written
here and not by FFmpeg's muxer so that the bytes, and the offsets in ``mfra``, do not depend on
FFmpeg's version and can know of our own boxes between the fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from weightvid.codec.tracks import TRACKS, TrackCodec
from weightvid.container.boxes import box, full_box
from weightvid.errors import FormatError

#: brand by which ``ftyp`` names archives of format version 1.
BRAND: Final = b"wvd2"
#: of formats 2 and 1.
KNOWN_BRANDS: Final = (BRAND, b"wvd1")
#: one frame lasts one second: slow enough for the level's bit rate whatever the samples.
TIMESCALE: Final = 1
FRAME_DURATION: Final = 1
TRACK_ID: Final = 1
_MATRIX: Final = b"".join(
    n.to_bytes(4, "big") for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
)
_SYNC_SAMPLE: Final = 0x02000000
_SAMPLE_ENTRY_BYTES: Final = 78


@dataclass(frozen=True, slots=True)
class Track:
    """A video track.

    Attributes
    ----------
    width, height : int
        Frame size in samples.
    record : bytes
        The codec's configuration record: payload of its box.
    entry : bytes
        Type of the sample entry.
    """

    width: int
    height: int
    record: bytes
    entry: bytes = b"hvc1"

    @classmethod
    def of(cls, codec: TrackCodec, width: int, height: int, record: bytes) -> Track:
        """Track of a codec."""
        return cls(width, height, record, codec.entry)


def _int(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def ftyp() -> bytes:
    """File type box."""
    return box(b"ftyp", b"iso6", _int(0, 4), b"iso6", b"mp41", BRAND)


def moov(track: Track) -> bytes:
    """Movie box of one fragmented track."""
    mvhd = full_box(
        b"mvhd", 0, 0, bytes(8), _int(TIMESCALE, 4), bytes(4), _int(0x10000, 4), _int(0x100, 2),
        bytes(10), _MATRIX, bytes(24), _int(TRACK_ID + 1, 4),
    )  # fmt: skip
    tkhd = full_box(
        b"tkhd", 0, 3, bytes(8), _int(TRACK_ID, 4), bytes(4 + 4 + 8 + 2 + 2 + 2 + 2), _MATRIX,
        _int(track.width << 16, 4), _int(track.height << 16, 4),
    )  # fmt: skip
    entry = box(
        track.entry, bytes(6), _int(1, 2), bytes(16), _int(track.width, 2), _int(track.height, 2),
        _int(72 << 16, 4), _int(72 << 16, 4), bytes(4), _int(1, 2), bytes(32), _int(24, 2),
        b"\xff\xff", box(_record_box(track.entry), track.record),
    )  # fmt: skip
    stbl = box(
        b"stbl",
        full_box(b"stsd", 0, 0, _int(1, 4), entry),
        full_box(b"stts", 0, 0, bytes(4)),
        full_box(b"stsc", 0, 0, bytes(4)),
        full_box(b"stsz", 0, 0, bytes(8)),
        full_box(b"stco", 0, 0, bytes(4)),
    )
    dinf = box(b"dinf", full_box(b"dref", 0, 0, _int(1, 4), full_box(b"url ", 0, 1)))
    minf = box(b"minf", full_box(b"vmhd", 0, 1, bytes(8)), dinf, stbl)
    mdhd = full_box(b"mdhd", 0, 0, bytes(8), _int(TIMESCALE, 4), bytes(4), b"\x55\xc4", bytes(2))
    hdlr = full_box(b"hdlr", 0, 0, bytes(4), b"vide", bytes(12), b"\0")
    trak = box(b"trak", tkhd, box(b"mdia", mdhd, hdlr, minf))
    trex = full_box(
        b"trex", 0, 0, _int(TRACK_ID, 4), _int(1, 4), _int(FRAME_DURATION, 4), bytes(4),
        _int(_SYNC_SAMPLE, 4),
    )  # fmt: skip
    return box(b"moov", mvhd, trak, box(b"mvex", trex))


def _record_box(entry: bytes) -> bytes:
    """Type of the box that holds the configuration record in a sample entry.

    Raises
    ------
    FormatError
        ``moov``: no codec has such an entry.
    """
    for codec in TRACKS.values():
        if codec.entry == entry:
            return codec.box
    known = ", ".join(dict.fromkeys(codec.entry.decode() for codec in TRACKS.values()))
    name = entry.decode("ascii", "backslashreplace")
    raise FormatError(f"the track is {name!r}, and this reader knows {known}", code="moov")


def moof(number: int, packet_bytes: int) -> bytes:
    """Movie fragment of frame ``number`` (from 0), whose mdat follows at once."""

    def build(offset: int) -> bytes:
        tfhd = full_box(b"tfhd", 0, 0x020000, _int(TRACK_ID, 4))
        tfdt = full_box(b"tfdt", 0, 0, _int(number * FRAME_DURATION, 4))
        trun = full_box(b"trun", 0, 0x201, _int(1, 4), _int(offset, 4), _int(packet_bytes, 4))
        mfhd = full_box(b"mfhd", 0, 0, _int(number + 1, 4))
        return box(b"moof", mfhd, box(b"traf", tfhd, tfdt, trun))

    return build(len(build(0)) + 8)


#: every ``moof`` of an archive has this size.
MOOF_BYTES: Final = len(moof(0, 0))


def mfra(moof_offsets: Sequence[int]) -> bytes:
    """Movie fragment random access box: each frame's time and the offset of its ``moof``."""
    wide = bool(moof_offsets) and moof_offsets[-1] >= 1 << 32
    size = 8 if wide else 4
    entries = b"".join(
        _int(number * FRAME_DURATION, size) + _int(offset, size) + b"\x01\x01\x01"
        for number, offset in enumerate(moof_offsets)
    )
    tfra = full_box(
        b"tfra", int(wide), 0, _int(TRACK_ID, 4), bytes(4), _int(len(moof_offsets), 4), entries
    )
    whole = 8 + len(tfra) + 16
    return box(b"mfra", tfra, full_box(b"mfro", 0, 0, _int(whole, 4)))


def _children(data: bytes, begin: int, end: int) -> list[tuple[bytes, int, int]]:
    found = []
    while begin < end:
        size = int.from_bytes(data[begin : begin + 4], "big")
        if end - begin < 8 or not 8 <= size <= end - begin:
            raise FormatError("a box inside moov has an impossible size", code="box-size")
        found.append((data[begin + 4 : begin + 8], begin + 8, begin + size))
        begin += size
    return found


def _find(data: bytes, path: Sequence[bytes]) -> tuple[int, int]:
    begin, end = 0, len(data)
    for kind in path:
        for name, inner, stop in _children(data, begin, end):
            if name == kind:
                begin, end = inner, stop
                break
        else:
            raise FormatError(f"moov has no {kind.decode()} box", code="moov")
    return begin, end


def parse_moov(payload: bytes) -> Track:
    """Track of a movie box.

    Raises
    ------
    FormatError
        ``moov`` or ``box-size``: no video track of a known kind can be found in it.
    """
    begin, end = _find(payload, (b"trak", b"mdia", b"minf", b"stbl", b"stsd"))
    entries = _children(payload, begin + 8, end)
    if len(entries) != 1:
        raise FormatError("the track has not one sample entry", code="moov")
    ((kind, begin, end),) = entries
    record_box = _record_box(kind)
    if end - begin < _SAMPLE_ENTRY_BYTES:
        raise FormatError("the sample entry is cut short", code="moov")
    width = int.from_bytes(payload[begin + 24 : begin + 26], "big")
    height = int.from_bytes(payload[begin + 26 : begin + 28], "big")
    for name, inner, stop in _children(payload, begin + _SAMPLE_ENTRY_BYTES, end):
        if name == record_box:
            return Track(width, height, payload[inner:stop], kind)
    raise FormatError(f"the sample entry has no {record_box.decode()} box", code="moov")


def parse_moof(payload: bytes) -> int:
    """Frame number of a movie fragment, from 0, by its sequence number."""
    begin, end = _find(payload, (b"mfhd",))
    if end - begin != 8:
        raise FormatError("mfhd has a wrong size", code="moof")
    return int.from_bytes(payload[begin + 4 : end], "big") - 1
