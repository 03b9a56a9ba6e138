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
from independent import sources

from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.errors import (
    CheckpointError,
    CodecError,
    FormatError,
    OutputError,
    TensorNotFoundError,
    TruncatedError,
)
from weightvid.loader import TensorSpec, open_archive, to_float32
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.spec import stored_dtype
from weightvid.unpack import UnpackOptions, convert, unpack_archive


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with open_checkpoint(path) as reader:
        return {name: reader.read(name).copy() for name, _ in reader.contents.rows()}


def frame_end(path: Path, tensor: str) -> int:
    """Where the last frame of a tensor ends."""
    with open_archive(path) as opened:
        assert opened.index is not None
        offset, size = opened.index.frames[opened.info(tensor).frames[-1]]
        return offset + size


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_everything_comes_back(archive: Path, tmp_path: Path, suffix: str) -> None:
    seen: list[Any] = []
    report = unpack_archive(archive, tmp_path / f"out{suffix}", progress=seen.append)
    assert {p.stage for p in seen} == {"decode"}
    assert (seen[-1].done, seen[-1].done_bytes) == (seen[-1].total, seen[-1].total_bytes)
    found = stored(tmp_path / f"out{suffix}")
    source = small_models.small()
    assert found.keys() == source.keys()
    assert report.tensors == len(source) - 1
    assert report.aliases == ("head.weight",)
    assert report.file_bytes == (tmp_path / f"out{suffix}").stat().st_size
    assert (report.missing, report.defect) == ((), None)
    with open_archive(archive) as opened:
        for name, array in found.items():
            assert array.dtype == source[name].dtype
            assert array.shape == source[name].shape
            assert array.tobytes() == opened.stored(name).tobytes()


def test_metadata_survives_and_what_cannot_be_held_is_noted(archive: Path, tmp_path: Path) -> None:
    unpack_archive(archive, tmp_path / "out.safetensors")
    with open_checkpoint(tmp_path / "out.safetensors") as reader:
        assert reader.contents.metadata == {"format": "test"}
    notes = unpack_archive(archive, tmp_path / "out.npz").notes
    assert any("metadata" in note for note in notes)
    assert any("tied" in note for note in notes)


def test_ties_come_back_in_torch_files(archive: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    unpack_archive(archive, tmp_path / "out.pt", UnpackOptions(kind="torch"))
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_folder_gets_the_side_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": small_models.weights(1, 64, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    pack_checkpoint(folder, tmp_path / "m.mp4", PackOptions(jobs=1))
    report = unpack_archive(tmp_path / "m.mp4", tmp_path / "out")
    assert report.side_files == ("config.json",)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    (tmp_path / "out" / "mine").write_bytes(bytes(1000))
    again = unpack_archive(tmp_path / "m.mp4", tmp_path / "out", UnpackOptions(force=True))
    files = [tmp_path / "out" / name for name in ("model.safetensors", "config.json")]
    assert again.file_bytes == report.file_bytes == sum(file.stat().st_size for file in files)
    notes = unpack_archive(tmp_path / "m.mp4", tmp_path / "m.npz").notes
    assert any("config.json" in note for note in notes)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("embed.*", "c*.bias"), {"embed.weight", "head.weight", "conv.bias"}),
        (("head.*",), {"head.weight"}),
        (("count", "half.*"), {"count", "half.weight"}),
    ],
)
def test_selection(
    archive: Path, tmp_path: Path, patterns: tuple[str, ...], names: set[str]
) -> None:
    path = tmp_path / "out.npz"
    report = unpack_archive(archive, path, UnpackOptions(tensors=patterns))
    found = stored(path)
    assert found.keys() == names
    assert report.tensors + len(report.aliases) == len(names)
    with open_archive(archive) as opened:
        for name in names:
            assert found[name].tobytes() == opened.stored(name).tobytes()


def test_selection_reads_no_other_frames(long_archive: Path, tmp_path: Path) -> None:
    class Counting(small_models.Pipe):
        seekable, seek = io.BytesIO.seekable, io.BytesIO.seek

    file = Counting(long_archive.read_bytes())
    unpack_archive(file, tmp_path / "c.npz", UnpackOptions(tensors=("c.weight",)))
    with open_archive(long_archive) as opened:
        assert opened.index is not None
        assert file.taken < len(file.getvalue()) - opened.index.frames[0][1]


def test_pipes(long_archive: Path, tmp_path: Path) -> None:
    unpack_archive(long_archive, tmp_path / "file.safetensors")
    unpack_archive(small_models.Pipe(long_archive.read_bytes()), tmp_path / "pipe.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("file", "pipe")]
    assert files[0] == files[1]
    # A pipe is left when the selection is complete.
    pipe = small_models.Pipe(long_archive.read_bytes())
    unpack_archive(pipe, tmp_path / "a.npz", UnpackOptions(tensors=("a.weight",)))
    assert stored(tmp_path / "a.npz").keys() == {"a.weight"}
    assert pipe.taken < long_archive.stat().st_size


@pytest.mark.parametrize("from_pipe", [False, True])
def test_cut_archive(long_archive: Path, tmp_path: Path, from_pipe: bool) -> None:
    cut = frame_end(long_archive, "a.weight")
    data = long_archive.read_bytes()[: cut + 500]

    def source() -> Any:
        return small_models.Pipe(data) if from_pipe else io.BytesIO(data)

    with pytest.raises(TruncatedError) as caught:
        unpack_archive(source(), tmp_path / "out.npz")
    assert "c.bias" in caught.value.missing
    assert not list(tmp_path.iterdir())
    report = unpack_archive(source(), tmp_path / "out.npz", UnpackOptions(partial=True))
    assert stored(tmp_path / "out.npz").keys() == {"a.weight"}
    assert set(report.missing) == {"b.weight", "c.weight", "c.bias"}
    assert report.defect is not None
    assert report.defect.code == "truncated"
    # Nothing that is asked for is missing.
    report = unpack_archive(source(), tmp_path / "a.npz", UnpackOptions(tensors=("a.*",)))
    assert report.missing == ()


def test_partial_goes_on_behind_damage(long_archive: Path, tmp_path: Path) -> None:
    data = bytearray(long_archive.read_bytes())
    with open_archive(long_archive) as opened:
        first, last = (opened.info(f"{name}.weight").frames for name in "ac")
        assert first[0] < last[0]
        assert opened.index is not None
        offset, size = opened.index.frames[0]
    data[offset + size - 1000] ^= 0x55
    with pytest.raises((FormatError, CodecError)):
        unpack_archive(io.BytesIO(data), tmp_path / "out.npz")
    assert not list(tmp_path.iterdir())
    report = unpack_archive(io.BytesIO(data), tmp_path / "out.npz", UnpackOptions(partial=True))
    assert "a.weight" in report.missing
    assert stored(tmp_path / "out.npz").keys() >= {"c.weight", "c.bias"}


def test_damage_costs_rows_of_a_tensor_of_many_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightvid.levels.code.PART_WEIGHTS", 64 * 300)
    source = {"table": small_models.weights(1, 2000, 64), "other": small_models.weights(2, 64, 64)}
    with sources.small_frames(), from_mapping(source) as checkpoint:
        pack_checkpoint(checkpoint, tmp_path / "a.mp4", PackOptions(jobs=1))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    with open_archive(bytes(data)) as opened:
        whole = opened["table"]
        frames = opened.info("table").frames
        assert opened.index is not None
        offset, size = opened.index.frames[frames[len(frames) // 2]]
    data[offset + size - 500] ^= 0x55
    out = tmp_path / "out.npz"
    report = unpack_archive(io.BytesIO(data), out, UnpackOptions(partial=True))
    assert report.missing == ()
    assert report.lost.keys() == {"table"}
    expected = whole.copy()
    for first, count in report.lost["table"]:
        assert not first % 300
        expected[first : first + count] = 0
    assert 0 < sum(count for _, count in report.lost["table"]) <= 1200  # of four parts
    np.testing.assert_array_equal(stored(out)["table"], expected)


def test_what_is_refused(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    with pytest.raises(CheckpointError, match="INT4"):
        unpack_archive(archive, path, UnpackOptions(dtype="INT4"))
    with pytest.raises(CheckpointError, match=r"tensors is a tuple, such as \('conv"):
        unpack_archive(archive, path, UnpackOptions(tensors="conv.*"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="gguf-f32"):
        unpack_archive(archive, path.with_suffix(".gguf"), UnpackOptions(dtype="F32"))
    with pytest.raises(TensorNotFoundError, match="'nothing"):
        unpack_archive(archive, path, UnpackOptions(tensors=("conv.*", "nothing.*")))
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        unpack_archive(archive, path)
    assert path.read_bytes() == b"precious"


def test_archive_is_not_written_over_itself(archive: Path, tmp_path: Path) -> None:
    link = tmp_path / "model.npz"
    link.symlink_to(archive)
    with pytest.raises(CheckpointError, match="itself"):
        unpack_archive(archive, link, UnpackOptions(force=True))
    assert archive.read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_floats_are_converted_and_nothing_else(archive: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "out.safetensors"
    report = unpack_archive(archive, path, UnpackOptions(dtype=dtype))
    with open_checkpoint(path) as reader:
        types = {spec.name: spec.dtype for spec in reader.contents.tensors}
    assert (types.pop("count"), types.pop("mask")) == ("I64", "BOOL")
    assert set(types.values()) == {dtype}
    assert ("half.weight" in report.converted) == (dtype != "F16")


@given(st.lists(st.floats(width=32), max_size=20), st.sampled_from(["F16", "BF16", "F64"]))
def test_convert_rounds_to_nearest_and_keeps_what_is_not_finite(
    numbers: list[float], dtype: str
) -> None:
    source = np.array(numbers, np.float32)
    try:
        made = convert(source, TensorSpec("w", "F32", source.shape), dtype)
    except CheckpointError as error:
        limit = {"F16": 65504.0, "BF16": 3.3e38}[dtype]
        assert np.abs(source[np.isfinite(source)]).max() > limit
        assert "'w'" in str(error)
        return
    assert made.dtype == stored_dtype(dtype)
    back = to_float32(made, dtype)
    assert np.array_equal(np.isnan(back), np.isnan(source))
    finite = np.isfinite(source)
    infinite = ~finite & ~np.isnan(source)
    assert np.array_equal(back[infinite], source[infinite])
    relative = 2.0 ** -{"F16": 11, "BF16": 8, "F64": 53}[dtype]
    least = {"F16": 2.0**-25, "BF16": 2.0**-134, "F64": 0.0}[dtype]
    exact = source[finite].astype(np.float64)
    assert (np.abs(back[finite] - exact) <= np.maximum(np.abs(exact) * relative, least)).all()
