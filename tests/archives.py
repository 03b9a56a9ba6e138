"""Builds small archives for tests, and takes archives apart."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.checkpoint import create_checkpoint, from_mapping
from weightvid.dtypes import to_float32
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.tile import FrameGeometry

Arrays = Mapping[str, np.ndarray[Any, Any]]


def packed(
    arrays: Arrays,
    options: PackOptions | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Bytes of the archive of these arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mp4"
        pack_checkpoint(from_mapping(arrays, dtypes=dtypes, metadata=metadata), path, options)
        return path.read_bytes()


def normal(seed: int, *shape: int, scale: float = 0.1) -> np.ndarray[Any, Any]:
    """Normal weights, float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def sample_arrays() -> dict[str, np.ndarray[Any, Any]]:
    """A little of everything: several frames, outliers, exact tensors, an alias."""
    weights = normal(1, 70, 130)
    weights[3, 5] = 17.5
    tied = normal(2, 40, 33)
    return {
        "a.weight": weights,
        "a.bias": normal(3, 70),
        "b.weight": tied,
        "count": np.array(7, np.int64),
        "c.weight": normal(4, 300, 129),
        "tied": tied,
        "d.weight": normal(5, 20, 9, 3, 3),
        "e.weight": normal(6, 64, 500).astype(np.float16),
        "empty": np.empty((0, 4), np.float32),
        "mask": np.array([True, False, True]),
        "f.weight": normal(7, 200, 257),
    }


@dataclass(frozen=True, slots=True)
class Span:
    """A box: its kind, where it begins and ends, and where its payload begins."""

    kind: bytes
    begin: int
    end: int
    payload: int


def spans(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[Span]:
    """Boxes of a byte string, one level deep; parsed here, not by the code under test."""
    stop = len(data) if end is None else end
    while begin < stop:
        size, kind = int.from_bytes(data[begin : begin + 4], "big"), data[begin + 4 : begin + 8]
        assert 8 <= size <= stop - begin
        inner = begin + 8
        if kind == b"uuid":
            kind, inner = data[inner : inner + 16], inner + 16
        yield Span(kind, begin, begin + size, inner)
        begin += size


def first(data: bytes, kind: bytes) -> Span:
    """First top-level box of a kind."""
    return next(span for span in spans(data) if span.kind == kind)


def child(data: bytes, path: Iterable[bytes]) -> Span:
    """Box at a path of kinds; skips the fields before the children of stsd and hvc1."""
    begin, end, found = 0, len(data), None
    for kind in path:
        found = next(span for span in spans(data, begin, end) if span.kind == kind)
        begin = found.payload + {b"stsd": 8, b"hvc1": 78}.get(kind, 0)
        end = found.end
    assert found is not None
    return found


class Pipe(io.RawIOBase):
    """Bytes that can be read once, in pieces of odd sizes, and not be sought in."""

    def __init__(self, data: bytes, piece: int = 1 << 16) -> None:
        super().__init__()
        self._data = data
        self._piece = piece
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation("seek")

    def read(self, size: int = -1) -> bytes:
        count = self._piece if size < 0 else min(size, self._piece)
        found = self._data[self.at : self.at + count]
        self.at += len(found)
        return found


def natural(array: np.ndarray[Any, Any], dtype: str | None = None) -> np.ndarray[Any, Any]:
    """What the loader gives for stored elements: BF16 as float32."""
    return to_float32(array, "BF16") if dtype == "BF16" else array


def same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays have one dtype, shape and bytes."""
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


@contextmanager
def small_frames(width: int = 256, height: int = 256) -> Iterator[None]:
    """Archives packed meanwhile have frames of this size, so that small models fill several."""

    def choose(_: int) -> FrameGeometry:
        return FrameGeometry(width, height)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightvid.tile.choose_geometry", choose)
        yield


def save(arrays: Arrays, path: Path) -> Path:
    """Write a checkpoint, of the kind that its name tells."""
    source = from_mapping(arrays)
    with create_checkpoint(path, source.contents) as writer:
        for spec in source.contents.tensors:
            writer.write(spec.name, source.read(spec.name))
    return path
