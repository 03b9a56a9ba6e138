"""VVC in an MP4: parameter sets, and the ``vvcC`` record.

Sources: Rec. ITU-T H.266 clauses 7.3.2.4 and 7.3.3; ISO/IEC 14496-15 clause 11.2.4.2.
"""

from __future__ import annotations

from typing import Final

from weightvid.codec.bits import Bits
from weightvid.codec.form import Claim, Form
from weightvid.codec.nal import split_nal_units, unescape, unique, with_lengths
from weightvid.errors import CodecError

_IDR_TYPES: Final = (7, 8)
_SPS, _PPS, _APS, _PICTURE_HEADER = 15, 16, 17, 19
#: access unit delimiters and supplemental information, which nobody needs.
_DROPPED: Final = (_SPS, _PPS, 20, 23, 24)
_PROFILES: Final = {1: "Main 10", 33: "Main 10 4:4:4"}
#: version and flags, which the decoder is not told.
FLAGS_BYTES: Final = 4
_LEAST_RECORD_BYTES: Final = 20


def nal_type(unit: bytes) -> int:
    """nal_unit_type of a NAL unit."""
    return unit[1] >> 3


def wrap(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """The ``vvcC`` record, and one picture as it lies in an MP4.

    Parameters
    ----------
    extradata, packet : bytes
        An encoder's byte stream; parameter sets may stand in either.
    form : Form

    Raises
    ------
    CodecError
        It is no IDR picture of this form.
    """
    units = split_nal_units(packet)
    known = [*split_nal_units(extradata), *units] if extradata else units
    sps = unique((u for u in known if nal_type(u) == _SPS), "SPS")
    pps = unique((u for u in known if nal_type(u) == _PPS), "PPS")
    kept = [unit for unit in units if nal_type(unit) not in _DROPPED]
    kinds = {nal_type(unit) for unit in kept}
    if not kinds & {*_IDR_TYPES} or not kinds <= {*_IDR_TYPES, _APS, _PICTURE_HEADER}:
        raise CodecError(f"expected an IDR picture, the encoder gave NAL units of {sorted(kinds)}")
    return _record(sps, pps, form), with_lengths(kept)


def _record(sps: bytes, pps: bytes, form: Form) -> bytes:
    """VvcDecoderConfigurationRecord of a 4:2:0 track with 4-byte NAL lengths."""
    bits = Bits(unescape(sps)[2:])
    bits.take(8)  # sps_seq_parameter_set_id, sps_video_parameter_set_id
    sublayers, chroma = bits.take(3), bits.take(2)
    bits.take(2)  # sps_log2_ctu_size_minus5
    if sublayers or chroma != 1 or not bits.flag():
        raise CodecError("the VVC stream is not of 4:2:0 pictures in one layer")
    profile_and_tier, level, constraints = bits.take(8), bits.take(8), bits.take(8)
    if constraints & 0x3F:
        raise CodecError("the VVC stream has constraints of its own, which are unknown here")
    record = bytearray(FLAGS_BYTES)
    record += b"\xff"  # lengths of 4 bytes; profile, tier and level follow
    record += b"\x00\x11"  # one layer set, one sublayer, 4:2:0
    record.append((form.bits - 8) << 5 | 0x1F)
    record += bytes((1, profile_and_tier, level, constraints, 0))  # no sub-profile
    record += form.width.to_bytes(2, "big") + form.height.to_bytes(2, "big") + bytes(2)
    record.append(2)
    for kind, unit in ((_SPS, sps), (_PPS, pps)):
        record += bytes((0x80 | kind, 0, 1)) + len(unit).to_bytes(2, "big") + unit
    return bytes(record)


def extradata(record: bytes) -> bytes:
    """What the decoder is told."""
    return record[FLAGS_BYTES:]


def describe(record: bytes) -> Claim:
    """What a ``vvcC`` record claims."""
    if len(record) < _LEAST_RECORD_BYTES:
        raise CodecError("the vvcC record is cut short")
    profile, level = record[9], record[10]
    name = _PROFILES.get(profile >> 1, str(profile >> 1))
    # general_level_idc is 16 times the major number and 3 times the minor one (A.4.1).
    shown = f"{level // 16}.{level % 16 // 3}" if level % 16 else f"{level // 16}"
    return Claim(name, "High" if profile & 1 else "Main", shown)


def check(record: bytes, form: Form) -> None:
    """Refuse a record that contradicts the track.

    Raises
    ------
    CodecError
    """
    if len(record) < _LEAST_RECORD_BYTES or record[4] != 0xFF:
        raise CodecError("the vvcC record is malformed")
    size = int.from_bytes(record[13:15], "big"), int.from_bytes(record[15:17], "big")
    if size != (form.width, form.height) or (record[7] >> 5) + 8 != form.bits:
        raise CodecError(f"the vvcC record is of {size[0]} x {size[1]} pictures")
