"""The ribbon: sequences of samples to frames.

All levels of an archive lie on one endless **ribbon**, 64 samples high. Element s of a part's
sequence lies in ribbon column ``s // 64``, row ``s % 64``, counted from the part's first column,
which is a multiple of 4 (the width of a coefficient group of HEVC). A frame shows its share of the
ribbon in bands of 64 rows, from top to bottom.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np

from weightvid.loader import ALIGN, BAND, ZERO_SAMPLE, Bytes

_T = TypeVar("_T")

MIN_FRAME: Final = 192
MAX_FRAME: Final = 2048
#: frames grow with the model up to this size, at which HEVC's level 3.1 asks for the least
#: compression of a first picture.
LARGEST_FRAME: Final = 983_040


class FrameSize(NamedTuple):
    """Size of every frame in samples; both multiples of 64."""

    width: int
    height: int

    @property
    def columns(self) -> int:
        """Ribbon columns that one frame shows."""
        return self.width * (self.height // BAND)


def ribbon_columns(size: int) -> int:
    """Ribbon columns that so many levels take, alignment included.

    Examples
    --------
    >>> ribbon_columns(640), ribbon_columns(16 * 27)
    (12, 8)
    """
    return -(-size // (BAND * ALIGN)) * ALIGN


def choose_frame_size(columns: int) -> FrameSize:
    """Frame size for a ribbon: about square, little left blank.

    Parameters
    ----------
    columns : int
        Length of the ribbon; 0 is allowed.
    """
    blocks = max(1, -(-columns // BAND))
    low, high = MIN_FRAME // BAND, MAX_FRAME // BAND
    most = LARGEST_FRAME // BAND**2
    frames = max(1, -(-blocks // most))
    best: tuple[tuple[int, int, int], FrameSize] | None = None
    for wide in range(low, high + 1):
        tall = max(low, -(-blocks // (frames * wide)))
        if wide * tall > most or not 0.5 <= wide / tall <= 2.0:
            continue
        blank = frames * wide * tall - blocks
        rank = (blank, abs(wide - tall), wide)
        if best is None or rank < best[0]:
            best = (rank, FrameSize(wide * BAND, tall * BAND))
    return best[1] if best else FrameSize(960, 1024)


class Frame(NamedTuple, Generic[_T]):
    """One frame: its number, its luma, and the items that start and that end in it.

    ``starts`` gives, with each item, its first ribbon column in this frame.
    """

    number: int
    luma: Bytes
    starts: tuple[tuple[_T, int], ...]
    ends: tuple[_T, ...]


def lay_out(items: Iterable[tuple[_T, Bytes]], size: FrameSize) -> Iterator[Frame[_T]]:
    """Frames of consecutive items, each given with its samples in coding order."""
    number, at, ribbon = 0, 0, _blank(size)
    starts: list[tuple[_T, int]] = []
    ends: list[_T] = []
    for item, samples in items:
        columns = np.full((ribbon_columns(samples.size), BAND), ZERO_SAMPLE, np.uint8)
        columns.reshape(-1)[: samples.size] = samples
        if at == size.columns:
            yield Frame(number, _picture(ribbon, size), tuple(starts), tuple(ends))
            number, at, ribbon, starts, ends = number + 1, 0, _blank(size), [], []
        starts.append((item, at))
        begin = 0
        while begin < len(columns):
            if at == size.columns:
                yield Frame(number, _picture(ribbon, size), tuple(starts), tuple(ends))
                number, at, ribbon, starts, ends = number + 1, 0, _blank(size), [], []
            count = min(len(columns) - begin, size.columns - at)
            ribbon[at : at + count] = columns[begin : begin + count]
            begin, at = begin + count, at + count
        ends.append(item)
    if starts or ends or at:
        yield Frame(number, _picture(ribbon, size), tuple(starts), tuple(ends))


def _blank(size: FrameSize) -> Bytes:
    return np.full((size.columns, BAND), ZERO_SAMPLE, np.uint8)


def _picture(ribbon: Bytes, size: FrameSize) -> Bytes:
    bands = ribbon.reshape(size.height // BAND, size.width, BAND).transpose(0, 2, 1)
    return np.ascontiguousarray(bands).reshape(size.height, size.width)
