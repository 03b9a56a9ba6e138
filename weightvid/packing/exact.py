"""Exact tensors to boxes: collected until a box is worth it, large ones in parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightvid.container.exact import LEVEL_DTYPES, PART_BYTES, ExactItem, PlainLevels
from weightvid.container.writer import ArchiveWriter
from weightvid.dtypes import stored_dtype
from weightvid.packing.quantized import CodedTensor
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

    def add_plain(self, tensor: int, coded: CodedTensor, video_bytes: int) -> None:
        """Store a quantized tensor's levels without video."""
        levels = coded.true_levels()
        peak = int(np.abs(levels.astype(np.int32)).max(initial=0))
        name = "I8" if peak < 1 << 7 else "I16" if peak < 1 << 15 else "I32"
        flat = np.ascontiguousarray(levels.astype(LEVEL_DTYPES[name])).reshape(-1)
        plain = PlainLevels(name, coded.params, coded.sha256, coded.sqnr_db, video_bytes)
        part = PART_BYTES // flat.itemsize
        for first in range(0, flat.size, part):
            piece = flat[first : first + part]
            self._add(ExactItem(tensor, first, piece.size, piece.view(np.uint8), plain))

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

    def _likeness(self, item: ExactItem) -> tuple[int, bool, str, str, int, int]:
        spec = self._tensors[item.tensor]
        owner, _, kind = spec.name.rpartition(".")
        family = "".join(c for c in owner.rpartition(".")[2] if not c.isdigit())
        itemsize = item.data.nbytes // max(1, item.count)
        return itemsize, item.plain is not None, kind, family, item.tensor, item.first
