"""Archive to checkpoint: names, types, pipes, and what happens to a broken archive."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import given
from hypothesis import strategies as st

from weightvid.checkpoint import open_checkpoint
from weightvid.dtypes import stored_dtype, to_float32
from weightvid.errors import (
    CheckpointError,
    FormatError,
    OutputError,
    TensorNotFoundError,
    TruncatedError,
)
from weightvid.loader import open_archive
from weightvid.spec import TensorSpec
from weightvid.unpack import UnpackOptions, convert, unpack_archive


class Pipe(io.RawIOBase):
    """A file that cannot seek and counts what is read."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.taken = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.taken += len(data)
        return data


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with open_checkpoint(path) as reader:
        names = [*(spec.name for spec in reader.contents.tensors), *reader.contents.aliases]
        return {name: reader.read(name).copy() for name in names}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.pack(small_models.small(), tmp_path_factory.mktemp("small") / "s.mp4")


@pytest.fixture(scope="module")
def long_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return small_models.pack(small_models.several_frames(), folder / "l.mp4")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_everything_comes_back(archive: Path, tmp_path: Path, suffix: str) -> None:
    report = unpack_archive(archive, tmp_path / f"out{suffix}")
    found = stored(tmp_path / f"out{suffix}")
    source = small_models.small()
    assert found.keys() == source.keys()
    assert report.tensors == len(source) - 1
    assert report.aliases == ("head.weight",)
    assert report.file_bytes == (tmp_path / f"out{suffix}").stat().st_size
    assert report.missing == ()
    assert report.defect is None
    with open_archive(archive) as opened:
        for name, array in found.items():
            assert array.dtype == source[name].dtype
            assert array.shape == source[name].shape
            assert array.tobytes() == opened.stored(name).tobytes()


def test_metadata_survives(archive: Path, tmp_path: Path) -> None:
    unpack_archive(archive, tmp_path / "out.safetensors")
    with open_checkpoint(tmp_path / "out.safetensors") as reader:
        assert reader.contents.metadata == {"format": "test"}


def test_what_the_kind_cannot_hold_is_noted(archive: Path, tmp_path: Path) -> None:
    notes = unpack_archive(archive, tmp_path / "out.npz").notes
    assert any("metadata" in note for note in notes)
    assert any("tied" in note for note in notes)


def test_ties_come_back_in_torch_files(archive: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    unpack_archive(archive, tmp_path / "out.pt")
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_kind_may_be_named(archive: Path, tmp_path: Path) -> None:
    unpack_archive(archive, tmp_path / "out", UnpackOptions(kind="npz"))
    assert stored(tmp_path / "out").keys() == small_models.small().keys()


def test_selection_brings_aliases_along(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    report = unpack_archive(archive, path, UnpackOptions(tensors=("embed.*", "c*.bias")))
    assert stored(path).keys() == {"embed.weight", "head.weight", "conv.bias"}
    assert report.aliases == ("head.weight",)


def test_pattern_of_an_alias_brings_the_data_under_its_name(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    unpack_archive(archive, path, UnpackOptions(tensors=("head.*",)))
    found = stored(path)
    assert found.keys() == {"head.weight"}
    with open_archive(archive) as opened:
        assert np.array_equal(found["head.weight"], opened["embed.weight"])


def test_pattern_that_matches_nothing_is_an_error(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(TensorNotFoundError, match="'nothing"):
        unpack_archive(archive, tmp_path / "o.npz", UnpackOptions(tensors=("conv.*", "nothing.*")))
    assert not list(tmp_path.iterdir())


def test_selection_reads_no_other_frames(long_archive: Path, tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    file = Counting(long_archive.read_bytes())
    unpack_archive(file, tmp_path / "c.npz", UnpackOptions(tensors=("c.weight",)))
    with open_archive(long_archive) as opened:
        first = opened.index.frames[0]
    assert file.taken < len(file.getvalue()) - first.fragment_bytes


def test_pipe_gives_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    unpack_archive(archive, tmp_path / "file.safetensors")
    unpack_archive(Pipe(archive.read_bytes()), tmp_path / "pipe.safetensors")
    assert (tmp_path / "file.safetensors").read_bytes() == (
        tmp_path / "pipe.safetensors"
    ).read_bytes()


def test_pipe_is_left_when_the_selection_is_complete(long_archive: Path, tmp_path: Path) -> None:
    pipe = Pipe(long_archive.read_bytes())
    unpack_archive(pipe, tmp_path / "a.npz", UnpackOptions(tensors=("a.weight",)))
    assert stored(tmp_path / "a.npz").keys() == {"a.weight"}
    assert pipe.taken < long_archive.stat().st_size


@pytest.mark.parametrize("from_pipe", [False, True])
def test_cut_archive_leaves_no_output(long_archive: Path, tmp_path: Path, from_pipe: bool) -> None:
    data = long_archive.read_bytes()[:-2000]
    source = Pipe(data) if from_pipe else io.BytesIO(data)
    with pytest.raises(TruncatedError) as caught:
        unpack_archive(source, tmp_path / "out.npz")
    assert "c.bias" in caught.value.missing
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("from_pipe", [False, True])
def test_partial_writes_what_is_whole(long_archive: Path, tmp_path: Path, from_pipe: bool) -> None:
    with open_archive(long_archive) as opened:
        cut = opened.index.frames[1].end - 100
    data = long_archive.read_bytes()[:cut]
    source = Pipe(data) if from_pipe else io.BytesIO(data)
    report = unpack_archive(source, tmp_path / "out.npz", UnpackOptions(partial=True))
    assert stored(tmp_path / "out.npz").keys() == {"a.weight"}
    assert set(report.missing) == {"b.weight", "c.weight", "c.bias"}
    assert report.defect is not None
    assert report.defect.code == "truncated"


def test_whole_selection_of_a_cut_archive_is_no_error(long_archive: Path, tmp_path: Path) -> None:
    with open_archive(long_archive) as opened:
        cut = opened.index.frames[1].end - 100
    source = io.BytesIO(long_archive.read_bytes()[:cut])
    report = unpack_archive(source, tmp_path / "a.npz", UnpackOptions(tensors=("a.*",)))
    assert report.missing == ()


def test_partial_goes_on_behind_damage(long_archive: Path, tmp_path: Path) -> None:
    with open_archive(long_archive) as opened:
        middle = opened.index.frames[0].end - 1000
    data = bytearray(long_archive.read_bytes())
    data[middle] ^= 0x55
    with pytest.raises(FormatError):
        unpack_archive(io.BytesIO(data), tmp_path / "out.npz")
    report = unpack_archive(io.BytesIO(data), tmp_path / "out.npz", UnpackOptions(partial=True))
    assert report.missing == ("a.weight", "b.weight")
    assert stored(tmp_path / "out.npz").keys() == {"c.weight", "c.bias"}


def test_existing_output_needs_force(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        unpack_archive(archive, path)
    assert path.read_bytes() == b"precious"
    unpack_archive(archive, path, UnpackOptions(force=True))
    assert len(stored(path)) == len(small_models.small())


def test_archive_is_not_written_over_itself(archive: Path, tmp_path: Path) -> None:
    link = tmp_path / "model.npz"
    link.symlink_to(archive)
    with pytest.raises(CheckpointError, match="itself"):
        unpack_archive(archive, link, UnpackOptions(force=True))
    assert archive.read_bytes()[4:8] == b"ftyp"


def test_progress_ends_at_the_total(archive: Path, tmp_path: Path) -> None:
    seen = []
    unpack_archive(archive, tmp_path / "out.npz", progress=seen.append)
    assert {p.stage for p in seen} == {"decode"}
    assert seen[-1].done == seen[-1].total


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_floats_are_converted_and_nothing_else(archive: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "out.safetensors"
    report = unpack_archive(archive, path, UnpackOptions(dtype=dtype))
    with open_checkpoint(path) as reader:
        types = {spec.name: spec.dtype for spec in reader.contents.tensors}
    assert types["count"] == "I64"
    assert types["mask"] == "BOOL"
    assert {types[name] for name in types if name not in ("count", "mask")} == {dtype}
    assert ("half.weight" in report.converted) == (dtype != "F16")


def test_unknown_type_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="INT4"):
        unpack_archive(archive, tmp_path / "out.npz", UnpackOptions(dtype="INT4"))


def test_overflow_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    big = {"big": np.array([1.0, 70000.0, np.inf], np.float32)}
    path = small_models.pack(big, tmp_path / "big.mp4")
    with pytest.raises(CheckpointError, match=r"'big'.*F16.*1 of its elements"):
        unpack_archive(path, tmp_path / "out.npz", UnpackOptions(dtype="F16"))
    assert not (tmp_path / "out.npz").exists()


@given(st.lists(st.floats(width=32), max_size=20), st.sampled_from(["F16", "BF16", "F64"]))
def test_convert_rounds_to_nearest_and_keeps_what_is_not_finite(
    numbers: list[float], dtype: str
) -> None:
    source = np.array(numbers, np.float32)
    spec = TensorSpec("w", "F32", source.shape)
    try:
        made = convert(source, spec, dtype)
    except CheckpointError:
        limit = {"F16": 65504.0, "BF16": 3.3e38}[dtype]
        assert np.abs(source[np.isfinite(source)]).max() > limit
        return
    assert made.dtype == stored_dtype(dtype)
    back = to_float32(made, dtype)
    assert np.array_equal(np.isnan(back), np.isnan(source))
    finite = np.isfinite(source)
    assert np.array_equal(back[~finite & ~np.isnan(source)], source[~finite & ~np.isnan(source)])
    bits = {"F16": 11, "BF16": 8, "F64": 53}[dtype]
    least = {"F16": 2.0**-25, "BF16": 2.0**-134, "F64": 0.0}[dtype]
    error = np.abs(back[finite].astype(np.float64) - source[finite])
    assert (
        error <= np.maximum(np.abs(source[finite].astype(np.float64)) * 2.0**-bits, least)
    ).all()
