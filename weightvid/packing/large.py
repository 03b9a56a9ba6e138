"""A tensor that is quantized in blocks of rows, and may be larger than memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.container.records import TENSOR_HASH_BYTES, Escapes
from weightvid.dtypes import from_float32
from weightvid.packing.layout import Magnitudes, kernel_size, layout_for
from weightvid.packing.plain import LevelBytes, PlaneBytes, choose_coding, video_bytes
from weightvid.packing.quantized import CodedTensor, join_escapes
from weightvid.packing.quantizer import Coded, Request, Rows
from weightvid.quantize import Params, dequantize
from weightvid.scratch import Scratch
from weightvid.tile.blocks import BlockOrder

Levels = npt.NDArray[np.int8]


class LargeTensor:
    """Takes the blocks of a tensor in order, and finishes it.

    Its levels, one byte each, wait in memory or in a temporary file: their order on the ribbon is
    known only when all are there.

    Parameters
    ----------
    request : Request
    folder : path or None
        Where a temporary file goes.
    """

    def __init__(self, request: Request, folder: str | os.PathLike[str] | None = None) -> None:
        self._request = request
        self._folder = folder
        self._shape = tile.matrix_shape(request.spec.shape)
        self._levels = Scratch(request.spec.size, folder)
        self._digest = hashlib.sha256()
        self._done = 0
        self._sizes: list[int] = []
        self._escapes: list[Escapes] = []
        self._params: Params = request.params
        self._row_sums: list[npt.NDArray[np.int64]] = []
        self._column_sums = np.zeros(self._shape[1], np.int64)
        self._noise = self._power = 0.0
        self._shifts: list[npt.NDArray[np.float32]] = []

    def take(self, block: Rows) -> None:
        """Add the next rows."""
        self._levels.write(self._done, block.levels)
        self._done += block.levels.size
        self._params = block.params
        for stored in block.restored.stored or self._dequantized(block):
            self._digest.update(np.ascontiguousarray(stored).data)
        self._noise += block.restored.noise
        self._power += block.restored.power
        self._sizes.append(block.levels.size)
        self._row_sums.append(block.magnitudes.rows)
        self._column_sums += block.magnitudes.columns
        self._escapes.append(block.escapes)
        if block.shift is not None:
            self._shifts.append(block.shift)

    def _dequantized(self, block: Rows) -> Iterator[npt.NDArray[np.generic]]:
        exact = block.escapes.placed_in(block.levels)
        yield from_float32(dequantize(exact, block.params), self._request.spec.dtype)

    def finish(self) -> Coded:
        """Choose layout and coding; the levels of the result are to be closed."""
        spec, escapes = self._request.spec, join_escapes(self._escapes, self._sizes)
        layout = layout_for(
            Magnitudes(np.concatenate(self._row_sums), self._column_sums),
            kernel_size(spec.shape),
            self._row_blocks(),
        )
        sha256 = self._digest.digest()[:TENSOR_HASH_BYTES]
        tensor = CodedTensor(spec, self._params, escapes, layout, sha256, self._noise, self._power)
        sequence = Scratch(spec.size, self._folder)
        places = BlockOrder(self._shape, layout.order)
        for begin, end in places.blocks():
            places.put(sequence, begin, self._rows(begin, end))
        choice = choose_coding(
            video_bytes(layout, self._shape, len(escapes.index), sequence.read),
            LevelBytes(spec.size, self._levels.read),
            PlaneBytes(spec.size, spec.stored_bytes // spec.size, self._request.read.elements),
        )
        kept = {"video": sequence, "plain": self._levels}.get(choice.coding)
        for unused in (sequence, self._levels):
            if unused is not kept:
                unused.close()
        shift = np.concatenate(self._shifts) if self._shifts else None
        return Coded(self._request.number, tensor, choice, kept, shift)

    def _row_blocks(self) -> Iterator[tuple[int, Levels]]:
        for begin, end in BlockOrder(self._shape, None).blocks():
            yield begin, self._rows(begin, end)

    def _rows(self, begin: int, end: int) -> Levels:
        columns = self._shape[1]
        return self._levels.read(begin * columns, end * columns).reshape(-1, columns)
