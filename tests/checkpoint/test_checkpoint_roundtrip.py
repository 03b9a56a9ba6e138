"""What goes into a checkpoint comes out of it, bit for bit, whatever the kind."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from weightvid.checkpoint import (
    CheckpointReader,
    Contents,
    TensorSpec,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.dtypes import PACKABLE, RAW_BITS, STORED, SUB_BYTE, stored_dtype, to_float32
from weightvid.errors import CheckpointError

KINDS = {"safetensors": ".safetensors", "npz": ".npz", "torch": ".pt"}
NUMPY_ONLY = ("npy:<U3", "npy:|S4", "npy:>f4", "npy:>i8", "npy:<M8[ns]", "npy:<m8[25s]", "npy:|V2")
LACKS = {
    "safetensors": {"C128", "C32", *NUMPY_ONLY},
    "npz": set(),
    "torch": {"F6_E2M3", "F6_E3M2", *NUMPY_ONLY},
}


NEEDS_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


def kind_param() -> list[object]:
    return [pytest.param(kind, marks=[NEEDS_TORCH] if kind == "torch" else []) for kind in KINDS]


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Every bit pattern a dtype may have: NaN payloads, infinities, denormals."""
    stored = stored_dtype(dtype)
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
    raw = rng.integers(0, 256, count, dtype=np.uint8)
    if dtype in SUB_BYTE:
        raw &= (1 << SUB_BYTE[dtype]) - 1
    elif dtype == "BOOL":
        raw &= 1
    elif stored.kind in "US":
        raw = rng.choice(np.frombuffer(b"abcxyz", np.uint8), count)
        if stored.kind == "U":
            raw = raw.view("<u4") & 0x7F
            return raw.view(stored).reshape(shape)
    return raw.view(stored).reshape(shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def through(path: Path, source: CheckpointReader, kind: str | None = None) -> CheckpointReader:
    with create_checkpoint(path, source.contents, kind=kind) as writer:
        for spec in reversed(source.contents.tensors):
            writer.write(spec.name, source.read(spec.name))
    return open_checkpoint(path)


def expected(kind: str, dtype: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if kind == "npz" and dtype == "BF16":
        return "F32", np.asarray(to_float32(array, "BF16"))
    if kind == "npz" and dtype in RAW_BITS:
        return f"U{8 * array.itemsize}", array
    return dtype, array


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=[NEEDS_TORCH] if kind == "torch" else [])
        for kind in KINDS
        for dtype in (*STORED, *NUMPY_ONLY)
        if dtype not in LACKS[kind]
    ],
)
def test_every_dtype(tmp_path: Path, kind: str, dtype: str) -> None:
    shapes = [(3, 4), (0, 2), (5, 0), (2, 1, 3, 4), (8,)]
    if dtype not in SUB_BYTE:
        shapes += [(), (7,), (1,)]
    arrays = {f"t{i}": random_bits(dtype, shape, i) for i, shape in enumerate(shapes)}
    source = from_mapping(arrays, dtypes=dict.fromkeys(arrays, dtype))
    with through(tmp_path / f"x{KINDS[kind]}", source) as back:
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
def checkpoints(draw: st.DrawFn, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    names = TEXT.filter(lambda name: "\0" not in name) if kind == "npz" else TEXT
    dtypes = {}
    arrays = {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(set(STORED) - LACKS[kind])))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        if dtype in SUB_BYTE:
            shape = (*shape, 8)
        arrays[name] = random_bits(dtype, shape, draw(st.integers(0, 2**32)))
        dtypes[name] = dtype
    return arrays, dtypes


@pytest.mark.parametrize("kind", kind_param())
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_checkpoint(kind: str, data: st.DataObject) -> None:
    arrays, dtypes = data.draw(checkpoints(kind))
    metadata = data.draw(st.dictionaries(TEXT, TEXT, max_size=3))
    source = from_mapping(arrays, dtypes=dtypes, metadata=metadata)
    with tempfile.TemporaryDirectory() as folder:
        with through(Path(folder) / f"x{KINDS[kind]}", source) as back:
            names = {spec.name for spec in back.contents.tensors}
            assert names == set(arrays)
            if kind == "safetensors":
                assert dict(back.contents.metadata) == metadata
            for name, array in arrays.items():
                want, bits = expected(kind, dtypes[name], array)
                assert back.spec(name).dtype == want
                assert same_bits(back.read(name), bits)
        assert [item.name for item in Path(folder).iterdir()] == [f"x{KINDS[kind]}"]


@pytest.mark.parametrize("kind", kind_param())
def test_every_bfloat16(tmp_path: Path, kind: str) -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    source = from_mapping({"w": bits}, dtypes={"w": "BF16"})
    with through(tmp_path / f"x{KINDS[kind]}", source) as back:
        got = back.read("w")
        if kind == "npz":
            assert got.dtype == np.float32
            got = (got.view(np.uint32) >> 16).astype(np.uint16)
        assert same_bits(got, bits)


@pytest.mark.parametrize("kind", kind_param())
def test_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    for dtype in LACKS[kind]:
        contents = Contents((TensorSpec("layer.w", dtype, (2, 4)),))
        with pytest.raises(CheckpointError, match=r"layer\.w"):
            create_checkpoint(tmp_path / f"x{KINDS[kind]}", contents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", kind_param())
def test_same_contents_same_bytes(tmp_path: Path, kind: str) -> None:
    arrays = {f"t{i}": random_bits("F32", (i, 3), i) for i in range(4)}
    source = from_mapping(arrays)
    for name in ("a", "b"):
        through(tmp_path / f"{name}{KINDS[kind]}", source).close()
    one, two = ((tmp_path / f"{name}{KINDS[kind]}").read_bytes() for name in ("a", "b"))
    assert one == two


@pytest.mark.parametrize("kind", kind_param())
def test_aliases(tmp_path: Path, kind: str) -> None:
    weights = random_bits("F32", (4, 6), 1)
    source = from_mapping({"a": weights, "head": weights, "t": weights.T, "v": weights[:2]})
    assert source.contents.aliases == {"head": "a"}
    path = tmp_path / f"x{KINDS[kind]}"
    with through(path, source) as back:
        assert same_bits(back.read("head"), weights)
        assert same_bits(back.read("t"), weights.T)
        assert dict(back.contents.aliases) == ({"head": "a"} if kind == "torch" else {})
    with create_checkpoint(path, source.contents, force=True) as writer:
        assert any("head" in note for note in writer.notes) == (kind != "torch")
        for spec in source.contents.tensors:
            writer.write(spec.name, source.read(spec.name))


@pytest.mark.parametrize("kind", kind_param())
def test_packable_types_are_held_by_all(kind: str) -> None:
    assert not PACKABLE & LACKS[kind]


@pytest.mark.parametrize("kind", kind_param())
def test_the_writer_keeps_its_own_copy(tmp_path: Path, kind: str) -> None:
    spec = tuple(TensorSpec(name, "F32", (2,)) for name in "ab")
    buffer = np.ones(2, np.float32)
    with create_checkpoint(tmp_path / "x", Contents(spec), kind=kind) as writer:
        writer.write("a", buffer)
        buffer[:] = 2
        writer.write("b", buffer)
    with open_checkpoint(tmp_path / "x") as back:
        assert back.read("a").tolist() == [1, 1]
        assert back.read("b").tolist() == [2, 2]
