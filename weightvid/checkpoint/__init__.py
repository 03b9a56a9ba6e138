"""Checkpoints in and out: one reader and one writer per file kind.

A kind is a row of the table in :mod:`weightvid.checkpoint.kinds` and a module with the classes
``Reader`` and ``Writer``, imported when a file of that kind is opened: only torch files need torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from weightvid.checkpoint.base import CheckpointReader, CheckpointWriter, Contents
from weightvid.checkpoint.kinds import KINDS, Kind, kind_for_output, open_local
from weightvid.checkpoint.mapping import from_mapping
from weightvid.checkpoint.remote import check_upload, file_name, is_url, open_remote, upload
from weightvid.progress import Report, quiet
from weightvid.spec import TensorSpec

__all__ = [
    "KINDS",
    "CheckpointReader",
    "CheckpointWriter",
    "Contents",
    "Kind",
    "TensorSpec",
    "check_upload",
    "create_checkpoint",
    "file_name",
    "from_mapping",
    "is_url",
    "kind_for_output",
    "open_checkpoint",
    "open_remote",
    "upload",
]


def open_checkpoint(path: str | os.PathLike[str], progress: Report = quiet) -> CheckpointReader:
    """Open a checkpoint; its content decides the kind. No weight is read yet where that can be.

    Parameters
    ----------
    path : str or PathLike
        A file, a Hugging Face folder, or an address (``hf://org/model[@revision]``,
        ``https://...``, ``s3://...``): what lies there is downloaded first.
    progress : callable
        Receives the stage ``download``, counted in bytes.

    Raises
    ------
    CheckpointError, RemoteError
        No checkpoint of a known kind, or a damaged one; or it cannot be read from its address.
    """
    if is_url(path):
        from weightvid.checkpoint.download import open_downloaded

        return open_downloaded(path, progress)
    return open_local(Path(path))


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
        Destination: a regular file, a folder, or absent; replaced with ``force``.
    contents : Contents
        Every tensor and alias that will be written.
    kind : str or None
        A name in :data:`KINDS`; None goes by the suffix; without one it is a folder.

    Raises
    ------
    CheckpointError, OutputError
        Contents that the kind cannot hold; a destination that exists or cannot be written.
    """
    return kind_for_output(Path(path), kind).create(Path(path), contents, force=force)
