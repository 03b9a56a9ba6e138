"""Tensors to frames and back: the ribbon layout.

A tensor is a matrix of R x C levels (first axis: rows; all others flattened: columns). The whole
archive is one endless **ribbon**, :data:`BAND` = 64 samples high. A matrix is cut into groups of
64 rows, and each group is laid on the ribbon column by column: element (i, j) of group
g = i // 64, which has r = min(64, R - 64 g) rows, is number ``s = 64 g C + j r + (i - 64 g)`` of
its tensor, and lies in ribbon column ``s // 64``, ribbon row ``s % 64``, counted from the tensor's
first column. A full group is thus simply the 64 x C sub-matrix, and a short one folds up without
padding. Each tensor starts at a multiple of :data:`ALIGN` = 4 columns, the width of a coefficient
group of HEVC.

A frame of W x H samples shows H / 64 bands of W ribbon columns each, from top to bottom. So the
place of every tensor follows from the shapes alone, and coding order follows the ribbon.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.uint8]

#: height of the ribbon in samples; also the size of a coding-tree unit.
BAND: Final = 64
#: tensors start at multiples of this many ribbon columns.
ALIGN: Final = 4
#: sample of level 0; also fills what no tensor covers.
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


def to_ribbon(matrix: Samples) -> Samples:
    """Lay an R x C matrix of samples on its piece of ribbon.

    Parameters
    ----------
    matrix : ndarray of uint8, shape (R, C)

    Returns
    -------
    ndarray of uint8, shape (64, ribbon_columns(R, C))
        Unused samples are :data:`ZERO_SAMPLE`.
    """
    rows, columns = matrix.shape
    ribbon = np.full((BAND, ribbon_columns(rows, columns)), ZERO_SAMPLE, np.uint8)
    groups, rest = divmod(rows, BAND)
    full = groups * columns
    if groups:
        blocks = matrix[: groups * BAND].reshape(groups, BAND, columns)
        ribbon[:, :full].reshape(BAND, groups, columns)[...] = blocks.transpose(1, 0, 2)
    if rest:
        tail = np.full((ribbon.shape[1] - full) * BAND, ZERO_SAMPLE, np.uint8)
        tail[: rest * columns] = matrix[groups * BAND :].T.reshape(-1)
        ribbon[:, full:] = tail.reshape(-1, BAND).T
    return ribbon


def from_ribbon(ribbon: Samples, rows: int, columns: int) -> Samples:
    """Undo :func:`to_ribbon`: the R x C matrix of samples."""
    matrix = np.empty((rows, columns), np.uint8)
    groups, rest = divmod(rows, BAND)
    full = groups * columns
    if groups:
        blocks = ribbon[:, :full].reshape(BAND, groups, columns).transpose(1, 0, 2)
        matrix[: groups * BAND].reshape(groups, BAND, columns)[...] = blocks
    if rest:
        tail = ribbon[:, full:].T.reshape(-1)[: rest * columns]
        matrix[groups * BAND :] = tail.reshape(columns, rest).T
    return matrix


def frame_from_ribbon(piece: Samples, geometry: FrameGeometry) -> Samples:
    """Picture of ``geometry.columns`` ribbon columns: (64, columns) to (height, width)."""
    bands = geometry.height // BAND
    cut = piece.reshape(BAND, bands, geometry.width)
    return np.ascontiguousarray(cut.transpose(1, 0, 2)).reshape(geometry.height, geometry.width)


def copy_from_frame(frame: Samples, first: int, ribbon: Samples, at: int, count: int) -> None:
    """Copy ``count`` ribbon columns from ``first`` of a frame to ``ribbon``, from its ``at``."""
    width = frame.shape[1]
    while count:
        band, x = divmod(first, width)
        run = min(count, width - x)
        ribbon[:, at : at + run] = frame[band * BAND : (band + 1) * BAND, x : x + run]
        first, at, count = first + run, at + run, count - run


def place(row: int, column: int, rows: int, columns: int) -> tuple[int, int]:
    """Ribbon (column, row) of matrix element (row, column), from the tensor's first column."""
    group = row // BAND
    height = min(BAND, rows - group * BAND)
    number = group * BAND * columns + column * height + row - group * BAND
    return divmod(number, BAND)


def element(ribbon_column: int, ribbon_row: int, rows: int, columns: int) -> tuple[int, int]:
    """Matrix (row, column) at a place of the tensor's ribbon; the inverse of :func:`place`.

    Raises
    ------
    IndexError
        The place is padding.
    """
    number = ribbon_column * BAND + ribbon_row
    if not 0 <= number < rows * columns:
        raise IndexError(f"ribbon place ({ribbon_column}, {ribbon_row}) is padding")
    group = min(number // (BAND * columns), rows // BAND)
    height = min(BAND, rows - group * BAND)
    column, row = divmod(number - group * BAND * columns, height)
    return group * BAND + row, column


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
