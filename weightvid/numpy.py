"""Archives as dicts of numpy arrays, with the functions of ``safetensors.numpy``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from weightvid.loader import open_archive

if TYPE_CHECKING:
    from weightvid.pack import PackOptions, PackReport

Array = npt.NDArray[np.generic]


def load_file(path: str | os.PathLike[str], *, threads: int = 0) -> dict[str, Array]:
    """All tensors of an archive.

    Parameters
    ----------
    path : path
    threads : int
        Frames decoded at the same time; 0: one per core.

    Returns
    -------
    dict of str to ndarray
        In the order of the source; tied tensors are one array. BF16 comes as float32, float8 and
        complex32 as raw bits.

    Raises
    ------
    FormatError
        The archive is damaged or cut short.
    """
    with open_archive(path, threads=threads, check_tensors=True) as archive:
        found = dict(archive)
        return {name: found[name] for name in archive.names}


def save_file(
    tensors: Mapping[str, Array],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    recipe: str | None = None,
    options: PackOptions | None = None,
) -> PackReport:
    """Pack arrays into an archive; an existing file is replaced, as safetensors does.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        Arrays that show the same memory the same way are stored once.
    path : path
        Appears whole, or not at all.
    metadata : mapping of str to str, optional
        Free text pairs.
    recipe : str, optional
        ``balanced`` (default), ``small`` or ``fine``.
    options : PackOptions, optional
        All other settings; its ``force`` counts, then.

    Raises
    ------
    CheckpointError, QuantizationError, OutputError
    """
    # Late, so that a device that only loads needs no encoder.
    from weightvid.checkpoint import from_mapping
    from weightvid.pack import PackOptions, pack_checkpoint

    chosen = options or PackOptions(force=True)
    if recipe is not None:
        chosen = replace(chosen, recipe=recipe)
    with from_mapping(tensors, metadata=metadata) as reader:
        return pack_checkpoint(reader, path, chosen)
