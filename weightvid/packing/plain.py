"""Never worse than the plain way: what a tensor takes as video, as plain levels, or exactly."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from weightvid.container.exact import compress, deflate_raw
from weightvid.tile.fold import fold_counts
from weightvid.tile.layout import Layout, cut

Levels = npt.NDArray[np.int8]

#: bytes a tensor's entry takes in a sidecar, its hash included; a plain one's takes about twice.
_ENTRY_BYTES: Final = 40
#: HEVC codes samples this much above their zero-order entropy, class by class.
_HEVC_OVERHEAD: Final = 1.05
#: and Huffman codes the digits so much above theirs.
_HUFFMAN_OVERHEAD: Final = 1.01
#: so many bytes of a large tensor tell how well it compresses.
_PROBE_BYTES: Final = 1 << 17
#: matches that save so much speak for repeats, and when they come so near, LZMA is tried.
_REPEATS: Final = 0.98
_PROMISING: Final = 1.5
#: the plain way must save more than the estimate of the video's size may be off.
_MARGIN: Final = 0.95
#: levels counted at a time.
_BLOCK_LEVELS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Choice:
    """How a tensor will be stored.

    Attributes
    ----------
    coding : str
        ``video``, ``plain`` (levels without video) or ``exact`` (the original elements).
    video_bytes : int
        Estimate of what it takes as video.
    """

    coding: str
    video_bytes: int


class Rival(Protocol):
    """A tensor's bytes, of which pieces are asked for."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def bytes(self, begin: int, end: int) -> bytes:
        """Bytes ``begin .. end``."""


@dataclass(frozen=True, slots=True)
class LevelBytes:
    """Levels row by row, one byte each.

    Attributes
    ----------
    size : int
    read : callable
        Levels of a range.
    """

    size: int
    read: Callable[[int, int], Levels]

    def bytes(self, begin: int, end: int) -> bytes:
        """Bytes of a range."""
        return self.read(begin, end).tobytes()


@dataclass(frozen=True, slots=True)
class PlaneBytes:
    """Stored elements as byte planes: all first bytes, then all second bytes, and so on.

    Attributes
    ----------
    elements : int
    itemsize : int
    read : callable
        Stored elements ``first .. first + count``.
    """

    elements: int
    itemsize: int
    read: Callable[[int, int], npt.NDArray[np.generic]]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.elements * self.itemsize

    def bytes(self, begin: int, end: int) -> bytes:
        """Bytes of a range of the planes."""
        found = []
        while begin < end:
            plane, first = divmod(begin, self.elements)
            count = min(end - begin, self.elements - first)
            stored = np.ascontiguousarray(self.read(first, count))
            found.append(stored.view(np.uint8).reshape(count, -1)[:, plane].tobytes())
            begin += count
        return b"".join(found)


def choose_coding(video_bytes: int, levels: Rival, planes: Rival) -> Choice:
    """Smallest coding of a quantized tensor; the original elements if even those are smaller.

    Parameters
    ----------
    video_bytes : int
        Estimate of what it takes as video.
    levels, planes : Rival
        The levels, and the original elements.
    """
    rival = int(_MARGIN * video_bytes) - _ENTRY_BYTES
    coding = "plain" if _beats(levels, rival) else "video"
    if _beats(planes, rival):
        coding = "exact"
    return Choice(coding, video_bytes)


def _beats(data: Rival, rival: int) -> bool:
    """Whether bytes compressed the plain way take fewer than ``rival``.

    Of large data, evenly spaced pieces are tried. LZMA is slow, and without repeats, of which a
    quick deflate knows, it does no better than Huffman codes.
    """
    probe = _probe(data)
    goal = rival * len(probe) / data.size
    size = len(deflate_raw(probe, zlib.Z_HUFFMAN_ONLY))
    matched = len(deflate_raw(probe, level=1))
    if matched < _REPEATS * size:
        size = matched
        if goal <= size < _PROMISING * goal:
            size = len(compress(probe)[1])
    return size < goal


def _probe(data: Rival) -> bytes:
    """All of the data, or evenly spaced pieces of them."""
    if data.size <= _PROBE_BYTES:
        return data.bytes(0, data.size)
    pieces = 64
    stride, size = data.size // pieces, _PROBE_BYTES // pieces
    return b"".join(data.bytes(i * stride, i * stride + size) for i in range(pieces))


def video_bytes(
    layout: Layout, shape: tuple[int, int], escapes: int, read: Callable[[int, int], Levels]
) -> int:
    """Estimate of a tensor's bytes as video: samples, digits, energies and its sidecar entry.

    Parameters
    ----------
    layout : Layout
    shape : (int, int)
        Of the matrix.
    escapes : int
        Number of levels outside the sample range.
    read : callable
        Levels of a range of the sequence.
    """
    rows, columns = shape
    bits = 0.0
    for first, last, fold in cut(layout.segments(rows, columns), 0, rows * columns):
        counts = np.zeros(256, np.int64)
        for begin in range(first, last, _BLOCK_LEVELS):
            piece = read(begin, min(last, begin + _BLOCK_LEVELS)).view(np.uint8)
            counts += np.bincount(piece, minlength=256)
        samples, core, tail = fold_counts(counts, fold)
        bits += _HEVC_OVERHEAD * _entropy_bits(samples)
        bits += _HUFFMAN_OVERHEAD * (_entropy_bits(core) + _entropy_bits(tail))
    side = 0 if layout.order is None else layout.order.rows.size + layout.order.columns.size
    return ceil((bits + 2.5 * side) / 8) + _ENTRY_BYTES + 4 * escapes


def _entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Zero-order entropy of so many symbols of each value; nothing takes no bits."""
    total = int(counts.sum())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / total)).sum())
