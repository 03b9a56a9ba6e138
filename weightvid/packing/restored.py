"""Tensors as an archive would give them back, without an archive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.packing.quantized import join_escapes
from weightvid.packing.quantizer import (
    BATCH_WEIGHTS,
    Fixed,
    Piece,
    Request,
    Rows,
    Wish,
    block_rows,
    calibrated_rows,
    code_rows,
    fit,
    fit_calibrated,
)

_T = TypeVar("_T")
#: runs a function on each of some things, in order.
Run = Callable[[Callable[[Any], _T], Iterable[Any]], Iterable[_T]]


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
    return _stored(request, [block() for block in _blocks(request)])


def quantized(
    requests: Sequence[Request], run: Run[Any] = map
) -> Iterator[tuple[Fixed, npt.NDArray[np.generic]]]:
    """Levels of tensors, and their stored elements as they come back.

    Parameters
    ----------
    requests : sequence of Request
    run : callable
        ``map``, or that of an executor, whose workers then share the blocks of all tensors.

    Raises
    ------
    QuantizationError
        One cannot be quantized; it is named.
    """
    blocks = list(run(_blocks, requests))
    rows = iter(run(_call, [block for some in blocks for block in some]))
    for request, some in zip(requests, blocks, strict=True):
        parts = [next(rows) for _ in some]
        yield _joined(parts), _stored(request, parts)


def _call(block: Callable[[], Rows]) -> Rows:
    return block()


def _joined(parts: Sequence[Rows]) -> Fixed:
    escapes = join_escapes([part.escapes for part in parts], [p.levels.size for p in parts])
    levels = np.concatenate([part.levels for part in parts])
    shifts = [part.shift for part in parts if part.shift is not None]
    shift = np.concatenate(shifts) if len(shifts) == len(parts) else None
    return Fixed(Piece(parts[0].params, levels, escapes), shift)


def _stored(request: Request, parts: Sequence[Rows]) -> npt.NDArray[np.generic]:
    arrays = [array for rows in parts for array in rows.restored.stored]
    return np.concatenate(arrays).reshape(request.spec.shape)


def _blocks(request: Request) -> list[Callable[[], Rows]]:
    shape = tile.matrix_shape(request.spec.shape)
    large = shape[0] * shape[1] > BATCH_WEIGHTS
    if request.moments is not None:
        quantizer = fit_calibrated(request)
        step = block_rows(shape, request.params) if large and quantizer.divisible else shape[0]
        return [
            partial(calibrated_rows, request, quantizer, span) for span in _spans(shape[0], step)
        ]
    wish = fit(request) if large else Wish(request.params, request.kernel)
    step = block_rows(shape, wish.params) if large else shape[0]
    return [partial(code_rows, request, wish, span) for span in _spans(shape[0], step)]


def _spans(rows: int, step: int) -> list[tuple[int, int]]:
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]
