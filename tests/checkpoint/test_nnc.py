"""NNC bitstreams as checkpoints, by a Python that has nncodec."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from weightvid.checkpoint import create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import CheckpointError


def test_without_nncodec_an_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTVID_NNCODEC", raising=False)
    (tmp_path / "x.nnc").write_bytes(bytes([0, 4, 2, 1]))
    with pytest.raises(CheckpointError, match="WEIGHTVID_NNCODEC"):
        open_checkpoint(tmp_path / "x.nnc")
    monkeypatch.setenv("WEIGHTVID_NNCODEC", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="cannot be run"):
        open_checkpoint(tmp_path / "x.nnc")
    contents = from_mapping({"c": np.zeros(3, np.complex64)}).contents
    with pytest.raises(CheckpointError, match="no C64"):
        create_checkpoint(tmp_path / "y.nnc", contents)
    assert not (tmp_path / "y.nnc").exists()


def test_round_trip(tmp_path: Path) -> None:
    if not os.environ.get("WEIGHTVID_NNCODEC"):
        pytest.skip("WEIGHTVID_NNCODEC is not set: it names a Python that has NNCodec")
    chance = np.random.default_rng(0)
    weight = chance.normal(0, 0.1, (16, 8, 3, 3)).astype(np.float32)
    arrays = {"conv.weight": weight, "n": np.arange(4), "tied.weight": weight}
    given = from_mapping(arrays)
    with create_checkpoint(tmp_path / "x.nnc", given.contents) as writer:
        for name in ("conv.weight", "n"):
            writer.write(name, given.read(name))
        assert any("quantizes" in note for note in writer.notes)
    with open_checkpoint(tmp_path / "x.nnc") as reader:
        found = {spec.name: reader.read(spec.name) for spec in reader.contents.tensors}
    assert set(found) == set(arrays)
    assert np.abs(found["conv.weight"] - weight).max() < 1e-3
    assert found["n"].tolist() == [0, 1, 2, 3] and found["n"].dtype == np.int32
