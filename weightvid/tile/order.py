"""The order in which the levels of a matrix are laid on the ribbon.

**Plain order.** The matrix is cut into groups of 64 rows; each group is taken column by column.
Element (i, j) of group g = i // 64, which has r = min(64, R - 64 g) rows, is number
``64 g C + j r + (i - 64 g)`` of the sequence. On the ribbon a full group is the sub-matrix itself.

**Energy order.** Rows and columns carry small numbers, their energies: the larger, the larger their
levels. Rows are sorted by falling energy, columns too, both stable. The class of an element is the
sum of both energies; classes come in falling order, within a class its row energies in falling
order, and each such rectangle is taken row by row. So the spread of the levels falls along the
sequence, and an adaptive entropy coder always knows about what to expect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.tile.ribbon import BAND

#: int8 in archives; wider integers in comparisons.
Levels = npt.NDArray[Any]
Energies = npt.NDArray[np.uint8]

#: largest energy of a row or a column.
MAX_ENERGY: Final = 63
#: rows that are put in place at a time.
_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Consecutive numbers of a sequence: a rectangle of the sorted matrix, row by row."""

    energy: int
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True, slots=True, eq=False)
class EnergyOrder:
    """Energies of the rows and columns of an R x C matrix.

    Attributes
    ----------
    rows : ndarray of uint8, shape (R,)
        0..63.
    columns : ndarray of uint8, shape (L,)
        0..63; L divides C, and each energy holds for C / L columns (the kernel positions of one
        input channel).
    """

    rows: Energies
    columns: Energies
    _cache: dict[int, list[Rectangle]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for energies in (self.rows, self.columns):
            if not energies.size or int(energies.max()) > MAX_ENERGY:
                raise QuantizationError(f"energies must be 0..{MAX_ENERGY}, one at least")

    @property
    def classes(self) -> int:
        """Number of classes: numbers 0 .. classes - 1, of which some may be empty."""
        return int(self.rows.max()) + int(self.columns.max()) + 1

    def permutations(self, columns: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Original numbers of the sorted rows and of the ``columns`` sorted columns."""
        rows = np.argsort(-self.rows.astype(np.int16), kind="stable")
        repeat = columns // self.columns.size
        each = np.argsort(-self.columns.astype(np.int16), kind="stable")
        return rows, (each[:, None] * repeat + np.arange(repeat)).reshape(-1)

    def rectangles(self, columns: int) -> list[Rectangle]:
        """Rectangles of the sorted matrix in the order of the sequence."""
        found = self._cache.get(columns)
        if found is None:
            found = self._cache[columns] = list(self._rectangles(columns // self.columns.size))
        return found

    def _rectangles(self, repeat: int) -> Iterator[Rectangle]:
        row_edges = _edges(self.rows, 1)
        column_edges = _edges(self.columns, repeat)
        for energy in range(self.classes - 1, -1, -1):
            for row in range(len(row_edges) - 1, -1, -1):
                column = energy - row
                if not 0 <= column < len(column_edges):
                    continue
                rows, columns = row_edges[row], column_edges[column]
                if rows.stop > rows.start and columns.stop > columns.start:
                    yield Rectangle(energy, rows, columns)

    def class_edges(self, columns: int) -> list[tuple[int, int]]:
        """(class, end of its part of the sequence), in the order of the sequence."""
        edges: list[tuple[int, int]] = []
        end = 0
        for rectangle in self.rectangles(columns):
            height, width = rectangle.shape
            end += height * width
            if edges and edges[-1][0] == rectangle.energy:
                edges.pop()
            edges.append((rectangle.energy, end))
        return edges


def _edges(energies: Energies, repeat: int) -> list[slice]:
    """Place of each energy's rows (or columns) after sorting by falling energy."""
    counts = np.bincount(energies) * repeat
    ends = np.cumsum(counts[::-1])[::-1]
    return [slice(int(end - count), int(end)) for count, end in zip(counts, ends, strict=True)]


def to_sequence(matrix: Levels, order: EnergyOrder | None) -> Levels:
    """Levels of an R x C matrix in coding order, shape (R * C,)."""
    rows, columns = matrix.shape
    sequence = np.empty(rows * columns, matrix.dtype)
    if order is None:
        groups, rest = divmod(rows, BAND)
        full = groups * BAND * columns
        if groups:
            blocks = matrix[: groups * BAND].reshape(groups, BAND, columns)
            sequence[:full].reshape(groups, columns, BAND)[...] = blocks.transpose(0, 2, 1)
        if rest:
            sequence[full:].reshape(columns, rest)[...] = matrix[groups * BAND :].T
        return sequence
    row_order, column_order = order.permutations(columns)
    ordered = np.take(matrix[row_order], column_order, axis=1)
    at = 0
    for rectangle in order.rectangles(columns):
        height, width = rectangle.shape
        part = sequence[at : at + height * width].reshape(height, width)
        part[...] = ordered[rectangle.rows, rectangle.columns]
        at += height * width
    return sequence


def from_sequence(sequence: Levels, shape: tuple[int, int], order: EnergyOrder | None) -> Levels:
    """Undo :func:`to_sequence`; elements of ``sequence`` beyond R * C are ignored."""
    rows, columns = shape
    matrix = np.empty(shape, sequence.dtype)
    if order is None:
        groups, rest = divmod(rows, BAND)
        full = groups * BAND * columns
        if groups:
            blocks = sequence[:full].reshape(groups, columns, BAND).transpose(0, 2, 1)
            matrix[: groups * BAND].reshape(groups, BAND, columns)[...] = blocks
        if rest:
            matrix[groups * BAND :] = sequence[full : rows * columns].reshape(columns, rest).T
        return matrix
    at = 0
    for rectangle in order.rectangles(columns):
        height, width = rectangle.shape
        part = sequence[at : at + height * width].reshape(height, width)
        matrix[rectangle.rows, rectangle.columns] = part
        at += height * width
    row_order, column_order = order.permutations(columns)
    row_place, column_place = np.argsort(row_order), np.argsort(column_order)
    found = np.empty(shape, sequence.dtype)
    for begin in range(0, rows, _ROWS):
        some = slice(begin, begin + _ROWS)
        np.take(matrix[row_place[some]], column_place, axis=1, out=found[some], mode="clip")
    return found


def element(number: int, rows: int, columns: int) -> tuple[int, int]:
    """Matrix (row, column) of a number of the plain order.

    Raises
    ------
    IndexError
        There is no such number.
    """
    if not 0 <= number < rows * columns:
        raise IndexError(f"number {number} is not in a {rows} x {columns} matrix")
    group = min(number // (BAND * columns), rows // BAND)
    height = min(BAND, rows - group * BAND)
    column, row = divmod(number - group * BAND * columns, height)
    return group * BAND + row, column


def number(row: int, column: int, rows: int, columns: int) -> int:
    """Number of a matrix element in the plain order; the inverse of :func:`element`."""
    group = row // BAND
    height = min(BAND, rows - group * BAND)
    return group * BAND * columns + column * height + row - group * BAND
