"""Sequences too large for memory: where the levels of a block of rows lie in one.

What :func:`~weightvid.tile.order.to_sequence` does at once is done here block by block, between a
matrix that is held row by row and a sequence that is held somewhere else. Within a block, rows of
one energy keep their order, so what they put into each rectangle of the energy order is one run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from weightvid.tile.order import EnergyOrder, Levels, from_sequence, to_sequence
from weightvid.tile.ribbon import BAND

#: levels of one block, about.
BLOCK_LEVELS: Final = 1 << 21


class Room(Protocol):
    """Somewhere bytes lie."""

    def write(self, at: int, data: Levels) -> None:
        """Put bytes at an offset."""

    def read(self, begin: int, end: int) -> Levels:
        """Bytes ``begin .. end``."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of a block that have one energy, and where their part of each rectangle begins."""

    rows: npt.NDArray[np.intp]
    parts: tuple[tuple[int, slice], ...]


class BlockOrder:
    """The order of an R x C matrix, block of rows by block of rows.

    Parameters
    ----------
    shape : (int, int)
    order : EnergyOrder or None
    dtype : dtype
        Of the levels.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        order: EnergyOrder | None,
        dtype: npt.DTypeLike = np.int8,
    ) -> None:
        self._rows, self._columns = shape
        self._order = order
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        if order is None:
            return
        row_order, self._column_order = order.permutations(self._columns)
        self._column_place = np.argsort(self._column_order)
        self._row_place = np.argsort(row_order)
        # Of each energy of rows: its first sorted row, and (offset, columns) of its rectangles.
        self._rectangles: dict[int, tuple[int, list[tuple[int, slice]]]] = {}
        at = 0
        for rectangle in order.rectangles(self._columns):
            energy = int(order.rows[row_order[rectangle.rows.start]])
            _, parts = self._rectangles.setdefault(energy, (rectangle.rows.start, []))
            parts.append((at, rectangle.columns))
            height, width = rectangle.shape
            at += height * width

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Blocks of rows that cover the matrix; each but the last is whole groups of 64 rows."""
        step = max(1, BLOCK_LEVELS // (BAND * max(1, self._columns))) * BAND
        for begin in range(0, self._rows, step):
            yield begin, min(self._rows, begin + step)

    def _runs(self, begin: int, end: int) -> Iterator[_Run]:
        order = self._order
        if order is None:
            return
        energies = order.rows[begin:end]
        for energy in np.flatnonzero(np.bincount(energies)):
            rows = np.flatnonzero(energies == energy)
            first, rectangles = self._rectangles[int(energy)]
            rank = int(self._row_place[begin + rows[0]]) - first
            parts = tuple(
                (at + rank * (columns.stop - columns.start), columns) for at, columns in rectangles
            )
            yield _Run(rows, parts)

    def _write(self, room: Room, at: int, levels: Levels) -> None:
        room.write(at * self._dtype.itemsize, levels.reshape(-1).view(np.int8))

    def _read(self, room: Room, begin: int, end: int) -> Levels:
        size = self._dtype.itemsize
        return room.read(begin * size, end * size).view(self._dtype)

    def put(self, room: Room, begin: int, block: Levels) -> None:
        """Put the levels of some rows, of :meth:`blocks`, where they lie in the sequence."""
        if self._order is None:
            self._write(room, begin * self._columns, to_sequence(block, None))
            return
        ordered = np.take(block, self._column_order, axis=1)
        for run in self._runs(begin, begin + len(block)):
            rows = ordered[run.rows]
            for at, columns in run.parts:
                self._write(room, at, np.ascontiguousarray(rows[:, columns]))

    def get(self, room: Room, begin: int, end: int) -> Levels:
        """Levels of some rows, of :meth:`blocks`, from the sequence."""
        shape = (end - begin, self._columns)
        if self._order is None:
            whole = self._read(room, begin * shape[1], end * shape[1])
            return from_sequence(whole, shape, None)
        ordered = np.empty(shape, self._dtype)
        for run in self._runs(begin, end):
            rows = np.empty((len(run.rows), self._columns), self._dtype)
            for at, columns in run.parts:
                width = columns.stop - columns.start
                part = self._read(room, at, at + width * len(rows))
                rows[:, columns] = part.reshape(len(rows), width)
            ordered[run.rows] = rows
        return np.take(ordered, self._column_place, axis=1)
