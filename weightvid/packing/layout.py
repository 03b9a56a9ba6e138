"""Choosing how a tensor lies on the ribbon: energies of rows and columns, and folds."""

from __future__ import annotations

from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.tile.fold import MAX_CORE, Fold
from weightvid.tile.layout import Layout
from weightvid.tile.order import MAX_ENERGY, Energies, EnergyOrder

Levels = npt.NDArray[np.int8]

#: one class of energy is this factor in the mean magnitude of levels, as a power of two.
_CLASS_OCTAVES: Final = 0.25
#: rows and columns within so many classes of the mean are told apart.
_REACH: Final = 16


def kernel_size(shape: tuple[int, ...]) -> int:
    """Columns of the matrix that belong to one input channel.

    Examples
    --------
    >>> kernel_size((64, 32, 3, 3)), kernel_size((10, 64))
    (9, 1)
    """
    return prod(shape[2:])


def choose_layout(levels: Levels, kernel: int) -> Layout:
    """Layout of an R x C matrix of levels.

    Parameters
    ----------
    levels : ndarray of int8, shape (R, C)
    kernel : int
        Columns that share one energy; divides C.
    """
    columns = levels.shape[1]
    magnitude = np.abs(levels).view(np.uint8)
    per_row = magnitude.mean(axis=1)
    mean = float(per_row.mean())
    if mean <= 0:
        return Layout()
    per_column = magnitude.mean(axis=0).reshape(columns // kernel, kernel).mean(axis=1)
    order = EnergyOrder(_energies(per_row, mean), _energies(per_column, mean))
    folds = [Fold()] * order.classes
    for energy, mean_magnitude in _class_means(magnitude, order, columns):
        folds[energy] = fold_for(mean_magnitude)
    return Layout(order, tuple(folds))


def _class_means(
    magnitude: npt.NDArray[np.uint8], order: EnergyOrder, columns: int
) -> list[tuple[int, float]]:
    row_order, column_order = order.permutations(columns)
    ordered = np.take(magnitude[row_order], column_order, axis=1)
    total: dict[int, float] = {}
    count: dict[int, int] = {}
    for rectangle in order.rectangles(columns):
        part = ordered[rectangle.rows, rectangle.columns]
        total[rectangle.energy] = total.get(rectangle.energy, 0.0) + float(part.sum())
        count[rectangle.energy] = count.get(rectangle.energy, 0) + part.size
    return [(energy, total[energy] / count[energy]) for energy in total]


def _energies(means: npt.NDArray[np.float64], mean: float) -> Energies:
    octaves = np.log2(np.maximum(means, mean * 1e-9) / mean) / _CLASS_OCTAVES
    energies = np.clip(np.rint(octaves), -_REACH, _REACH).astype(np.int16)
    energies -= energies.min()
    return np.minimum(energies, MAX_ENERGY).astype(np.uint8)


def fold_for(mean_magnitude: float) -> Fold:
    """Fold for levels of this mean magnitude (of about Gaussian spread)."""
    sigma = mean_magnitude * 1.2533
    if sigma < 0.4:
        return Fold()
    core = min(MAX_CORE, max(1, round(sigma)))
    width = 1 if sigma < 1.3 else 2 if sigma < 4 else 3
    return Fold(core, width)
