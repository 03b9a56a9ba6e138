"""Small models for the tests of what stands on the loader: verbs, facades, reports."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.checkpoint import from_mapping
from weightvid.levels.frames import FrameSize
from weightvid.pack import PackOptions, pack_checkpoint

Arrays = dict[str, np.ndarray[Any, Any]]


def weights(seed: int, *shape: int, scale: float = 0.05) -> np.ndarray[Any, Any]:
    """Normal weights, float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def small() -> Arrays:
    """Conv, linear, half, a tied name, exact tensors, 0-d, empty."""
    tied = weights(1, 96, 80)
    return {
        "conv.weight": weights(2, 32, 16, 1, 1) + weights(9, 32, 16, 3, 3, scale=0.01),
        "conv.bias": weights(3, 32),
        "embed.weight": tied,
        "half.weight": weights(4, 40, 50).astype(np.float16),
        "head.weight": tied,
        "count": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
        "empty": np.empty((0, 4), np.float32),
    }


def several_frames() -> Arrays:
    """Some 110,000 weights; see `pack`: three frames, of which the second begins within ``b``."""
    return {
        "a.weight": weights(5, 128, 300),
        "b.weight": weights(6, 192, 320),
        "c.weight": weights(7, 96, 128),
        "c.bias": weights(8, 64),
    }


def pack(arrays: Arrays, path: Path, dtypes: Any = None) -> Path:
    """Pack arrays in frames of 256 x 192, with metadata, by the fine recipe."""
    options = PackOptions(recipe="fine", jobs=1, force=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        from_mapping(arrays, dtypes=dtypes, metadata={"format": "test"}) as reader,
    ):
        patch.setattr("weightvid.pack.choose_frame_size", lambda _: FrameSize(256, 192))
        pack_checkpoint(reader, path, options)
    return path


class Pipe(io.BytesIO):
    """A file that cannot seek and counts what is read."""

    taken = 0

    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation("seek")

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data
