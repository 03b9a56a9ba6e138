"""Quantizing: pure functions of tensors, or of blocks of rows, that any worker may run.

Small tensors are quantized in company, large ones in blocks of rows. Whatever the company, the
blocks and the workers, the levels are the same. Each function reads its weights itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.calibration import TensorMoments
from weightvid.container.records import Escapes
from weightvid.dtypes import to_float32
from weightvid.errors import QuantizationError
from weightvid.packing.calibrated import Calibrated, calibrate_quantizer, mean_shift
from weightvid.packing.layout import Magnitudes
from weightvid.packing.plain import Choice, LevelBytes, PlaneBytes, choose_coding, video_bytes
from weightvid.packing.quantized import (
    CodedTensor,
    Restored,
    finish_tensor,
    matrix_of,
    restore,
    split_levels,
)
from weightvid.packing.source import TensorRead
from weightvid.quantize import Params, TrellisParams, UniformParams, dequantize, shaped, uniform
from weightvid.quantize.rate import RateModel
from weightvid.quantize.trellis_search import TrellisConfig, TrellisJob, quantize_many
from weightvid.scratch import Scratch
from weightvid.spec import TensorSpec

Array = npt.NDArray[np.generic]
Matrix = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int32]

#: tensors are quantized together up to this many weights; larger ones in blocks of about as many.
BATCH_WEIGHTS: Final = 1 << 20
#: rows are searched side by side, and few of them take longer each: so wide matrices are cut into
#: blocks of more weights, up to a bound, as a block is what a worker holds.
_BLOCK_ROWS: Final = 512
_BLOCK_WEIGHTS: Final = 1 << 21
#: weights that the choice of numbering and the rate model of a large tensor are fitted to.
_SAMPLE_WEIGHTS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Levels of some rows of a tensor."""

    params: Params
    levels: npt.NDArray[np.int8]
    escapes: Escapes


@dataclass(frozen=True, slots=True)
class Fixed:
    """All levels of a tensor, and what the bias of its layer must gain for them."""

    piece: Piece
    shift: Matrix | None = None


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
    read : TensorRead
        Gives the stored elements.
    shaped : bool
        Round with noise shaping, if the quantizer is uniform and the tensor a convolution.
    moments : TensorMoments or None
        Calibration statistics; quantize with error feedback.
    fixed : Fixed or None
        The levels are known already.
    """

    number: int
    spec: TensorSpec
    params: Params
    read: TensorRead
    shaped: bool = False
    moments: TensorMoments | None = None
    fixed: Fixed | None = None

    @property
    def alone(self) -> bool:
        """Whether it is no company for other tensors."""
        return self.moments is not None or self.fixed is not None

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel positions to be shaped over; empty for no shaping."""
        return self.spec.shape[2:] if self.shaped else ()


@dataclass(frozen=True, slots=True)
class Wish:
    """A quantizer for some rows: what is free in it is fitted to them, unless a model is given."""

    params: Params
    kernel: tuple[int, ...] = ()
    model: RateModel | None = None


def _quantize(blocks: list[tuple[Matrix, Wish]]) -> list[Piece]:
    """Levels of matrices; those of trellises are searched together, and shaped ones of a width."""
    pieces: list[Piece | None] = [None] * len(blocks)
    trellis: dict[TrellisConfig, list[tuple[int, TrellisJob]]] = {}
    convolutions: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for place, (weights, wish) in enumerate(blocks):
        params = wish.params
        if isinstance(params, UniformParams):
            if wish.kernel:
                convolutions.setdefault((weights.shape[1], wish.kernel), []).append(place)
            else:
                levels = uniform.quantize(weights, params.step)
                pieces[place] = Piece(params, *split_levels(levels))
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
            pieces[place] = Piece(quantizer, *split_levels(levels))
    for config, jobs in trellis.items():
        found = quantize_many([job for _, job in jobs], config)
        for (place, job), result in zip(jobs, found, strict=True):
            chosen = TrellisParams(4 * job.step, config.states, config.axis, result.zero)
            pieces[place] = Piece(chosen, *split_levels(result.levels))
    return [piece for piece in pieces if piece is not None]


def _shape(matrices: list[Matrix], steps: list[float], kernel: tuple[int, ...]) -> list[Levels]:
    """Levels of convolutions of one width, all rows together."""
    scaled = [m / np.float32(step) for m, step in zip(matrices, steps, strict=True)]
    levels = shaped.quantize(np.concatenate(scaled), 1.0, kernel)
    return np.split(levels, np.cumsum([len(m) for m in matrices])[:-1])


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor that has been quantized.

    Attributes
    ----------
    number : int
        Id.
    tensor : CodedTensor
    choice : Choice
        How it is best stored.
    levels : ndarray of int8, Scratch or None
        For video, in the order of the layout; for plain levels, row by row; else None.
    shift : ndarray of float32 or None
        What the layer's bias must gain; None if the tensor was quantized without statistics.
    """

    number: int
    tensor: CodedTensor
    choice: Choice
    levels: npt.NDArray[np.int8] | Scratch | None
    shift: Matrix | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a large tensor, quantized.

    Attributes
    ----------
    params : Params
    levels : ndarray of int8, shape (r, C)
        Clipped to the sample range.
    escapes : Escapes
        Those that were clipped, counted from the first row.
    magnitudes : Magnitudes
    restored : Restored
        Without the elements, if another process made them.
    shift : ndarray of float32 or None
        As in :class:`Coded`, of these rows.
    """

    params: Params
    levels: npt.NDArray[np.int8]
    escapes: Escapes
    magnitudes: Magnitudes
    restored: Restored
    shift: Matrix | None = None


def fit(request: Request) -> Wish:
    """Fit what is free to evenly spaced rows of a large tensor."""
    if isinstance(request.params, UniformParams):
        return Wish(request.params, request.kernel)
    rows, columns = tile.matrix_shape(request.spec.shape)
    stride = max(1, rows * columns // _SAMPLE_WEIGHTS)
    sample = np.concatenate([request.read.rows(i, i + 1) for i in range(0, rows, stride)])
    (piece,) = _quantize([(to_float32(sample, request.spec.dtype), Wish(request.params))])
    return Wish(piece.params, (), RateModel.from_levels(piece.levels))


def block_rows(shape: tuple[int, int], params: Params) -> int:
    """Rows of a large tensor that are quantized at a time."""
    if isinstance(params, TrellisParams) and params.axis == 0:
        return max(1, shape[0])
    rows = max(BATCH_WEIGHTS, min(_BLOCK_ROWS * shape[1], _BLOCK_WEIGHTS)) // shape[1]
    return max(1, rows)


def code_batch(requests: Sequence[Request]) -> list[Coded]:
    """Quantize small tensors together.

    Raises
    ------
    QuantizationError
        One of them cannot be quantized; they are named.
    """
    with naming(requests):
        arrays = [request.read() for request in requests]
        blocks: list[tuple[Matrix, Wish]] = []
        for request, array in zip(requests, arrays, strict=True):
            matrix = to_float32(matrix_of(array, request.spec), request.spec.dtype)
            blocks.append((matrix, Wish(request.params, request.kernel)))
        found = _quantize(blocks)
        del blocks
        return [
            _finish(request, array, piece)
            for request, array, piece in zip(requests, arrays, found, strict=True)
        ]


def code_rows(request: Request, wish: Wish, span: tuple[int, int]) -> Rows:
    """Quantize some rows of a large tensor.

    Parameters
    ----------
    request : Request
    wish : Wish
        Of :func:`fit`.
    span : (int, int)
        First row, and end.
    """
    with naming([request]):
        rows = request.read.rows(*span)
        (piece,) = _quantize([(to_float32(rows, request.spec.dtype), wish)])
        return _rows(request, rows, piece)


def code_calibrated(request: Request) -> list[Coded]:
    """Quantize a tensor with error feedback."""
    with naming([request]):
        array = request.read()
        matrix = to_float32(matrix_of(array, request.spec), request.spec.dtype)
        quantizer = fit_calibrated(request, matrix)
        levels = quantizer.levels(matrix)
        shift = _shift(request, matrix, levels, quantizer)
        piece = Piece(quantizer.params, *split_levels(levels))
        return [replace(_finish(request, array, piece), shift=shift)]


def code_fixed(request: Request) -> list[Coded]:
    """Finish a tensor whose levels are known."""
    if request.fixed is None:
        raise QuantizationError(f"the levels of tensor {request.spec.name!r} are not known")
    with naming([request]):
        made = _finish(request, request.read(), request.fixed.piece)
        return [replace(made, shift=request.fixed.shift)]


def fit_calibrated(request: Request, matrix: Matrix | None = None) -> Calibrated:
    """Quantizer with error feedback of a tensor, which is read if it is not given."""
    if request.moments is None:
        raise QuantizationError(f"tensor {request.spec.name!r} has no calibration statistics")
    with naming([request]):
        if matrix is None:
            whole = matrix_of(request.read(), request.spec)
            matrix = to_float32(whole, request.spec.dtype)
        return calibrate_quantizer(matrix, request.params, request.moments)


def calibrated_rows(request: Request, quantizer: Calibrated, span: tuple[int, int]) -> Rows:
    """Quantize some rows with error feedback; parameters as in :func:`code_rows`."""
    with naming([request]):
        rows = request.read.rows(*span)
        weights = to_float32(rows, request.spec.dtype)
        levels = quantizer.levels(weights)
        shift = _shift(request, weights, levels, quantizer)
        made = _rows(request, rows, Piece(quantizer.params, *split_levels(levels)))
        return replace(made, shift=shift)


def _shift(
    request: Request, weights: Matrix, levels: Levels, quantizer: Calibrated
) -> Matrix | None:
    if request.moments is None or request.moments.bias is None:
        return None
    return mean_shift(weights - dequantize(levels, quantizer.params), request.moments)


def _rows(request: Request, rows: Array, piece: Piece) -> Rows:
    restored = restore(rows, request.spec.dtype, piece.params, piece.levels, piece.escapes)
    magnitudes = Magnitudes.of(piece.levels)
    return Rows(piece.params, piece.levels, piece.escapes, magnitudes, restored)


def _finish(request: Request, array: Array, piece: Piece) -> Coded:
    levels, flat = piece.levels, array.reshape(-1)
    tensor = finish_tensor(array, request.spec, piece.params, levels, piece.escapes)
    sequence = tile.to_sequence(levels, tensor.layout.order)
    rows = levels.reshape(-1)
    choice = choose_coding(
        video_bytes(
            tensor.layout, tensor.shape, len(piece.escapes.index), lambda a, b: sequence[a:b]
        ),
        LevelBytes(rows.size, lambda a, b: rows[a:b]),
        PlaneBytes(flat.size, flat.itemsize, lambda first, count: flat[first : first + count]),
    )
    stored = {"video": sequence, "plain": rows}.get(choice.coding)
    return Coded(request.number, tensor, choice, stored)


@contextmanager
def naming(requests: Sequence[Request]) -> Iterator[None]:
    """Name the tensors that a quantizer refuses."""
    try:
        yield
    except QuantizationError as error:
        names = ", ".join(repr(request.spec.name) for request in requests[:3])
        more = f" or {len(requests) - 3} more" if len(requests) > 3 else ""
        if str(error).startswith("tensor "):
            raise
        raise QuantizationError(f"tensor {names}{more}: {error}") from None
