"""What every checkpoint reader and writer offers, whatever the file kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from weightvid.dtypes import stored_dtype

Array = npt.NDArray[np.generic]


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


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, known without reading any weight.

    Attributes
    ----------
    tensors : tuple of TensorSpec
        Distinct tensors in file order; aliases are not repeated here.
    aliases : mapping of str to str
        Name -> name in ``tensors`` of the tensor it shares all its storage with (tied weights).
    metadata : mapping of str to str
        Free text pairs of the file (``__metadata__`` of safetensors).
    skipped : tuple of str
        Entries that are no tensors, each as ``"name (type)"``: they cannot be stored.
    """

    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


class CheckpointReader(ABC):
    """A source of tensors that are read one at a time."""

    contents: Contents

    @abstractmethod
    def read(self, name: str) -> Array:
        """Stored elements of one tensor.

        Parameters
        ----------
        name : str
            A name in ``contents.tensors``.

        Returns
        -------
        ndarray
            C-contiguous, little-endian, of the tensor's shape and ``stored_dtype``; read-only
            or a fresh copy: callers must not write into it.

        Raises
        ------
        TensorNotFoundError
            No such tensor.
        CheckpointError
            The file is damaged there.
        """

    def close(self) -> None:
        """Release the file. Reading afterwards is an error."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CheckpointWriter(ABC):
    """A checkpoint that is being written, one tensor at a time, in any order.

    Used as a context manager: a clean exit finishes the file under its real name; an exception
    (KeyboardInterrupt included) removes every trace of it.
    """

    @abstractmethod
    def write(self, name: str, array: Array) -> None:
        """Add one tensor of ``contents.tensors``: stored elements, in its own dtype and shape."""

    @abstractmethod
    def commit(self) -> None:
        """Write what is left (aliases too), flush to disk, and rename into place."""

    @abstractmethod
    def abort(self) -> None:
        """Remove the temporary file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.commit()
            except BaseException:
                self.abort()
                raise
        else:
            self.abort()
