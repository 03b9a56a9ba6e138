"""Tensors to levels, with everything their sidecars will say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.container.records import TENSOR_HASH_BYTES, Escapes
from weightvid.dtypes import from_float32, to_float32
from weightvid.packing.layout import choose_layout, kernel_size
from weightvid.quantize import Params, dequantize
from weightvid.spec import TensorSpec
from weightvid.tile import Layout

Levels = npt.NDArray[Any]

#: largest magnitude of a level that an 8-bit sample can carry; sample 0 is never used.
SAMPLE_LEVEL: Final = 127
_BLOCK: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A quantized tensor, but for its levels: those lie beside it, clipped to the sample range.

    Attributes
    ----------
    spec : TensorSpec
    params : Params
    escapes : Escapes
        The levels that were clipped.
    layout : Layout
        How the levels will lie on the ribbon.
    sha256 : bytes
        First 16 bytes of the SHA-256 of the dequantized stored elements.
    noise, power : float
        Sums of squares of the error and of the weights.
    """

    spec: TensorSpec
    params: Params
    escapes: Escapes
    layout: Layout
    sha256: bytes
    noise: float
    power: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix of levels."""
        return tile.matrix_shape(self.spec.shape)

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio; None without noise."""
        return sqnr_db(self.power, self.noise)


def sqnr_db(power: float, noise: float) -> float | None:
    """10 log10(power / noise); None without noise.

    Examples
    --------
    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    if not (noise > 0 and power > 0):
        return None
    return 10 * log10(power / noise)


def split_levels(levels: npt.NDArray[np.int32], most: int = SAMPLE_LEVEL) -> tuple[Levels, Escapes]:
    """Clip true levels of a matrix to the sample range, and list those that were clipped.

    Parameters
    ----------
    levels : ndarray of int32
    most : int
        Largest magnitude of a sample's level.

    Returns
    -------
    ndarray of int8, or of int16 where ``most`` is above 127; Escapes
    """
    outside = np.flatnonzero((levels > most) | (levels < -most))
    escapes = Escapes(outside.astype(np.int64), levels.reshape(-1)[outside])
    clipped = np.clip(levels, -most, most) if len(outside) else levels
    return clipped.astype(np.int8 if most <= SAMPLE_LEVEL else np.int16), escapes


def join_escapes(parts: Sequence[Escapes], sizes: Sequence[int]) -> Escapes:
    """Escapes of consecutive blocks of these numbers of weights, counted from the first."""
    starts = np.concatenate(([0], np.cumsum(sizes)))
    index = [part.index + start for part, start in zip(parts, starts, strict=False)]
    return Escapes(np.concatenate(index), np.concatenate([part.level for part in parts]))


@dataclass(frozen=True, slots=True)
class Restored:
    """What a reader will make of some levels, and how far it is from the weights.

    Attributes
    ----------
    stored : tuple of ndarray
        Dequantized elements in the tensor's own dtype, block after block; none if it comes from
        another process: to make them anew takes less than to send them.
    noise, power : float
        Sums of squares of the error and of the weights.
    """

    stored: tuple[npt.NDArray[np.generic], ...]
    noise: float
    power: float

    def __reduce__(self) -> tuple[type[Restored], tuple[object, ...]]:
        """What a pipe carries."""
        return Restored, ((), self.noise, self.power)


def restore(
    matrix: npt.NDArray[np.generic],
    dtype: str,
    params: Params,
    levels: Levels,
    escapes: Escapes,
) -> Restored:
    """Dequantize as a reader will, and measure; in blocks of rows, unless runs are columns."""
    rows, columns = levels.shape
    noise = power = 0.0
    found = []
    step = rows if getattr(params, "axis", 1) == 0 else max(1, _BLOCK // columns)
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        exact = escapes.placed_in(levels[begin:end], begin * columns)
        stored = from_float32(dequantize(exact, params), dtype)
        found.append(stored)
        weights = to_float32(matrix[begin:end], dtype)
        error = weights - to_float32(stored, dtype)
        power += float(np.square(weights).sum(dtype=np.float64))
        noise += float(np.square(error).sum(dtype=np.float64))
    return Restored(tuple(found), noise, power)


def finish_tensor(
    array: npt.NDArray[np.generic],
    spec: TensorSpec,
    params: Params,
    levels: npt.NDArray[np.int8],
    escapes: Escapes,
) -> CodedTensor:
    """Dequantize as a reader will, hash, measure, and choose the layout.

    Parameters
    ----------
    array : ndarray
        Stored elements of the tensor.
    spec : TensorSpec
    params : Params
    levels : ndarray of int8, shape (R, C)
    escapes : Escapes
    """
    restored = restore(array.reshape(levels.shape), spec.dtype, params, levels, escapes)
    digest = hashlib.sha256()
    for block in restored.stored:
        digest.update(np.ascontiguousarray(block).data)
    layout = choose_layout(levels, kernel_size(spec.shape))
    sha256 = digest.digest()[:TENSOR_HASH_BYTES]
    return CodedTensor(spec, params, escapes, layout, sha256, restored.noise, restored.power)


def matrix_of(array: npt.NDArray[np.generic], spec: TensorSpec) -> npt.NDArray[np.generic]:
    """The 2-D view of a tensor's stored elements."""
    return array.reshape(tile.matrix_shape(spec.shape))
