"""``weightvid compare``: what it prints and writes, and how it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import Run
from schemas import COMPARE_ROW, check
from small_models import several_frames

from weightvid.cli.video import Wish
from weightvid.codec.encode import find_program
from weightvid.errors import CodecError
from weightvid.loader import open_archive

Few = Callable[..., Any]


@pytest.fixture
def few(run: Run, model: Path, tmp_path: Path) -> Few:
    """A comparison of few points, with its own cache and folder."""

    def call(*arguments: object, status: int = 0) -> Any:
        return run(
            "compare", model, "--cache", tmp_path / "cache", "--out", tmp_path / "out",
            *arguments, status=status,
        )  # fmt: skip

    return call


POINTS = (
    "--codecs", "x264", "--quantizers", "uniform,pack", "--rates", "0.1,0.2,0.4", "--presets",
    "ultrafast", "--baselines", "int8,nncodec",
)  # fmt: skip


def test_table_files_and_best(few: Few, tmp_path: Path) -> None:
    result = few(*POINTS, "--at", "sqnr=22", "--at", "size=1B", "--anchor", "weightvid uniform")
    text = result.stdout
    assert "weightvid uniform k=0.2" in text
    assert "x264 ultrafast qp 20" in text
    assert "no other point is smaller and better" in text
    assert "BD-rate against weightvid uniform" in text
    assert "best of each codec at sqnr 22" in text
    assert "none reaches it" in text
    assert "weightvid pack" in text
    assert "warning: nncodec: needs NNCodec" in result.stderr
    folder = tmp_path / "out"
    record = json.loads((folder / "results.json").read_text())
    labels = [row["label"] for row in record["rows"]]
    assert labels[0] == "original"
    assert len(labels) == 1 + 6 + 8 + 3 + 5 + 1 + 6
    for row in record["rows"]:
        check(row, COMPARE_ROW | {"pareto": [str]}, row["label"])
    assert record["bd_rate"]["anchor"] == "weightvid uniform"
    over = record["bd_rate"]["series"]["x264 ultrafast lossless"]["sqnr"]
    assert over["percent"] is not None or over["reason"]
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == labels
    assert {row["status"] for row in rows} == {"ok", "missing"}
    assert (folder / "rate_sqnr.svg").read_text().startswith("<?xml")
    assert (folder / "rate_sqnr.png").read_bytes().startswith(b"\x89PNG")
    again = few(*POINTS, "--sort", "bytes")
    sizes = [
        int(line.split("*")[-1].split()[0].replace(",", "")) if "*" in line else None
        for line in again.stdout.splitlines()
        if " k=" in line
    ]
    front = [size for size in sizes if size is not None]
    assert front
    assert front == sorted(front)


def test_json_is_one_object_a_line(few: Few) -> None:
    result = few("--codecs", "none", "--quantizers", "none", "--baselines", "int8", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["original", "int8"]
    for row in rows:
        check(row, COMPARE_ROW, row["label"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codecs", "x256"), "did you mean x265"),
        (("--presets", "ultrafats"), "did you mean ultrafast"),
        (("--qp", "many"), "no list of numbers"),
        (("--at", "psnr=3"), "no point such as"),
        (("--sort", "beauty"), "unknown column"),
        (("--jobs", "0"), "--jobs"),
    ],
)
def test_wrong_usage(few: Few, arguments: tuple[str, ...], message: str) -> None:
    assert message in " ".join(few(*arguments, status=2).stderr.replace("│", " ").split())


def test_what_fails_is_one_line(few: Few, tmp_path: Path) -> None:
    script = tmp_path / "judge.py"
    script.write_text("def f(state):\n    raise RuntimeError('no\\nimages')\n")
    other = tmp_path / "no-ffmpeg"
    other.write_text("#!/bin/sh\necho hello\n")
    other.chmod(0o755)
    for arguments, message in (
        (("--eval", f"{script}:f"), "judge.py:f failed: RuntimeError: no images"),
        (("--eval", f"{script}:g"), "defines no function 'g'"),
        (("--ffmpeg", other), "is no ffmpeg"),
        (("--only", "x264 medum qp 20"), "did you mean 'x264 medium qp 20'"),
        (("--anchor", "nothing"), "no curve 'nothing'"),
        (("--calibration", script), "judge.py"),
    ):
        result = few(*arguments, status=1)
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert message in line
        assert result.stdout == ""


def test_a_folder_that_cannot_be_written(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("compare", model, "--out", tmp_path / "file" / "out", status=1)
    assert result.stderr.startswith("error: cannot make the folder")
    result = run("compare", model, "--out", "/proc/weightvid", status=1)
    assert result.stderr.startswith("error: cannot make the folder /proc/weightvid")


def test_a_failed_point_is_an_exit_of_one(
    few: Few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zstandard.py").write_text("raise SystemExit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = few(
        "--codecs", "none", "--quantizers", "none", "--baselines", "int8,int8+zstd", status=1
    )
    assert "error: int8+zstd: the point's process ended with status 9" in result.stderr
    assert "int8 " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codec", "jpegls"), "no sample entry of an MP4 is registered for JPEG-LS"),
        (("--codec", "nvenc"), "its bytes depend on device and driver"),
        (("--codec", "rav1e"), "rav1e has no lossless mode: give it a --qp"),
        (("--codec", "vp9", "--crf", "20"), "vp9 has no CRF"),
        (("--codec", "vp9", "--qp", "20", "--bit-depth", "10"), "8 bits, not of 10"),
        (("--codec", "svtav1", "--qp", "64"), "svtav1: qp goes from 1 to 63, not 64"),
        (("--bit-depth", "10"), "it is of lossy video"),
        (("--codec", "x256"), "did you mean x265"),
        (("--qp", "20", "--crf", "20"), "exclude each other"),
        (("--qp", "20", "--step", "0.2"), "takes no --recipe"),
        (("--qp", "52"), "--qp"),
        (("--quantizer", "trelis8"), "did you mean trellis8"),
    ],
)
def test_pack_refuses(
    run: Run, model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("pack", model, "-o", tmp_path / "a.mp4", *arguments, status=2)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_pack_by_another_codec(run: Run, run_json: Run, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    run_json("pack", model, "-o", path, "--codec", "x264", "--qp", 20, "--bit-depth", 10)
    shown = run_json("inspect", path)
    assert shown["format_version"] == "2.0"
    assert shown["video"]["codec"] == "avc"
    assert shown["video"]["profile"] == "High 10 Intra"
    assert shown["video"]["bit_depth"] == 10
    assert shown["about"]["encoder"] == "x264"
    text = run("inspect", path).stdout
    assert "avc, High 10 Intra profile, level 2, 10 bits" in text
    assert f"{shown['sqnr_db']:.2f} dB" in text
    run("verify", path)


@pytest.mark.parametrize(
    ("codec", "arguments", "bits"),
    [("x265", (20, None, None), 8), ("vvenc", (20, None, None), 10), ("vvenc", (20, None, 8), 8),
     ("x264", (None, 20.0, 10), 10), ("x265", (None, None, None), 8)],
)  # fmt: skip
def test_the_bit_depth_follows_the_codec(codec: str, arguments: Any, bits: int) -> None:
    assert Wish(codec, *arguments).bit_depth == bits


def test_vvc_of_its_only_depth(run_json: Run, model: Path, tmp_path: Path) -> None:
    try:
        find_program("vvenc")
    except CodecError as error:
        pytest.skip(str(error))
    path = tmp_path / "a.mp4"
    run_json("pack", model, "-o", path, "--codec", "vvenc", "--qp", 20)
    assert run_json("inspect", path)["video"]["bit_depth"] == 10


def test_whole_video(run_json: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **several_frames())
    found = []
    for options in ((), ("--whole-video",)):
        path = tmp_path / "a.mp4"
        run_json("pack", tmp_path / "model.npz", "-o", path, "--force", *options)
        account = run_json("inspect", path)["account"]
        assert (account["digits"] == 0) == bool(options)
        with open_archive(path, check_tensors=True) as archive:
            found.append({name: array.tobytes() for name, array in archive})
    assert found[0] == found[1]


def test_a_preset_of_another_codec(run: Run, model: Path, tmp_path: Path) -> None:
    result = run(
        "pack", model, "-o", tmp_path / "a.mp4", "--codec", "svtav1", "--preset", "slow", status=1
    )
    assert result.stderr.startswith("error: svtav1 has no preset 'slow'; known: 12, 11")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_pack_lossy(run_json: Run, model: Path, tmp_path: Path) -> None:
    sizes = []
    for option, value in (("--qp", 12), ("--qp", 24), ("--crf", 30)):
        made = run_json(
            "pack", model, "-o", tmp_path / "a.mp4", "--force", "--codec", "x265", option, value
        )
        sizes.append(made["file_bytes"])
    assert sizes == sorted(sizes, reverse=True)
