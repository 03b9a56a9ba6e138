"""Exact tensors to boxes: collected until a box is worth it, large ones in parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightvid.container.exact import PART_BYTES, ExactItem
from weightvid.container.writer import ArchiveWriter
from weightvid.dtypes import stored_dtype
from weightvid.spec import TensorSpec


class ExactWriter:
    """Collects exact tensors and writes them in boxes of a bounded size.

    Tensors of one kind are brought together (all biases, all running means, ...): their bytes
    resemble each other.
    """

    def __init__(self, writer: ArchiveWriter, tensors: Sequence[TensorSpec]) -> None:
        self._writer = writer
        self._tensors = tensors
        self._items: list[ExactItem] = []
        self._bytes = 0

    def add(self, tensor: int, array: npt.NDArray[np.generic]) -> None:
        """Store a tensor bit for bit."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        itemsize = stored_dtype(self._tensors[tensor].dtype).itemsize
        part = max(1, PART_BYTES // itemsize)
        size = self._tensors[tensor].size
        if not size:
            self._add(ExactItem(tensor, 0, 0, data))
        for first in range(0, size, part):
            count = min(part, size - first)
            piece = data[first * itemsize : (first + count) * itemsize]
            # Small pieces are copied, so that they don't keep a whole file mapping alive.
            self._add(ExactItem(tensor, first, count, piece.copy()))

    def _add(self, item: ExactItem) -> None:
        if self._bytes + item.data.nbytes > PART_BYTES:
            self.flush()
        self._items.append(item)
        self._bytes += item.data.nbytes

    def flush(self) -> None:
        """Write what has been collected."""
        if self._items:
            self._items.sort(key=self._likeness)
            self._writer.write_exact(self._items)
        self._items, self._bytes = [], 0

    def _likeness(self, item: ExactItem) -> tuple[int, str, str, int, int]:
        spec = self._tensors[item.tensor]
        owner, _, kind = spec.name.rpartition(".")
        family = "".join(c for c in owner.rpartition(".")[2] if not c.isdigit())
        itemsize = stored_dtype(spec.dtype).itemsize
        return itemsize, kind, family, item.tensor, item.first
