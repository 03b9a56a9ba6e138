"""A reader over arrays that are in memory already."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weightvid.checkpoint.base import CheckpointReader, Contents
from weightvid.checkpoint.common import Array
from weightvid.errors import CheckpointError
from weightvid.spec import TensorSpec, name_of, stored_dtype


def from_mapping(
    arrays: Mapping[str, Array],
    *,
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CheckpointReader:
    """Read from a mapping of name to numpy array; nothing is copied before it is read.

    Names whose arrays show the same memory the same way (address, dtype, shape, strides) become
    aliases of the first of them, so tied weights stay tied. ``read`` gives read-only views of
    contiguous arrays, copies of others.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        Any shape and strides. Types numpy lacks come as raw bits, named in ``dtypes``.
    dtypes, metadata : mapping of str to str, optional
        Dtype names where they are not the arrays' own (``{"w": "BF16"}``); free text pairs.

    Raises
    ------
    CheckpointError
        No string for a name, no array of plain elements, a dtype that does not fit the array.

    Examples
    --------
    >>> with from_mapping({"w": np.zeros((2, 3), np.float32)}) as reader:
    ...     reader.contents.tensors
    (TensorSpec(name='w', dtype='F32', shape=(2, 3)),)
    """
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    distinct: dict[str, Array] = {}
    first_of: dict[tuple[object, ...], str] = {}
    for name, value in arrays.items():
        if not isinstance(name, str):
            raise CheckpointError(f"tensor names must be strings, not {name!r}")
        if not isinstance(value, (np.ndarray, np.generic)):
            raise CheckpointError(f"{name!r} is no numpy array but {type(value).__name__}")
        array = np.asarray(value)
        try:
            dtype = (dtypes or {}).get(name) or name_of(array.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{name!r}: {error}") from None
        if array.dtype != stored_dtype(dtype):
            raise CheckpointError(f"{name!r} is an array of {array.dtype}, which is not {dtype}")
        look = (array.__array_interface__["data"][0], dtype, array.shape, array.strides)
        if array.size and look in first_of:
            aliases[name] = first_of[look]
            continue
        first_of[look] = name
        distinct[name] = array
        specs.append(TensorSpec(name, dtype, array.shape))
    return ArrayReader(Contents(tuple(specs), aliases, dict(metadata or {})), distinct)


class ArrayReader(CheckpointReader):
    """A reader over contents whose arrays are known, in memory or mapped."""

    def __init__(self, contents: Contents, arrays: dict[str, Array]) -> None:
        super().__init__(contents)
        self._arrays = arrays

    def _read(self, spec: TensorSpec) -> Array:
        array = self._arrays[spec.name]
        shown = array.view() if array.flags.c_contiguous else array.copy(order="C")
        shown.flags.writeable = False
        return shown

    def close(self) -> None:
        """Let the arrays go."""
        super().close()
        self._arrays = {}
