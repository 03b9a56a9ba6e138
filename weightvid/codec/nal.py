"""NAL units, as H.264, HEVC and VVC have them: byte streams, escapes, lengths.

Sources: Rec. ITU-T H.264, H.265 and H.266, clause 7.3 and Annex B of each; ISO/IEC 14496-15.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from weightvid.errors import CodecError

_START_CODE: Final = re.compile(rb"\x00\x00\x00?\x01")


def split_nal_units(stream: bytes) -> list[bytes]:
    """NAL units of an Annex B byte stream, without start codes and trailing zero bytes."""
    edges = [(m.start(), m.end()) for m in _START_CODE.finditer(stream)]
    if not edges:
        raise CodecError("the encoder's output has no start code")
    ends = [start for start, _ in edges[1:]] + [len(stream)]
    units = [stream[begin:end].rstrip(b"\x00") for (_, begin), end in zip(edges, ends, strict=True)]
    return [unit for unit in units if len(unit) > 2]


def unescape(unit: bytes) -> bytes:
    """Remove emulation prevention bytes (H.265 7.4.2)."""
    return re.sub(rb"\x00\x00\x03", b"\x00\x00", unit)


def escape(payload: bytes) -> bytes:
    """Insert emulation prevention bytes.

    Examples
    --------
    >>> escape(bytes([1, 0, 0, 0, 0, 1])).hex()
    '0100000300000301'
    """
    out, zeros = bytearray(), 0
    for byte in payload:
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def with_lengths(units: Iterable[bytes]) -> bytes:
    """NAL units as they lie in an MP4, each behind its length of 4 bytes.

    Examples
    --------
    >>> with_lengths([b"ab", b"c"]).hex()
    '0000000261620000000163'
    """
    return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)


def unique(units: Iterable[bytes], what: str) -> bytes:
    """The one unit that must be there.

    Raises
    ------
    CodecError
        There is none, or there are several that differ.
    """
    found = list(dict.fromkeys(units))
    if len(found) != 1:
        raise CodecError(f"the encoder gave {len(found)} different {what}, not one")
    return found[0]
