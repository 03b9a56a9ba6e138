"""Tensors that come in parts: dequantized block by block, from levels that lie on a disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.beside import ALONE, Side
from weightvid.container.exact import LEVEL_DTYPES, PlainLevels
from weightvid.container.records import TENSOR_HASH_BYTES, Escapes
from weightvid.dtypes import PACKABLE, from_float32, stored_dtype
from weightvid.errors import FormatError
from weightvid.quantize import Params, TrellisParams, dequantize
from weightvid.quantize.trellis import ColumnDequantizer
from weightvid.scratch import Scratch
from weightvid.spec import TensorSpec
from weightvid.tile import Layout
from weightvid.tile.blocks import BlockOrder

Array = npt.NDArray[np.generic]
Levels = npt.NDArray[np.integer]

#: tensors of more elements are held in scratch rooms where tensors may come in parts.
STREAMED_ELEMENTS: Final = 1 << 22
#: elements of one part of an exact tensor.
_PART_ELEMENTS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Spill:
    """Leave to hold large tensors outside memory.

    Attributes
    ----------
    folder : path or None
        Where temporary files go; None: the system's folder for them.
    """

    folder: str | os.PathLike[str] | None = None

    def room(self, size: int) -> Scratch:
        """Room for so many bytes."""
        return Scratch(size, self.folder)


class Dequantizer:
    """Rows of levels, in order, to stored elements; checks the tensor's hash at the end.

    Parameters
    ----------
    spec : TensorSpec
    params : Params
    sha256 : bytes or None
        What the first bytes of the SHA-256 must be; None: unchecked.
    side : Side
        Hashes.
    """

    def __init__(
        self, spec: TensorSpec, params: Params, sha256: bytes | None, side: Side = ALONE
    ) -> None:
        self._side = side
        self._hashed: Future[None] | None = None
        self._spec = spec
        self._params = params
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        self._columns: ColumnDequantizer | None = None
        if isinstance(params, TrellisParams) and params.axis == 0:
            columns = tile.matrix_shape(spec.shape)[1]
            self._columns = ColumnDequantizer(columns, params.states, params.zero)

    def rows(self, levels: Levels, out: Array | None = None) -> Array:
        """Stored elements of the next whole rows, in their shape.

        Parameters
        ----------
        levels : ndarray of integers, shape (r, C)
        out : ndarray, shape (r, C), optional
            Takes the elements. They must stay as they are until :meth:`finish`.
        """
        # Elements that are float32 go to their place at once.
        place = cast("npt.NDArray[np.float32] | None", out if self._spec.dtype == "F32" else None)
        if self._columns is None:
            values = dequantize(levels, self._params, place)
        else:
            index = self._columns.feed(levels)
            unit = self._params.unit
            values = np.multiply(index, unit, out=place, dtype=np.float32, casting="unsafe")
        stored = np.ascontiguousarray(from_float32(values, self._spec.dtype))
        if out is not None and place is None:
            out[...] = stored
        if self._sha256 is not None:
            if self._hashed is not None:
                self._hashed.result()
            self._hashed = self._side.do(self._digest.update, stored.data)
        return stored

    def finish(self) -> None:
        """All rows have come.

        Raises
        ------
        FormatError
            ``tensor-digest``: they are not those that were packed.
        """
        if self._hashed is not None:
            self._hashed.result()
        if self._sha256 not in (None, self._digest.digest()[:TENSOR_HASH_BYTES]):
            raise FormatError(
                f"tensor {self._spec.name!r} does not match its SHA-256",
                code="tensor-digest",
                tensor=self._spec.name,
            )


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A quantized tensor whose sequence of levels lies in a room.

    Attributes
    ----------
    spec : TensorSpec
    sequence : Scratch
    layout : Layout
    escapes : Escapes
    params : Params
    sha256 : bytes
    dtype : dtype
        Of the levels.
    """

    spec: TensorSpec
    sequence: Scratch
    layout: Layout
    escapes: Escapes
    params: Params
    sha256: bytes
    dtype: np.dtype[np.integer]

    def parts(self, check: bool = False) -> Iterator[Array]:
        """Stored elements of consecutive rows; the room is given back at the end."""
        shape = tile.matrix_shape(self.spec.shape)
        order = BlockOrder(shape, self.layout.order, self.dtype)
        dequantizer = Dequantizer(self.spec, self.params, self.sha256 if check else None)
        with self.sequence as room:
            for begin, end in order.blocks():
                levels = order.get(room, begin, end)
                yield dequantizer.rows(self.escapes.placed_in(levels, begin * shape[1]))
        dequantizer.finish()


@dataclass(frozen=True, slots=True)
class StreamedExact:
    """A tensor of exact boxes, or plain levels of one, whose bytes lie in a room.

    Attributes
    ----------
    spec : TensorSpec
    data : Scratch
    plain : PlainLevels or None
    """

    spec: TensorSpec
    data: Scratch
    plain: PlainLevels | None

    def parts(self, check: bool = False) -> Iterator[Array]:
        """Stored elements of consecutive elements or rows; the room is given back at the end."""
        with self.data as room:
            if self.plain is None:
                dtype = stored_dtype(self.spec.dtype)
                for first in range(0, self.spec.size, _PART_ELEMENTS):
                    end = min(self.spec.size, first + _PART_ELEMENTS)
                    data = room.read(first * dtype.itemsize, end * dtype.itemsize)
                    yield data.view(dtype)
                return
            shape = tile.matrix_shape(self.spec.shape)
            sha256 = self.plain.sha256 if check else None
            dequantizer = Dequantizer(self.spec, self.plain.params, sha256)
            stored = LEVEL_DTYPES[self.plain.dtype]
            for begin, end in BlockOrder(shape, None).blocks():
                at = [row * shape[1] * stored.itemsize for row in (begin, end)]
                levels: Levels = room.read(at[0], at[1]).view(stored)
                yield dequantizer.rows(levels.reshape(end - begin, shape[1]))
        dequantizer.finish()


Streamed = StreamedTensor | StreamedExact


def check_plain(spec: TensorSpec) -> None:
    """Refuse plain levels of a tensor that cannot have any.

    Raises
    ------
    FormatError
        ``schema``.
    """
    if spec.dtype not in PACKABLE:
        raise FormatError(
            f"tensor {spec.name!r} of dtype {spec.dtype} cannot have levels",
            code="schema",
            tensor=spec.name,
        )
