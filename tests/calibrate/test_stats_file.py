"""The file of calibration statistics, and what packing makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from safetensors import safe_open
from safetensors.numpy import save_file

from weightvid.calibrate import Calibration, CalibrationStats
from weightvid.calibrate.stats import KEY, TensorMoments, load_stats, model_hash
from weightvid.checkpoint import from_mapping
from weightvid.errors import CheckpointError, OutputError, QuantizationError
from weightvid.pack import PackOptions, pack_checkpoint


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, weightvid.calibrate as c; c.Calibration, c.Evaluation; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in found.stdout.split()
    assert "weightvid.calibrate.stats" in found.stdout.split()


ARRAYS = {"a.weight": small_models.weights(1, 40, 30), "a.bias": small_models.weights(2, 40)}


def made(**more: Any) -> CalibrationStats:
    inputs = small_models.weights(3, 200, 30, scale=1.0) + 0.5
    ones = np.pad(inputs, ((0, 0), (0, 1)), constant_values=1)
    moments = TensorMoments(
        (ones.T @ ones / 200)[None], inputs.mean(0)[None], 1, 0.1, 3.25, "a.bias", -1
    )
    digest, loss = model_hash(from_mapping(ARRAYS), ["a.weight"]), {"a.weight": 2.5}
    stats = CalibrationStats(digest, 200, {"a.weight": moments}, ("a note",), loss, "", True)
    return replace(stats, **more)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    stats, path = made(), tmp_path / "stats"
    stats.save(path)
    found, data = load_stats(path), path.read_bytes()
    assert repr(found) == repr(stats)
    with pytest.raises(OutputError, match="exists"):
        stats.save(path)
    found.save(path, force=True)
    assert path.read_bytes() == data


def rewritten(path: Path, change: Any) -> None:
    made().save(path)
    with safe_open(path, "np") as file:
        record = json.loads(file.metadata()[KEY])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(record, arrays)
    save_file(arrays, path, {KEY: json.dumps(record)})


@pytest.mark.parametrize(
    "change",
    [
        *(lambda r, _, v=v: r["sensitivity"].update({"a.weight": v}) for v in (0, "x", None)),
        *(lambda r, _, k=k: r.pop(k) for k in ("tensors", "model_sha256", "notes")),
        *(lambda r, _, k=k, v=v: r["tensors"]["a.weight"].update({k: v})
          for k, v in (("axis", 2), ("damping", -1.0), ("damping", None), ("bias_sign", 0))),
        lambda r, _: r.update(tensors=[1]),
        lambda r, _: r["tensors"]["a.weight"].pop("bias"),
        lambda _, a: a.pop("a.weight#mean"),
        lambda _, a: a.update({"a.weight#mean": np.ones((1, 29), np.float32)}),
        lambda _, a: a.update({"a.weight#moment": np.ones((1, 31, 31), np.float16)}),
        lambda _, a: a.update({"a.weight#outputs": np.ones((3, 4), np.float32)}),
        lambda _, a: a.update({"a.weight#outputs": np.ones((4, 4), np.int32)}),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, change: Any) -> None:
    rewritten(tmp_path / "stats", change)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_stats(tmp_path / "stats")


def test_other_files(tmp_path: Path) -> None:
    rewritten(tmp_path / "newer", lambda record, _: record.update(version=9))
    save_file(ARRAYS, tmp_path / "model")
    messages = {"newer": "version 9", "model": "no calibration", "absent": "absent"}
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            Calibration.from_file(tmp_path / name)


def packed(path: Path, stats: CalibrationStats, arrays: Any = ARRAYS, **more: Any) -> Any:
    options = PackOptions(calibration=Calibration(stats), jobs=1, **more)
    return pack_checkpoint(from_mapping(arrays), path, options)


@pytest.mark.parametrize(
    ("arrays", "more", "message"),
    [
        (ARRAYS | {"a.weight": 2 * ARRAYS["a.weight"]}, {}, "other weights"),
        ({"b.weight": ARRAYS["a.weight"]}, {}, r"has no .*a\.weight"),
        (ARRAYS, {"fidelity": "weights"}, "calibration and fidelity 'weights' exclude"),
    ],
)
def test_another_model_and_other_aims(tmp_path: Path, arrays: Any, more: Any, message: str) -> None:
    with pytest.raises((CheckpointError, QuantizationError), match=message):
        packed(tmp_path / "m.mp4", made(), arrays, **more)
    assert not list(tmp_path.iterdir())


def test_statistics_of_no_use_change_nothing(tmp_path: Path) -> None:
    pack_checkpoint(from_mapping(ARRAYS), tmp_path / "plain.mp4", PackOptions(jobs=1))
    useless = {"a.weight": replace(made().tensors["a.weight"], damping=0.0)}
    none = {"tensors": useless, "sensitivity": {}}, "calibrated: 0 of 1 tensors"
    for more, note in (none, ({"refused": "foreign"}, "calibration was not used: foreign")):
        path = tmp_path / note[:12]
        assert packed(path, made(**more)).notes == (note,)
        assert path.read_bytes() == (tmp_path / "plain.mp4").read_bytes()
