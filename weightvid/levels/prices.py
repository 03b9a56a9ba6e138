"""Prices of levels: what they cost among levels of about the magnitude that is expected there.

A matrix is laid out in the order of its energies (`weightvid.levels.frames`), so an adaptive coder
always knows about what to expect: a level that is rare among small ones is common among large ones.
Places of a matrix are classed by the mean magnitudes of their row and their column, and each class
has bits of its own.
"""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.levels.trellis import Bits, Places, histogram_bits
from weightvid.loader import Floats

_CLASSES_AN_OCTAVE: Final = 2.0
#: expected magnitudes further from 1 are of the last classes.
_REACH: Final = 14
#: what the mean of all counts for beside as many magnitudes of a row or column.
_PRIOR: Final = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """Classes of a matrix, ``first`` to ``last``, by its mean magnitude.

    ``columns``, shape (C,), are by how many classes magnitudes in a column lie above the mean.
    """

    mean: float
    columns: Floats
    first: int = -_REACH
    last: int = _REACH

    @classmethod
    def of(cls, rows: Floats) -> "Classes":
        """Classes by some rows, shape (R, C), in steps."""
        mean = float(np.abs(rows).mean(dtype=np.float64)) + 1e-6 if rows.size else 1e-6
        every = cls(mean, _classes(_means(rows.T, mean) / mean))
        if not rows.size:
            return every
        places = every.of_places(rows) + every.first
        return replace(every, first=int(places.min()), last=int(places.max()))

    def of_places(self, rows: Floats) -> Places:
        """Class of each place of rows, from 0; a row's don't depend on others."""
        own = _classes(_means(rows, self.mean))[:, None] + self.columns
        places: Places = np.clip(np.rint(own), self.first, self.last).astype(np.intp)
        return places - self.first

    def bits(self, levels: npt.NDArray[Any], places: Places) -> Bits:
        """Bits of the levels -127 .. 127 in each class, by some levels and their classes."""
        return np.stack([
            histogram_bits(levels[places == k - self.first], 2.0 ** (k / _CLASSES_AN_OCTAVE))
            for k in range(self.first, self.last + 1)
        ])  # fmt: skip


def _means(rows: Floats, mean: float) -> Floats:
    sums: Floats = np.abs(rows).sum(axis=1)
    return (sums + np.float32(_PRIOR * mean)) / np.float32(rows.shape[1] + _PRIOR)


def _classes(magnitudes: Floats) -> Floats:
    return np.asarray(_CLASSES_AN_OCTAVE * np.log2(magnitudes), np.float32)
