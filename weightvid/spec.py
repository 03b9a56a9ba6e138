"""Name, element type and shape of a tensor: what checkpoints and archives both list."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from weightvid.dtypes import stored_dtype


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type (as in :mod:`weightvid.dtypes`) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements (1 for a 0-d tensor)."""
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor's elements in its own dtype."""
        return self.size * stored_dtype(self.dtype).itemsize
