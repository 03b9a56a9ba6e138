"""HEVC in an MP4: parameter sets, the level they claim, and the ``hvcC`` record.

Sources: Rec. ITU-T H.265 clause 7.3 and Annexes A and B; ISO/IEC 14496-15 clause 8.3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from weightvid.codec.form import Claim, Form
from weightvid.codec.nal import escape, split_nal_units, unescape, with_lengths
from weightvid.errors import CodecError

_VPS, _SPS, _PPS = 32, 33, 34
_IDR_TYPES: Final = (19, 20)
_SEI_TYPES: Final = (39, 40)
_LEAST_RECORD_BYTES: Final = 23
#: offset of profile_tier_level() in the unescaped payload, header of the NAL unit included.
_PTL_IN_VPS, _PTL_IN_SPS = 6, 3
_LEVEL_IN_PTL: Final = 11

#: level number -> (general_level_idc, MaxLumaPs, MaxLumaSr, MaxBR and MaxCPB in kbit, Main tier);
#: H.265 tables A.8 and A.9. Levels below 2 are left out: no frame of ours is that small.
LEVELS: Final[dict[str, tuple[int, int, int, int]]] = {
    "2": (60, 122_880, 3_686_400, 1_500),
    "2.1": (63, 245_760, 7_372_800, 3_000),
    "3": (90, 552_960, 16_588_800, 6_000),
    "3.1": (93, 983_040, 33_177_600, 10_000),
    "4": (120, 2_228_224, 66_846_720, 12_000),
    "4.1": (123, 2_228_224, 133_693_440, 20_000),
    "5": (150, 8_912_896, 267_386_880, 25_000),
    "5.1": (153, 8_912_896, 534_773_760, 40_000),
    "5.2": (156, 8_912_896, 1_069_547_520, 60_000),
}
#: more bits than a lossless picture takes per luma sample. Measured: uniform noise 10.6, noise of
#: samples at both ends of the range 12.2 (tests/codec/test_codec.py). Those of deeper samples are
#: taken to grow with their bits.
_WORST_BITS_PER_SAMPLE: Final = 13.0


@dataclass(frozen=True, slots=True)
class ParameterSets:
    """VPS, SPS and PPS NAL units of a track, without start codes, emulation prevention kept."""

    vps: bytes
    sps: bytes
    pps: bytes


def nal_type(unit: bytes) -> int:
    """nal_unit_type of a NAL unit."""
    return (unit[0] >> 1) & 0x3F


def _with_level(unit: bytes, ptl: int, level_idc: int) -> bytes:
    payload = bytearray(unescape(unit))
    payload[ptl + _LEVEL_IN_PTL] = level_idc
    return escape(bytes(payload))


def choose_level(width: int, height: int, bits: int = 8) -> str:
    """Lowest level of the Main tier that one such frame a second meets in any case.

    Checks the picture size, both sides, the sample rate and, for incompressible samples, the bit
    rate and the coded picture buffer (H.265 A.4.1).

    Examples
    --------
    >>> choose_level(256, 256), choose_level(1024, 1024), choose_level(2048, 2048)
    ('2', '4.1', '5.2')
    """
    samples = width * height
    worst = samples * _WORST_BITS_PER_SAMPLE * bits / 8
    for name, (_, max_picture, max_rate, max_kbits) in LEVELS.items():
        side = (8 * max_picture) ** 0.5
        fits = samples <= min(max_picture, max_rate) and max(width, height) <= side
        if fits and worst <= 1000 * max_kbits:
            return name
    raise CodecError(f"no HEVC level allows frames of {width} x {height}")


def parameter_sets(extradata: bytes, level: str) -> ParameterSets:
    """The encoder's parameter sets, claiming ``level``.

    x265 writes level 8.5 for every lossless stream; the level is replaced in VPS and SPS.
    """
    found = {nal_type(unit): unit for unit in split_nal_units(extradata)}
    if not {_VPS, _SPS, _PPS} <= found.keys():
        raise CodecError("the encoder gave no VPS, SPS and PPS")
    level_idc = LEVELS[level][0]
    vps = _with_level(found[_VPS], _PTL_IN_VPS, level_idc)
    sps = _with_level(found[_SPS], _PTL_IN_SPS, level_idc)
    return ParameterSets(vps, sps, found[_PPS])


def hvcc(sets: ParameterSets, bits: int = 8) -> bytes:
    """HEVCDecoderConfigurationRecord of a 4:2:0 track with 4-byte NAL lengths."""
    ptl = unescape(sets.sps)[_PTL_IN_SPS : _PTL_IN_SPS + _LEVEL_IN_PTL + 1]
    record = bytearray(b"\x01") + ptl
    record += b"\xf0\x00"  # min_spatial_segmentation_idc: unknown
    record += b"\xfc"  # parallelismType: unknown
    record += b"\xfd"  # chromaFormat: 4:2:0
    record += bytes((0xF8 | (bits - 8), 0xF8 | (bits - 8)))  # bit depth of luma and chroma
    record += b"\x00\x00"  # avgFrameRate: unspecified
    record += b"\x0f"  # one temporal layer, nested; lengths of 4 bytes
    record += b"\x03"
    for kind, unit in ((_VPS, sets.vps), (_SPS, sets.sps), (_PPS, sets.pps)):
        record += bytes((0x80 | kind, 0, 1)) + len(unit).to_bytes(2, "big") + unit
    return bytes(record)


def idr_sample(packet: bytes) -> bytes:
    """One coded picture as it lies in an MP4: NAL units with 4-byte lengths, slices only.

    Raises
    ------
    CodecError
        The packet holds anything but slices of an IDR picture.
    """
    return _slices(split_nal_units(packet))


def _slices(units: list[bytes]) -> bytes:
    if not units or any(nal_type(unit) not in _IDR_TYPES for unit in units):
        kinds = sorted({nal_type(unit) for unit in units})
        raise CodecError(f"expected an IDR picture, the encoder gave NAL units of types {kinds}")
    return with_lengths(units)


def wrap(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """The ``hvcC`` record, and one picture as it lies in an MP4.

    Parameters
    ----------
    extradata, packet : bytes
        An encoder's byte stream; parameter sets may stand in either.
    form : Form

    Raises
    ------
    CodecError
        There is more than one picture, or it is no IDR picture.
    """
    units = split_nal_units(packet)
    outside = [unit for unit in units if nal_type(unit) not in (_VPS, _SPS, _PPS, *_SEI_TYPES)]
    level = choose_level(form.width, form.height, form.bits)
    sets = parameter_sets(extradata or packet, level)
    return hvcc(sets, form.bits), _slices(outside)


def describe(record: bytes) -> Claim:
    """What an ``hvcC`` record claims."""
    if len(record) < 13:
        raise CodecError("the hvcC record is cut short")
    names = {1: "Main", 2: "Main 10", 3: "Main Still Picture", 4: "Range Extensions"}
    profile = record[1] & 0x1F
    tier = "High" if record[1] & 0x20 else "Main"
    return Claim(names.get(profile, str(profile)), tier, f"{record[12] / 30:g}")


def check(record: bytes, form: Form) -> None:
    """Refuse a record that contradicts the track.

    Its SPS is not looked into: the decoder is, and a picture of another form is refused then.

    Raises
    ------
    CodecError
    """
    if len(record) < _LEAST_RECORD_BYTES:
        raise CodecError("the hvcC record is cut short")
