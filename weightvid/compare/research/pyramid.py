"""Pyramids of matrices of levels: coarse first, then what is missing, without loss."""

from collections.abc import Sequence
from math import prod
from typing import Final, NamedTuple

import numpy as np

from weightvid.compare.research import scalar
from weightvid.compare.research.scalar import Floats64, Integers, Matrix, decode, encode
from weightvid.levels.transform import View

_LEVELS: Final = 3
_TAPS: Final = {3: np.array([1, 2, 1]), 5: np.array([1, 4, 6, 4, 1])}


class Pyramid(NamedTuple):
    """A pyramid of each matrix of levels: coarse first, then what is missing, without loss.

    ``taps`` 3, 5: Burt and Adelson's Laplacian pyramid with such a kernel. 0: every second sample
    is kept, and predicts those between (no sample is coded twice).
    """

    taps: int

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View]) -> bytes:
        """Bytes of matrices."""
        bands: list[Integers] = []
        for levels in scalar.rounded(matrices):
            bands += self._bands(levels.reshape(len(levels), -1))
        contexts = np.repeat(np.arange(len(bands)), [band.size for band in bands])
        return encode(scalar.flattened(bands), contexts)

    def decode(self, data: bytes, views: Sequence[View]) -> list[Matrix]:
        """Matrices of bytes."""
        # Bands of zeros have the shapes of those that were coded.
        empty = [self._bands(np.zeros((v.rows, v.columns), np.int64)) for v in views]
        shapes = [band.shape for bands in empty for band in bands]
        contexts = np.repeat(np.arange(len(shapes)), [prod(shape) for shape in shapes])
        bands = iter(scalar.in_shapes(decode(data, contexts)[0], shapes))
        found = []
        for view, own in zip(views, empty, strict=True):
            whole = self._whole([next(bands) for _ in own], (view.rows, view.columns))
            found.append(whole.reshape(scalar.shape_of(view)))
        return found

    def _bands(self, matrix: Integers) -> list[Integers]:
        found: list[Integers] = []
        for _ in range(_LEVELS):
            if self.taps:
                coarse = _reduced(matrix, _TAPS[self.taps])
                found.append(matrix - _expanded(coarse, matrix.shape, _TAPS[self.taps]))
                matrix = coarse
                continue
            for _ in ("rows", "columns"):
                even, odd = matrix[::2], matrix[1::2]
                found.append(odd - _between(even, len(odd)))
                matrix = even.T
        return [*found, matrix]

    def _whole(self, bands: list[Integers], shape: tuple[int, int]) -> Integers:
        *rest, matrix = bands
        for band in reversed(rest):
            if self.taps:
                matrix = band + _expanded(matrix, band.shape, _TAPS[self.taps])
                continue
            even = matrix.T
            odd = band + _between(even, len(band))
            matrix = np.empty((len(even) + len(odd), even.shape[1]), np.int64)
            matrix[::2], matrix[1::2] = even, odd
        return matrix.reshape(shape)


def _filtered(matrix: Integers, taps: Integers) -> Integers:
    """Sums along both axes, edges repeated."""
    for _ in range(2):
        padded = np.pad(matrix, ((len(taps) // 2,) * 2, (0, 0)), "edge")
        rows = [tap * padded[i : i + len(matrix)] for i, tap in enumerate(taps)]
        matrix = np.sum(rows, axis=0).T
    return matrix


def _reduced(matrix: Integers, taps: Integers) -> Integers:
    weight = int(taps.sum()) ** 2
    return (_filtered(matrix, taps)[::2, ::2] + weight // 2) // weight


def _expanded(coarse: Integers, shape: tuple[int, ...], taps: Integers) -> Integers:
    spread = np.zeros((2 * coarse.shape[0], 2 * coarse.shape[1]), np.int64)
    spread[::2, ::2] = coarse
    weight = int(taps.sum()) ** 2 // 4
    return ((_filtered(spread, taps) + weight // 2) // weight)[: shape[0], : shape[1]]


def _between(even: Integers, count: int) -> Integers:
    """Rows between those kept: the mean of both neighbours."""
    below = np.concatenate([even[1:], even[-1:]])[:count]
    return np.asarray((even[:count] + below) >> 1)
