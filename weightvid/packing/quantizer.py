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

from weightvid.calibration import TensorMoments
from weightvid.container.records import Escapes
from weightvid.dtypes import to_float32
from weightvid.errors import QuantizationError
from weightvid.packing.calibrated import Calibrated, calibrate_quantizer
from weightvid.packing.plain import Choice, choose_coding
from weightvid.packing.quantized import (
    CodedTensor,
    finish_tensor,
    join_escapes,
    matrix_of,
    split_levels,
)
from weightvid.quantize import Params, TrellisParams, UniformParams, shaped, uniform
from weightvid.quantize.rate import RateModel
from weightvid.quantize.trellis_search import TrellisConfig, TrellisJob, quantize_many
from weightvid.spec import TensorSpec

_T = TypeVar("_T")
Array = npt.NDArray[np.generic]
Matrix = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int32]

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
    shaped : bool
        Round with noise shaping, if the quantizer is uniform and the tensor a convolution.
    moments : TensorMoments or None
        Calibration statistics; quantize with error feedback.
    """

    number: int
    spec: TensorSpec
    params: Params
    read: Callable[[], Array]
    shaped: bool = False
    moments: TensorMoments | None = None

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel positions to be shaped over; empty for no shaping."""
        return self.spec.shape[2:] if self.shaped else ()


@dataclass(frozen=True, slots=True)
class _Wish:
    """A quantizer for some rows: what is free in it is fitted to them, unless a model is given."""

    params: Params
    kernel: tuple[int, ...] = ()
    model: RateModel | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Levels of some rows of a tensor."""

    params: Params
    levels: npt.NDArray[np.int8]
    escapes: Escapes


def _quantize(blocks: list[tuple[Matrix, _Wish]]) -> list[_Piece]:
    """Levels of matrices; those of trellises are searched together, and shaped ones of a width."""
    pieces: list[_Piece | None] = [None] * len(blocks)
    trellis: dict[TrellisConfig, list[tuple[int, TrellisJob]]] = {}
    convolutions: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for place, (weights, wish) in enumerate(blocks):
        params = wish.params
        if isinstance(params, UniformParams):
            if wish.kernel:
                convolutions.setdefault((weights.shape[1], wish.kernel), []).append(place)
            else:
                levels = uniform.quantize(weights, params.step)
                pieces[place] = _Piece(params, *split_levels(levels))
            continue
        zero = None if wish.model is None else params.zero
        job = TrellisJob(weights, params.step / 4, zero, wish.model)
        config = TrellisConfig(params.states, axis=params.axis)
        trellis.setdefault(config, []).append((place, job))
    for (_, kernel), places in convolutions.items():
        wanted = [blocks[place][1].params for place in places]
        matrices = [blocks[place][0] for place in places]
        shapes = _shape(matrices, [p.step for p in wanted], kernel)
        for place, quantizer, levels in zip(places, wanted, shapes, strict=True):
            pieces[place] = _Piece(quantizer, *split_levels(levels))
    for config, jobs in trellis.items():
        found = quantize_many([job for _, job in jobs], config)
        for (place, job), result in zip(jobs, found, strict=True):
            chosen = TrellisParams(4 * job.step, config.states, config.axis, result.zero)
            pieces[place] = _Piece(chosen, *split_levels(result.levels))
    return [piece for piece in pieces if piece is not None]


def _shape(matrices: list[Matrix], steps: list[float], kernel: tuple[int, ...]) -> list[Levels]:
    """Levels of convolutions of one width, all rows together."""
    scaled = [m / np.float32(step) for m, step in zip(matrices, steps, strict=True)]
    levels = shaped.quantize(np.concatenate(scaled), 1.0, kernel)
    return np.split(levels, np.cumsum([len(m) for m in matrices])[:-1])


def _fit(matrix: Array, request: Request) -> _Wish:
    """Fit what is free to evenly spaced rows of a tensor."""
    if isinstance(request.params, UniformParams):
        return _Wish(request.params, request.kernel)
    stride = max(1, matrix.size // _SAMPLE_WEIGHTS)
    sample = to_float32(np.ascontiguousarray(matrix[::stride]), request.spec.dtype)
    (piece,) = _quantize([(sample, _Wish(request.params))])
    return _Wish(piece.params, (), RateModel.from_levels(piece.levels))


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
    blocks: list[tuple[Matrix, _Wish]] = []
    for request, array in batch:
        matrix = to_float32(matrix_of(array, request.spec), request.spec.dtype)
        blocks.append((matrix, _Wish(request.params, request.kernel)))
    return [
        _finish(request, array, piece)
        for (request, array), piece in zip(batch, _quantize(blocks), strict=True)
    ]


def _code_rows(rows: Array, dtype: str, wish: _Wish) -> _Piece:
    (piece,) = _quantize([(to_float32(rows, dtype), wish)])
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
        alone = request.moments is not None or (bool(batch) and batch[0].moments is not None)
        if batch and (alone or weights + request.spec.size > BATCH_WEIGHTS):
            yield batch
            batch, weights = [], 0
        batch.append(request)
        weights += request.spec.size
    if batch:
        yield batch


def _start(batch: list[Request], executor: Executor) -> Callable[[], list[Coded]]:
    arrays = [request.read() for request in batch]
    if batch[0].moments is not None:
        return _start_calibrated(batch[0], batch[0].moments, arrays[0], executor)
    if len(batch) > 1 or batch[0].spec.size <= BATCH_WEIGHTS:
        pairs = list(zip(batch, arrays, strict=True))
        future = executor.submit(_code_batch, pairs)
        return lambda: _named(future, batch)
    (request,), (array,) = batch, arrays
    matrix = matrix_of(array, request.spec)
    wish = _fit(matrix, request)
    if isinstance(wish.params, TrellisParams) and wish.params.axis == 0:
        step = len(matrix)
    else:
        step = max(1, BATCH_WEIGHTS // matrix.shape[1])
    rows = [matrix[begin : begin + step] for begin in range(0, len(matrix), step)]
    futures = [executor.submit(_code_rows, r, request.spec.dtype, wish) for r in rows]

    def result() -> list[Coded]:
        pieces = [_named(piece, batch) for piece in futures]
        futures.clear()
        return [_join(request, array, pieces)]

    return result


def _start_calibrated(
    request: Request, moments: TensorMoments, array: Array, executor: Executor
) -> Callable[[], list[Coded]]:
    """Quantize with error feedback; large tensors in blocks of rows."""
    matrix = matrix_of(array, request.spec)
    if matrix.size <= BATCH_WEIGHTS:
        future = executor.submit(_code_calibrated, request, moments, array)
        return lambda: _named(future, [request])
    fitting = executor.submit(
        lambda: calibrate_quantizer(to_float32(matrix, request.spec.dtype), request.params, moments)
    )
    quantizer = _named(fitting, [request])
    step = max(1, BATCH_WEIGHTS // matrix.shape[1]) if quantizer.divisible else len(matrix)
    rows = [matrix[begin : begin + step] for begin in range(0, len(matrix), step)]
    dtype = request.spec.dtype
    futures = [executor.submit(_calibrated_rows, r, dtype, quantizer) for r in rows]

    def result() -> list[Coded]:
        pieces = [_named(piece, [request]) for piece in futures]
        futures.clear()
        return [_join(request, array, pieces)]

    return result


def _code_calibrated(request: Request, moments: TensorMoments, array: Array) -> list[Coded]:
    matrix = to_float32(matrix_of(array, request.spec), request.spec.dtype)
    quantizer = calibrate_quantizer(matrix, request.params, moments)
    piece = _Piece(quantizer.params, *split_levels(quantizer.levels(matrix)))
    return [_finish(request, array, piece)]


def _calibrated_rows(rows: Array, dtype: str, quantizer: Calibrated) -> _Piece:
    levels = quantizer.levels(to_float32(rows, dtype))
    return _Piece(quantizer.params, *split_levels(levels))


def _named(future: Future[_T], batch: list[Request]) -> _T:
    try:
        return future.result()
    except QuantizationError as error:
        names = ", ".join(repr(request.spec.name) for request in batch[:3])
        more = f" or {len(batch) - 3} more" if len(batch) > 3 else ""
        raise QuantizationError(f"tensor {names}{more}: {error}") from None
