"""Random mutations that are sealed again: 60 seconds of them in CI, fewer elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("what", ["archives", "checkpoints"])
def test_random_mutations(what: str) -> None:
    for package in ("torch", "onnx", "gguf"):
        pytest.importorskip(package)
    seconds = os.environ.get("WEIGHTVID_FUZZ_SECONDS", "30" if os.environ.get("CI") else "4")
    seed = os.environ.get("WEIGHTVID_FUZZ_SEED", "1")
    run = subprocess.run(
        [sys.executable, str(FUZZ), "--what", what, "--seconds", seconds, "--seed", seed],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    made, _, results, *_ = run.stdout.splitlines()[-1].split()
    assert int(made) > 10
    assert int(results) > int(made) / 20, "mutations that break everything find nothing"
