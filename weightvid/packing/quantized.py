"""One tensor: weights to samples, with everything its sidecar will say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import log10
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.container.records import Escapes
from weightvid.dtypes import from_float32, to_float32
from weightvid.errors import QuantizationError
from weightvid.packing.layout import choose_layout, kernel_size
from weightvid.quantize import Params, TrellisParams, dequantize, uniform
from weightvid.spec import TensorSpec
from weightvid.tile import Layout

#: largest magnitude of a level that a sample can carry; sample 0 is never used.
SAMPLE_LEVEL: Final = 127
_BLOCK: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A quantized tensor, ready for the ribbon.

    Attributes
    ----------
    spec : TensorSpec
    params : Params
    levels : ndarray of int8, shape (R, C)
        Levels, those beyond the sample range clipped to it.
    escapes : Escapes
        The levels that were clipped.
    layout : Layout
        How the levels will lie on the ribbon.
    sha256 : bytes
        Of the dequantized stored elements.
    noise, power : float
        Sums of squares of the error and of the weights.
    """

    spec: TensorSpec
    params: Params
    levels: npt.NDArray[np.int8]
    escapes: Escapes
    layout: Layout
    sha256: bytes
    noise: float
    power: float

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


def code_tensor(array: npt.NDArray[np.generic], spec: TensorSpec, params: Params) -> CodedTensor:
    """Quantize one tensor, in blocks of rows.

    Parameters
    ----------
    array : ndarray
        Stored elements of ``spec``.
    spec : TensorSpec
    params : Params

    Raises
    ------
    QuantizationError
        A weight is not finite, or the step is so fine that levels overflow.
    """
    if isinstance(params, TrellisParams):
        raise QuantizationError("trellis-coded packing is not part of this recipe")
    matrix = array.reshape(tile.matrix_shape(spec.shape))
    rows, columns = matrix.shape
    levels = np.empty((rows, columns), np.int8)
    digest = hashlib.sha256()
    found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]] = []
    noise = power = 0.0
    step = max(1, _BLOCK // columns)
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        weights = to_float32(matrix[begin:end], spec.dtype)
        exact = uniform.quantize(weights, params.step)
        np.clip(exact, -SAMPLE_LEVEL, SAMPLE_LEVEL, out=levels[begin:end], casting="unsafe")
        outside = np.flatnonzero(np.abs(exact) > SAMPLE_LEVEL)
        if len(outside):
            found.append((outside + begin * columns, exact.reshape(-1)[outside]))
        stored = from_float32(dequantize(exact, params), spec.dtype)
        digest.update(np.ascontiguousarray(stored).data)
        error = to_float32(stored, spec.dtype).astype(np.float64) - weights
        noise += float(np.vdot(error, error))
        power += float(np.vdot(weights, weights.astype(np.float64)))
    index = np.concatenate([i for i, _ in found]) if found else np.empty(0, np.int64)
    level = np.concatenate([v for _, v in found]) if found else np.empty(0, np.int32)
    escapes = Escapes(index.astype(np.int64), level.astype(np.int32))
    layout = choose_layout(levels, kernel_size(spec.shape))
    return CodedTensor(spec, params, levels, escapes, layout, digest.digest(), noise, power)
