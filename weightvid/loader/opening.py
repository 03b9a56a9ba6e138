"""Opening an archive wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from weightvid.loader.archive import Archive


def open_archive(
    source: str | os.PathLike[str] | BinaryIO, *, threads: int = 0, check_tensors: bool = False
) -> Archive:
    """Open an archive for reading.

    Parameters
    ----------
    source : path, address or binary file object
        An address is a str such as ``https://...``, ``s3://...`` or ``hf://...``; what reads it is
        imported then. A file object that cannot seek (a pipe, a download) can only be iterated
        over, once.
    threads : int
        Frames decoded at the same time; 0: one per core.
    check_tensors : bool
        Check the SHA-256 of every dequantized tensor too, and, when all of the file is read, the
        index. The SHA-256 of every frame with its sidecar, and of every box, is always checked.

    Raises
    ------
    FormatError
        The file is no archive, is damaged, or needs a newer reader; ``error.code`` says which.
    OSError
        The file cannot be opened; a :class:`~weightvid.errors.RemoteError` for an address.
    """
    if isinstance(source, (str, os.PathLike)):
        stream = _open(source)
        try:
            return Archive(stream, threads, check_tensors, owned=True)
        except BaseException:
            stream.close()
            raise
    return Archive(source, threads, check_tensors, owned=False)


def _open(source: str | os.PathLike[str]) -> BinaryIO:
    if isinstance(source, str) and "://" in source:
        from weightvid.remote import is_url, open_remote

        if is_url(source):
            return open_remote(source)
    return Path(source).open("rb")
