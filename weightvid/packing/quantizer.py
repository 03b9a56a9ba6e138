"""Quantizing many tensors on all cores: small ones in company, large ones in blocks of rows.

Whatever the company, the blocks and the number of workers, the levels are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from weightvid.container.records import Escapes
from weightvid.dtypes import to_float32
from weightvid.errors import QuantizationError
from weightvid.packing.plain import Choice, choose_coding
from weightvid.packing.quantized import (
    CodedTensor,
    finish_tensor,
    join_escapes,
    matrix_of,
    split_levels,
)
from weightvid.quantize import Params, TrellisParams, UniformParams, uniform
from weightvid.quantize.rate import RateModel
from weightvid.quantize.trellis_search import TrellisConfig, TrellisJob, quantize_many
from weightvid.spec import TensorSpec

_T = TypeVar("_T")
Array = npt.NDArray[np.generic]
Matrix = npt.NDArray[np.float32]

#: tensors are quantized together up to this many weights; larger ones in blocks of about as many.
BATCH_WEIGHTS: Final = 1 << 20
#: weights that the choice of numbering and the rate model of a large tensor are fitted to.
_SAMPLE_WEIGHTS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """A tensor to be quantized.

    Attributes
    ----------
    number : int
        Id.
    spec : TensorSpec
    params : Params
        The quantizer; the numbering of a trellis is still free.
    read : callable
        Gives the stored elements.
    """

    number: int
    spec: TensorSpec
    params: Params
    read: Callable[[], Array]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Levels of some rows of a tensor."""

    params: Params
    levels: npt.NDArray[np.int8]
    escapes: Escapes


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A quantizer with nothing left free."""

    params: Params
    model: RateModel | None = None


def _quantize(blocks: list[tuple[Matrix, _Fitted | Params]]) -> list[_Piece]:
    """Levels of matrices, each by a fitted quantizer or by one that is fitted to it."""
    pieces: list[_Piece | None] = [None] * len(blocks)
    trellis: dict[TrellisConfig, list[tuple[int, TrellisJob]]] = {}
    for place, (weights, wish) in enumerate(blocks):
        fitted = wish if isinstance(wish, _Fitted) else None
        params = wish.params if isinstance(wish, _Fitted) else wish
        if isinstance(params, UniformParams):
            pieces[place] = _Piece(params, *split_levels(uniform.quantize(weights, params.step)))
            continue
        zero, model = (params.zero, fitted.model) if fitted else (None, None)
        job = TrellisJob(weights, params.step / 4, zero, model)
        config = TrellisConfig(params.states, axis=params.axis)
        trellis.setdefault(config, []).append((place, job))
    for config, jobs in trellis.items():
        found = quantize_many([job for _, job in jobs], config)
        for (place, job), result in zip(jobs, found, strict=True):
            params = TrellisParams(4 * job.step, config.states, config.axis, result.zero)
            pieces[place] = _Piece(params, *split_levels(result.levels))
    return [piece for piece in pieces if piece is not None]


def _fit(matrix: Array, spec: TensorSpec, params: Params) -> _Fitted:
    """Fit what is free to evenly spaced rows of a tensor."""
    if isinstance(params, UniformParams):
        return _Fitted(params)
    rows, columns = matrix.shape
    stride = max(1, rows * columns // _SAMPLE_WEIGHTS)
    sample = to_float32(np.ascontiguousarray(matrix[::stride]), spec.dtype)
    (piece,) = _quantize([(sample, params)])
    return _Fitted(piece.params, RateModel.from_levels(piece.levels))


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor that has been quantized: its id, the result, and how it is best stored."""

    number: int
    tensor: CodedTensor
    choice: Choice


def _finish(request: Request, array: Array, piece: _Piece) -> Coded:
    tensor = finish_tensor(array, request.spec, piece.params, piece.levels, piece.escapes)
    return Coded(request.number, tensor, choose_coding(tensor, array))


def _code_batch(batch: list[tuple[Request, Array]]) -> list[Coded]:
    """Code small tensors together."""
    blocks: list[tuple[Matrix, _Fitted | Params]] = []
    for request, array in batch:
        matrix = to_float32(matrix_of(array, request.spec), request.spec.dtype)
        blocks.append((matrix, request.params))
    return [
        _finish(request, array, piece)
        for (request, array), piece in zip(batch, _quantize(blocks), strict=True)
    ]


def _code_rows(rows: Array, dtype: str, fitted: _Fitted) -> _Piece:
    (piece,) = _quantize([(to_float32(rows, dtype), fitted)])
    return piece


def _join(request: Request, array: Array, pieces: list[_Piece]) -> Coded:
    levels = np.concatenate([piece.levels for piece in pieces])
    sizes = [piece.levels.size for piece in pieces]
    escapes = join_escapes([piece.escapes for piece in pieces], sizes)
    whole = _Piece(pieces[0].params, levels, escapes)
    pieces.clear()
    return _finish(request, array, whole)


@dataclass(slots=True)
class _Running:
    """Work that has been handed out, in order."""

    weights: int
    result: Callable[[], list[Coded]]


def code_tensors(requests: Iterable[Request], executor: Executor, workers: int) -> Iterator[Coded]:
    """Quantize tensors, in order; at most a few batches more than there are workers are held.

    Parameters
    ----------
    requests : iterable of Request
    executor : Executor
        Of threads.
    workers : int
        Its number of threads.

    Yields
    ------
    Coded

    Raises
    ------
    QuantizationError
        A tensor cannot be quantized; it is named.
    """
    running: deque[_Running] = deque()
    limit = (workers + 1) * BATCH_WEIGHTS
    for batch in _batches(requests):
        weights = sum(request.spec.size for request in batch)
        while running and sum(work.weights for work in running) + weights > limit:
            yield from running.popleft().result()
        running.append(_Running(weights, _start(batch, executor)))
    while running:
        yield from running.popleft().result()


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    batch: list[Request] = []
    weights = 0
    for request in requests:
        if batch and weights + request.spec.size > BATCH_WEIGHTS:
            yield batch
            batch, weights = [], 0
        batch.append(request)
        weights += request.spec.size
    if batch:
        yield batch


def _start(batch: list[Request], executor: Executor) -> Callable[[], list[Coded]]:
    arrays = [request.read() for request in batch]
    if len(batch) > 1 or batch[0].spec.size <= BATCH_WEIGHTS:
        pairs = list(zip(batch, arrays, strict=True))
        future = executor.submit(_code_batch, pairs)
        return lambda: _named(future, batch)
    (request,), (array,) = batch, arrays
    matrix = matrix_of(array, request.spec)
    fitted = _fit(matrix, request.spec, request.params)
    if isinstance(fitted.params, TrellisParams) and fitted.params.axis == 0:
        step = len(matrix)
    else:
        step = max(1, BATCH_WEIGHTS // matrix.shape[1])
    rows = [matrix[begin : begin + step] for begin in range(0, len(matrix), step)]
    futures = [executor.submit(_code_rows, r, request.spec.dtype, fitted) for r in rows]

    def result() -> list[Coded]:
        pieces = [_named(piece, batch) for piece in futures]
        futures.clear()
        return [_join(request, array, pieces)]

    return result


def _named(future: Future[_T], batch: list[Request]) -> _T:
    try:
        return future.result()
    except QuantizationError as error:
        names = ", ".join(repr(request.spec.name) for request in batch[:3])
        more = f" or {len(batch) - 3} more" if len(batch) > 3 else ""
        raise QuantizationError(f"tensor {names}{more}: {error}") from None
