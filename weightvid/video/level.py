"""Levels: what a decoder must be able to do, and what a configuration record claims.

Sources: Rec. ITU-T H.265 7.3.3, 7.4.2 and Annex A; ISO/IEC 14496-15 5.3.3 and 8.3.3; AV1 Codec
ISO Media File Format Binding 2.3.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import av

from weightvid.errors import CodecError
from weightvid.loader import TRACKS

#: coded bytes of a decoded 4:2:0 sample of 8 bits: FormatCapabilityFactor of Main (table A.9).
_BYTES_PER_SAMPLE: Final = 1.5
#: frames of a second in which a first picture may be decoded: 1 / fR (A.4.2).
_FIRST_SHARE: Final = 300
#: offset of general_profile_space in the unescaped VPS and SPS, and of general_level_idc after it.
_PROFILE_AT: Final = {32: 6, 33: 3}
_LEVEL_AFTER: Final = 11
#: offset of general_level_idc and of the arrays of parameter sets in an hvcC record.
_LEVEL_IN_RECORD, _ARRAYS_IN_RECORD = 12, 23
_PROFILES: Final = {
    b"hvc1": {1: "Main", 2: "Main 10", 3: "Main Still Picture", 4: "Range Extensions"},
    b"av01": {0: "Main", 1: "High", 2: "Professional"},
    b"avc1": {66: "Baseline", 77: "Main", 100: "High", 244: "High 4:4:4 Predictive"},
}


class HevcLevel(NamedTuple):
    """A level of HEVC's Main tier: MaxLumaPs, MaxLumaSr, MaxBR, MinCrBase (H.265 A.8 and A.9).

    MaxCPB equals MaxBR from level 2 on. Units: samples, samples a second, 1000 bits (a second).
    """

    name: str
    level_idc: int
    max_picture: int
    max_rate: int
    max_kbits: int
    min_cr: int


#: from level 2 on: decoders that end below it are not made.
HEVC_LEVELS: Final = (
    HevcLevel("2", 60, 122_880, 3_686_400, 1_500, 2),
    HevcLevel("2.1", 63, 245_760, 7_372_800, 3_000, 2),
    HevcLevel("3", 90, 552_960, 16_588_800, 6_000, 2),
    HevcLevel("3.1", 93, 983_040, 33_177_600, 10_000, 2),
    HevcLevel("4", 120, 2_228_224, 66_846_720, 12_000, 4),
    HevcLevel("4.1", 123, 2_228_224, 133_693_440, 20_000, 4),
    HevcLevel("5", 150, 8_912_896, 267_386_880, 25_000, 6),
    HevcLevel("5.1", 153, 8_912_896, 534_773_760, 40_000, 8),
    HevcLevel("5.2", 156, 8_912_896, 1_069_547_520, 60_000, 8),
    HevcLevel("6", 180, 35_651_584, 1_069_547_520, 60_000, 8),
    HevcLevel("6.1", 183, 35_651_584, 2_139_095_040, 120_000, 8),
    HevcLevel("6.2", 186, 35_651_584, 4_278_190_080, 240_000, 6),
)


class Claim(NamedTuple):
    """What a track says about itself, in its standard's words; H.264 has no tier.

    ``full_range`` is whether samples span 0 to 255; None where FFmpeg tells it only with a picture
    (H.264).
    """

    profile: str
    tier: str
    level: str
    full_range: bool | None


def hevc_level(width: int, height: int, packet_bytes: int, first_bytes: int) -> HevcLevel:
    """Lowest level of the Main tier whose limits hold at one picture a second.

    The limits are picture size and sides, sample rate, bit rate and coded picture buffer (H.265
    A.4.1), and the compression ratio MinCR of the first and of the other pictures (A.4.2).

    Parameters
    ----------
    width, height : int
        Of a frame, in samples.
    packet_bytes : int
        Largest packet.
    first_bytes : int
        First packet.

    Raises
    ------
    CodecError
        No level allows it.

    Examples
    --------
    >>> hevc_level(960, 1024, 600_000, 600_000).name, hevc_level(1024, 1024, 300_000, 417_000).name
    ('3.1', '5.2')
    """
    samples, side = width * height, max(width, height)
    for level in HEVC_LEVELS:
        allowed = _BYTES_PER_SAMPLE / level.min_cr
        if (
            samples <= min(level.max_picture, level.max_rate)
            and side * side <= 8 * level.max_picture
            and 8 * max(packet_bytes, first_bytes) <= 1000 * level.max_kbits
            and first_bytes <= allowed * max(samples, level.max_rate / _FIRST_SHARE)
            and packet_bytes <= allowed * level.max_rate
        ):
            return level
    raise CodecError(
        f"no HEVC level allows frames of {width} x {height} with packets of {packet_bytes} bytes; "
        "use smaller frames"
    )


def unescape(unit: bytes) -> bytes:
    """NAL unit without its emulation prevention bytes."""
    return re.sub(rb"\x00\x00\x03", b"\x00\x00", unit)


def with_level(record: bytes, level_idc: int) -> bytes:
    """An hvcC record whose profile bytes, VPS and SPS claim a level; its length stays.

    Parameters
    ----------
    record : bytes
    level_idc : int
        :attr:`HevcLevel.level_idc`. Above 3, as the one before: so no emulation prevention changes.

    Raises
    ------
    CodecError
        The record is cut short.
    """
    out, at = bytearray(record), _ARRAYS_IN_RECORD
    out[_LEVEL_IN_RECORD : _LEVEL_IN_RECORD + 1] = bytes((level_idc,))
    for kind, profile_at in _PROFILE_AT.items():
        # The encoder's record has one unit in each array: type, count, length, unit.
        begin, end = at + 5, at + 5 + int.from_bytes(record[at + 3 : at + 5], "big")
        unit, place = record[begin:end], profile_at + _LEVEL_AFTER
        if not unit or unit[0] >> 1 != kind or len(unescape(unit)) <= place:
            raise CodecError("the hvcC record does not begin with one VPS and one SPS")
        out[next(begin + i for i in range(len(unit)) if len(unescape(unit[: i + 1])) > place)] = (
            level_idc
        )
        at = end
    return bytes(out)


def describe(entry: bytes, record: bytes) -> Claim:
    """Profile, tier, level and range of samples that a configuration record claims.

    Parameters
    ----------
    entry : bytes
        Type of the sample entry: ``hvc1``, ``av01`` or ``avc1``.
    record : bytes

    Raises
    ------
    CodecError
        The record is malformed.
    """
    if len(record) <= (_LEVEL_IN_RECORD if entry == b"hvc1" else 4):
        raise CodecError(f"the {entry.decode()} configuration record is cut short")
    profile, tier, level = record[1], "", f"{record[3] / 10:g}"
    if entry == b"hvc1":
        tier, level = "High" if profile & 0x20 else "Main", f"{record[_LEVEL_IN_RECORD] / 30:g}"
        profile &= 0x1F
    elif entry == b"av01":
        index = profile & 0x1F
        tier, level = "High" if record[2] & 0x80 else "Main", f"{2 + index // 4}.{index % 4}"
        profile >>= 5
    name = _PROFILES[entry].get(profile, str(profile))
    return Claim(name, tier, level, _full_range(entry, record))


def _full_range(entry: bytes, record: bytes) -> bool | None:
    try:
        decoder: Any = av.CodecContext.create(TRACKS[entry][1], "r")
        decoder.extradata = record
        decoder.open()
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise CodecError(f"the {entry.decode()} record is not understood: {error}") from None
    return {1: False, 2: True}.get(decoder.color_range)
