"""Small models for the tests of what stands on the loader: verbs, facades, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.checkpoint import from_mapping
from weightvid.pack import PackOptions, pack_checkpoint

Arrays = dict[str, np.ndarray[Any, Any]]


def weights(seed: int, *shape: int, scale: float = 0.05) -> np.ndarray[Any, Any]:
    """Normal weights, float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def small() -> Arrays:
    """One frame: conv, linear, half, a tied name, exact tensors, 0-d, empty."""
    tied = weights(1, 96, 80)
    return {
        "conv.weight": weights(2, 32, 16, 3, 3),
        "conv.bias": weights(3, 32),
        "embed.weight": tied,
        "half.weight": weights(4, 40, 50).astype(np.float16),
        "head.weight": tied,
        "count": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
        "empty": np.empty((0, 4), np.float32),
    }


def several_frames() -> Arrays:
    """Some 1.3 million weights: two frames, of which the second begins within ``b``."""
    return {
        "a.weight": weights(5, 512, 1024),
        "b.weight": weights(6, 768, 1024),
        "c.weight": weights(7, 64, 64),
        "c.bias": weights(8, 64),
    }


def pack(arrays: Arrays, path: Path, **more: Any) -> Path:
    """Pack arrays as video, whatever their size, with metadata, by the fine recipe."""
    options = PackOptions(recipe="fine", jobs=1, force=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightvid.packing.write.TRIAL_WEIGHTS", 0)
        pack_checkpoint(from_mapping(arrays, metadata={"format": "test"}, **more), path, options)
    return path
