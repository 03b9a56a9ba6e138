"""H.264 in an MP4: parameter sets, the level they claim, and the ``avcC`` record.

Sources: Rec. ITU-T H.264 clause 7.3 and Annex A; ISO/IEC 14496-15 clause 5.3.3.
"""

from __future__ import annotations

from typing import Final

from weightvid.codec.bits import Bits
from weightvid.codec.form import Claim, Form
from weightvid.codec.nal import escape, split_nal_units, unescape, unique, with_lengths
from weightvid.errors import CodecError

_IDR, _SEI, _SPS, _PPS = 5, 6, 7, 8
_MACROBLOCK: Final = 16
#: profile_idc -> name, and cpbBrVclFactor / 1000 (tables A-2 and A-3, clause A.3).
_PROFILES: Final = {
    66: ("Baseline", 1.0), 77: ("Main", 1.0), 100: ("High", 1.25), 110: ("High 10", 3.0),
    122: ("High 4:2:2", 4.0), 244: ("High 4:4:4 Predictive", 4.0),
}  # fmt: skip
#: of those, with constraint_set3_flag.
_INTRA: Final = {110: "High 10 Intra", 122: "High 4:2:2 Intra", 244: "High 4:4:4 Intra"}
#: level -> (MaxMBPS, MaxFS, MaxBR in 1000 bit/s); table A-1. Levels below 2 are left out.
LEVELS: Final[dict[int, tuple[int, int, int]]] = {
    20: (11_880, 396, 2_000),
    21: (19_800, 792, 4_000),
    22: (20_250, 1_620, 4_000),
    30: (40_500, 1_620, 10_000),
    31: (108_000, 3_600, 14_000),
    32: (216_000, 5_120, 20_000),
    40: (245_760, 8_192, 20_000),
    42: (522_240, 8_704, 50_000),
    50: (589_824, 22_080, 135_000),
    51: (983_040, 36_864, 240_000),
}
#: a macroblock of 4:2:0 never takes more than its samples, and a little (clause 7.3.5: I_PCM).
_WORST_BITS_PER_SAMPLE: Final = 13.0
_LEAST_RECORD_BYTES: Final = 7


def nal_type(unit: bytes) -> int:
    """nal_unit_type of a NAL unit."""
    return unit[0] & 0x1F


def choose_level(form: Form, profile: int) -> int:
    """Lowest level_idc, from 2 on, that one such frame a second meets in any case.

    Examples
    --------
    >>> choose_level(Form(256, 256), 244), choose_level(Form(1024, 1024), 100)
    (20, 32)
    """
    wide, high = form.width // _MACROBLOCK, form.height // _MACROBLOCK
    bits = form.width * form.height * _WORST_BITS_PER_SAMPLE * form.bits / 8
    factor = _PROFILES[profile][1]
    for level, (_, picture, kbits) in LEVELS.items():
        fits = wide * high <= picture and max(wide, high) ** 2 <= 8 * picture
        if fits and bits <= 1000 * kbits * factor:
            return level
    raise CodecError(f"no H.264 level allows frames of {form.width} x {form.height}")


def wrap(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """The ``avcC`` record, and one picture as it lies in an MP4: slices of an IDR picture.

    Parameters
    ----------
    extradata, packet : bytes
        An encoder's byte stream; parameter sets may stand in either.
    form : Form

    Raises
    ------
    CodecError
    """
    units = split_nal_units(packet)
    known = [*split_nal_units(extradata), *units] if extradata else units
    sps = unique((u for u in known if nal_type(u) == _SPS), "SPS")
    pps = unique((u for u in known if nal_type(u) == _PPS), "PPS")
    slices = [unit for unit in units if nal_type(unit) not in (_SEI, _SPS, _PPS)]
    if not slices or any(nal_type(unit) != _IDR for unit in slices):
        kinds = sorted({nal_type(unit) for unit in slices})
        raise CodecError(f"expected an IDR picture, the encoder gave NAL units of types {kinds}")
    return _record(sps, pps, form), with_lengths(slices)


def _record(sps: bytes, pps: bytes, form: Form) -> bytes:
    """AVCDecoderConfigurationRecord of a 4:2:0 track with 4-byte NAL lengths."""
    payload = bytearray(unescape(sps))
    profile = payload[1]
    if profile not in _PROFILES:
        raise CodecError(f"the encoder chose the H.264 profile {profile}, which is unknown here")
    payload[3] = choose_level(form, profile)
    sps = escape(bytes(payload))
    record = bytearray((1, *payload[1:4], 0xFF, 0xE1))
    record += len(sps).to_bytes(2, "big") + sps
    record += b"\x01" + len(pps).to_bytes(2, "big") + pps
    if profile in (100, 110, 122, 244):
        depth = form.bits - 8
        record += bytes((0xFD, 0xF8 | depth, 0xF8 | depth, 0))  # 4:2:0, depths, no SPS extension
    return bytes(record)


def describe(record: bytes) -> Claim:
    """What an ``avcC`` record claims."""
    if len(record) < _LEAST_RECORD_BYTES:
        raise CodecError("the avcC record is cut short")
    profile, constraints, level = record[1:4]
    name = _PROFILES.get(profile, (str(profile), 0))[0]
    if constraints & 0x10:
        name = _INTRA.get(profile, name)
    return Claim(name, "", f"{level / 10:g}")


def check(record: bytes, form: Form) -> None:
    """Refuse a record whose SPS is of another form than the track.

    Raises
    ------
    CodecError
    """
    if len(record) < _LEAST_RECORD_BYTES or record[0] != 1 or record[4] & 3 != 3:
        raise CodecError("the avcC record is not one with NAL lengths of 4 bytes")
    size = int.from_bytes(record[6:8], "big")
    found = _form(unescape(record[8 : 8 + size]))
    if found != form:
        raise CodecError(
            f"the avcC record is of {found.width} x {found.height} pictures of {found.bits} bits"
        )


def _form(sps: bytes) -> Form:
    """What an SPS says of its pictures (7.3.2.1.1); 4:2:0 frames alone."""
    bits = Bits(sps[4:])
    bits.golomb()  # seq_parameter_set_id
    depth = 8
    if sps[1] in (100, 110, 122, 244):
        if bits.golomb() != 1:
            raise CodecError("the track is not of 4:2:0 pictures")
        depth += bits.golomb()
        bits.golomb()  # bit_depth_chroma_minus8
        bits.flag()  # qpprime_y_zero_transform_bypass_flag
        if bits.flag():
            raise CodecError("the track has scaling matrices")
    bits.golomb()  # log2_max_frame_num_minus4
    order = bits.golomb()
    if order == 0:
        bits.golomb()  # log2_max_pic_order_cnt_lsb_minus4
    elif order != 2:
        raise CodecError("the track has an unusual order of pictures")
    bits.golomb()  # max_num_ref_frames
    bits.flag()  # gaps_in_frame_num_value_allowed_flag
    wide, high = bits.golomb() + 1, bits.golomb() + 1
    if not bits.flag():
        raise CodecError("the track is of fields, not of frames")
    return Form(wide * _MACROBLOCK, high * _MACROBLOCK, depth)
