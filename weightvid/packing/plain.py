"""Never worse than the plain way: what a tensor takes as video, as plain levels, or exactly."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.container.exact import compress, deflate_raw
from weightvid.packing.quantized import CodedTensor
from weightvid.tile.fold import fold_levels
from weightvid.tile.layout import cut

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


def choose_coding(coded: CodedTensor, array: npt.NDArray[np.generic]) -> Choice:
    """Smallest coding of a quantized tensor; the original elements if even those are smaller."""
    video = video_bytes(coded)
    rival = int(_MARGIN * video) - _ENTRY_BYTES
    coding = "plain" if _beats(coded.levels.reshape(-1).view(np.uint8), rival) else "video"
    stored = np.ascontiguousarray(array).reshape(-1)
    planes = stored.view(np.uint8).reshape(-1, stored.itemsize).T
    if _beats(planes.reshape(-1), rival):
        coding = "exact"
    return Choice(coding, video)


def _beats(data: npt.NDArray[np.uint8], rival: int) -> bool:
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


def _probe(data: npt.NDArray[np.uint8]) -> bytes:
    """All of the data, or evenly spaced pieces of them."""
    if data.size <= _PROBE_BYTES:
        return data.tobytes()
    pieces = 64
    stride, size = data.size // pieces, _PROBE_BYTES // pieces
    return b"".join(data[i * stride : i * stride + size].tobytes() for i in range(pieces))


def video_bytes(coded: CodedTensor) -> int:
    """Estimate of a tensor's bytes as video: samples, digits, energies and its sidecar entry."""
    rows, columns = coded.levels.shape
    layout = coded.layout
    sequence = tile.to_sequence(coded.levels, layout.order)
    bits = 0.0
    for first, last, fold in cut(layout.segments(rows, columns), 0, sequence.size):
        samples, core, tail = fold_levels(sequence[first:last], fold)
        bits += _HEVC_OVERHEAD * _entropy_bits(samples)
        bits += _HUFFMAN_OVERHEAD * (_entropy_bits(core) + _entropy_bits(tail))
    side = 0 if layout.order is None else layout.order.rows.size + layout.order.columns.size
    return ceil((bits + 2.5 * side) / 8) + _ENTRY_BYTES + 4 * len(coded.escapes.index)


def _entropy_bits(samples: npt.NDArray[np.uint8]) -> float:
    """Zero-order entropy; nothing takes no bits."""
    counts = np.bincount(samples, minlength=256)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / samples.size)).sum())
