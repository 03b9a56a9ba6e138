"""Checkpoints in and out: one reader and one writer per file kind.

A kind is a row of the table in :mod:`weightvid.checkpoint.kinds` and a module that offers
``open_reader(path)`` and ``open_writer(path, contents, *, force)``; it is imported when a file of
that kind is opened, so torch is needed for torch files alone.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import cast

from weightvid.checkpoint.base import CheckpointReader, Contents
from weightvid.checkpoint.kinds import KINDS, Kind, kind_for_output, kind_of_file
from weightvid.checkpoint.mapping import from_mapping
from weightvid.checkpoint.writer import CheckpointWriter
from weightvid.progress import Report, quiet
from weightvid.remote import is_url
from weightvid.spec import TensorSpec

__all__ = [
    "KINDS",
    "CheckpointReader",
    "CheckpointWriter",
    "Contents",
    "Kind",
    "TensorSpec",
    "create_checkpoint",
    "from_mapping",
    "kind_for_output",
    "open_checkpoint",
]


def open_checkpoint(path: str | os.PathLike[str], progress: Report = quiet) -> CheckpointReader:
    """Open a checkpoint; its content decides the kind, whatever its name says.

    Parameters
    ----------
    path : str or PathLike
        A file, a Hugging Face folder, or an address (``hf://org/model[@revision]``,
        ``https://...``, ``s3://...``): what lies there is brought here first.
    progress : callable
        Told about the stage ``download``.

    Returns
    -------
    CheckpointReader
        A context manager. No weight has been read yet (legacy torch pickles are read whole).

    Raises
    ------
    CheckpointError
        No such file, not a checkpoint of a known kind, or a damaged one.
    RemoteError
        It cannot be read from its address.
    """
    if is_url(path):
        from weightvid.checkpoint.fetched import open_fetched

        fetched = open_fetched(path, progress)
        fetched.location = os.fspath(path)
        return fetched
    kind = kind_of_file(Path(path))
    reader = cast(CheckpointReader, import_module(kind.module).open_reader(Path(path)))
    reader.location = os.path.abspath(path)  # noqa: PTH100 - links stay as they are named
    return reader


def create_checkpoint(
    path: str | os.PathLike[str],
    contents: Contents,
    *,
    force: bool = False,
    kind: str | None = None,
) -> CheckpointWriter:
    """Start writing a checkpoint; use it as a context manager.

    Parameters
    ----------
    path : str or PathLike
        Destination: a regular file, a folder, or absent.
    contents : Contents
        Every tensor and alias that will be written.
    force : bool
        Replace a file that exists.
    kind : str or None
        A name in :data:`KINDS`; None goes by the suffix; without one it is a folder.

    Returns
    -------
    CheckpointWriter
        Its ``notes`` say what the kind cannot hold and what is written instead.

    Raises
    ------
    CheckpointError
        Unknown kind, or contents that it cannot hold. Nothing has been written.
    OutputError
        The destination exists or cannot be written.
    """
    chosen = kind_for_output(Path(path), kind)
    opener = import_module(chosen.module).open_writer
    variant = {"variant": chosen.variant} if chosen.variant else {}
    return cast(CheckpointWriter, opener(Path(path), contents, force=force, **variant))
