"""Exact tensors to boxes: collected until a box is worth it, large ones in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from weightvid.container.exact import (
    LEVEL_DTYPES,
    PART_BYTES,
    ExactItem,
    PlainLevels,
    exact_payload,
)
from weightvid.dtypes import stored_dtype
from weightvid.packing.quantized import CodedTensor
from weightvid.packing.workers import Outbox
from weightvid.spec import TensorSpec

Array = npt.NDArray[np.generic]


class ExactSink(Protocol):
    """Where boxes of exact tensors go: an archive's writer, or whoever wants to know their size."""

    def write_exact(self, payload: bytes, tensors: tuple[int, ...]) -> None:
        """Write one box."""


class ExactWriter:
    """Collects exact tensors and writes them in boxes of a bounded size.

    Tensors of one kind are brought together (all biases, all running means, ...): their bytes
    resemble each other.
    """

    def __init__(self, writer: ExactSink, tensors: Sequence[TensorSpec], outbox: Outbox) -> None:
        self._writer = writer
        self._tensors = tensors
        self._outbox = outbox
        self._items: list[ExactItem] = []
        self._bytes = 0

    def add(self, tensor: int, read: Callable[[int, int], Array]) -> None:
        """Store a tensor bit for bit.

        Parameters
        ----------
        tensor : int
            Id.
        read : callable
            Gives its stored elements ``first .. first + count``, shape (count,).
        """
        itemsize = stored_dtype(self._tensors[tensor].dtype).itemsize
        part = max(1, PART_BYTES // itemsize)
        size = self._tensors[tensor].size
        if not size:
            self._add(ExactItem(tensor, 0, 0, np.empty(0, np.uint8)))
        for first in range(0, size, part):
            count = min(part, size - first)
            piece = np.ascontiguousarray(read(first, count)).reshape(-1).view(np.uint8)
            # Small pieces are copied, so that they don't keep a whole file mapping alive.
            self._add(ExactItem(tensor, first, count, piece.copy()))

    def add_plain(
        self,
        tensor: int,
        coded: CodedTensor,
        read: Callable[[int, int], npt.NDArray[np.int8]],
        video_bytes: int,
    ) -> None:
        """Store a quantized tensor's levels without video.

        Parameters
        ----------
        tensor : int
            Id.
        coded : CodedTensor
        read : callable
            Gives its clipped levels of a range, row by row.
        video_bytes : int
            What it would take as video.
        """
        size = coded.spec.size
        peak = int(np.abs(coded.escapes.level.astype(np.int64)).max(initial=0))
        for first in range(0, size, PART_BYTES):
            levels = read(first, min(size, first + PART_BYTES))
            peak = max(peak, int(np.abs(levels).max(initial=0)))
        name = "I8" if peak < 1 << 7 else "I16" if peak < 1 << 15 else "I32"
        dtype = LEVEL_DTYPES[name]
        plain = PlainLevels(name, coded.params, coded.sha256, coded.sqnr_db, video_bytes)
        part = PART_BYTES // dtype.itemsize
        for first in range(0, size, part):
            levels = read(first, min(size, first + part))
            piece = coded.escapes.placed_in(levels, first).astype(dtype)
            self._add(ExactItem(tensor, first, piece.size, piece.view(np.uint8), plain))

    def _add(self, item: ExactItem) -> None:
        if self._bytes + item.data.nbytes > PART_BYTES:
            self.flush()
        self._items.append(item)
        self._bytes += item.data.nbytes

    def flush(self) -> None:
        """Hand out what has been collected; it is written in its turn."""
        if self._items:
            self._items.sort(key=self._likeness)
            ids = tuple(item.tensor for item in self._items)

            def write(payload: bytes) -> None:
                self._writer.write_exact(payload, ids)

            self._outbox.put(
                write,
                exact_payload,
                self._items,
                {i.tensor: self._tensors[i.tensor] for i in self._items},
            )
        self._items, self._bytes = [], 0

    def _likeness(self, item: ExactItem) -> tuple[int, bool, str, str, int, int]:
        spec = self._tensors[item.tensor]
        owner, _, kind = spec.name.rpartition(".")
        family = "".join(c for c in owner.rpartition(".")[2] if not c.isdigit())
        itemsize = item.data.nbytes // max(1, item.count)
        return itemsize, item.plain is not None, kind, family, item.tensor, item.first
