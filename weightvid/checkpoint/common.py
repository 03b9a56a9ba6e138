"""Small functions that several kinds of checkpoints share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt

from weightvid.errors import CheckpointError
from weightvid.spec import SIDE_FILE_BYTES, SideFile

Array = npt.NDArray[np.generic]


def raw_bytes(array: Array) -> npt.NDArray[np.uint8]:
    """Bytes of a C-contiguous array as a flat view (numpy lends no buffer of dates or empties)."""
    return array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)


def need(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package, or say how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"the {extra} package is needed for this ({error}): pip install 'weightvid[{extra}]'"
        ) from None


def as_side_file(path: str, data: bytes, role: str) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """What a kind needs besides the tensors, or a note for ``skipped`` where it is too large."""
    if len(data) > SIDE_FILE_BYTES:
        return (), (f"{path} (larger than {SIDE_FILE_BYTES >> 20} MiB)",)
    return (SideFile(path, data, role),), ()


def encode_name(name: str) -> bytes:
    """UTF-8 of a tensor's name, or an error where it is not valid Unicode."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"the tensor name {name!r} is not valid Unicode") from None


def shorten(items: Iterable[object], limit: int = 8) -> str:
    """The first few items, comma-separated, and how many there are.

    Examples
    --------
    >>> shorten("abcd", limit=2)
    'a, b, ... (4 in all)'
    """
    listed = [str(item) for item in items]
    more = f", ... ({len(listed)} in all)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tied_note(aliases: Collection[str]) -> tuple[str, ...]:
    """Note of the writers whose format cannot share storage."""
    said = f"tied tensors are written as full copies: {shorten(aliases)}"
    return (said,) if aliases else ()
