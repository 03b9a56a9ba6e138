"""Runs check.c, the C loader's test program, and reads what it tells."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from test_hevc import SOURCES

LOADER: Final = (SOURCES / "weightvid.c", SOURCES / "hevc.c")
FLAGS: Final = ("-ffp-contract=off", f"-I{SOURCES}")
#: numbers of statuses, and those that may stand for a code of FORMAT.md.
OK, TRUNCATED, NO_ARCHIVE, VERSION, LIMIT, FORMAT, DIGEST, CODEC, LEVELS = 0, *range(5, 13)
STATUSES: Final = {
    "ftyp": {NO_ARCHIVE, TRUNCATED},
    "moov": {FORMAT, CODEC},
    "truncated": {TRUNCATED},
    "version": {VERSION},
    "limit": {LIMIT},
    **{code: {DIGEST} for code in ("digest", "frame-digest", "tensor-digest")},
    **{code: {FORMAT} for code in ("box-size", "order", "deflate", "record", "index")},
}


class Found(NamedTuple):
    """What the C loader says of an archive; levels: with their step, or a status."""

    status: int
    peak: int
    metadata: dict[str, str]
    files: dict[str, bytes]
    tensors: dict[str, bytes]
    levels: dict[str, Any]


#: mode, type and archives of check.c -> what it found in each.
Read = Callable[[str, str, Sequence[Path]], list[Found]]


def reader(*program: str | Path) -> Read:
    """A function that reads archives by check.c."""

    def read(mode: str, kind: str, paths: Sequence[Path]) -> list[Found]:
        command = [*program, mode, kind, *paths]
        done = subprocess.run(command, capture_output=True, check=False, timeout=600)
        assert (done.returncode, done.stderr) == (0, b"")
        found = list(parsed(done.stdout))
        assert len(found) == len(paths)
        return found

    return read


def parsed(output: bytes) -> Iterator[Found]:
    """Records of check.c, archive by archive."""
    found, at, last = Found(0, 0, {}, {}, {}, {}), 0, ""
    while at < len(output):
        kind, size = output[at : at + 1], int.from_bytes(output[at + 1 : at + 9], "little")
        data, at = output[at + 9 : at + 9 + size], at + 9 + size
        if kind in b"mpn":
            last = data.decode("utf-8", "surrogatepass")
        elif kind == b"v":
            found.metadata[last] = data.decode("utf-8", "surrogatepass")
        elif kind == b"f":
            found.files[last] = data
        elif kind == b"d":
            found.tensors[last] = data
        elif kind in b"el":
            found.levels[last] = data[0] if kind == b"e" else data
        elif kind == b"s" and data:
            found.levels[last] = found.levels[last], data
        elif kind == b"S":
            found = found._replace(status=data[0])
        elif kind == b"P":
            yield found._replace(peak=int.from_bytes(data, "little"))
            found = Found(0, 0, {}, {}, {}, {})
