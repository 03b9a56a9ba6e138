"""Room for the bytes of one tensor: memory while they are few, a temporary file beyond."""

from __future__ import annotations

import os
import tempfile
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from weightvid.closing import Closing
from weightvid.errors import OutputError

Bytes = npt.NDArray[np.int8]

#: so many bytes are held in memory.
MEMORY_BYTES: Final = 64 << 20


class Scratch(Closing):
    """Bytes that are written and read in ranges; not for use by two threads at once.

    Parameters
    ----------
    size : int
        Bytes.
    folder : path or None
        Where a file goes that holds more than ``memory_bytes``: a disk, not a part of memory.
        None: the system's folder for temporary files. The file has no name, so nothing of it
        stays behind, however the program ends.
    memory_bytes : int or None
        None: :data:`MEMORY_BYTES`.
    """

    def __init__(
        self,
        size: int,
        folder: str | os.PathLike[str] | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self.size = size
        self._memory: Bytes | None = None
        self._file: IO[bytes] | None = None
        limit = MEMORY_BYTES if memory_bytes is None else memory_bytes
        if size <= limit:
            self._memory = np.empty(size, np.int8)
            return
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from None

    @property
    def in_memory(self) -> bool:
        """Whether no file is needed."""
        return self._memory is not None

    def write(self, at: int, data: npt.NDArray[np.int8] | npt.NDArray[np.uint8]) -> None:
        """Put bytes at an offset.

        Raises
        ------
        OutputError
            The disk of temporary files is full.
        """
        if self._memory is not None:
            self._memory[at : at + data.size] = data.reshape(-1).view(np.int8)
            return
        file = self._file
        if file is None:
            raise OutputError("a temporary file was used after it was closed")
        left = np.ascontiguousarray(data).reshape(-1).data.cast("B")
        try:
            file.seek(at)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise self._failed(error) from None

    def read(self, begin: int, end: int) -> Bytes:
        """Bytes ``begin .. end``; a view where they are in memory."""
        if self._memory is not None:
            return self._memory[begin:end]
        if self._file is None:
            raise OutputError("a temporary file was used after it was closed")
        data = np.empty(end - begin, np.int8)
        left = data.data.cast("B")
        try:
            self._file.seek(begin)
            while left:
                got = self._file.readinto(left)  # type: ignore[attr-defined]
                if not got:
                    raise OutputError("a temporary file was cut short")
                left = left[got:]
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise self._failed(error) from None
        return data

    def close(self) -> None:
        """Give the room back."""
        self._memory = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _failed(self, error: OSError) -> OutputError:
        made = OutputError(
            f"a temporary file of {self.size:,} bytes cannot be used: {error.strerror or error}; "
            "make room where it lies, or set TMPDIR to another folder"
        )
        made.errno = error.errno
        return made
