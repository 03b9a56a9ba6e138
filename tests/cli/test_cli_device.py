"""``weightvid device`` writes the C loader's sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import schemas
from running import ROOT, Run

SOURCES = ROOT / "weightvid" / "device"


def test_device(run: Run, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_json("device", "-o", tmp_path / "new" / "loader")
    schemas.check(record, "device")
    written = {Path(path).name: Path(path).read_bytes() for path in record["files"]}
    assert written == {path.name: path.read_bytes() for path in SOURCES.iterdir()}
    assert {"weightvid.c", "weightvid.h", "hevc.c", "hevc.h", "example.c"} <= written.keys()
    assert "exists" in run("device", "-o", tmp_path / "new" / "loader", status=1).stderr
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / sorted(written)[-1]).touch()
    assert "exists" in run("device", "-o", tmp_path / "half", status=1).stderr
    assert len(list((tmp_path / "half").iterdir())) == 1, "nothing is written by halves"
    shutil.rmtree(tmp_path / "half")
    monkeypatch.chdir(tmp_path)
    run("device", "-o", "", "--force", status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    shown = run("device", "-o", tmp_path / "new" / "loader", "--force").stdout.split()
    assert [Path(path).name for path in shown] == sorted(written)
