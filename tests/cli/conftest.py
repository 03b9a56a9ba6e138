"""The command line, in this process and in its own, and files for it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from running import COMMAND, ROOT, Run, Start
from typer.testing import CliRunner

from weightvid.cli.app import app


@pytest.fixture
def run() -> Run:
    """Run a verb in this process; checks the exit status, gives click's result."""

    def call(*arguments: object, status: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        assert not unexpected, repr(result.exception)
        assert result.exit_code == status, result.output
        return result

    return call


@pytest.fixture
def run_json(run: Run) -> Run:
    """Run a verb with --json; gives the object, which must be all of stdout."""

    def call(*arguments: object, status: int = 0) -> Any:
        result = run(*arguments, "--json", status=status)
        return json.loads(result.stdout)

    return call


@pytest.fixture
def start() -> Start:
    """Start a verb in a process of its own."""

    def call(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            **more,
        )

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    path = tmp_path_factory.mktemp("model") / "model.npz"
    np.savez(path, **small_models.small())
    return path


@pytest.fixture(scope="session")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes seconds to pack."""
    path = tmp_path_factory.mktemp("large") / "large.npz"
    np.savez(path, **{f"w{i}": small_models.weights(i, 1024, 1024) for i in range(6)})
    return path
