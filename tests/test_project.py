"""The project itself: versions, scripts, import contracts, what `import weightvid` costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from weightvid.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = (
    *("torch", "safetensors", "typer", "rich", "imageio", "zstandard", "sklearn"),
    *("fsspec", "aiohttp", "huggingface_hub", "onnx", "gguf", "weightvid.remote"),
)


def imported_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


def scripts() -> list[Path]:
    folders = (ROOT / "tools", ROOT / ".ci")
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return sorted(path for path in files if path.suffix == "")


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", __version__)


def test_installed_version_is_the_sources() -> None:
    try:
        installed = metadata.version("weightvid")
    except metadata.PackageNotFoundError:
        pytest.skip("weightvid is run from the checkout, not installed")
    assert installed == __version__


def test_every_script_can_be_run() -> None:
    names = {path.name for path in scripts()}
    assert names >= {"setup", "demo", "test", "lint", "run"}
    for path in scripts():
        assert path.read_text().startswith("#!/usr/bin/env bash\n"), path
        assert os.access(path, os.X_OK), f"{path} lacks the run bit: chmod +x"


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_script_parses(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, capture_output=True)


def test_setup_refuses_unknown_arguments() -> None:
    run = subprocess.run(
        [str(ROOT / "tools" / "setup"), "--nonsense"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "--no-torch" in run.stderr


def test_import_contracts_hold() -> None:
    pytest.importorskip("importlinter", reason="import-linter is a development tool")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("statement", ["import weightvid", "import weightvid.loader"])
def test_import_is_light(statement: str) -> None:
    assert imported_by(statement).isdisjoint(HEAVY)


def test_runtime_dependencies_have_an_upper_bound() -> None:
    for requirement in PROJECT["project"]["dependencies"]:
        assert re.search(r"<\d", requirement), requirement


def test_tools_are_pinned_and_pre_commit_agrees() -> None:
    pins = dict(
        requirement.split("==")
        for requirement in PROJECT["dependency-groups"]["dev"]
        if "==" in requirement
    )
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "mypy", "import-linter", "codespell"):
        assert tool in pins
        assert tool in hooks


def test_wheel_carries_the_sample() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        assert (ROOT / source).is_file()
        assert target == f"weightvid/sample/{Path(source).name}"


def test_sample_is_small() -> None:
    total_bytes = sum(p.stat().st_size for p in (ROOT / "data" / "digits").iterdir())
    assert total_bytes < 1_000_000
