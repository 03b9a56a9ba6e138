"""A reader over arrays that are in memory already."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weightvid.checkpoint.base import (
    Array,
    CheckpointReader,
    Contents,
    check_contents,
)
from weightvid.dtypes import name_of, stored_dtype
from weightvid.errors import CheckpointError
from weightvid.spec import TensorSpec


def from_mapping(
    arrays: Mapping[str, Array],
    *,
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CheckpointReader:
    """Read from a mapping of name to numpy array; nothing is copied before it is read.

    Names whose arrays show the same memory the same way (address, dtype, shape, strides) become
    aliases of the first of them, so tied weights stay tied.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        Any shape and strides. Types numpy lacks come as raw bits, named in ``dtypes``.
    dtypes : mapping of str to str, optional
        Name -> dtype name, where it is not the array's own (``{"w": "BF16"}`` for uint16 bits).
    metadata : mapping of str to str, optional
        Free text pairs.

    Returns
    -------
    CheckpointReader
        Its ``read`` gives read-only views of contiguous arrays, copies of others.

    Raises
    ------
    CheckpointError
        A name that is no string, a value that is no array of plain elements, a dtype that does
        not fit the array.

    Examples
    --------
    >>> with from_mapping({"w": np.zeros((2, 3), np.float32)}) as reader:
    ...     reader.contents.tensors
    (TensorSpec(name='w', dtype='F32', shape=(2, 3)),)
    """
    named = dict(dtypes or {})
    specs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    kept: dict[str, Array] = {}
    first_of: dict[tuple[object, ...], str] = {}
    for name, value in arrays.items():
        if not isinstance(name, str):
            raise CheckpointError(f"tensor names must be strings, not {name!r}")
        if not isinstance(value, (np.ndarray, np.generic)):
            raise CheckpointError(f"{name!r} is no numpy array but {type(value).__name__}")
        array = np.asarray(value)
        dtype = named.get(name) or _own_dtype(name, array)
        if array.dtype != stored_dtype(dtype):
            raise CheckpointError(f"{name!r} is an array of {array.dtype}, which is not {dtype}")
        address = array.__array_interface__["data"][0]
        look = (address, dtype, array.shape, array.strides)
        if array.size and look in first_of:
            aliases[name] = first_of[look]
            continue
        first_of[look] = name
        kept[name] = array
        specs.append(TensorSpec(name, dtype, array.shape))
    contents = Contents(tuple(specs), aliases, dict(metadata or {}))
    check_contents(contents)
    return _MappingReader(contents, kept)


def _own_dtype(name: str, array: Array) -> str:
    try:
        return name_of(array.dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name!r}: {error}") from None


class _MappingReader(CheckpointReader):
    def __init__(self, contents: Contents, arrays: dict[str, Array]) -> None:
        super().__init__(contents)
        self._arrays = arrays

    def _read(self, spec: TensorSpec) -> Array:
        array = self._arrays[spec.name]
        shown = array.view() if array.flags.c_contiguous else array.copy(order="C")
        shown.flags.writeable = False
        return shown

    def close(self) -> None:
        super().close()
        self._arrays = {}
