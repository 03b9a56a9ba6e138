"""The ribbon: sequences of samples to frames and back.

The whole archive is one endless **ribbon**, :data:`BAND` = 64 samples high. The levels of a tensor
come as a **sequence** (see :mod:`weightvid.tile.order`); number s of it lies in ribbon column
``s // 64``, ribbon row ``s % 64``, counted from the tensor's first column. Each tensor starts at a
multiple of :data:`ALIGN` = 4 columns, the width of a coefficient group of HEVC.

A frame of W x H samples shows H / 64 bands of W ribbon columns each, from top to bottom. So the
place of every tensor follows from the shapes alone, and coding order follows the ribbon.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: uint8, or uint16 where samples have more than 8 bits.
Samples = npt.NDArray[Any]

#: height of the ribbon in samples; also the size of a coding-tree unit.
BAND: Final = 64
#: tensors start at multiples of this many ribbon columns.
ALIGN: Final = 4
#: 8-bit sample of level 0; also fills what no tensor covers.
ZERO_SAMPLE: Final = 128
MIN_FRAME_PX: Final = 256
MAX_FRAME_PX: Final = 2048
#: frames grow with the model up to this many samples; measured in tools/results/layout.md.
_TARGET_SAMPLES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """Size of every frame of a track, in samples; both multiples of 64."""

    width: int
    height: int

    @property
    def columns(self) -> int:
        """Ribbon columns that one frame shows."""
        return self.width * (self.height // BAND)


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of one tensor's levels on a frame, in samples."""

    frame: int
    x: int
    y: int
    width: int


def zero_sample(bits: int) -> int:
    """Sample of level 0.

    Examples
    --------
    >>> zero_sample(8), zero_sample(10)
    (128, 512)
    """
    return 1 << (bits - 1)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the 2-D view of a tensor.

    Examples
    --------
    >>> matrix_shape((16, 3, 3, 3)), matrix_shape((5,)), matrix_shape(())
    ((16, 27), (1, 5), (1, 1))
    """
    if len(shape) < 2:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])


def ribbon_columns(rows: int, columns: int) -> int:
    """Ribbon columns that an R x C matrix takes, alignment included.

    Examples
    --------
    >>> ribbon_columns(64, 10), ribbon_columns(16, 27)
    (12, 8)
    """
    needed = -(-rows * columns // BAND)
    return -(-needed // ALIGN) * ALIGN


def starts(shapes: Iterable[tuple[int, int]]) -> list[int]:
    """First ribbon column of each matrix, and, last, the length of the whole ribbon."""
    edges = [0]
    for rows, columns in shapes:
        edges.append(edges[-1] + ribbon_columns(rows, columns))
    return edges


def frame_from_ribbon(piece: Samples, geometry: FrameGeometry) -> Samples:
    """Picture of ``geometry.columns`` ribbon columns: (64, columns) to (height, width)."""
    bands = geometry.height // BAND
    cut = piece.reshape(BAND, bands, geometry.width)
    return np.ascontiguousarray(cut.transpose(1, 0, 2)).reshape(geometry.height, geometry.width)


def sequence_from_frame(frame: Samples, first: int, count: int) -> Samples:
    """Samples of ``count`` ribbon columns of a frame from column ``first``, in sequence order.

    Returns
    -------
    ndarray of the frame's dtype, shape (64 * count,)
    """
    width = frame.shape[1]
    columns = np.empty((count, BAND), frame.dtype)
    at = 0
    while at < count:
        band, x = divmod(first + at, width)
        run = min(count - at, width - x)
        columns[at : at + run] = frame[band * BAND : (band + 1) * BAND, x : x + run].T
        at += run
    return columns.reshape(-1)


def place(number: int) -> tuple[int, int]:
    """Ribbon (column, row) of a number of the sequence, from the tensor's first column."""
    return divmod(number, BAND)


def tiles(first: int, count: int, geometry: FrameGeometry) -> list[Tile]:
    """Rectangles, each 64 samples high, on which ``count`` ribbon columns from ``first`` lie."""
    found = []
    while count:
        frame, inside = divmod(first, geometry.columns)
        band, x = divmod(inside, geometry.width)
        run = min(count, geometry.width - x)
        found.append(Tile(frame, x, band * BAND, run))
        first, count = first + run, count - run
    return found


def choose_geometry(total_columns: int) -> FrameGeometry:
    """Frame size for a ribbon: about square, at most about a million samples, little left blank.

    Parameters
    ----------
    total_columns : int
        Length of the ribbon; 0 is allowed.

    Returns
    -------
    FrameGeometry
        256..2048 samples on each side, multiples of 64.
    """
    blocks = max(1, -(-total_columns // BAND))
    target = _TARGET_SAMPLES // BAND**2
    low, high = MIN_FRAME_PX // BAND, MAX_FRAME_PX // BAND
    frames = max(1, -(-blocks // target))
    best = None
    for wide in range(low, high + 1):
        tall = max(low, -(-blocks // (frames * wide)))
        if tall > high or not 0.5 <= wide / tall <= 2.0:
            continue
        blank = frames * wide * tall - blocks
        rank = (blank, abs(wide - tall), wide)
        if best is None or rank < best[0]:
            best = (rank, FrameGeometry(wide * BAND, tall * BAND))
    return best[1] if best else FrameGeometry(MIN_FRAME_PX, MIN_FRAME_PX)
