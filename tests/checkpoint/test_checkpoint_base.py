"""What all readers and writers have in common, and the reader over arrays in memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import weightvid
from weightvid.checkpoint import (
    Contents,
    TensorSpec,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.dtypes import name_of, pack_bits, stored_dtype, unpack_bits
from weightvid.errors import CheckpointError, OutputError, TensorNotFoundError

KINDS = ["safetensors", "npz"] + (["torch"] if importlib.util.find_spec("torch") else [])
TWO = Contents((TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "I8", ())))


@pytest.mark.parametrize("kind", KINDS)
class TestWriters:
    def test_missing_tensor(self, tmp_path: Path, kind: str) -> None:
        with (
            pytest.raises(CheckpointError, match="never written: b"),
            create_checkpoint(tmp_path / "x", TWO, kind=kind) as writer,
        ):
            writer.write("a", np.zeros((2, 3), np.float32))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "array", "error", "said"),
        [
            ("c", np.zeros(1), TensorNotFoundError, "no tensor 'c'"),
            ("a", np.zeros((3, 2), np.float32), CheckpointError, "announced as F32"),
            ("a", np.zeros((2, 3), np.float64), CheckpointError, "announced as F32"),
            ("a", np.zeros((2, 3), ">f4"), CheckpointError, "announced as F32"),
        ],
    )
    def test_wrong_tensor(
        self, tmp_path: Path, kind: str, name: str, array: np.ndarray, error: type, said: str
    ) -> None:
        with (
            pytest.raises(error, match=said),
            create_checkpoint(tmp_path / "x", TWO, kind=kind) as writer,
        ):
            writer.write(name, array)
        assert list(tmp_path.iterdir()) == []

    def test_written_twice(self, tmp_path: Path, kind: str) -> None:
        with (
            pytest.raises(CheckpointError, match="written before"),
            create_checkpoint(tmp_path / "x", TWO, kind=kind) as writer,
        ):
            writer.write("b", np.array(1, np.int8))
            writer.write("b", np.array(1, np.int8))

    def test_interrupted(self, tmp_path: Path, kind: str) -> None:
        with (
            pytest.raises(KeyboardInterrupt),
            create_checkpoint(tmp_path / "x", TWO, kind=kind) as writer,
        ):
            writer.write("b", np.array(1, np.int8))
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_existing_output(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"old")
        with pytest.raises(OutputError, match="exists already"):
            create_checkpoint(path, TWO, kind=kind)
        with create_checkpoint(path, TWO, kind=kind, force=True) as writer:
            writer.write("b", np.array(1, np.int8))
            writer.write("a", np.ones((3, 2), np.float32).T)
        with open_checkpoint(path) as reader:
            assert reader.read("a").tolist() == np.ones((2, 3)).tolist()

    def test_nothing_at_all(self, tmp_path: Path, kind: str) -> None:
        suffix = {"safetensors": ".safetensors", "npz": ".npz", "torch": ".pt"}[kind]
        with create_checkpoint(tmp_path / f"x{suffix}", Contents(())):
            pass
        with open_checkpoint(tmp_path / f"x{suffix}") as reader:
            assert reader.contents.tensors == ()

    def test_full_disk(self, tmp_path: Path, kind: str) -> None:
        code = f"""
        import resource, sys
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
            sys.exit(0)
        sys.exit(4)
        """
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(weightvid.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.startswith("cannot write out: File too large")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (Contents((TensorSpec("a", "F32", ()), TensorSpec("a", "F32", ()))), "two tensors"),
        (Contents((TensorSpec("a", "F33", ()),)), "F33"),
        (Contents((TensorSpec("a", "npy:|O", ()),)), "npy"),
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


def test_unknown_output_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="onnxx"):
        create_checkpoint(tmp_path / "x.npz", TWO, kind="onnxx")
    with pytest.raises(CheckpointError, match=r"what kind.*\.safetensors"):
        create_checkpoint(tmp_path / "x.tar", TWO)


class TestMapping:
    def test_reads_views_that_cannot_be_written(self) -> None:
        array = np.arange(6.0).reshape(2, 3)
        with from_mapping({"a": array, "t": array.T, "s": np.float16(2)}) as reader:
            assert [(spec.dtype, spec.shape) for spec in reader.contents.tensors] == [
                ("F64", (2, 3)),
                ("F64", (3, 2)),
                ("F16", ()),
            ]
            got = reader.read("a")
            assert np.shares_memory(got, array)
            assert not got.flags.writeable
            assert array.flags.writeable
            assert reader.read("t").flags.c_contiguous
            with pytest.raises(TensorNotFoundError, match="nope"):
                reader.read("nope")
        with pytest.raises(CheckpointError, match="closed"):
            reader.read("a")

    def test_aliases_need_the_same_look_and_elements(self) -> None:
        a = np.zeros((4, 4), np.uint16)
        empty = np.zeros(0)
        reader = from_mapping(
            {"a": a, "b": a.view(), "c": a[:2], "bf": a, "i": a.view(np.int16), "e": empty},
            dtypes={"bf": "BF16"},
        )
        assert reader.contents.aliases == {"b": "a"}
        assert from_mapping({"a": empty, "b": empty}).contents.aliases == {}
        assert from_mapping({"a": a, "b": a}).read("b").shape == (4, 4)

    @pytest.mark.parametrize(
        ("arrays", "dtypes", "said"),
        [
            ({1: np.zeros(1)}, {}, "strings"),
            ({"a": [1.0]}, {}, "list"),
            ({"a": np.array([None])}, {}, "object"),
            ({"a": np.zeros(1, "f4,f4")}, {}, "cannot be stored"),
            ({"a": np.zeros(1, "f4")}, {"a": "BF16"}, "BF16"),
        ],
    )
    def test_refused(self, arrays: dict, dtypes: dict, said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            from_mapping(arrays, dtypes=dtypes)


class TestDtypeNames:
    @pytest.mark.parametrize(
        "name", ["", "f32", "npy:", "npy:f4", "npy:|O8", "npy:<f4,<f4", "npy:(2,)<f4", "npy:<f3"]
    )
    def test_refused(self, name: str) -> None:
        with pytest.raises(CheckpointError):
            stored_dtype(name)

    @pytest.mark.parametrize("descr", [">f4", "<U7", "<M8[us]", "<m8[25s]", "|V9", "<M8", "<f16"])
    def test_numpy_only_names(self, descr: str) -> None:
        try:
            dtype = np.dtype(descr)
        except TypeError:
            pytest.skip("this machine has no such type")
        assert stored_dtype(name_of(dtype)) == dtype

    @pytest.mark.parametrize("name", ["F4", "F6_E2M3"])
    def test_sub_byte(self, name: str) -> None:
        array = np.random.default_rng(0).integers(0, 16, 40, dtype=np.uint8)
        packed = pack_bits(array, name)
        assert packed.size == (20 if name == "F4" else 30)
        assert unpack_bits(packed, name, 40).tolist() == array.tolist()
        with pytest.raises(CheckpointError, match="bits"):
            pack_bits(np.array([64], np.uint8), name)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, weightvid.checkpoint; print([m for m in ('torch', 'av') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
