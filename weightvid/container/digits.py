"""The digits of a frame: what folding left to be stored beside the video.

All digits of one kind in a frame form one stream, in the order of the ribbon: of core digits one
stream for each core size, of tail digits one for each width.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from weightvid.errors import FormatError
from weightvid.tile.fold import (
    PLAIN,
    Digits,
    Fold,
    Levels,
    count_digits,
    digits_per_byte,
    pack_digits,
    unfold,
    unpack_digits,
)
from weightvid.tile.ribbon import Samples

#: a stream of digits: ("core", core) or ("tail", width).
Kind = tuple[str, int]
#: streams that are being inflated.
Inflated = Mapping[Kind, "Future[Digits]"]
_NO_DIGITS: Final[Digits] = np.empty(0, np.uint8)


def radix(kind: Kind) -> int:
    """Radix of the digits of a stream."""
    return 2 * kind[1] + 1 if kind[0] == "core" else kind[1]


def compress(digits: Digits, kind: Kind) -> bytes:
    """Pack and deflate the digits of a stream; Huffman codes alone, for there are no repeats."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(pack_digits(digits, radix(kind))) + packer.flush()


def decompress(data: bytes, kind: Kind, most: int) -> Digits:
    """Undo :func:`compress`, up to the digits that filled the last byte.

    Raises
    ------
    FormatError
        ``digits``: the stream is damaged or holds more than ``most`` digits.
    """
    limit = -(-most // digits_per_byte(radix(kind)))
    inflater = zlib.decompressobj(-15)
    try:
        packed = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise FormatError(f"a frame's digits are damaged: {error}", code="digits") from None
    if len(packed) > limit or not inflater.eof or inflater.unused_data:
        raise FormatError("a frame's digits are not one stream of the right size", code="digits")
    return unpack_digits(packed, radix(kind))


@dataclass(slots=True)
class DigitWriter:
    """Collects the digits of a frame."""

    parts: dict[Kind, list[Digits]] = field(default_factory=dict)

    def add(self, fold: Fold, core: Digits, tail: Digits) -> None:
        """Take the digits of a piece of a sequence."""
        if core.size:
            self.parts.setdefault(("core", fold.core), []).append(core)
        if tail.size:
            self.parts.setdefault(("tail", fold.width), []).append(tail)

    def counts(self) -> dict[Kind, int]:
        """Digits collected so far, by stream."""
        return {kind: sum(p.size for p in parts) for kind, parts in self.parts.items()}

    def streams(self) -> dict[Kind, bytes]:
        """Compressed streams, in a fixed order."""
        return {
            kind: compress(np.concatenate(self.parts[kind]), kind) for kind in sorted(self.parts)
        }


class DigitReader:
    """Hands out the digits of a frame in the order of the ribbon.

    Parameters
    ----------
    streams : mapping of Kind to bytes
    samples : int
        Samples of the frame: no stream can hold more digits.
    inflated : mapping of Kind to Future, optional
        Streams that something else inflates.
    """

    def __init__(
        self, streams: Mapping[Kind, bytes], samples: int, inflated: Inflated | None = None
    ) -> None:
        self._streams = streams
        self._inflated = inflated or {}
        self._samples = samples
        self._digits: dict[Kind, Digits] = {}
        self._at: dict[Kind, int] = {}

    def skip(self, counts: Mapping[Kind, int]) -> None:
        """Pass over digits of a tensor that is not wanted."""
        for kind, count in counts.items():
            self._at[kind] = self._at.get(kind, 0) + count

    def check_carried(self, counts: Mapping[Kind, int]) -> None:
        """Compare what has been taken so far with what the sidecar says was carried over.

        Raises
        ------
        FormatError
            ``digits``: they differ.
        """
        taken = {kind: count for kind, count in self._at.items() if count}
        if taken != {kind: count for kind, count in counts.items() if count}:
            raise FormatError("a frame's carried digits are miscounted", code="digits")

    def _take(self, kind: Kind, count: int) -> Digits:
        if not count:
            return _NO_DIGITS
        digits = self._digits.get(kind)
        if digits is None:
            if (elsewhere := self._inflated.get(kind)) is not None:
                digits = elsewhere.result()
            else:
                data = self._streams.get(kind, b"\x03\x00")
                digits = decompress(data, kind, self._samples)
            self._digits[kind] = digits
        begin = self._at.get(kind, 0)
        if begin + count > digits.size:
            raise FormatError("a frame has too few digits", code="digits")
        self._at[kind] = begin + count
        return digits[begin : begin + count]

    def unfold(self, samples: Samples, fold: Fold) -> Levels:
        """Levels of the next samples, shape (n,)."""
        core, tail = count_digits(samples, fold)
        core_digits = self._take(("core", fold.core), core)
        return unfold(samples, fold, core_digits, self._take(("tail", fold.width), tail))

    def pass_over(self, samples: Samples, fold: Fold) -> None:
        """Take note of the digits of samples that are not wanted."""
        if fold != PLAIN:
            core, tail = count_digits(samples, fold)
            self.skip({("core", fold.core): core, ("tail", fold.width): tail})
