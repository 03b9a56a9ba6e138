"""``pack`` with a target of size, rate or SQNR, and its warnings."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemas
from running import Run

from weightvid.loader import open_archive


def test_target_size(run: Run, model: Path, tmp_path: Path) -> None:
    run("pack", model, "-o", tmp_path / "m.mp4", "--target-size", "9kB")
    assert 8910 <= (tmp_path / "m.mp4").stat().st_size <= 9000


def test_target_rate(run_json: Run, model: Path, tmp_path: Path) -> None:
    record = run_json("pack", model, "-o", tmp_path / "m.mp4", "--target-bpw", 4.5)
    schemas.check(record, schemas.PACK)
    assert 0.99 * 4.5 <= record["bits_per_weight"] <= 4.5


def test_target_sqnr_and_rule(run_json: Run, model: Path, tmp_path: Path) -> None:
    call = ("pack", model, "-o", tmp_path / "m.mp4", "--target-sqnr", 22, "--rule", "sqnr")
    record = run_json(*call)
    assert abs(record["sqnr_db"] - 22) <= 0.1
    with open_archive(tmp_path / "m.mp4") as archive:
        assert archive.header.about["rule"] == "sqnr"
        assert archive.header.about["recipe"] == "target 22.00 dB"


def test_a_target_out_of_reach(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("pack", model, "-o", tmp_path / "m.mp4", "--target-size", "1kB", status=1)
    assert result.stderr.startswith("error: 1,000 bytes cannot be reached")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--target-size", "12 apples"),
        ("--target-size", "0"),
        ("--target-bpw", "-3"),
        ("--target-bpw", "nan"),
        ("--target-sqnr", "inf"),
        ("--target-bpw", "3", "--target-sqnr", "20"),
        ("--target-bpw", "3", "--step", "0.2"),
        ("--target-bpw", "3", "--recipe", "small"),
        ("--rule", "golden"),
    ],
)
def test_wrong_targets(run: Run, model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    run("pack", model, "-o", tmp_path / "m.mp4", *options, status=2)
    assert not list(tmp_path.iterdir())


def test_a_small_model_is_warned_of(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("pack", model, "-o", tmp_path / "m.mp4")
    assert "warning: only 21,968 weights are quantized" in result.stderr
    assert "warning" not in result.stdout
    assert not run("pack", model, "-o", tmp_path / "f.mp4", "--recipe", "fine").stderr


def test_every_tensor_ends_at_one_slope(
    run: Run, run_json: Run, model: Path, tmp_path: Path
) -> None:
    """But where a limit holds the step, and what is exact has none."""
    run("pack", model, "-o", tmp_path / "m.mp4", "--step", 0.2)
    record = run_json("inspect", tmp_path / "m.mp4")
    schemas.check(record, schemas.INSPECT)
    slopes = {t["name"]: t["slope"] for t in record["tensors"] if t["alias_of"] is None}
    assert slopes["conv.weight"] == slopes["embed.weight"] == 1.0
    assert slopes["count"] is None
    assert "slopes" not in record["about"]
    run("pack", model, "-o", tmp_path / "c.mp4", "--step", 5)
    record = run_json("inspect", tmp_path / "c.mp4")
    limited = {t["name"] for t in record["tensors"] if t["slope"] and t["slope"] < 0.5}
    assert limited >= {"conv.weight", "embed.weight", "half.weight"}
    assert " slope " in run("inspect", tmp_path / "c.mp4", "--tensors").stdout
