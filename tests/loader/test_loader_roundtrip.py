"""Pack and load: every dtype and shape, random access, levels, pipes."""

from __future__ import annotations

import hashlib
import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import Pipe, first, natural, normal, packed, same, sample_arrays, small_frames
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.dtypes import PACKABLE, STORED, from_float32, to_float32
from weightvid.errors import FormatError, TensorNotFoundError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions
from weightvid.quantize import UniformParams

Array = np.ndarray[Any, Any]

#: scalar quantization, and every tensor kept as it is unless it becomes video.
PLAIN = PackOptions(states=0, shaping=False, mantissa_bits=23)


def load(data: bytes) -> dict[str, Array]:
    with open_archive(io.BytesIO(data), check_tensors=True) as archive:
        return dict(archive)


@cache
def sample() -> bytes:
    with small_frames():
        return packed(sample_arrays(), metadata={"format": "pt", "ключ": "значение"})


def check(arrays: dict[str, Array], data: bytes, dtypes: dict[str, str] | None = None) -> None:
    """Exact tensors are equal; quantized ones are what their levels and steps say."""
    with open_archive(io.BytesIO(data), check_tensors=True) as archive:
        assert set(archive.names) == set(arrays)
        streamed = dict(open_archive(Pipe(data, 777)))  # type: ignore[arg-type]
        for name, array in arrays.items():
            info, found, kind = archive.info(name), archive[name], (dtypes or {}).get(name)
            assert info.shape == found.shape == array.shape
            assert same(streamed[name], found)
            if info.coding == "exact" or info.params is None:
                assert same(found, natural(array, kind))
                continue
            assert info.dtype in PACKABLE
            levels = archive.levels(name)
            assert levels.levels.shape == array.shape
            if not isinstance(info.params, UniformParams) or info.params.shifts is not None:
                continue
            values = np.float32(levels.levels) * np.float32(info.params.step)
            stored = from_float32(values, info.dtype)
            assert same(found, natural(stored, kind))
            assert len(info.sha256) >= 32
            assert hashlib.sha256(stored.tobytes()).hexdigest().startswith(info.sha256)
            exact = to_float32(array, info.dtype).astype(np.float64)
            error = np.abs(values.astype(np.float64) - exact)
            # Rounding is aware of the rate: it may take the second nearest level, no farther one.
            assert np.all(error <= 1.001 * info.params.step + np.abs(exact) * 2.0**-20)


shapes = st.one_of(
    st.just(()),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 130), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.data_too_large])
@given(
    st.lists(
        st.tuples(
            shapes,
            st.sampled_from(sorted(PACKABLE)),
            st.sampled_from(["normal", "zero", "constant", "outlier", "nan", "inf", "tiny"]),
        ),
        max_size=5,
    ),
    st.integers(0, 1 << 30),
)
def test_round_trip_of_anything(wanted: list[tuple[Any, str, str]], seed: int) -> None:
    arrays, dtypes = {}, {}
    for number, (shape, dtype, kind) in enumerate(wanted):
        values = normal(seed + number, *shape).reshape(shape)
        flat = values.reshape(-1)
        if kind in ("zero", "constant"):
            flat[...] = 0.0 if kind == "zero" else 0.37
        elif kind == "tiny":
            flat *= np.float32(1e-30)
        elif flat.size and kind != "normal":
            flat[flat.size // 2] = {"outlier": 17.5, "nan": np.nan, "inf": -np.inf}[kind]
        arrays[f"t{number}"] = from_float32(values, dtype)
        dtypes[f"t{number}"] = dtype
    check(arrays, packed(arrays, PLAIN, dtypes=dtypes), dtypes)


@settings(max_examples=8)
@given(st.sampled_from([0, 4, 8, 64]), st.integers(2, 150), st.integers(2, 150), st.booleans())
def test_round_trip_of_every_quantizer(states: int, rows: int, columns: int, wild: bool) -> None:
    weights = normal(rows, rows, columns)
    if wild:
        weights[rows // 2, columns // 2] = 20.0
    check({"w": weights}, packed({"w": weights}, PackOptions(states=states)))


@pytest.mark.parametrize("dtype", sorted(STORED))
def test_every_dtype(dtype: str) -> None:
    rng = np.random.default_rng(1)
    stored = STORED[dtype]
    arrays = {
        "w": rng.integers(0, 2, (20, 30)).astype(stored),
        "scalar": np.ones((), stored),
        "empty": np.empty((3, 0, 2), stored),
    }
    dtypes = dict.fromkeys(arrays, dtype)
    data = packed(arrays, PackOptions(keep=("*",)), dtypes=dtypes)
    with open_archive(io.BytesIO(data)) as archive:
        for name, array in arrays.items():
            assert archive.spec(name).dtype == dtype
            assert same(archive.stored(name), array)
            expected = to_float32(array, "BF16") if dtype == "BF16" else array
            assert same(archive[name], expected)


def test_numpy_only_types() -> None:
    arrays = {
        "big": np.arange(300, dtype=">f4").reshape(20, 15),
        "text": np.array(["a", "βγ"], "<U4"),
        "date": np.array(["2024-01-01"], "<M8[D]"),
    }
    found = load(packed(arrays))
    for name, array in arrays.items():
        assert same(found[name], array)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_outliers_at_175_sigma(dtype: str) -> None:
    values = normal(5, 100, 120)
    sigma = float(values.std())
    values[7, 11], values[99, 119], values[0, 0] = 175 * sigma, -175 * sigma, 60 * sigma
    arrays = {"w": from_float32(values, dtype)}
    data = packed(arrays, PLAIN, dtypes={"w": dtype})
    check(arrays, data, {"w": dtype})
    with open_archive(io.BytesIO(data)) as archive:
        levels = archive.levels("w").levels
        assert abs(int(levels[7, 11])) > 127
        assert int(levels[99, 119]) < -127


def test_many_tiny_tensors() -> None:
    rng = np.random.default_rng(2)
    arrays = {f"layer.{i}.p": rng.standard_normal(i % 7).astype(np.float32) for i in range(1500)}
    found = load(packed(arrays, PLAIN))
    assert list(arrays) == sorted(found, key=list(arrays).index)
    assert all(same(found[name], array) for name, array in arrays.items())


def test_odd_names() -> None:
    arrays = {name: normal(1, 3) for name in ("", "\0", "a/b", "模型.重み", "x" * 4000, "a\nb")}
    found = load(packed(arrays, PLAIN))
    assert all(same(found[name], array) for name, array in arrays.items())


def test_an_empty_model() -> None:
    data = packed({})
    with open_archive(io.BytesIO(data)) as archive:
        assert archive.names == ()
        assert list(archive) == []
        assert archive.complete


def test_a_tensor_across_many_frames() -> None:
    weights = normal(9, 300, 1500)
    with small_frames():
        data = packed({"a": normal(1, 20, 20), "w": weights, "b": normal(2, 30, 30)}, PLAIN)
    check({"a": normal(1, 20, 20), "w": weights, "b": normal(2, 30, 30)}, data)
    with open_archive(io.BytesIO(data)) as archive:
        assert len(archive.frames_of("w")) >= 7
        assert archive.info("w").frames == archive.frames_of("w")


def test_aliases_share_one_array() -> None:
    with open_archive(io.BytesIO(sample())) as archive:
        assert archive.info("tied").alias_of == "b.weight"
        found = dict(archive)
        assert found["tied"] is found["b.weight"]
        assert same(archive["tied"], archive["b.weight"])
        assert "tied" in archive
        assert len(archive) == len(sample_arrays())
        assert dict(archive.header.metadata) == {"format": "pt", "ключ": "значение"}


def test_random_access_equals_sequential() -> None:
    with open_archive(io.BytesIO(sample()), check_tensors=True) as archive:
        expected = dict(archive)
        assert set(expected) == set(archive.names)
        for name in reversed(archive.names):
            assert same(archive[name], expected[name])
        assert {name: array.tobytes() for name, array in archive} == {
            name: array.tobytes() for name, array in expected.items()
        }


@pytest.mark.parametrize("threads", [1, 2])
def test_access_while_iterating(tmp_path: Path, threads: int) -> None:
    """Each iteration keeps its own place in the file."""
    path = tmp_path / "model.mp4"
    with small_frames():
        path.write_bytes(packed({f"w{i}": normal(i, 128, 512) for i in range(9)}, PLAIN))
    with open_archive(path, threads=threads) as archive:
        expected = dict(archive)
        for (name, array), (other, _) in zip(archive, archive, strict=True):
            assert name == other
            assert same(array, expected[name])
            assert archive.info("w4").shape == (128, 512)
            assert same(archive["w7"], expected["w7"])


def test_levels_of_exact_tensors_do_not_exist() -> None:
    with open_archive(io.BytesIO(sample())) as archive:
        with pytest.raises(TensorNotFoundError):
            archive.levels("count")
        for call in (archive.levels, archive.info, archive.spec, archive.stored, archive.frames_of):
            with pytest.raises(TensorNotFoundError):
                call("nowhere")
        with pytest.raises(LookupError):
            archive["nowhere"]
        assert "nowhere" not in archive


def test_a_pipe_gives_the_same_once() -> None:
    with open_archive(io.BytesIO(sample())) as archive:
        expected = dict(archive)
    for piece in (1, 13, 4096, 1 << 20):
        archive = open_archive(Pipe(sample(), piece))  # type: ignore[arg-type]
        assert archive.complete is None
        found = dict(archive)
        assert list(found) == list(expected)
        assert all(same(found[name], expected[name]) for name in expected)
        with pytest.raises(FormatError, match="not-seekable"):
            next(iter(archive))
        with pytest.raises(FormatError, match="not-seekable"):
            archive["a.weight"]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_first_tensor_before_half_the_file(threads: int) -> None:
    with small_frames():
        data = packed({f"l{i}": normal(i, 100, 640) for i in range(12)}, PLAIN)
    pipe = Pipe(data)
    name, _ = next(iter(open_archive(pipe, threads=threads)))  # type: ignore[arg-type]
    assert name == "l0"
    assert pipe.at < len(data) / 2


def test_access_reads_little_more_than_the_frames() -> None:
    with small_frames(512, 512):
        data = packed({f"l{i}": normal(i, 256, 2048) for i in range(4)}, PackOptions(states=0))
    archive = open_archive(io.BytesIO(data))
    entries = [archive.index.frames[number] for number in archive.frames_of("l2")]
    own = sum(entry.sidecar_bytes + entry.fragment_bytes for entry in entries)
    index = first(data, b"weightvid-index\0")
    tail = len(data) - index.begin
    head = archive.bytes_read
    assert archive.reads <= 3
    before = archive.bytes_read
    archive["l2"]
    assert archive.bytes_read - before <= 1.001 * own
    assert head + archive.bytes_read - before <= 1.02 * (own + tail) + 2 * 4096


def test_breaking_off_leaves_nothing_behind() -> None:
    for _ in range(20):
        for _ in open_archive(io.BytesIO(sample()), threads=4):
            break


def test_paths_are_opened_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "model.mp4"
    path.write_bytes(sample())
    with open_archive(path) as archive:
        expected = archive["a.weight"]
    stream = io.BytesIO(sample())
    with open_archive(stream) as archive:
        assert same(archive["a.weight"], expected)
    assert not stream.closed
    with pytest.raises(FileNotFoundError):
        open_archive(tmp_path / "none.mp4")
