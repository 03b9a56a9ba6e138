"""Sources that lack a part: one line that says what to do, exit 1, nothing written."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from running import Run
from safetensors.numpy import save_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two shards."""
    made = tmp_path / "model"
    made.mkdir()
    for shard, name in zip(SHARDS, ("a", "b"), strict=True):
        save_file({name: np.ones((8, 8), np.float32)}, made / shard)
    index = {"weight_map": dict(zip(("a", "b"), SHARDS, strict=True))}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def refused(run: Run, source: Path, said: str) -> None:
    out = source.parent / "out.mp4"
    result = run("pack", source, "-o", out, status=1)
    assert re.fullmatch(rf"error: .*{said}.*\n", result.stderr), result.stderr
    assert not result.stdout
    assert not out.exists()
    assert not list(source.parent.glob(".weightvid-*"))


def test_a_missing_shard(run: Run, folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    refused(run, folder, f"lacks {SHARDS[1]}, which its index names; download the rest")


def test_an_index_that_lies(run: Run, folder: Path) -> None:
    index = {"weight_map": {"a": SHARDS[1], "b": SHARDS[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run, folder, "index and shards are not of one version")


def test_a_shard_that_is_cut_short(run: Run, folder: Path) -> None:
    shard = folder / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    refused(run, folder, f"{SHARDS[1]} is no valid safetensors file .*cut short")


def test_onnx_without_its_data(run: Run, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array(np.ones((30, 40), np.float32), "w")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    (tmp_path / "w.data").unlink()
    refused(run, path, r"in w\.data, which is missing; put it beside the model")


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


def test_programs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(3), "code": Code()}, tmp_path / "code.pt")
    refused(run, tmp_path / "code.pt", r"loading them could run code; save the model's state_dict")
    (tmp_path / "code.bin").write_bytes(pickle.dumps(Code()))
    refused(
        run,
        tmp_path / "code.bin",
        "is a pickle of something else than tensors, and loading it could run",
    )
    assert not (tmp_path / "ran").exists()


def test_torchscript(run: Run, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"m/{name}", b"")
    refused(run, tmp_path / "m.pt", r"it is a TorchScript program.*save its state_dict\(\)")
