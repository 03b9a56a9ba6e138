"""Archives for the tests of the loader: cached, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import fuzz_archives as fuzz
import numpy as np
import small_models

from weightvid.loader import open_archive
from weightvid.pack import PackOptions

Array = np.ndarray[Any, Any]


@cache
def sample() -> bytes:
    """Four frames, all kinds of records: `fuzz_archives.model` says what is in it."""
    return fuzz.sample()


@cache
def integers() -> bytes:
    """The same tensors as plain integers times a step."""
    return fuzz.sample(PackOptions(fidelity="integers", jobs=1))


@cache
def tensors() -> Mapping[str, Array]:
    """All of `sample`, each checked by its hash."""
    with open_archive(sample(), check_tensors=True) as archive:
        return dict(archive.items())


class Pipe(small_models.Pipe):
    """One that gives a few bytes at a time."""

    def __init__(self, data: bytes, piece: int = 1 << 16) -> None:
        super().__init__(data)
        self._piece = piece

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, self._piece))


def same(found: Array, expected: Array) -> bool:
    """Whether two arrays have one dtype, shape and bytes."""
    kinds = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return kinds and found.tobytes() == expected.tobytes()


def all_same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> bool:
    """Whether two mappings hold the same tensors."""
    return found.keys() == expected.keys() and all(same(found[n], expected[n]) for n in expected)
