"""Choosing how a tensor lies on the ribbon: energies of rows and columns, and folds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log2, pi, prod, sqrt
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.tile.fold import MAX_CORE, Fold
from weightvid.tile.layout import Layout
from weightvid.tile.order import MAX_ENERGY, Energies, EnergyOrder

#: int8, or int16 of deeper samples.
Levels = npt.NDArray[Any]

#: one class of energy is this factor in the mean magnitude of levels, as a power of two.
_CLASS_OCTAVES: Final = 0.5
#: radius of the core in standard deviations of the class, and from which deviation on two and
#: three magnitudes of the tail share a sample.
_CORE_SIGMAS: Final = 1.8
_WIDER_FROM: Final = (3.0, 8.0)
#: radii of cores: each takes a stream with a code of its own, so few are better than all.
_RADII: Final = (1, 2, 4, 7, 11, MAX_CORE)
#: what an order takes in the sidecar beside its energies and folds.
_ORDER_BYTES: Final = 8
#: rows and columns within so many classes of the mean are told apart.
_REACH: Final = 16
#: so many magnitudes of at most 128 add up within 16 bits.
_SHORT_SUM: Final = 512


def kernel_size(shape: tuple[int, ...]) -> int:
    """Columns of the matrix that belong to one input channel.

    Examples
    --------
    >>> kernel_size((64, 32, 3, 3)), kernel_size((10, 64))
    (9, 1)
    """
    return prod(shape[2:])


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """Sums of the magnitudes of the levels of an R x C matrix.

    Attributes
    ----------
    rows : ndarray of int64, shape (R,)
    columns : ndarray of int64, shape (C,)
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]

    @classmethod
    def of(cls, levels: Levels) -> Magnitudes:
        """Sums of a matrix, or of a block of its rows."""
        magnitude = _magnitude(levels)
        rows = magnitude.sum(axis=1, dtype=np.int64)
        return cls(rows, magnitude.sum(axis=0, dtype=np.int64))


def choose_layout(levels: Levels, kernel: int) -> Layout:
    """Layout of an R x C matrix of levels.

    Parameters
    ----------
    levels : ndarray of int8 or int16, shape (R, C)
    kernel : int
        Columns that share one energy; divides C.
    """
    return layout_for(Magnitudes.of(levels), kernel, [(0, levels)])


def layout_for(magnitudes: Magnitudes, kernel: int, blocks: Iterable[tuple[int, Levels]]) -> Layout:
    """Layout of a matrix that is seen block by block.

    Parameters
    ----------
    magnitudes : Magnitudes
        Of the whole matrix.
    kernel : int
        Columns that share one energy; divides C.
    blocks : iterable of (int, ndarray of int8)
        First row and levels of blocks of rows; looked at only if an order may be worth it.
    """
    size, columns = magnitudes.rows.size * magnitudes.columns.size, magnitudes.columns.size
    per_row = magnitudes.rows / np.float64(columns)
    mean = float(per_row.mean())
    if mean <= 0:
        return Layout()
    per_column = magnitudes.columns / np.float64(magnitudes.rows.size)
    per_column = per_column.reshape(columns // kernel, kernel).mean(axis=1)
    flat = Layout(None, (fold_for(mean),))
    order = EnergyOrder(_energies(per_row, mean), _energies(per_column, mean))
    if order.classes == 1:
        return flat
    classes = _class_means(blocks, order, columns)
    saved = size * _level_bits(mean) - sum(n * _level_bits(m) for _, n, m in classes)
    if saved <= _side_bits(order):
        return flat
    folds = [Fold()] * order.classes
    for energy, _, mean_magnitude in classes:
        folds[energy] = fold_for(mean_magnitude)
    return Layout(order, tuple(folds))


def _level_bits(mean: float) -> float:
    """Entropy of a level whose magnitude is geometric with this mean, and whose sign is random."""
    if mean <= 0:
        return 0.0
    return (1 + mean) * log2(1 + mean) - mean * log2(mean) + mean / (1 + mean)


def _side_bits(order: EnergyOrder) -> float:
    """About what the energies and the folds of an order take in the sidecar."""
    bits = 8.0 * _ORDER_BYTES + 4.0 * order.classes
    for energies in (order.rows, order.columns):
        counts = np.bincount(energies)
        counts = counts[counts > 0]
        bits -= 1.05 * float((counts * np.log2(counts / energies.size)).sum())
    return bits


def _class_means(
    blocks: Iterable[tuple[int, Levels]], order: EnergyOrder, columns: int
) -> list[tuple[int, int, float]]:
    """Class, number of levels and mean magnitude of each class that is not empty; falling."""
    sums = np.zeros((int(order.rows.max()) + 1, columns), np.int64)
    for begin, levels in blocks:
        energies = order.rows[begin : begin + len(levels)]
        for energy in np.flatnonzero(np.bincount(energies)).tolist():
            rows = _magnitude(levels[energies == energy])
            sums[energy] += _column_sums(rows)
    repeat = columns // order.columns.size
    by_energy = np.repeat(order.columns, repeat)
    row_counts = np.bincount(order.rows)
    found: dict[int, tuple[int, int]] = {}
    for energy, width in enumerate(np.bincount(by_energy).tolist()):
        if not width:
            continue
        totals = sums[:, by_energy == energy].sum(axis=1).tolist()
        for row_energy, height in enumerate(row_counts.tolist()):
            if height:
                count, total = found.get(row_energy + energy, (0, 0))
                found[row_energy + energy] = count + height * width, total + totals[row_energy]
    falling = sorted(found.items(), reverse=True)
    return [(energy, count, total / count) for energy, (count, total) in falling]


def _magnitude(levels: Levels) -> npt.NDArray[Any]:
    """Magnitudes, that of the least level too, in as many bytes."""
    unsigned = np.uint8 if levels.dtype == np.int8 else np.uint16
    return np.abs(levels).view(unsigned)


def _column_sums(magnitude: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Sum of each column; few sums of many wide numbers, many of small ones, which are fast."""
    if magnitude.dtype != np.uint8:
        wide: npt.NDArray[np.int64] = magnitude.sum(axis=0, dtype=np.int64)
        return wide
    total = np.zeros(magnitude.shape[1], np.int64)
    for begin in range(0, len(magnitude), _SHORT_SUM):
        total += magnitude[begin : begin + _SHORT_SUM].sum(axis=0, dtype=np.uint16)
    return total


def _energies(means: npt.NDArray[np.float64], mean: float) -> Energies:
    octaves = np.log2(np.maximum(means, mean * 1e-9) / mean) / _CLASS_OCTAVES
    energies = np.clip(np.rint(octaves), -_REACH, _REACH).astype(np.int16)
    energies -= energies.min()
    return np.minimum(energies, MAX_ENERGY).astype(np.uint8)


def fold_for(mean_magnitude: float) -> Fold:
    """Fold for levels of this mean magnitude, taken as Gaussian.

    The wider the core, the smaller the file, and the less of it is video: digits cost what they
    are worth, HEVC's codes a little more (tools/results/layout.md).
    """
    sigma = mean_magnitude * sqrt(pi / 2)
    core = int(_CORE_SIGMAS * sigma + 0.5)
    if core < 1:
        return Fold()
    width = 1 if sigma < _WIDER_FROM[0] else 2 if sigma < _WIDER_FROM[1] else 3
    return Fold(min(_RADII, key=lambda radius: (abs(radius - core), radius)), width)
