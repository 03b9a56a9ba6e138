"""What all readers and writers have in common, and the reader over arrays in memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save
from hypothesis import given
from hypothesis import strategies as st

import weightvid
from weightvid.checkpoint import (
    Contents,
    TensorSpec,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.errors import CheckpointError, OutputError, TensorNotFoundError
from weightvid.spec import pack_bits, unpack_bits

pytest.importorskip("torch")

KINDS = ("safetensors", "npz", "torch", "folder", "gguf")
TWO = Contents((TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "I8", ())))


@pytest.mark.parametrize("kind", KINDS)
class TestWriters:
    @pytest.mark.parametrize(
        ("name", "array", "error", "said"),
        [
            ("b", np.array(1, np.int8), CheckpointError, "never written: a"),
            ("c", np.zeros(1), TensorNotFoundError, "no tensor 'c'"),
            ("a", np.zeros((3, 2), np.float32), CheckpointError, "announced as F32"),
            ("a", np.zeros((2, 3), np.float64), CheckpointError, "announced as F32"),
            ("a", np.zeros((2, 3), ">f4"), CheckpointError, "announced as F32"),
        ],
    )
    def test_wrong_tensor(
        self, tmp_path: Path, kind: str, name: str, array: Any, error: type, said: str
    ) -> None:
        with (
            pytest.raises(error, match=said),
            create_checkpoint(tmp_path / "x", TWO, kind=kind) as writer,
        ):
            writer.write(name, array)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError])
    def test_interrupted(self, tmp_path: Path, kind: str, error: type[BaseException]) -> None:
        with (
            pytest.raises(error),
            create_checkpoint(tmp_path / "x", TWO, kind=kind) as writer,
        ):
            writer.write("b", np.array(1, np.int8))
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            writer.write("b", np.array(1, np.int8))  # written before
        assert list(tmp_path.iterdir()) == []

    def test_existing_output(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "x"
        if kind == "folder":
            path.mkdir()
        (path / "model.bin" if kind == "folder" else path).write_bytes(b"old")
        with pytest.raises(OutputError, match=r"exists already|is not empty"):
            create_checkpoint(path, TWO, kind=kind)
        with create_checkpoint(path, TWO, kind=kind, force=True) as writer:
            buffer = np.array(1, np.int8)
            writer.write("b", buffer)
            buffer[()] = 2  # the writer has its own copy
            writer.write("a", np.ones((3, 2), np.float32).T)
        with open_checkpoint(path) as reader:
            assert reader.read("a").tolist() == np.ones((2, 3)).tolist()
            assert reader.read("b").reshape(-1).tolist() == [1]

    def test_parts_in_and_ranges_out(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "model"
        source = from_mapping(arrays())
        with create_checkpoint(path, source.contents, kind=kind) as writer:
            for spec in source.contents.tensors:
                writer.write_parts(spec.name, parts_of(source.read(spec.name), 11))
        with open_checkpoint(path) as reader:
            assert reader.location == str(path)
            for name, array in arrays().items():
                flat = reader.read(name).reshape(-1)
                assert np.allclose(flat, array.reshape(-1), rtol=1e-3)
                third = flat.size // 3
                for first, count in ((0, flat.size), (third, third), (flat.size, 0)):
                    found = reader.read_range(name, first, count)
                    assert found.dtype == flat.dtype
                    assert np.array_equal(found, flat[first : first + count])

    @pytest.mark.parametrize("count", [0, 12, 209, 211, 400])
    def test_too_few_or_too_many_elements(self, tmp_path: Path, kind: str, count: int) -> None:
        source = from_mapping({"a": arrays()["a"]})
        with (
            pytest.raises(CheckpointError, match="'a'"),
            create_checkpoint(tmp_path / "x", source.contents, kind=kind) as writer,
        ):
            writer.write_parts("a", parts_of(np.zeros(count, np.float32), 50))
        assert list(tmp_path.iterdir()) == []

    def test_full_disk(self, tmp_path: Path, kind: str) -> None:
        code = f"""
        import resource
        import numpy as np
        from weightvid.checkpoint import Contents, TensorSpec, create_checkpoint
        from weightvid.errors import OutputError
        spec = TensorSpec("a", "F32", (1000, 1000))
        if {kind!r} == "torch":
            import torch
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            with create_checkpoint("out", Contents((spec,)), kind={kind!r}) as writer:
                writer.write("a", np.zeros(spec.shape, np.float32))
        except OutputError as error:
            print(error)
        """
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(weightvid.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.stderr == ""
        assert ran.stdout.startswith("cannot write ")
        assert os.strerror(errno.EFBIG) in ran.stdout
        assert list(tmp_path.iterdir()) == []


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return {
        "a": random.standard_normal((7, 30)).astype(np.float32),
        "half": random.standard_normal((5, 4, 3)).astype(np.float16),
        "count": np.array(3, np.int64),
        "empty": np.empty((0, 3), np.float32),
        "long": np.arange(1000, dtype=np.int64),
    }


def parts_of(array: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
    flat = array.reshape(-1)
    return (flat[first : first + size] for first in range(0, flat.size, size))


@given(first=st.integers(-3, 220), count=st.integers(-3, 220))
def test_ranges_that_leave_a_tensor_are_refused(first: int, count: int) -> None:
    reader = from_mapping(arrays())
    if first >= 0 and count >= 0 and first + count <= 210:
        assert reader.read_range("a", first, count).size == count
        return
    with pytest.raises(CheckpointError, match="210 elements"):
        reader.read_range("a", first, count)


@pytest.mark.parametrize("end", ["close", "stop"])
def test_reading_ends(tmp_path: Path, end: str) -> None:
    save(tmp_path / "m.safetensors", from_mapping(arrays()))
    with open_checkpoint(tmp_path / "m.safetensors") as reader:
        known = reader.read("a")
        with pytest.raises(TensorNotFoundError, match="nothing"):
            reader.read("nothing")
        getattr(reader, end)()
        for read in (lambda: reader.read("a"), lambda: reader.read_range("a", 0, 1)):
            with pytest.raises(CheckpointError, match="closed"):
                read()
    assert np.array_equal(known, arrays()["a"])


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (Contents((TensorSpec("a", "F32", ()), TensorSpec("a", "F32", ()))), "two tensors"),
        (Contents((TensorSpec("a", "F33", ()),)), "F33"),
        (Contents((TensorSpec("a", "F32", (-1,)),)), "impossible shape"),
        (Contents((TensorSpec("a", "F32", (1,) * 70),)), "impossible shape"),
        (Contents((TensorSpec("a", "F32", (2**40, 2**40, 0)),)), "impossible shape"),
        (Contents((TensorSpec("a", "F32", ()),), {"a": "a"}), "alias"),
        (Contents((TensorSpec("a", "F32", ()),), {"b": "c"}), "no tensor"),
        (Contents((), metadata={"epoch": 3}), "text pairs"),  # type: ignore[dict-item]
    ],
)
def test_impossible_contents(tmp_path: Path, contents: Contents, said: str) -> None:
    for kind in KINDS:
        with pytest.raises(CheckpointError, match=said):
            create_checkpoint(tmp_path / "x", contents, kind=kind)
    assert list(tmp_path.iterdir()) == []


def test_views_that_cannot_be_written() -> None:
    array = np.arange(6.0).reshape(2, 3)
    with from_mapping({"a": array, "t": array.T, "s": np.float16(2)}) as reader:
        assert [(s.dtype, s.shape) for s in reader.contents.tensors] == [
            ("F64", (2, 3)), ("F64", (3, 2)), ("F16", ()),
        ]  # fmt: skip
        got = reader.read("a")
        assert np.shares_memory(got, array)
        assert (got.flags.writeable, array.flags.writeable) == (False, True)
        assert reader.read("t").flags.c_contiguous


def test_aliases_need_the_same_look_and_elements() -> None:
    a, empty = np.zeros((4, 4), np.uint16), np.zeros(0)
    views = {"a": a, "b": a.view(), "c": a[:2], "bf": a, "i": a.view(np.int16), "e": empty}
    reader = from_mapping({**views, "e2": empty}, dtypes={"bf": "BF16"})
    assert reader.contents.aliases == {"b": "a"}
    assert reader.read("b").shape == (4, 4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({1: np.zeros(1)}, "strings"),
        ({"a": [1.0]}, "list"),
        ({"a": np.array([None])}, "object"),
        ({"a": np.zeros(1, "f4,f4")}, "cannot be stored"),
        ({"bf": np.zeros(1, "f4")}, "BF16"),
    ],
)
def test_no_arrays(values: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        from_mapping(values, dtypes={"bf": "BF16"})


@pytest.mark.parametrize(("name", "size"), [("F4", 20), ("F6_E2M3", 30)])
def test_sub_byte_elements(name: str, size: int) -> None:
    array = np.random.default_rng(0).integers(0, 16, 40, dtype=np.uint8)
    packed = pack_bits(array, name)
    assert packed.size == size
    assert unpack_bits(packed, name, 40).tolist() == array.tolist()
    with pytest.raises(CheckpointError, match="bits"):
        pack_bits(np.array([64], np.uint8), name)


def test_what_a_kind_needs_is_imported_with_it(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", from_mapping(arrays()))
    code = (
        "import sys; from weightvid.checkpoint import open_checkpoint; "
        "open_checkpoint('m.safetensors').close(); print(*sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    found = set(ran.stdout.split())
    assert found.isdisjoint({"torch", "onnx", "gguf", "fsspec", "huggingface_hub"})
    ours = {name for name in found if name.startswith("weightvid.checkpoint.")}
    assert ours == {"weightvid.checkpoint.base", "weightvid.checkpoint.safetensors"}


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [("n" * 4097, (3,), "longer than 4096 bytes"), ("w", (1,) * 33, "has 33 axes")],
)
def test_what_an_archive_has_no_room_for(
    tmp_path: Path, name: str, shape: tuple[int, ...], said: str
) -> None:
    """It is refused before any work: nothing reads the weights."""
    from weightvid.pack import PackOptions, pack_checkpoint

    with from_mapping({name: np.zeros(shape, np.float32)}) as reader:
        reader.stop()
        with pytest.raises(CheckpointError, match=said):
            pack_checkpoint(reader, tmp_path / "m.mp4", PackOptions(verify=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["npz", "torch", "gguf"])
@pytest.mark.parametrize("change", [9, 70_000, -9])
def test_files_too_long_and_too_short(tmp_path: Path, kind: str, change: int) -> None:
    path = tmp_path / "model"
    save(path, from_mapping({"w": np.ones((8, 96), np.float32)}), kind)
    open_checkpoint(path).close()
    data = path.read_bytes()
    path.write_bytes(data + bytes(change) if change > 0 else data[:change])
    if kind == "gguf" and change == 9:  # less than its padding
        open_checkpoint(path).close()
        return
    with pytest.raises(CheckpointError, match=r"longer|too long|cut short|damaged|shorter"):
        open_checkpoint(path)
