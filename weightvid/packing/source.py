"""Where workers get their tensors from: the reader itself, or the checkpoint opened once more."""

from __future__ import annotations

import atexit
import threading
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final

import av
import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.errors import CheckpointError, RemoteError
from weightvid.spec import TensorSpec
from weightvid.version import __version__

Array = npt.NDArray[np.generic]


class Source(ABC):
    """A checkpoint that several workers read."""

    @abstractmethod
    def read(self, spec: TensorSpec) -> Array:
        """Stored elements of a tensor, in its shape."""

    @abstractmethod
    def read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        """Some consecutive stored elements, shape (count,)."""


class ReaderSource(Source):
    """A reader of this process, used by one thread at a time."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()

    def read(self, spec: TensorSpec) -> Array:
        """Stored elements of a tensor."""
        with self._lock:
            return self._reader.read(spec.name)

    def read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        """Some consecutive stored elements."""
        with self._lock:
            return self._reader.read_range(spec.name, first, count)


def versions() -> tuple[str, ...]:
    """What the bytes of an archive depend on besides the weights and the options."""
    libraries = ("libavcodec", "libavutil")
    return (__version__, *(".".join(map(str, av.library_versions[name])) for name in libraries))


@dataclass(frozen=True, slots=True)
class SharedSource(Source):
    """A checkpoint on storage that all workers share; each process opens it for itself.

    Attributes
    ----------
    location : str
        Path or address.
    token : str
        Of one packing: a worker that served another one opens the checkpoint anew.
    versions : tuple of str
        Of the program and its encoder where the archive is written.
    """

    location: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    versions: tuple[str, ...] = field(default_factory=versions)

    def read(self, spec: TensorSpec) -> Array:
        """Stored elements of a tensor."""
        return self._open(spec).read(spec)

    def read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        """Some consecutive stored elements."""
        return self._open(spec).read_range(spec, first, count)

    def _open(self, spec: TensorSpec) -> ReaderSource:
        with _OPENED.lock:
            if _OPENED.token != self.token:
                _OPENED.replace(self)
            reader = _OPENED.reader
            if reader is None or _OPENED.source is None or reader.spec(spec.name) != spec:
                raise CheckpointError(f"{self.location} is another checkpoint for a worker")
            return _OPENED.source


class HandedSource(ReaderSource):
    """A reader of this process; in another one, the same checkpoint opened once more.

    Parameters
    ----------
    reader : CheckpointReader
    location : str
        Path or address of the checkpoint.
    """

    def __init__(self, reader: CheckpointReader, location: str) -> None:
        super().__init__(reader)
        self._shared = SharedSource(location)

    def __reduce__(self) -> tuple[type[SharedSource], tuple[object, ...]]:
        """What a pipe carries."""
        shared = self._shared
        return SharedSource, (shared.location, shared.token, shared.versions)


class _Opened:
    """The checkpoint that this process serves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.token = ""
        self.reader: CheckpointReader | None = None
        self.source: ReaderSource | None = None

    def close(self) -> None:
        """Close the checkpoint."""
        if self.reader is not None:
            self.reader.close()
        self.token, self.reader, self.source = "", None, None

    def replace(self, shared: SharedSource) -> None:
        """Open another one."""
        if shared.versions != versions():
            raise CheckpointError(
                f"a worker runs weightvid and libavcodec {versions()}, not {shared.versions}: "
                "the archive's bytes would depend on who made them; install one version everywhere"
            )
        self.close()
        try:
            self.reader = open_checkpoint(shared.location)
        except (CheckpointError, RemoteError) as error:
            raise CheckpointError(
                f"a worker cannot read the checkpoint ({error}); on a cluster it must lie where "
                "every worker sees it under the same path"
            ) from None
        self.source = ReaderSource(self.reader)
        self.token = shared.token


_OPENED: Final = _Opened()
atexit.register(_OPENED.close)


@dataclass(frozen=True, slots=True)
class TensorRead:
    """One tensor and where it comes from; a callable that gives all of it.

    Attributes
    ----------
    source : Source
    spec : TensorSpec
    """

    source: Source
    spec: TensorSpec

    def __call__(self) -> Array:
        """Stored elements, in the tensor's shape."""
        return self.source.read(self.spec)

    def elements(self, first: int, count: int) -> Array:
        """Stored elements of a range, shape (count,)."""
        return self.source.read_range(self.spec, first, count)

    def rows(self, begin: int, end: int) -> Array:
        """Stored elements of some rows of the tensor's matrix."""
        columns = tile.matrix_shape(self.spec.shape)[1]
        flat = self.source.read_range(self.spec, begin * columns, (end - begin) * columns)
        return flat.reshape(end - begin, columns)
