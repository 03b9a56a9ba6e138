"""AV1 in an MP4: open bitstream units, the sequence header, and the ``av1C`` record.

Sources: AV1 Bitstream & Decoding Process Specification 5.3 to 5.5 and Annex A; AV1 Codec ISO Media
File Format Binding 2.3 and 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from weightvid.codec.bits import Bits
from weightvid.codec.form import Claim, Form
from weightvid.codec.nal import unique
from weightvid.errors import CodecError

_SEQUENCE, _FRAME_HEADER, _TILE_GROUP, _FRAME = 1, 3, 4, 6
_PROFILES: Final = ("Main", "High", "Professional")
_RECORD_BYTES: Final = 4
#: marker and version of the record.
_RECORD_START: Final = 0x81
#: seq_level_idx -> (MaxPicSize, MaxHSize, MaxVSize, MaxBR of the Main tier in kbit/s); A.3.
LEVELS: Final[dict[int, tuple[int, int, int, int]]] = {
    0: (147_456, 2_048, 1_152, 1_500),
    1: (278_784, 2_816, 1_584, 3_000),
    4: (665_856, 4_352, 2_448, 6_000),
    5: (1_065_024, 5_504, 3_096, 10_000),
    8: (2_359_296, 6_144, 3_456, 12_000),
    9: (2_359_296, 6_144, 3_456, 20_000),
    12: (8_912_896, 8_192, 4_352, 30_000),
    13: (8_912_896, 8_192, 4_352, 40_000),
    14: (8_912_896, 8_192, 4_352, 60_000),
}
#: levels above this one are followed by their tier.
_LAST_WITHOUT_TIER: Final = 7
#: more bits than a lossless picture takes per luma sample; measured: uniform noise 11.4.
_WORST_BITS_PER_SAMPLE: Final = 14.0
#: where seq_level_idx stands in a sequence header, in bits: of still pictures, and of others.
_LEVEL_OF_STILL, _LEVEL_AT = 5, 24


@dataclass(frozen=True, slots=True)
class Sequence:
    """What a sequence header says, as far as it is of interest here.

    Attributes
    ----------
    profile, level, tier : int
        seq_profile, seq_level_idx, seq_tier.
    form : Form
        Largest pictures.
    chroma_position : int
        chroma_sample_position.
    grain : bool
        Pictures may be given synthetic film grain.
    """

    profile: int
    level: int
    tier: int
    form: Form
    chroma_position: int
    grain: bool


def units(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each unit; every one must have its size.

    Raises
    ------
    CodecError
        The sizes do not add up.

    Examples
    --------
    >>> [(kind, payload.hex()) for kind, payload in units(bytes([0x12, 0, 0x0A, 2, 5, 6]))]
    [(2, ''), (1, '0506')]
    """
    at = 0
    while at < len(data):
        head, at = data[at], at + 1
        if head & 0x81 or not head & 0x02:
            raise CodecError("an AV1 packet is no sequence of units with sizes")
        at += 1 if head & 0x04 else 0
        size, shift = 0, 0
        while True:
            if at >= len(data) or shift > 49:
                raise CodecError("an AV1 packet is cut short")
            byte, at = data[at], at + 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        if at + size > len(data):
            raise CodecError("an AV1 packet is cut short")
        yield head >> 3 & 15, data[at : at + size]
        at += size


def unit(kind: int, payload: bytes) -> bytes:
    """A unit with its size.

    Examples
    --------
    >>> unit(1, bytes(2)).hex(), unit(6, bytes(200))[:3].hex()
    ('0a020000', '32c801')
    """
    out, size = bytearray((kind << 3 | 2,)), len(payload)
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out) + payload


def parse_sequence(payload: bytes) -> Sequence:
    """Read a sequence header (5.5): one operating point, no timing, 4:2:0 of 8 or 10 bits.

    Raises
    ------
    CodecError
        It is another one, or cut short.
    """
    bits = Bits(payload)
    profile = bits.take(3)
    bits.flag()  # still_picture
    reduced, tier = bits.flag(), 0
    if reduced:
        level = bits.take(5)
    else:
        if bits.flag() or bits.flag() or bits.take(5):
            raise CodecError("the AV1 track has timing or several operating points")
        bits.take(12)  # operating_point_idc
        level = bits.take(5)
        tier = bits.take(1) if level > _LAST_WITHOUT_TIER else 0
    wide, high = bits.take(4) + 1, bits.take(4) + 1
    width, height = bits.take(wide) + 1, bits.take(high) + 1
    _skip_tools(bits, reduced)
    deep = bits.flag()
    if profile or bits.flag():
        raise CodecError("the AV1 track is not of 4:2:0 pictures of 8 or 10 bits")
    if bits.flag():
        bits.take(24)  # colour description
    bits.flag()  # color_range
    position = bits.take(2)
    bits.flag()  # separate_uv_delta_q
    form = Form(width, height, 10 if deep else 8)
    return Sequence(profile, level, tier, form, position, bits.flag())


def _skip_tools(bits: Bits, reduced: bool) -> None:
    """Which coding tools are in use: of no interest here."""
    if not reduced and bits.flag():
        raise CodecError("the AV1 track numbers its frames")
    bits.take(3)  # use_128x128_superblock, enable_filter_intra, enable_intra_edge_filter
    if not reduced:
        bits.take(4)  # interintra and masked compound, warped motion, dual filter
        ordered = bits.flag()
        bits.take(2 if ordered else 0)  # jnt_comp, ref_frame_mvs
        if bits.flag() or bits.flag():  # screen content tools: chosen by frame, or forced
            bits.take(0 if bits.flag() else 1)  # integer_mv: chosen by frame, or forced
        bits.take(3 if ordered else 0)  # order_hint_bits_minus_1
    bits.take(3)  # enable_superres, enable_cdef, enable_restoration


def choose_level(form: Form) -> int:
    """Lowest seq_level_idx that one such frame a second meets in any case, Main tier.

    Examples
    --------
    >>> choose_level(Form(256, 256)), choose_level(Form(1024, 1024))
    (0, 9)
    """
    samples = form.width * form.height
    worst = samples * _WORST_BITS_PER_SAMPLE * form.bits / 8
    for level, (picture, wide, high, kbits) in LEVELS.items():
        fits = samples <= picture and form.width <= wide and form.height <= high
        if fits and worst <= 1000 * kbits:
            return level
    raise CodecError(f"no AV1 level allows frames of {form.width} x {form.height}")


def with_level(payload: bytes, level: int) -> bytes:
    """A sequence header that claims another level of the Main tier.

    Encoders go by the size and rate of pictures, and some claim no level at all.
    """
    still = bool(payload[0] & 0x08)
    at, old = (_LEVEL_OF_STILL if still else _LEVEL_AT), parse_sequence(payload).level
    bits = "".join(f"{byte:08b}" for byte in payload).rstrip("0")[:-1]
    new = f"{level:05b}" + ("0" if level > _LAST_WITHOUT_TIER and not still else "")
    skipped = 6 if old > _LAST_WITHOUT_TIER and not still else 5
    text = bits[:at] + new + bits[at + skipped :] + "1"
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def wrap(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """The ``av1C`` record, and one picture as it lies in an MP4.

    The sample is the sequence header and the frame, each unit with its size; temporal delimiters,
    metadata and padding are left out.

    Parameters
    ----------
    extradata : bytes
        Not looked at: some encoders' differs from the header that they send.
    packet : bytes
        One temporal unit.
    form : Form

    Raises
    ------
    CodecError
        It is no key frame of this form.
    """
    found = list(units(packet))
    header = unique((data for kind, data in found if kind == _SEQUENCE), "sequence headers")
    frames = [(k, data) for k, data in found if k in (_FRAME, _FRAME_HEADER, _TILE_GROUP)]
    _check_sequence(parse_sequence(header), form)
    header = with_level(header, choose_level(form))
    if not frames or not _is_key_frame(frames[0][1], header):
        raise CodecError("expected a key frame, the encoder gave another AV1 picture")
    sample = b"".join(unit(kind, data) for kind, data in [(_SEQUENCE, header), *frames])
    return _record(header), sample


def _is_key_frame(payload: bytes, header: bytes) -> bool:
    """Whether a frame header is that of a key frame that is shown (5.9.2)."""
    if header[0] & 0x08:
        return True  # a still picture
    bits = Bits(payload[:1])
    return not bits.flag() and bits.take(2) == 0 and bits.flag()


def _record(header: bytes) -> bytes:
    """AV1CodecConfigurationRecord; it ends in the sequence header."""
    found = parse_sequence(header)
    deep = 0x40 if found.form.bits > 8 else 0
    third = found.tier << 7 | deep | 0x0C | found.chroma_position
    head = bytes((_RECORD_START, found.profile << 5 | found.level, third, 0))
    return head + unit(_SEQUENCE, header)


def _sequence_of(record: bytes) -> Sequence:
    if len(record) < _RECORD_BYTES or record[0] != _RECORD_START:
        raise CodecError("the av1C record is malformed")
    headers = (data for kind, data in units(record[_RECORD_BYTES:]) if kind == _SEQUENCE)
    return parse_sequence(unique(headers, "sequence headers"))


def describe(record: bytes) -> Claim:
    """What an ``av1C`` record claims."""
    found = _sequence_of(record)
    tier = "High" if found.tier else "Main"
    return Claim(_PROFILES[found.profile], tier, f"{2 + found.level // 4}.{found.level % 4}")


def check(record: bytes, form: Form) -> None:
    """Refuse a record whose sequence header is of another form than the track.

    Raises
    ------
    CodecError
    """
    found = _sequence_of(record)
    deep = bool(record[2] & 0x40)
    if record[1] != found.profile << 5 | found.level or deep != (found.form.bits > 8):
        raise CodecError("the av1C record contradicts its sequence header")
    _check_sequence(found, form)


def _check_sequence(found: Sequence, form: Form) -> None:
    if found.form != form or found.grain:
        grain = " with film grain" if found.grain else ""
        raise CodecError(
            f"the AV1 sequence header is of {found.form.width} x {found.form.height} pictures of "
            f"{found.form.bits} bits{grain}"
        )
