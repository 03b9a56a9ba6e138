"""How one tensor is laid on the ribbon: its order, and a fold for each class of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from weightvid.errors import QuantizationError
from weightvid.tile.fold import PLAIN, Fold
from weightvid.tile.order import EnergyOrder


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a sequence with one fold; it ends before number ``end``."""

    end: int
    fold: Fold


@dataclass(frozen=True, slots=True)
class Layout:
    """Order and folds of a tensor.

    Attributes
    ----------
    order : EnergyOrder or None
        None: the plain order, of one class.
    folds : tuple of Fold
        The fold of each class, by class number.
    """

    order: EnergyOrder | None = None
    folds: tuple[Fold, ...] = (PLAIN,)

    def __post_init__(self) -> None:
        classes = 1 if self.order is None else self.order.classes
        if len(self.folds) != classes:
            raise QuantizationError(f"{len(self.folds)} folds for {classes} classes")

    def unfolded(self) -> Layout:
        """The same order, every level a sample."""
        return Layout(self.order, (PLAIN,) * len(self.folds))

    def segments(self, rows: int, columns: int) -> list[Segment]:
        """Parts of the sequence of an R x C matrix; neighbours have different folds."""
        if self.order is None:
            return [Segment(rows * columns, self.folds[0])]
        found: list[Segment] = []
        for energy, end in self.order.class_edges(columns):
            fold = self.folds[energy]
            if found and found[-1].fold == fold:
                found.pop()
            found.append(Segment(end, fold))
        return found


PLAIN_LAYOUT: Final = Layout()


def cut(segments: list[Segment], begin: int, end: int) -> list[tuple[int, int, Fold]]:
    """Parts of the segments within ``begin .. end``, counted from ``begin``.

    Examples
    --------
    >>> cut([Segment(10, PLAIN), Segment(30, Fold(2, 1))], 5, 20)
    [(0, 5, Fold(core=0, width=1)), (5, 15, Fold(core=2, width=1))]
    """
    found = []
    at = begin
    for segment in segments:
        stop = min(segment.end, end)
        if stop > at:
            found.append((at - begin, stop - begin, segment.fold))
            at = stop
    return found
