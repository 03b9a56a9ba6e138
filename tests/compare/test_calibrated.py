"""Calibrated archives as a curve of a comparison."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.calibration import CalibrationStats, TensorMoments, load_stats, model_hash
from weightvid.checkpoint import open_checkpoint
from weightvid.compare.run import Comparison, Options
from weightvid.compare.settings import Setting
from weightvid.compare.sweep import Sweep, select
from weightvid.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent.parent
MAIN = "from weightvid.cli import main; main()"
Make = Callable[..., Comparison]


def moments(columns: int) -> TensorMoments:
    """Inputs that are all much alike: errors may cancel."""
    shared = np.full((1, columns, columns), 1.0, np.float32)
    shared[0] += 0.05 * np.eye(columns, dtype=np.float32)
    return TensorMoments(shared, np.ones((1, columns), np.float32), rows=100)


@pytest.fixture
def stats_path(model_path: Path, tmp_path: Path) -> Path:
    tensors = {f"layers.{n}.weight": moments(96) for n in range(2)}
    tensors["conv.weight"] = moments(72)
    with open_checkpoint(model_path) as reader:
        made = CalibrationStats(model_hash(reader, tensors), 40, tensors)
    made.save(tmp_path / "model.stats")
    return tmp_path / "model.stats"


SWEEP: dict[str, Any] = {"quantizers": ("pack",), "rates": (0.2, 0.4), "presets": ("ultrafast",)}


def test_a_curve_of_real_archives(
    comparison: Make, stats_path: Path, model_path: Path, tmp_path: Path
) -> None:
    made = comparison(SWEEP, calibration=stats_path)
    rows = {row.label: row for row in made.rows()}
    assert set(rows) == {
        "original", "weightvid k=0.2", "weightvid k=0.4", "weightvid calibrated k=0.2",
        "weightvid calibrated k=0.4",
    }  # fmt: skip
    assert all(row.ok for row in rows.values())
    row, plain = rows["weightvid calibrated k=0.2"], rows["weightvid k=0.2"]
    assert row.series == "weightvid calibrated"
    assert row.restored_sha256 != plain.restored_sha256
    words = shlex.split(row.command)
    assert words[:2] == ["weightvid", "pack"]
    assert "--calibration" in words
    assert "--calibration" not in plain.command
    archive = tmp_path / "packed.mp4"
    subprocess.run(
        [sys.executable, "-c", MAIN, *words[1:], "-o", str(archive)],
        check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert row.file_bytes is not None
    assert abs(archive.stat().st_size - row.file_bytes) <= 0.005 * row.file_bytes


def test_other_statistics_are_other_points(
    comparison: Make, stats_path: Path, model_path: Path
) -> None:
    only = ("weightvid calibrated k=0.2",)
    first = list(comparison(SWEEP, calibration=stats_path, only=only).rows())[1]
    stats = load_stats(stats_path)
    fewer = dict(list(stats.tensors.items())[:2])
    with open_checkpoint(model_path) as reader:
        other = CalibrationStats(model_hash(reader, fewer), 40, fewer)
    other.save(stats_path, force=True)
    again = list(comparison(SWEEP, calibration=stats_path, only=only).rows())[1]
    assert first.ok
    assert again.ok
    assert first.restored_sha256 != again.restored_sha256


def test_without_statistics_there_is_no_such_curve() -> None:
    assert not any(setting.calibrated for setting in Sweep().settings())
    settings = Sweep(calibrated=True).settings()
    found = select(settings, ["weightvid calibrated"])
    assert len(found) == 5
    assert {s.preset for s in found} == {"ultrafast"}
    assert len({s.label for s in settings}) == len(settings)


def test_commands_name_the_statistics() -> None:
    setting = Setting(
        "pack", "x265", "ultrafast", "lossless", "yuv420p", None, "pack", 0.18, calibrated=True
    )
    command = setting.command("a b.npz", "c d.stats")
    assert command == "weightvid pack 'a b.npz' --step 0.18 --calibration 'c d.stats'"


def test_statistics_of_another_model_are_refused(
    stats_path: Path, model_path: Path, tmp_path: Path
) -> None:
    other = dict(np.load(model_path))
    other["layers.0.weight"] = other["layers.0.weight"] + np.float32(1)
    np.savez(tmp_path / "other.npz", **other)
    with pytest.raises(CheckpointError, match="calibrate again"):
        Comparison(tmp_path / "other.npz", Options(calibration=stats_path))
