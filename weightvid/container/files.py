"""Side files: one box each, straight after the header, which lists them.

FORMAT.md is the specification.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence
from typing import Any, Final

from weightvid.container import boxes
from weightvid.container.boxes import DIGEST_BYTES, UUID_HEADER_BYTES, seal, unseal
from weightvid.container.exact import decompress, deflate_raw, dictionary_bytes
from weightvid.container.fields import bad, integer, items, mapping
from weightvid.container.records import StoredFile
from weightvid.errors import CheckpointError, FormatError
from weightvid.spec import (
    SIDE_FILE_BYTES,
    SIDE_FILES,
    SIDE_FILES_BYTES,
    SideFile,
    is_safe_path,
)

_OVERHEAD: Final = UUID_HEADER_BYTES + DIGEST_BYTES
_ROLE: Final = "file"
_MAX_ROLE: Final = 64


def store_files(files: Iterable[SideFile]) -> tuple[tuple[StoredFile, ...], tuple[bytes, ...]]:
    """Entries of the header, and boxes, of side files.

    Raises
    ------
    CheckpointError
        A path that no archive may hold, one that comes twice, or more than the limits allow.
    """
    entries, made = [], []
    for file in files:
        codec, data = _compress(file.data)
        box = boxes.uuid_box(boxes.FILE_UUID, seal(data))
        entries.append(StoredFile(file.path, file.role, len(file.data), codec, len(box)))
        made.append(box)
    problem = _problem(entries)
    if problem:
        raise CheckpointError(f"side files cannot be kept: {problem}")
    return tuple(entries), tuple(made)


def _compress(data: bytes) -> tuple[str, bytes]:
    """Smallest of raw bytes, raw deflate and raw LZMA2, with its name."""
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": dictionary_bytes(len(data))},
    ]
    choices = [
        ("raw", data),
        ("deflate", deflate_raw(data)),
        ("lzma2", lzma.compress(data, lzma.FORMAT_RAW, filters=filters)),
    ]
    return min(choices, key=lambda choice: len(choice[1]))


def file_record(entry: StoredFile) -> dict[str, Any]:
    """JSON of an entry."""
    record: dict[str, Any] = {
        "path": entry.path,
        "bytes": entry.size,
        "codec": entry.codec,
        "box_bytes": entry.box_bytes,
    }
    if entry.role != _ROLE:
        record["role"] = entry.role
    return record


def parse_files(listed: object) -> tuple[StoredFile, ...]:
    """Entries from the header's JSON.

    Raises
    ------
    FormatError
        ``schema``, ``limit``; ``path``: one that leads out of its folder, or that comes twice.
    """
    what = "the list of side files"
    entries = []
    for item in items(listed, SIDE_FILES, what):
        record = mapping(item, what)
        texts = [record.get("path"), record.get("role", _ROLE), record.get("codec")]
        if not all(isinstance(text, str) for text in texts) or len(str(texts[1])) > _MAX_ROLE:
            raise bad(what, "path, role and codec must be text")
        path, role, codec = map(str, texts)
        size = integer(record.get("bytes"), 0, SIDE_FILE_BYTES, what)
        box = integer(record.get("box_bytes"), _OVERHEAD, boxes.LIMITS.box_bytes, what)
        entries.append(StoredFile(path, role, size, codec, box))
    problem = _problem(entries)
    if problem:
        raise FormatError(f"{what} is refused: {problem}", code="path")
    return tuple(entries)


def _problem(entries: Sequence[StoredFile]) -> str:
    """What is wrong with a list of files; empty if nothing."""
    if len(entries) > SIDE_FILES:
        return f"more than {SIDE_FILES} files"
    if sum(entry.size for entry in entries) > SIDE_FILES_BYTES:
        return f"more than {SIDE_FILES_BYTES >> 20} MiB together"
    seen: set[str] = set()
    for entry in entries:
        if entry.size > SIDE_FILE_BYTES:
            return f"{entry.path!r} has more than {SIDE_FILE_BYTES >> 20} MiB"
        if not is_safe_path(entry.path):
            return f"{entry.path[:80]!r} is no relative path that is safe on every system"
        folded = entry.path.casefold()
        if folded in seen:
            return f"{entry.path!r} comes twice"
        seen.add(folded)
    for path in seen:
        parts = path.split("/")
        if any("/".join(parts[:end]) in seen for end in range(1, len(parts))):
            return f"{path!r} lies below a file"
    return ""


def open_file(entry: StoredFile, payload: bytes) -> bytes:
    """A file's bytes, from the payload of its box.

    Raises
    ------
    FormatError
        ``digest``, ``stream``: damage.
    """
    return decompress(entry.codec, unseal(payload, f"side file {entry.path!r}"), entry.size)
