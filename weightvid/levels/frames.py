"""From matrices of levels to frames: the order of a part, and the ribbon.

A matrix is laid out by energies, so that the spread of its levels falls along the sequence. An
adaptive entropy coder then always knows about what to expect. The inverse, and the definition of
the order, is `weightvid.loader.from_sequence`.

All levels of an archive lie on one endless **ribbon**, 64 samples high. Element s of a part's
sequence lies in ribbon column ``s // 64``, row ``s % 64``, counted from the part's first column,
which is a multiple of 4 (the width of a coefficient group of HEVC). A frame shows its share of the
ribbon in bands of 64 rows, from top to bottom.
"""

from collections.abc import Iterable, Iterator
from math import log2, prod
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from weightvid import loader
from weightvid.levels.trellis import entropy_bits
from weightvid.loader import ALIGN, BAND, ZERO_SAMPLE, Array, Bytes, rectangles, sorted_places

#: one class of energy is this factor in the mean magnitude of levels, as a power of two. Large
#: matrices get finer classes: their energies cost little, and many rectangles take no time there.
CLASS_OCTAVES, LARGE_CLASS_OCTAVES = 1.0, 0.35
_LARGE: Final = 1 << 18
#: rows and columns within so many classes of the mean are told apart.
_REACH: Final = 16
#: what energies take in the sidecar beside their own entropy.
_ORDER_BITS: Final = 64.0


class Energies(NamedTuple):
    """Energies of rows, channels and frequencies, uint8; a column has the sum of its last two."""

    rows: Bytes
    channels: Bytes
    frequencies: Bytes

    @property
    def columns(self) -> Bytes:
        """Energies of the columns, frequency by frequency."""
        return (self.frequencies[:, None] + self.channels).reshape(-1)


def choose_energies(levels: Array, kernel: int = 1) -> Energies | None:
    """Energies of a matrix of int8, shape (R, kernel * C), of ``kernel`` frequencies.

    None where an order saves too little.
    """
    magnitudes = np.abs(levels.astype(np.int16))
    mean = float(magnitudes.mean(dtype=np.float64))
    if mean <= 0:
        return None
    columns = magnitudes.mean(axis=0, dtype=np.float64).reshape(kernel, -1)
    by_frequency = columns.mean(axis=1)
    relative = columns / np.maximum(by_frequency, mean * 1e-9)[:, None]
    octaves = CLASS_OCTAVES if levels.size < _LARGE else LARGE_CLASS_OCTAVES
    found = Energies(
        _energies(magnitudes.mean(axis=1, dtype=np.float64), mean, octaves),
        _energies(relative.mean(axis=0), 1.0, octaves),
        _energies(by_frequency, mean, octaves),
    )
    saved = levels.size * _level_bits(mean) - _ordered_bits(magnitudes, found.rows, found.columns)
    taken = _ORDER_BITS + sum(each.size * entropy_bits(each) for each in found)
    return found if saved > taken else None


def _ordered_bits(magnitudes: npt.NDArray[np.int16], rows: Bytes, columns: Bytes) -> float:
    """Bits of the levels where each class has a code of its own."""
    sums = np.zeros((int(rows.max()) + 1, magnitudes.shape[1]))
    for energy in np.flatnonzero(np.bincount(rows)).tolist():
        sums[energy] = magnitudes[rows == energy].sum(axis=0, dtype=np.float64)
    row_counts, column_counts = np.bincount(rows), np.bincount(columns)
    counts = np.zeros(len(row_counts) + len(column_counts))
    totals = np.zeros_like(counts)
    for energy, width in enumerate(column_counts.tolist()):
        if width:
            part = slice(energy, energy + len(row_counts))
            counts[part] += width * row_counts
            totals[part] += sums[:, columns == energy].sum(axis=1)
    used = counts > 0
    pairs = zip(counts[used].tolist(), totals[used].tolist(), strict=True)
    return float(sum(count * _level_bits(total / count) for count, total in pairs))


def _level_bits(mean: float) -> float:
    """Entropy of a level whose magnitude is geometric with this mean, and whose sign is random."""
    if mean <= 0:
        return 0.0
    return (1 + mean) * log2(1 + mean) - mean * log2(mean) + mean / (1 + mean)


def _energies(means: npt.NDArray[np.float64], mean: float, octaves: float) -> Bytes:
    classes = np.rint(np.log2(np.maximum(means, mean * 1e-9) / mean) / octaves)
    energies = np.clip(classes, -_REACH, _REACH).astype(np.int16)
    energies -= energies.min()
    return np.minimum(energies, loader.MAX_ENERGY).astype(np.uint8)


def to_sequence(matrix: Array, energies: Energies | None) -> Array:
    """Elements of a matrix in coding order, shape (R * C,)."""
    if energies is None:
        return np.ascontiguousarray(matrix).reshape(-1)
    rows, columns = energies.rows, energies.columns
    ordered = np.take(matrix[sorted_places(rows)], sorted_places(columns), axis=1)
    sequence, at = np.empty(matrix.size, matrix.dtype), 0
    for top, bottom, left, right in rectangles(rows, columns):
        size = (bottom - top) * (right - left)
        sequence[at : at + size].reshape(bottom - top, -1)[...] = ordered[top:bottom, left:right]
        at += size
    return sequence


_T = TypeVar("_T")

MIN_FRAME: Final = 192
MAX_FRAME: Final = 2048
#: frames grow with the model up to this size, at which HEVC's level 3.1 asks for the least
#: compression of a first picture.
LARGEST_FRAME: Final = 983_040
#: small models get so many frames, where they fill them, so that a download that is cut gives some
#: tensors. Each frame costs some 250 bytes: 0.9 % of a model of 270 thousand weights.
FEWEST_FRAMES: Final = 5


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


def choose_frame_size(columns: int, fewest: int = FEWEST_FRAMES) -> FrameSize:
    """Frame size for a ribbon of >= 0 columns: about square, little left blank.

    A small model gets ``fewest`` frames, if it fills them.
    """
    blocks = max(1, -(-columns // BAND))
    low, high = MIN_FRAME // BAND, MAX_FRAME // BAND
    most = LARGEST_FRAME // BAND**2
    frames = max(1, -(-blocks // most), min(fewest, blocks // low**2))
    sizes = ((wide, max(low, -(-blocks // (frames * wide)))) for wide in range(low, high + 1))
    wide, tall = min(
        (size for size in sizes if prod(size) <= most and 0.5 <= size[0] / size[1] <= 2.0),
        key=lambda size: (frames * prod(size) - blocks, abs(size[0] - size[1])),
    )
    return FrameSize(wide * BAND, tall * BAND)


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
        begin = 0
        while begin < len(columns):
            if at == size.columns:
                yield Frame(number, _picture(ribbon, size), tuple(starts), tuple(ends))
                number, at, ribbon, starts, ends = number + 1, 0, _blank(size), [], []
            if not begin:
                starts.append((item, at))
            count = min(len(columns) - begin, size.columns - at)
            ribbon[at : at + count] = columns[begin : begin + count]
            begin, at = begin + count, at + count
        ends.append(item)
    if at:
        yield Frame(number, _picture(ribbon, size), tuple(starts), tuple(ends))


def _blank(size: FrameSize) -> Bytes:
    return np.full((size.columns, BAND), ZERO_SAMPLE, np.uint8)


def _picture(ribbon: Bytes, size: FrameSize) -> Bytes:
    bands = ribbon.reshape(size.height // BAND, size.width, BAND).transpose(0, 2, 1)
    return np.ascontiguousarray(bands).reshape(size.height, size.width)
