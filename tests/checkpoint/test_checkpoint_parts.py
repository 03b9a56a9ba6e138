"""Reading ranges of tensors, and writing tensors in parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.checkpoint import create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import CheckpointError, OutputError, TensorNotFoundError

SUFFIXES = (".safetensors", ".npz", ".pt", "")


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
    for first in range(0, flat.size, size):
        yield flat[first : first + size]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parts_in_and_ranges_out(tmp_path: Path, suffix: str) -> None:
    if suffix == ".pt":
        pytest.importorskip("torch")
    source = from_mapping(arrays())
    path = tmp_path / f"model{suffix}"
    with create_checkpoint(path, source.contents) as writer:
        for spec in source.contents.tensors:
            writer.write_parts(spec.name, parts_of(source.read(spec.name), 11))
    with open_checkpoint(path) as reader:
        assert reader.location == str(path)
        for name, array in arrays().items():
            assert np.array_equal(reader.read(name), array)
            flat = array.reshape(-1)
            for first, count in ((0, flat.size), (flat.size // 3, flat.size // 2), (flat.size, 0)):
                found = reader.read_range(name, first, count)
                assert found.dtype == array.dtype
                assert np.array_equal(found, flat[first : first + count])


@given(first=st.integers(-3, 220), count=st.integers(-3, 220))
def test_ranges_that_leave_a_tensor_are_refused(first: int, count: int) -> None:
    reader = from_mapping(arrays())
    if first >= 0 and count >= 0 and first + count <= 210:
        assert reader.read_range("a", first, count).size == count
        return
    with pytest.raises(CheckpointError, match="210 elements"):
        reader.read_range("a", first, count)


def test_ranges_of_a_closed_reader(tmp_path: Path) -> None:
    reader = from_mapping(arrays())
    with pytest.raises(TensorNotFoundError):
        reader.read_range("nothing", 0, 1)
    reader.close()
    with pytest.raises(CheckpointError, match="closed"):
        reader.read_range("a", 0, 1)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ""])
@pytest.mark.parametrize("count", [0, 12, 209, 211, 400])
def test_too_few_or_too_many_elements(tmp_path: Path, suffix: str, count: int) -> None:
    source = from_mapping({"a": arrays()["a"]})
    numbers = np.zeros(count, np.float32)
    with (
        pytest.raises(CheckpointError, match="'a'"),
        create_checkpoint(tmp_path / f"model{suffix}", source.contents) as writer,
    ):
        writer.write_parts("a", parts_of(numbers, 50))
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_type(tmp_path: Path) -> None:
    source = from_mapping({"a": arrays()["a"]})
    with (
        pytest.raises(CheckpointError, match="announced"),
        create_checkpoint(tmp_path / "model.safetensors", source.contents) as writer,
    ):
        writer.write_parts("a", [np.zeros(210, np.float64)])


def test_tied_tensors_in_parts(tmp_path: Path) -> None:
    tied = arrays()["a"]
    source = from_mapping({"a": tied, "b": tied})
    path = tmp_path / "model.safetensors"
    with create_checkpoint(path, source.contents) as writer:
        writer.write_parts("a", parts_of(tied, 64))
    with open_checkpoint(path) as reader:
        assert np.array_equal(reader.read("b"), tied)


def test_nothing_is_removed_under_a_part_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are written by a thread beside; what goes wrong meanwhile waits for it."""
    written: list[str] = []

    def slow(self: Any, spec: Any, first: int, part: Any) -> None:
        sleep(0.2)
        self._output.file.seek(first)
        written.append("part")

    def broken() -> Iterator[np.ndarray[Any, Any]]:
        yield np.zeros(100, np.float32)
        written.append("failure")
        raise ValueError("the source broke")

    source = from_mapping({"a": arrays()["a"]})
    monkeypatch.setattr("weightvid.checkpoint.safetensors._SafetensorsWriter._write_part", slow)
    with (
        pytest.raises(ValueError, match="the source broke"),
        create_checkpoint(tmp_path / "x.safetensors", source.contents) as writer,
    ):
        writer.write_parts("a", broken())
    assert written == ["failure", "part"]
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OutputError("no space is left")

    source = from_mapping({"a": arrays()["a"]})
    monkeypatch.setattr("weightvid.checkpoint.safetensors._SafetensorsWriter._write_part", full)
    with (
        pytest.raises(OutputError, match="no space"),
        create_checkpoint(tmp_path / "x.safetensors", source.contents) as writer,
    ):
        writer.write_parts("a", parts_of(arrays()["a"], 50))
    assert list(tmp_path.iterdir()) == []
