"""Quantizers of the research: what they encode comes back, and they are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small_models

from weightvid.checkpoint import from_mapping
from weightvid.compare.model import Model, load_model
from weightvid.compare.research import SCHEMES, research_methods
from weightvid.compare.research.scalar import decode, encode
from weightvid.compare.rows import measure
from weightvid.levels.transform import view_of

pytest.importorskip("constriction", reason="the entropy coder is a package of its own")


@pytest.fixture(scope="module")
def model() -> Model:
    arrays = small_models.small()
    arrays["wide.weight"] = small_models.weights(5, 24, 20, 5, 3)
    arrays["depthwise.weight"] = small_models.weights(6, 40, 1, 3, 3)
    arrays["odd.weight"] = small_models.weights(7, 37, 1)
    return load_model(from_mapping(arrays))


@pytest.mark.parametrize("size", [0, 1, 7, 1000, 40_000])
def test_entropy_coder(size: int) -> None:
    chance = np.random.default_rng(size)
    contexts = chance.integers(0, 4, size)
    symbols = np.rint(chance.laplace(-3, 0.2 + 2 * contexts, size)).astype(np.int64)
    data = encode(symbols, contexts)
    found, rest = decode(data + b"rest", contexts)
    assert np.array_equal(found, symbols)
    assert rest == b"rest"
    bits = 0.0
    for context in range(4):
        counts = np.unique(symbols[contexts == context], return_counts=True)[1]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    assert len(data) < bits / 8 * 1.02 + 400


@pytest.mark.parametrize("method", list(research_methods()), ids=lambda method: method.name)
def test_methods(model: Model, method: Any) -> None:
    rows = [measure(model, method, value) for value in (0.35, 1.4)]
    assert [row.message for row in rows] == ["", ""]
    assert all(row.sqnr_db is not None and row.sqnr_db > 3 for row in rows)
    # With few clusters the step only says what is zero.
    assert "LNQ" in method.name or rows[0].file_bytes > rows[1].file_bytes


def test_lossless_methods_give_the_levels_of_uniform(model: Model) -> None:
    matrices = [np.asarray(x, np.float64) for x in model.matrices().values()]
    views = [view_of(x.shape) for x in matrices]
    shaped = [x.reshape(v.rows, v.channels, -1) for x, v in zip(matrices, views, strict=True)]
    scaled = [x / 0.02 for x in shaped]
    names = (
        "uniform, fixed length", "uniform", "kernel prediction", "pyramid 3x3", "pyramid 5x5",
        "pyramid, predictive",
    )  # fmt: skip
    for name in names:
        scheme = SCHEMES[name]
        found = scheme.decode(scheme.encode(scaled, views), views)
        assert all(np.array_equal(a, np.rint(b)) for a, b in zip(found, scaled, strict=True)), name


def test_prediction_finds_kernels_that_repeat() -> None:
    kernels = np.rint(np.random.default_rng(0).normal(0, 20, (20, 9)))
    layer = kernels[np.random.default_rng(1).integers(0, 20, 900)]
    layer[::2] *= -1
    shaped, views = [layer.reshape(30, 30, 9)], [view_of((30, 30, 3, 3))]
    plain = SCHEMES["uniform"].encode(shaped, views)
    predicted = SCHEMES["kernel prediction"]
    data = predicted.encode(shaped, views)
    assert len(data) < len(plain) / 2
    assert np.array_equal(predicted.decode(data, views)[0], shaped[0])


def test_lnq_keeps_zeros_and_few_values() -> None:
    weights = small_models.weights(3, 16, 128)
    weights[np.abs(weights) < np.abs(weights).mean()] = 0
    step = float(np.abs(weights).mean()) / 8
    shaped, views = [weights.astype(np.float64)[..., None] / step], [view_of(weights.shape)]
    for name, most in (("LNQ 2", 3), ("LNQ 4, fixed length", 5)):
        scheme = SCHEMES[name]
        found = scheme.decode(scheme.encode(shaped, views), views)[0]
        assert (found[shaped[0] == 0] == 0).all()
        assert max(len(np.unique(row)) for row in found[..., 0]) <= most
