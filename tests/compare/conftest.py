"""Small models for comparisons, and comparisons of few points."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.compare.model import Model, load_model
from weightvid.compare.run import Comparison, Options
from weightvid.compare.sweep import Sweep


def heavy_tailed(seed: int, *shape: int) -> np.ndarray:
    """Weights with a few far outliers."""
    draw = np.random.default_rng(seed)
    found = draw.standard_normal(shape) * 0.05
    found.reshape(-1)[:: max(1, found.size // 3)] *= 30
    return found.astype(np.float32)


def arrays() -> dict[str, np.ndarray]:
    """Like layers, a convolution, other types, tensors that are no video."""
    return {
        "layers.0.weight": heavy_tailed(0, 64, 96),
        "layers.0.bias": heavy_tailed(1, 64),
        "layers.1.weight": heavy_tailed(2, 64, 96),
        "conv.weight": heavy_tailed(3, 16, 8, 3, 3),
        "half.weight": heavy_tailed(4, 40, 32).astype(np.float16),
        "double.weight": heavy_tailed(5, 20, 32).astype(np.float64),
        "count": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
        "empty": np.empty((0, 4), np.float32),
    }


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "model.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="session")
def model(model_path: Path) -> Model:
    return load_model(model_path)


#: a sweep of nothing; tests add what they need.
NOTHING: dict[str, Any] = {
    "codecs": ("none",), "quantizers": ("none",), "baselines": ("none",), "rates": (0.2,),
}  # fmt: skip


@pytest.fixture
def comparison(model_path: Path, tmp_path: Path) -> Callable[..., Comparison]:
    """A comparison of few points, with a cache of its own."""

    def make(sweep: dict[str, Any], **more: Any) -> Comparison:
        options = {"cache": tmp_path / "cache", **more}
        return Comparison(model_path, Options(Sweep(**{**NOTHING, **sweep}), **options))

    return make
