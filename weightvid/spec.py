"""What checkpoints and archives both list: tensors, and the small files beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from weightvid.loader import TensorSpec

__all__ = ["SideFile", "TensorSpec", "is_safe_path"]

#: most side files, most bytes of one and of all, longest path in UTF-8 bytes.
SIDE_FILES: Final = 4096
SIDE_FILE_BYTES: Final = 48 << 20
SIDE_FILES_BYTES: Final = 128 << 20
SIDE_PATH_BYTES: Final = 1024

#: what some system takes for more than a letter of a name.
_UNSAFE: Final = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
#: names that are devices on Windows, whatever their suffix.
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file that belongs to a model: configuration, tokenizer, graph.

    Attributes
    ----------
    path : str
        Relative, with ``/`` (see :func:`is_safe_path`).
    data : bytes
        The whole file.
    role : str
        ``file``: restored as it is; others are what a kind needs to be written again
        (``onnx-graph``, ``gguf-metadata``).
    """

    path: str
    data: bytes
    role: str = "file"


def is_safe_path(path: str) -> bool:
    """Whether a path stays below the folder it is put into, and is a file name on every system.

    Examples
    --------
    >>> is_safe_path("1_Pooling/config.json"), is_safe_path("../config.json"), is_safe_path("/a")
    (True, False, False)
    """
    try:
        if len(path.encode()) > SIDE_PATH_BYTES:
            return False
    except UnicodeEncodeError:
        return False
    return not _UNSAFE.search(path) and all(
        part not in ("", ".", "..") and part[-1] not in ". " and not _DEVICE.fullmatch(part)
        for part in path.split("/")
    )
