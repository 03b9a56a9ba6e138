"""Verbs that run the user's own code: calibrate, pack with what it says, compare."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import schemas
import small_models
from running import Run
from safetensors.numpy import save_file

pytest.importorskip("torch", reason="needs the extra: weightvid[torch]")

SCRIPT = """
    import numpy as np
    import torch

    def examples():
        print("not for stdout")
        torch.manual_seed(0)
        nn = torch.nn
        module = nn.Sequential(nn.Linear(80, 96), nn.ReLU(), nn.Linear(96, 10))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(np.load("{folder}/" + name + ".npy")))
        mixed = torch.randn(80, 80) / 9
        return module, [torch.randn(32, 80) @ mixed for _ in range(8)]

    def logits(state):
        print("not for stdout")
        inputs = np.random.default_rng(0).standard_normal((40, 80))
        hidden = np.maximum(inputs @ np.asarray(state["0.weight"]).T, 0)
        return hidden @ np.asarray(state["2.weight"]).T

    def number(state):
        return -float(np.abs(np.asarray(state["0.weight"])).mean())

    def one():
        return 1

    def raises(*_):
        raise RuntimeError("no data")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint ``m.safetensors``, and ``judge.py`` that knows its network."""
    import numpy as np

    made = tmp_path_factory.mktemp("scripts")
    arrays = {
        "0.weight": small_models.weights(1, 96, 80),
        "0.bias": small_models.weights(2, 96),
        "2.weight": small_models.weights(3, 10, 96),
        "2.bias": small_models.weights(4, 10),
    }
    save_file(arrays, made / "m.safetensors")
    for name, array in arrays.items():
        np.save(made / f"{name}.npy", array)
    (made / "judge.py").write_text(textwrap.dedent(SCRIPT).replace("{folder}", str(made)))
    return made


def test_calibrate_and_pack(run: Run, run_json: Run, folder: Path, tmp_path: Path) -> None:
    stats, model = tmp_path / "stats.safetensors", folder / "m.safetensors"
    call = ("calibrate", f"{folder}/judge.py:examples", "-o", stats)
    record = run_json(*call, "--trust-inputs")
    schemas.check(record, "calibrate")
    assert {tensor["name"] for tensor in record["tensors"]} == {"0.weight", "2.weight"}
    assert "exists" in run(*call, status=2).stderr
    run(*call, "--force")
    for given in (stats, f"{folder}/judge.py:examples"):
        call = ("pack", model, "-o", tmp_path / "m.mp4", "--force", "--calibrate", given)
        record = run_json(*call)
        schemas.check(record, "pack")
        assert any("calibrated" in note for note in record["notes"])
        # Biases that make up for errors are what was packed, all the same.
        run("verify", tmp_path / "m.mp4", "--against", model)
    assert record["notes"][-1].startswith("not layer by layer: neither BatchNorm")


def test_pack_with_an_evaluation(run: Run, run_json: Run, folder: Path, tmp_path: Path) -> None:
    call = ("pack", folder / "m.safetensors", "-o", tmp_path / "m.mp4", "--eval")
    record = run_json(*call, f"{folder}/judge.py:logits", "--max-kl", 0.01)
    schemas.check(record, "pack")
    assert record["encodings"] > 1
    result = run(*call, f"{folder}/judge.py:logits", "--max-kl", "1e-13", "--force", status=1)
    assert "cannot be reached" in result.stderr
    assert result.stdout == ""
    result = run(*call, f"{folder}/judge.py:raises", "--max-kl", 0.1, "--force", status=1)
    assert "RuntimeError: no data" in result.stderr
    assert result.stderr.count("\n") == 1


def test_compare(run: Run, folder: Path, tmp_path: Path) -> None:
    call = ("compare", folder / "m.safetensors", "-o", tmp_path / "c", "--codecs", "none")
    more = ("--steps", "0.2,0.3,0.4,0.6", "--for", "outputs", "--no-peers", "--at", "kl=0.05")
    judge = ("--eval", f"{folder}/judge.py:logits")
    made = run(*call, *more, *judge, "--json")
    rows = [json.loads(line) for line in made.stdout.splitlines()]
    for row in rows:
        schemas.check(row, "compare")
    # Without a terminal, progress is a line for each point.
    assert f"[1 of {len(rows)}] weightvid, step factor 0.2: " in made.stderr
    assert sum(line.startswith("[") for line in made.stderr.splitlines()) == len(rows)
    # llama.cpp makes the K-quants of GGUF, and may be missing.
    assert {row["status"] for row in rows if "_K" not in row["curve"]} == {"ok"}
    assert sum(row["curve"] == "weightvid" for row in rows) == 4
    output = run(*call, *more, *judge).stdout
    for text in ("weightvid", "BD-rate over kl", "bpw at kl=0.05", "report.html"):
        assert text in output
    assert (tmp_path / "c" / "results.json").is_file()


def test_interrupted_compare_says_what_is_kept(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightvid.compare import video

    real, calls = video.pack_checkpoint, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(video, "pack_checkpoint", interrupted)
    call = ("compare", folder / "m.safetensors", "-o", tmp_path / "c", "--codecs", "none")
    more = ("--steps", "0.2,0.3,0.4", "--for", "outputs", "--no-peers", "--no-plain")
    result = run(*call, *more, status=130)
    assert "2 points are kept in" in result.stderr
    monkeypatch.setattr(video, "pack_checkpoint", real)
    assert "[9 of 9]" in run(*call, *more).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("pack", "m.safetensors", "--eval", "judge.py", "--max-kl", "1"),
        ("pack", "m.safetensors", "--eval", "absent.py:logits", "--max-kl", "1"),
        ("pack", "m.safetensors", "--eval", "judge.py:logits"),
        ("pack", "m.safetensors", "--eval", "judge.py:logits", "--max-drop", "much"),
        ("pack", "m.safetensors", "--eval", "judge.py:logits", "--max-kl", "-1"),
        ("pack", "m.safetensors", "--eval", "judge.py:logits", "--max-kl", "1", "--step", "0.2"),
        ("pack", "m.safetensors", "--calibrate", "judge.py:one"),
        ("calibrate", "judge.py:one"),
        ("calibrate", "judge"),
        ("compare", "m.safetensors", "--steps", "much"),
        ("compare", "m.safetensors", "--at", "size=3"),
    ],
)
def test_wrong_usage(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(folder)
    before = {*folder.iterdir()}
    run(*arguments, status=2)
    assert {*folder.iterdir()} - before <= {folder / "__pycache__"}
