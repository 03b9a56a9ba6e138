"""VP9 in an MP4: the frame header, and the ``vpcC`` record.

Sources: VP9 Bitstream & Decoding Process Specification 6.2 and Annex A; VP Codec ISO Media File
Format Binding 1.0.
"""

from __future__ import annotations

from typing import Final

from weightvid.codec.bits import Bits
from weightvid.codec.form import Claim, Form
from weightvid.errors import CodecError

_MARKER, _SYNC_CODE = 2, 0x498342
#: version 1, no flags: the record is a full box.
_RECORD_START: Final = bytes((1, 0, 0, 0))
_RECORD_BYTES: Final = 12
_COLOCATED_420: Final = 1
#: colour of unspecified kind, three times.
_UNSPECIFIED: Final = 2
#: level -> (largest picture, kbit/s, longest side); a frame a second meets any sample rate.
LEVELS: Final = {
    20: (122_880, 1_800, 960),
    21: (245_760, 3_600, 1_344),
    30: (552_960, 7_200, 2_048),
    31: (983_040, 12_000, 2_752),
    40: (2_228_224, 18_000, 4_160),
    41: (2_228_224, 30_000, 4_160),
    50: (8_912_896, 60_000, 8_384),
    51: (8_912_896, 120_000, 8_384),
}
#: more bits than a lossless picture takes per luma sample; measured: noise of samples at both ends
#: of the range 13.5.
_WORST_BITS_PER_SAMPLE: Final = 14.0


def choose_level(form: Form) -> int:
    """Lowest level, from 2 on, that one such frame a second meets in any case.

    Examples
    --------
    >>> choose_level(Form(256, 256)), choose_level(Form(1024, 1024))
    (20, 40)
    """
    samples = form.width * form.height
    for level, (picture, kbits, side) in LEVELS.items():
        fits = samples <= picture and max(form.width, form.height) <= side
        if fits and samples * _WORST_BITS_PER_SAMPLE <= 1000 * kbits:
            return level
    raise CodecError(f"no VP9 level allows frames of {form.width} x {form.height}")


def parse_frame(packet: bytes) -> Form:
    """Form of a key frame of profile 0 that is shown (6.2).

    Raises
    ------
    CodecError
        The packet is another one, or cut short.
    """
    bits = Bits(packet[:16])
    marker, low, high = bits.take(2), bits.take(1), bits.take(1)
    if marker != _MARKER or low or high:
        raise CodecError("the packet is no VP9 frame of profile 0")
    if bits.flag() or bits.take(1) or not bits.flag():
        raise CodecError("expected a key frame, the packet holds another VP9 picture")
    bits.flag()  # error_resilient_mode
    if bits.take(24) != _SYNC_CODE:
        raise CodecError("the packet has no VP9 sync code")
    bits.take(4)  # color_space, color_range
    return Form(bits.take(16) + 1, bits.take(16) + 1)


def wrap(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """The ``vpcC`` record, and one picture as it lies in an MP4: the frame as it is.

    Parameters
    ----------
    extradata : bytes
        VP9 has none.
    packet : bytes
    form : Form

    Raises
    ------
    CodecError
        It is no key frame of this form.
    """
    found = parse_frame(packet)
    if found != form:
        raise CodecError(f"the VP9 frame is of {found.width} x {found.height}")
    depth = form.bits << 4 | _COLOCATED_420 << 1
    head = bytes((0, choose_level(form), depth, *[_UNSPECIFIED] * 3, 0, 0))
    return _RECORD_START + head, packet


def describe(record: bytes) -> Claim:
    """What a ``vpcC`` record claims."""
    if len(record) < _RECORD_BYTES:
        raise CodecError("the vpcC record is cut short")
    return Claim(f"Profile {record[4]}", "", f"{record[5] / 10:g}")


def check(record: bytes, form: Form) -> None:
    """Refuse a record that contradicts the track.

    Raises
    ------
    CodecError
    """
    if len(record) < _RECORD_BYTES or record[:4] != _RECORD_START:
        raise CodecError("the vpcC record is malformed")
    if record[4] or record[6] >> 4 != form.bits or record[6] >> 1 & 7 > 1:
        raise CodecError(f"the vpcC record is not of 4:2:0 pictures of {form.bits} bits")
