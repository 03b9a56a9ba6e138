"""A tensor as an archive would give it back, without an archive."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.packing.quantizer import (
    BATCH_WEIGHTS,
    Request,
    Rows,
    Wish,
    block_rows,
    calibrated_rows,
    code_rows,
    fit,
    fit_calibrated,
)


def restored(request: Request) -> npt.NDArray[np.generic]:
    """Quantize a tensor and dequantize it, in this thread alone.

    Parameters
    ----------
    request : Request

    Returns
    -------
    ndarray
        Stored elements, in the shape of the tensor.

    Raises
    ------
    QuantizationError
        It cannot be quantized.
    """
    parts = [array for rows in _rows(request) for array in rows.restored.stored]
    return np.concatenate(parts).reshape(request.spec.shape)


def _rows(request: Request) -> list[Rows]:
    shape = tile.matrix_shape(request.spec.shape)
    large = shape[0] * shape[1] > BATCH_WEIGHTS
    if request.moments is not None:
        quantizer = fit_calibrated(request)
        step = block_rows(shape, request.params) if large and quantizer.divisible else shape[0]
        return [calibrated_rows(request, quantizer, span, True) for span in _spans(shape[0], step)]
    wish = fit(request) if large else Wish(request.params, request.kernel)
    step = block_rows(shape, wish.params) if large else shape[0]
    return [code_rows(request, wish, span, True) for span in _spans(shape[0], step)]


def _spans(rows: int, step: int) -> list[tuple[int, int]]:
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]
