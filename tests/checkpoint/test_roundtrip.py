"""What goes into a checkpoint comes out of it, bit for bit, whatever the kind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from checkpoints import save
from hypothesis import given, settings

from weightvid.checkpoint import (
    Contents,
    TensorSpec,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.errors import CheckpointError
from weightvid.loader import DTYPES, PACKABLE, to_float32
from weightvid.spec import RAW_BITS, SUB_BYTE, stored_dtype

pytest.importorskip("torch")

KINDS = {"safetensors": ".safetensors", "npz": ".npz", "torch": ".pt"}
LACKS: dict[str, set[str]] = {
    "safetensors": {"C128", "C32"},
    "npz": set(),
    "torch": {"F6_E2M3", "F6_E3M2"},
}


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Every bit pattern a dtype may have: NaN payloads, infinities, denormals."""
    stored = stored_dtype(dtype)
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
    raw = rng.integers(0, 256, count, dtype=np.uint8)
    if dtype in SUB_BYTE:
        raw &= (1 << SUB_BYTE[dtype]) - 1
    elif dtype == "BOOL":
        raw &= 1
    return raw.view(stored).reshape(shape)


def same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def expected(kind: str, dtype: str, array: np.ndarray[Any, Any]) -> tuple[str, Any]:
    if kind == "npz" and dtype == "BF16":
        return "F32", np.asarray(to_float32(array, "BF16"))
    if kind == "npz" and dtype in RAW_BITS:
        return f"U{8 * array.itemsize}", array
    return dtype, array


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, dtype) for k in KINDS for dtype in DTYPES if dtype not in LACKS[k]],
)
def test_every_dtype(tmp_path: Path, kind: str, dtype: str) -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (0, 2), (5, 0), (2, 1, 3, 4), (8,)]
    if dtype not in SUB_BYTE:
        shapes += [(), (7,), (1,)]
    arrays = {f"t{i}": random_bits(dtype, shape, i) for i, shape in enumerate(shapes)}
    path = tmp_path / f"x{KINDS[kind]}"
    save(path, from_mapping(arrays, dtypes=dict.fromkeys(arrays, dtype)))
    with open_checkpoint(path) as back:
        assert back.contents.skipped == ()
        assert {spec.name for spec in back.contents.tensors} == set(arrays)
        for spec in back.contents.tensors:
            name, array = expected(kind, dtype, arrays[spec.name])
            assert (spec.dtype, spec.shape) == (name, array.shape)
            got = back.read(spec.name)
            assert got.flags.c_contiguous
            assert same_bits(got, array)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def checkpoints(draw: st.DrawFn, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    names = TEXT.filter(lambda name: "\0" not in name) if kind == "npz" else TEXT
    dtypes, arrays = {}, {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(set(DTYPES) - LACKS[kind])))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        if dtype in SUB_BYTE:
            shape = (*shape, 8)
        arrays[name] = random_bits(dtype, shape, draw(st.integers(0, 2**32)))
        dtypes[name] = dtype
    return arrays, dtypes


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30)
def test_any_checkpoint(kind: str, data: st.DataObject) -> None:
    arrays, dtypes = data.draw(checkpoints(kind))
    metadata = data.draw(st.dictionaries(TEXT, TEXT, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{KINDS[kind]}"
        save(path, from_mapping(arrays, dtypes=dtypes, metadata=metadata))
        with open_checkpoint(path) as back:
            assert {spec.name for spec in back.contents.tensors} == set(arrays)
            if kind == "safetensors":
                assert dict(back.contents.metadata) == metadata
            for name, array in arrays.items():
                want, bits = expected(kind, dtypes[name], array)
                assert back.spec(name).dtype == want
                assert same_bits(back.read(name), bits)
        assert list(Path(folder).iterdir()) == [path]


@pytest.mark.parametrize("kind", KINDS)
def test_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    assert not PACKABLE & LACKS[kind]
    for dtype in LACKS[kind]:
        contents = Contents((TensorSpec("layer.w", dtype, (2, 4)),))
        with pytest.raises(CheckpointError, match=r"layer\.w"):
            create_checkpoint(tmp_path / f"x{KINDS[kind]}", contents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_aliases_and_the_same_bytes_again(tmp_path: Path, kind: str) -> None:
    weights = random_bits("F32", (4, 6), 1)
    source = from_mapping({"a": weights, "head": weights, "t": weights.T, "v": weights[:2]})
    assert source.contents.aliases == {"head": "a"}
    path, again = tmp_path / f"x{KINDS[kind]}", tmp_path / f"again{KINDS[kind]}"
    for one in (path, again):
        notes = save(one, source)
        assert any("head" in note for note in notes) == (kind != "torch")
    assert path.read_bytes() == again.read_bytes()
    with open_checkpoint(path) as back:
        assert same_bits(back.read("head"), weights)
        assert same_bits(back.read("t"), weights.T)
        assert dict(back.contents.aliases) == ({"head": "a"} if kind == "torch" else {})


SMALL = {"a": random_bits("F32", (3,), 1), "b": random_bits("I8", (2, 2), 2)}


@pytest.mark.parametrize("kind", [*KINDS, "gguf", "onnx", "legacy"])
@given(cut=st.none() | st.floats(0, 1), flips=st.lists(st.floats(0, 1), min_size=1, max_size=3))
@settings(max_examples=60)
def test_damage_is_an_error_or_harmless(kind: str, cut: float | None, flips: list[float]) -> None:
    """A file that is cut short somewhere, or has a few flipped bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        if kind == "legacy":
            torch = pytest.importorskip("torch")
            state = {name: torch.from_numpy(array) for name, array in SMALL.items()}
            torch.save(state, path, _use_new_zipfile_serialization=False)
        elif kind == "onnx":
            onnx = pytest.importorskip("onnx")
            tensors = [onnx.numpy_helper.from_array(array, name) for name, array in SMALL.items()]
            onnx.save(
                onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)), path
            )
        else:
            save(path, from_mapping(SMALL), kind)
        data = bytearray(path.read_bytes())
        if cut is None:
            for flip in flips:
                at = min(int(flip * 8 * len(data)), 8 * len(data) - 1)
                data[at // 8] ^= 1 << at % 8
        else:
            del data[min(int(cut * len(data)), len(data) - 1) :]
        path.write_bytes(data)
        try:
            with open_checkpoint(path) as reader:
                for spec in reader.contents.tensors:
                    got = reader.read(spec.name)
                    assert got.shape == spec.shape
                    if kind == "npz":  # a checksum guards the data
                        assert got.tobytes() == SMALL.get(spec.name, got).tobytes()
        except CheckpointError as error:
            assert "\n" not in str(error)
