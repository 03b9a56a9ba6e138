"""Whole comparisons: the cache, broken points, evaluations, agreement with the outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from weightvid.compare import nnc
from weightvid.compare.archive import ArchiveCoder
from weightvid.compare.model import Model
from weightvid.compare.row import Row
from weightvid.compare.run import Comparison
from weightvid.compare.settings import Setting
from weightvid.errors import EvaluationError, WeightvidError
from weightvid.pack import PackOptions, pack_checkpoint

Make = Callable[..., Comparison]
ROOT = Path(__file__).resolve().parent.parent.parent
TWO = {"baselines": ("int8", "fp16+zstd")}


@pytest.fixture(autouse=True)
def no_nncodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(nnc.VARIABLE, raising=False)


def measured(comparison: Comparison) -> dict[str, Row]:
    rows = {row.label: row for row in comparison.rows()}
    assert len(rows) == len(comparison.settings)
    return rows


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_finished_point_is_not_measured_twice(comparison: Make, tmp_path: Path) -> None:
    first = measured(comparison(TWO))
    assert [row.status for row in first.values()] == ["ok"] * 3
    written = times(tmp_path / "cache")
    again = measured(comparison(TWO))
    assert again == first
    assert times(tmp_path / "cache") == written
    measured(comparison({"baselines": ("int8",)}, refresh=True))
    changed = {n for n, t in times(tmp_path / "cache").items() if written[n] != t}
    assert len(changed) == 2


def test_a_damaged_cache_is_measured_again(comparison: Make, tmp_path: Path) -> None:
    first = measured(comparison({"baselines": ("int8",)}))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    again = measured(comparison({"baselines": ("int8",)}))
    assert again["int8"].file_bytes == first["int8"].file_bytes


def test_rows_tell_everything(comparison: Make, model: Model) -> None:
    rows = measured(comparison({"quantizers": ("pack",), "codecs": ("x264",), "qp": (20,)}))
    assert set(rows) == {
        "original", "weightvid k=0.2", "weightvid x264 lossless k=0.2", "weightvid x264 qp 20",
        "x264 medium lossless k=0.2", "x264 medium qp 20",
    }  # fmt: skip
    for row in rows.values():
        assert row.ok, row.message
        assert row.file_bytes == sum(row.items.values())
        assert row.bits_per_weight == 8 * row.file_bytes / model.weights
        assert row.weights == model.weights
        assert row.versions["weightvid"]
    coded = rows["x264 medium qp 20"]
    assert coded.encode_s and coded.decode_s and coded.codec_encode_s
    assert coded.encode_s >= coded.codec_encode_s
    assert coded.options["qp"] == "20"
    assert coded.about["standard"] == "H.264"
    assert coded.versions["libavcodec"]
    assert coded.worst_tensor in model.tensors
    assert (coded.worst_sqnr_db or 0) <= (coded.sqnr_db or 0)
    record = json.loads(json.dumps(coded.record()))
    assert record["encode_weights_per_s"] == pytest.approx(model.weights / coded.encode_s)


@pytest.mark.parametrize(
    "curve",
    [
        "weightvid", "weightvid uniform", "weightvid sqnr", "weightvid qp",
        "weightvid qp yuv420p10le", "weightvid x264 lossless ultrafast", "weightvid svtav1 qp",
    ],
)  # fmt: skip
def test_pack_writes_what_compare_said(
    curve: str, comparison: Make, model_path: Path, tmp_path: Path
) -> None:
    sweep = {
        "quantizers": ("pack", "uniform", "sqnr"), "codecs": ("x265", "x264", "svtav1"),
        "qp": (20,), "formats": ("yuv420p", "yuv420p10le"),
    }  # fmt: skip
    label = f"{curve} 20" if " qp" in curve else f"{curve} k=0.2"
    row = measured(comparison({**sweep, "presets": ("ultrafast",)}, only=(label,)))[label]
    words = row.command.split()
    assert words[:2] == ["weightvid", "pack"]
    code = "from weightvid.cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", code, *words[1:], "-o", str(tmp_path / "packed.mp4")],
        check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert row.file_bytes is not None
    size = (tmp_path / "packed.mp4").stat().st_size
    assert abs(size - row.file_bytes) <= 0.005 * row.file_bytes


def test_packets_are_what_ffprobe_counts(
    model: Model, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("ffprobe") is None:
        pytest.skip("needs ffprobe (Debian: apt-get install ffmpeg)")
    monkeypatch.setattr("weightvid.packing.write.TRIAL_WEIGHTS", 0)
    setting = Setting("pack", "x265", "ultrafast", "lossless", "yuv420p", None, "uniform", 0.2)
    coded = ArchiveCoder(model, setting).encode(1)
    path = tmp_path / "archive.mp4"
    path.write_bytes(coded.parts["archive"])
    told = subprocess.run(
        ["ffprobe", "-v", "error", "-show_entries", "packet=size", "-of", "csv=p=0", str(path)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    counted = sum(int(line.strip(",")) for line in told.stdout.split())
    assert counted == coded.items["packets"] > 0
    rest = sum(size for name, size in coded.items.items() if name != "packets")
    assert counted + rest == path.stat().st_size
    packed = pack_checkpoint(
        model_path, tmp_path / "packed.mp4",
        PackOptions(step_factor=0.2, states=0, shaping=False, side_files=False, jobs=1),
    )  # fmt: skip
    assert packed.file_bytes == path.stat().st_size


SCRIPT = """
import numpy as np, pathlib
seen = pathlib.Path(__file__).with_name("seen")
def score(state):
    with seen.open("a") as f: f.write("x")
    return {body}
"""


def script(folder: Path, body: str) -> str:
    path = folder / "judge.py"
    path.write_text(SCRIPT.format(body=body))
    return f"{path}:score"


LOGITS = "state['layers.0.weight'][:, :7], np.arange(64) % 7"


def test_an_evaluation_judges_equal_reconstructions_once(comparison: Make, tmp_path: Path) -> None:
    name = script(tmp_path, LOGITS)
    names = ("int8", "int8+zstd", "int8+xz", "fp16+zstd")
    rows = measured(comparison({"baselines": names}, evaluation=name))
    assert (rows["original"].kl, rows["original"].agreement) == (0.0, 1.0)
    kl = {rows[n].kl for n in names[:3]}
    assert len(kl) == 1
    assert 0 < (rows["fp16+zstd"].kl or 0) < min(k for k in kl if k is not None)
    assert (tmp_path / "seen").read_text() == "xxx"
    again = measured(comparison({"baselines": names}, evaluation=name))
    assert again == rows
    assert (tmp_path / "seen").read_text() == "xxx"


@pytest.mark.parametrize(
    ("body", "message"),
    [("1 / 0", "failed: ZeroDivisionError"), ("float('nan')", "nan"), ("'x'", "returned a str")],
)
def test_an_evaluation_that_fails_on_the_original(
    comparison: Make, tmp_path: Path, body: str, message: str
) -> None:
    made = comparison(TWO, evaluation=script(tmp_path, body))
    with pytest.raises(EvaluationError, match=f"original model cannot be judged: .*{message}"):
        list(made.rows())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / (abs(state['layers.0.weight']).sum() == CLEAN)", "ZeroDivisionError"),
        ("1.0 if abs(state['layers.0.weight']).sum() == CLEAN else np.nan", "nan"),
        (
            "np.ones((2, 2)) if abs(state['layers.0.weight']).sum() == CLEAN else np.ones((1, 2))",
            "outputs of another shape",
        ),
        ("1.0 if abs(state['layers.0.weight']).sum() == CLEAN else __import__('os')._exit(7)",
         "evaluation's process ended with status 7"),
    ],
)  # fmt: skip
def test_an_evaluation_that_fails_on_a_point_hurts_no_other(
    comparison: Make, model: Model, tmp_path: Path, body: str, message: str
) -> None:
    clean = repr(abs(model.tensors["layers.0.weight"]).sum())
    text = body.replace("CLEAN", clean).replace("1 / (", "1 / int(")
    made = comparison({"baselines": ("int8", "int8+zstd")}, evaluation=script(tmp_path, text))
    rows = measured(made)
    assert rows["original"].ok
    for name in ("int8", "int8+zstd"):
        assert rows[name].status == "error"
        assert message in rows[name].message


def test_a_point_that_crashes_hurts_no_other(
    comparison: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A library that takes the whole process with it."""
    (tmp_path / "zstandard.py").write_text("import os, signal\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = measured(comparison({"baselines": ("int8", "fp16+zstd", "int8+xz")}))
    assert rows["fp16+zstd"].status == "error"
    assert f"signal {int(signal.SIGSEGV)}" in rows["fp16+zstd"].message
    assert rows["int8"].ok
    assert rows["int8+xz"].ok


def test_what_is_missing_is_a_row(comparison: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightvid.compare.run.program.programs", lambda wanted: ())
    rows = measured(comparison({"codecs": ("vvenc", "videotoolbox"), "baselines": ("nncodec",)}))
    reasons = {row.series: row.message for row in rows.values() if row.status == "missing"}
    assert "no ffmpeg program found" in reasons["vvenc faster qp"]
    assert "has no hevc_videotoolbox" in reasons["videotoolbox qp"]
    assert "--nncodec" in reasons["nncodec"]


def test_points_side_by_side_are_marked(comparison: Make) -> None:
    alone = measured(comparison({"quantizers": ("uniform",), "baselines": ("int8",)}))
    shared = measured(comparison({"quantizers": ("uniform",), "baselines": ("int8",)}, jobs=2))
    for label, row in alone.items():
        assert shared[label].file_bytes == row.file_bytes
        assert shared[label].restored_sha256 == row.restored_sha256
        assert (row.timing, shared[label].timing) == ("alone", "shared")
        assert shared[label].encode_all_s is None


def test_wrong_options(comparison: Make, tmp_path: Path) -> None:
    with pytest.raises(WeightvidError, match="at least one job"):
        comparison(TWO, jobs=0)
    with pytest.raises(WeightvidError, match="cannot be run"):
        comparison(TWO, ffmpeg=str(tmp_path / "no-ffmpeg"))
    with pytest.raises(WeightvidError, match="cannot be run"):
        comparison(TWO, nncodec=str(tmp_path / "no-python"))
    with pytest.raises(WeightvidError, match="is no file"):
        comparison(TWO, evaluation="absent.py:score")
    with pytest.raises(WeightvidError, match="not of the form"):
        comparison(TWO, evaluation="script.py")
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightvidError, match="cannot make the folder"):
        comparison(TWO, cache=tmp_path / "file" / "cache")


def test_the_model_must_not_change_meanwhile(tmp_path: Path) -> None:
    from weightvid.compare.run import Options
    from weightvid.compare.sweep import Sweep

    path = tmp_path / "model.npz"
    np.savez(path, w=np.ones((32, 32), np.float32))
    sweep = Sweep(("none",), quantizers=("none",), baselines=("int8",))
    made = Comparison(path, Options(sweep, cache=tmp_path / "cache"))
    np.savez(path, w=np.zeros((32, 32), np.float32))
    with pytest.raises(WeightvidError, match="has changed since"):
        list(made.rows())


def test_killed_at_any_moment_it_goes_on(model_path: Path, tmp_path: Path) -> None:
    """SIGKILL after the third row; what was finished is not measured again, no child is left."""
    code = "from weightvid.cli import main; main()"
    command = [
        sys.executable, "-c", code, "compare", str(model_path), "--codecs", "x264", "--rates",
        "0.2", "--quantizers", "uniform", "--baselines", "int8,fp16+zstd,int8+xz", "--json",
        "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    assert process.stdout is not None
    seen = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.kill()
    process.communicate()
    written = times(tmp_path / "cache")
    assert len(written) >= 3
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 1 + 1 + 1 + 5 + 3
    assert all(row["status"] == "ok" for row in rows)
    assert rows[:3] == seen
    after = times(tmp_path / "cache")
    assert {name: after[name] for name in written} == written
    assert (tmp_path / "out" / "results.json").is_file()
