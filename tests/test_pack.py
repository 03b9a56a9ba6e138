"""Packing: the same bytes every time, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal, sample_arrays, small_frames

from weightvid.checkpoint.mapping import from_mapping
from weightvid.codec.x265 import X265Encoder
from weightvid.errors import CheckpointError, OutputError, QuantizationError, WeightvidError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.progress import Progress


def pack(path: Path, options: PackOptions | None = None, **more: Any) -> bytes:
    with small_frames():
        pack_checkpoint(from_mapping(sample_arrays()), path, options, **more)
    return path.read_bytes()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def encoders() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("weightvid")]


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    assert pack(tmp_path / "1.mp4") == pack(tmp_path / "2.mp4")


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    made = {pack(tmp_path / f"{jobs}.mp4", PackOptions(jobs=jobs)) for jobs in (1, 2, 3)}
    assert len(made) == 1


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Hash seeds and addresses leave no trace."""
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_pack import pack
        pack(Path(sys.argv[2]))
    """
    here = pack(tmp_path / "here.mp4")
    for seed in ("1", "2"):
        there = tmp_path / f"{seed}.mp4"
        command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), there]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, timeout=120)
        assert there.read_bytes() == here


def test_the_report_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "model.mp4"
    with small_frames():
        report = pack_checkpoint(
            from_mapping(sample_arrays()), path, PackOptions(keep=("f.*", "nothing*"))
        )
    assert report.file_bytes == path.stat().st_size
    assert report.unused_keeps == ("nothing*",)
    assert report.bits_per_weight == pytest.approx(8 * report.file_bytes / report.weights)
    with open_archive(path) as archive:
        assert len(archive.index.frames) == report.frames
        assert archive.info("f.weight").coding == "exact"
        assert np.array_equal(archive["f.weight"], sample_arrays()["f.weight"])


def test_progress_is_monotone_and_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[Progress] = []
    pack(tmp_path / "model.mp4", None, progress=seen.append)
    for stage in ("survey", "encode", "verify"):
        points = [p for p in seen if p.stage == stage]
        assert points, stage
        assert [p.done for p in points] == sorted(p.done for p in points)
        assert points[-1].done == points[-1].total


class BrokenSource(Exception):
    """Something that no code of ours expects."""


@pytest.mark.parametrize("error", [BrokenSource, KeyboardInterrupt, MemoryError, CheckpointError])
@pytest.mark.parametrize("after", [0, 3, 14, 17, 20])
def test_a_source_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int
) -> None:
    reader = from_mapping(sample_arrays())
    count = 0
    inner = reader._read

    def read(spec: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise error("no more")
        return inner(spec)

    monkeypatch.setattr(reader, "_read", read)
    with small_frames():
        try:
            pack_checkpoint(reader, tmp_path / "model.mp4")
        except error:
            assert left_in(tmp_path) == []
        else:
            assert count <= after
    assert encoders() == []


@pytest.mark.parametrize("stage", ["survey", "encode", "verify"])
def test_an_interrupt_at_any_stage(tmp_path: Path, stage: str) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == stage and progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "model.mp4", progress=interrupt)
    assert left_in(tmp_path) == []
    assert encoders() == []


def test_an_encoder_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: X265Encoder, luma: Any) -> bytes:
        raise BrokenSource("in a worker")

    monkeypatch.setattr(X265Encoder, "encode", encode)
    with pytest.raises(BrokenSource):
        pack(tmp_path / "model.mp4")
    assert left_in(tmp_path) == []
    assert encoders() == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
@pytest.mark.parametrize("room", [0, 500, 5_000, 60_000])
def test_a_full_disk(tmp_path: Path, room: int) -> None:
    """A limit on the file's size fails the write as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot write") as caught:
            pack(tmp_path / "model.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert left_in(tmp_path) == []
    assert encoders() == []


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError):
        pack(path)
    assert path.read_bytes() == b"precious"

    def interrupt(progress: Progress) -> None:
        if progress.stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(path, PackOptions(force=True), progress=interrupt)
    assert path.read_bytes() == b"precious"
    assert left_in(tmp_path) == ["model.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from archives import normal, small_frames
        from weightvid.checkpoint.mapping import from_mapping
        from weightvid.pack import PackOptions, pack_checkpoint
        def told(progress):
            if progress.stage == "encode":
                print("encoding", flush=True)
        arrays = {f"w{i}": normal(i, 500, 900) for i in range(20)}
        with small_frames():
            pack_checkpoint(from_mapping(arrays), sys.argv[2], PackOptions(states=0), told)
    """
    target = tmp_path / "model.mp4"
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"encoding"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) != 0
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [
        PackOptions(recipe="magic"),
        PackOptions(step_factor=0.0),
        PackOptions(step_factor=float("nan")),
        PackOptions(preset="warp"),
        PackOptions(jobs=-1),
        PackOptions(states=5),
        PackOptions(mantissa_bits=5),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: PackOptions) -> None:
    with pytest.raises(WeightvidError):
        pack(tmp_path / "model.mp4", options)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_near_the_end_of_their_type(tmp_path: Path, dtype: type) -> None:
    """No finite weight becomes infinite by rounding to a level."""
    most = float(np.finfo(dtype).max)
    weights = np.clip(normal(0, 64, 64, scale=1.0).astype(np.float64) * most / 3, -most, most)
    array = weights.astype(dtype)
    with small_frames():
        try:
            pack_checkpoint(from_mapping({"w": array}), tmp_path / "model.mp4")
        except QuantizationError:
            return
    with open_archive(tmp_path / "model.mp4", check_tensors=True) as archive:
        assert np.isfinite(archive["w"]).all()
