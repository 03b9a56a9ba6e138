"""Archives as dicts of numpy arrays, with the functions of ``safetensors.numpy``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from weightvid.archives import Location, open_anywhere
from weightvid.loader import Array

if TYPE_CHECKING:
    from weightvid.pack import PackOptions, PackReport


def load_file(location: Location) -> dict[str, Array]:
    """All tensors of an archive at a path, an address, or in a binary file object.

    Returns
    -------
    dict of str to ndarray
        In the order of the source; further names of tied tensors, which are one array, come last.
        BF16 comes as float32, float8 and complex32 as raw bits.

    Raises
    ------
    FormatError
        The archive is damaged or cut short.
    """
    with open_anywhere(location) as archive:
        found = dict(archive.items())
        return {name: found[name] for name in archive}


def save_file(
    tensors: Mapping[str, Array],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
    recipe: str | None = None,
    options: PackOptions | None = None,
) -> PackReport:
    """Pack arrays into an archive; an existing file is replaced, as safetensors does.

    Arrays that show the same memory the same way are stored once.

    Parameters
    ----------
    tensors, path, metadata : mapping of str to ndarray, path, mapping of str to str
    dtypes : mapping of str to str, optional
        Name -> element type where it is not the array's own: ``BF16`` for uint16 bits.
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
    with from_mapping(tensors, dtypes=dtypes, metadata=metadata) as reader:
        return pack_checkpoint(reader, path, chosen)
