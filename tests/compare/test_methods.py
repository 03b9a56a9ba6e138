"""Ways to store a model: codecs on frames, plain integers, GGUF, peers."""

from __future__ import annotations

import lzma
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid.checkpoint import from_mapping
from weightvid.compare.codecs import CODECS, FrameCodec, backend, through
from weightvid.compare.model import Model, load_model
from weightvid.compare.rivals import peer_methods, plain_methods
from weightvid.compare.rows import measure
from weightvid.compare.video import llm265_method, pictures
from weightvid.errors import CodecError


def scheduling() -> int | None:
    return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None


def frames(count: int = 2) -> list[Any]:
    """Noise around gray, as levels are."""
    noise = np.random.default_rng(0).laplace(128, 3, (count, 192, 256))
    return list(np.rint(noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def model() -> Model:
    arrays = small_models.small()
    arrays["nan.weight"] = np.full((8, 8), np.nan, np.float32)
    arrays["logit_scale"] = np.array(4.6, np.float32)
    return load_model(from_mapping(arrays))


@pytest.mark.parametrize("codec", list(CODECS.values()), ids=list(CODECS))
def test_codecs_keep_their_word(codec: FrameCodec) -> None:
    if backend(codec) is None:
        pytest.skip(f"neither PyAV nor an ffmpeg program has {codec.encoder}")
    shown, before = frames(), scheduling()
    if codec.lossless is not None:
        passage = through(shown, codec, codec.preset)
        assert all(np.array_equal(a, b) for a, b in zip(shown, passage.lumas, strict=True))
        assert 2 < 8 * passage.size / np.size(shown) < 7
    if codec.lossy is not None:
        sizes, errors = [], []
        for value in codec.values[1:3]:
            passage = through(shown, codec, codec.preset, value)
            error = np.subtract(passage.lumas, shown, dtype=np.float64)
            sizes.append(passage.size)
            errors.append(float(np.square(error).mean()))
            # Far from a gray picture; and samples are rounded without moving every weight.
            assert errors[-1] < 0.8 * np.var(shown)
            assert abs(error.mean()) < (0.05 if codec.pixel_format == "yuv420p10le" else 0.3)
        assert sizes[0] > sizes[1]
        assert errors[0] < errors[1]
    assert scheduling() == before  # SVT-AV1 would leave a real-time process behind


def test_options_are_filled_in() -> None:
    found = CODECS["x265"].options("slow", 14)
    assert found["preset"] == "slow"
    assert found["x265-params"].endswith(":qp=14")
    assert CODECS["kvazaar"].options("fast", None)["kvazaar-params"].endswith(",lossless=1")


def test_options_of_ones_own() -> None:
    codec = CODECS["x265"].with_options("rd=6:tskip=1")
    assert ":rd=6:tskip=1" in codec.options("slow", None)["x265-params"]
    assert CODECS["kvazaar"].with_options("rd=2").common["kvazaar-params"].endswith(",rd=2")
    assert CODECS["png"].with_options("pred=none").common["pred"] == "none"
    finer = through(frames(), codec, "superfast")
    assert finer.size != through(frames(), CODECS["x265"], "superfast").size


def test_llm265_turns_and_turns_back(model: Model) -> None:
    method = llm265_method()
    if method.missing:
        pytest.skip(method.missing)
    rows = [measure(model, method, value) for value in method.values]
    assert [row.message for row in rows] == [""] * len(rows)
    assert [r.file_bytes for r in rows] == sorted((r.file_bytes for r in rows), reverse=True)
    qualities = [row.sqnr_db or 0.0 for row in rows]
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[0] > 20


def test_codecs_that_fail_say_so() -> None:
    unknown = FrameCodec("none", "libnone", {})
    with pytest.raises(CodecError, match="libnone"):
        through(frames(), unknown, "")
    wrong = FrameCodec("x265", "libx265", {"x265-params": "qp=x"}, pixel_format="no such")
    with pytest.raises(CodecError, match="libx265 failed"):
        through(frames(), wrong, "")


def test_pictures_restore_the_archive(model: Model, tmp_path: Path) -> None:
    shown = pictures(tmp_path, model, 0.2, "outputs")
    restored = shown.restore(shown.lumas)
    assert set(restored) == set(model.tensors)
    sqnr = model.sqnr_db(restored)
    assert sqnr is not None and 15 < sqnr < 35
    assert shown.other_bytes > 0
    assert 0 < shown.entropy_bytes() < sum(luma.size for luma in shown.lumas)
    before = [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    pictures(tmp_path, model, 0.2, "outputs")
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == before


def test_bfloat16_is_compared_as_float32(tmp_path: Path) -> None:
    bits = (small_models.weights(3, 60, 80).view(np.uint32) >> 16).astype(np.uint16)
    model = load_model(from_mapping({"a.weight": bits}, dtypes={"a.weight": "BF16"}))
    assert model.tensors["a.weight"].dtype == np.float32
    shown = pictures(tmp_path, model, 0.2, "outputs")
    sqnr = model.sqnr_db(shown.restore(shown.lumas))
    assert sqnr is not None and 15 < sqnr < 35


@pytest.mark.parametrize("method", list(plain_methods()), ids=lambda method: method.name)
def test_plain_ways(model: Model, method: Any) -> None:
    if method.missing:
        pytest.skip(method.missing)
    rows = [measure(model, method, value) for value in method.values]
    assert [row.message for row in rows] == [""] * len(rows)
    qualities = [math.inf if row.sqnr_db is None else row.sqnr_db for row in rows]
    assert all(quality > 6 for quality in qualities)
    sizes = [row.file_bytes for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert qualities == sorted(qualities, reverse=True)


def test_integers_per_channel_are_what_they_say() -> None:
    weights = np.array([[127.0, -2.0], [0.0, 0.0], [63.5, 1.0]], np.float32)
    model = load_model(from_mapping({"a.weight": weights}))
    method = next(plain_methods())
    coded = method.code(model, 8)
    assert coded.tensors["a.weight"].tolist() == [[127.0, -2.0], [0.0, 0.0], [63.5, 1.0]]
    levels = np.array([[127, -2], [0, 0], [127, 2]], np.int8)
    scales = np.array([1.0, 0.0, 0.5], np.float32)
    data = lzma.compress(levels.tobytes() + scales.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    assert coded.file_bytes == len(data)


def test_matrices_are_finite_floats(model: Model) -> None:
    assert set(model.matrices()) == {"conv.weight", "embed.weight", "half.weight"}
    assert model.state(model.tensors)["head.weight"] is not model.tensors["embed.weight"]


def test_nncodec_by_another_python(model: Model) -> None:
    python = os.environ.get("WEIGHTVID_NNCODEC")
    if not python:
        pytest.skip("WEIGHTVID_NNCODEC is not set: it names a Python that has NNCodec")
    arrays = {"a.weight": small_models.weights(1, 64, 96), "n": np.array([3, 4])}
    small = load_model(from_mapping(arrays))
    for method in peer_methods(python, (-30,), (-30,)):
        row = measure(small, method, -30.0)
        assert row.message == ""
        assert row.sqnr_db is not None and row.sqnr_db > 15
