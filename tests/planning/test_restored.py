"""Tensors restored without an archive are those that an archive gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal

from weightvid.calibration import CalibrationStats, TensorMoments, model_hash
from weightvid.checkpoint import from_mapping
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.packing import quantizer, restored, schedule
from weightvid.packing.quantizer import Request
from weightvid.packing.source import ReaderSource, TensorRead
from weightvid.planning.survey import survey


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    outlying = normal(1, 90, 70)
    outlying[3, 4] = 60.0
    return {
        "linear.weight": outlying,
        "conv.weight": normal(2, 20, 6, 3, 3),
        "half.weight": normal(3, 50, 40).astype(np.float16),
        "brain.weight": (normal(4, 40, 60).view(np.uint32) >> 16).astype(np.uint16),
    }


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: int, large: bool, calibrated: bool
) -> None:
    if large:
        for module in (quantizer, restored, schedule):
            monkeypatch.setattr(module, "BATCH_WEIGHTS", 1000)
    source = from_mapping(arrays(), dtypes={"brain.weight": "BF16"})
    inputs = np.abs(normal(8, 300, 70, scale=1.0)) + 0.5
    moment = (inputs.T @ inputs / len(inputs))[None].astype(np.float32)
    tensors = {"linear.weight": TensorMoments(moment, None, rows=300)}
    stats = CalibrationStats(model_hash(source, tensors), 300, tensors) if calibrated else None
    options = PackOptions(states=states, calibration=stats, jobs=1)
    pack_checkpoint(source, tmp_path / "m.mp4", options)
    surveyed = survey(source, options)
    with open_archive(tmp_path / "m.mp4") as archive:
        for number, step in surveyed.steps(options.first_factor).items():
            spec = source.contents.tensors[number]
            params = surveyed.quantizer(number, step)
            assert params is not None
            found = restored.restored(
                Request(
                    number,
                    spec,
                    params,
                    TensorRead(ReaderSource(source), spec),
                    surveyed.shaped(number),
                    surveyed.moments.get(number),
                )
            )
            assert archive.info(spec.name).coding != "exact"
            assert np.array_equal(found, archive.stored(spec.name)), spec.name
