"""Codecs whose pictures lie in an MP4 as the encoder gives them: FFV1, PNG and JPEG 2000.

Sources: RFC 9043 4.3.3 (FFV1: sample entry ``FFV1``, the configuration record in a ``glbl`` box);
ISO/IEC 14496-1 7.2.6 and the registered object types 0x6D (PNG) and 0x6E (JPEG 2000).
"""

from __future__ import annotations

from typing import Final

from weightvid.codec.form import Claim, Form
from weightvid.errors import CodecError

_PNG_TYPE, _JPEG2000_TYPE = 0x6D, 0x6E
_PNG_START: Final = b"\x89PNG\r\n\x1a\n"
#: start of code-stream, then image size (A.4, A.5).
_JPEG2000_START: Final = b"\xff\x4f\xff\x51"
#: streamType 4 (visual), upStream 0, reserved 1.
_VISUAL: Final = 0x11


def _esds(object_type: int) -> bytes:
    """An elementary stream descriptor that names a codec and nothing else, as a full box."""
    config = bytes((object_type, _VISUAL)) + bytes(11)
    inner = bytes((0, 0, 0)) + bytes((4, len(config))) + config + bytes((6, 1, 2))
    return bytes(4) + bytes((3, len(inner))) + inner


def _check_esds(record: bytes, object_type: int) -> None:
    if record != _esds(object_type):
        raise CodecError("the esds box names another codec")


def wrap_ffv1(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """FFV1's configuration record, and one frame as it is.

    Raises
    ------
    CodecError
        The encoder gave no configuration record: FFV1 before version 3.
    """
    if not extradata:
        raise CodecError("the encoder gave no FFV1 configuration record")
    return extradata, packet


def describe(record: bytes) -> Claim:
    """None of them has profiles, or says so in its record."""
    return Claim("")


def check_ffv1(record: bytes, form: Form) -> None:
    """Refuse a record that cannot be one; it has a CRC of its own, which the decoder checks.

    Raises
    ------
    CodecError
    """
    if not record:
        raise CodecError("the FFV1 configuration record is empty")


def wrap_png(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """The descriptor, and one PNG file of this form.

    Raises
    ------
    CodecError
    """
    if packet[:8] != _PNG_START or _size(packet[16:24]) != (form.width, form.height):
        raise CodecError("the encoder gave no PNG of the frame's size")
    return _esds(_PNG_TYPE), packet


def check_png(record: bytes, form: Form) -> None:
    """Refuse a descriptor of another codec.

    Raises
    ------
    CodecError
    """
    _check_esds(record, _PNG_TYPE)


def wrap_jpeg2000(extradata: bytes, packet: bytes, form: Form) -> tuple[bytes, bytes]:
    """The descriptor, and one code-stream of this form.

    Raises
    ------
    CodecError
    """
    if packet[:4] != _JPEG2000_START or _size(packet[8:16]) != (form.width, form.height):
        raise CodecError("the encoder gave no JPEG 2000 code-stream of the frame's size")
    return _esds(_JPEG2000_TYPE), packet


def check_jpeg2000(record: bytes, form: Form) -> None:
    """Refuse a descriptor of another codec.

    Raises
    ------
    CodecError
    """
    _check_esds(record, _JPEG2000_TYPE)


def _size(data: bytes) -> tuple[int, int]:
    """Width and height, 4 bytes each."""
    return int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
