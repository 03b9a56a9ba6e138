"""The project itself: version, scripts, contracts, what an import costs, the public API."""

from __future__ import annotations

import enum
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from weightvid.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = (
    *("torch", "safetensors", "typer", "rich", "imageio", "zstandard", "fsspec", "aiohttp"),
    *("huggingface_hub", "onnx", "gguf", "distributed", "ray", "weightvid.checkpoint"),
)
#: modules whose names are promised; ``WEIGHTVID_REGENERATE=1`` writes them to `API`.
PUBLIC = (
    *("weightvid", "weightvid.loader", "weightvid.pack", "weightvid.targets", "weightvid.errors"),
    *("weightvid.unpack", "weightvid.verify", "weightvid.inspect", "weightvid.preview"),
    *("weightvid.numpy", "weightvid.torch", "weightvid.checkpoint", "weightvid.calibrate"),
    *("weightvid.compare", "weightvid.video", "weightvid.workers", "weightvid.container"),
)
API = ROOT / "tests" / "api.txt"


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, **more
    )  # fmt: skip


def scripts() -> list[Path]:
    files = [path for folder in ("tools", ".ci") for path in (ROOT / folder).iterdir()]
    return sorted(path for path in files if path.is_file() and not path.suffix)


def texts() -> Iterator[Path]:
    """What is committed, and what might be."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix not in (".mp4", ".png", ".npz", ".safetensors"):
            yield path


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", __version__)


def test_installed_version_is_the_sources() -> None:
    try:
        installed = metadata.version("weightvid")
    except metadata.PackageNotFoundError:
        pytest.skip("weightvid is run from the checkout, not installed")
    assert installed == __version__


def test_every_script_can_be_run() -> None:
    assert {path.name for path in scripts()} >= {"setup", "demo", "test", "lint", "run"}
    for path in scripts():
        assert path.read_text().startswith("#!/usr/bin/env bash\n"), path
        assert os.access(path, os.X_OK), f"{path} lacks the run bit: chmod +x"
        assert run("bash", "-n", str(path)).returncode == 0, path


def test_setup_refuses_unknown_arguments() -> None:
    done = run(str(ROOT / "tools" / "setup"), "--nonsense")
    assert done.returncode == 2
    assert "--no-torch" in done.stderr


def test_import_contracts_hold() -> None:
    pytest.importorskip("importlinter", reason="import-linter is a development tool")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("statement", ["import weightvid", "import weightvid.loader"])
def test_import_is_light(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = run(sys.executable, "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()).isdisjoint(HEAVY)


def test_the_house_stays_small() -> None:
    """Ratchets: lower them with the code."""
    lines = {p: len(p.read_text().splitlines()) for p in (ROOT / "weightvid").rglob("*.py")}
    assert lines[ROOT / "weightvid" / "loader.py"] <= 1_494
    assert sum(lines.values()) <= 23_410


def test_nothing_names_where_it_was_made() -> None:
    hosts = ("pypi" + ".org", "python" + "hosted.org", "proxy.golang" + ".org")
    places = ("/" + "work/", "/tmp" + "/old", "house" + ".md")
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in texts()
        for word in (*hosts, *places)
        if word in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert not found


def test_runtime_dependencies_have_an_upper_bound() -> None:
    for requirement in PROJECT["project"]["dependencies"]:
        assert re.search(r"<\d", requirement), requirement


def test_tools_are_pinned_and_pre_commit_agrees() -> None:
    wanted = PROJECT["dependency-groups"]["dev"]
    pins = dict(requirement.split("==") for requirement in wanted if "==" in requirement)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "mypy", "import-linter", "codespell"):
        assert tool in pins
        assert tool in hooks


def test_wheel_carries_the_sample_which_is_small() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        assert (ROOT / source).is_file()
        assert target == f"weightvid/sample/{Path(source).name}"
    assert sum(p.stat().st_size for p in (ROOT / "data" / "digits").iterdir()) < 1_000_000


# --- the public API -------------------------------------------------------------------------------


def names_of(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    here = [n for n in vars(module) if not n.startswith("_")]
    return sorted(n for n in here if getattr(vars(module)[n], "__module__", "") == module.__name__)


def signature(value: Any) -> str:
    try:
        shown = str(inspect.signature(value))
    except (TypeError, ValueError):
        return "(...)"
    shown = re.sub(r"<function (\S+) at 0x\w+>", r"\1", shown)
    return re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", shown).replace("'", "")


def described(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if issubclass(value, enum.Enum):
            return
        fields = getattr(value, "_fields", ())
        if fields or (value.__init__ is not object.__init__ and not issubclass(value, Exception)):
            yield f"    {name}{signature(value)}"
        for member, inner in sorted(vars(value).items()):
            if member.startswith("_") or member in fields:
                continue
            if isinstance(inner, property):
                yield f"    .{member}"
            elif callable(inner) or isinstance(inner, (classmethod, staticmethod)):
                yield f"    .{member}{signature(getattr(value, member))}"
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def test_public_api() -> None:
    pytest.importorskip("torch", reason="weightvid.torch is part of the API")
    lines = [
        "# Public names. To accept a change: WEIGHTVID_REGENERATE=1 pytest tests/test_project.py"
    ]
    for name in PUBLIC:
        module = importlib.import_module(name)
        lines += ["", f"[{name}]"]
        for item in names_of(module):
            value = getattr(module, item)
            # What the package hands on is described where it lives.
            lines += [item] if name == "weightvid" else described(item, value)
    made = "\n".join(lines) + "\n"
    if os.environ.get("WEIGHTVID_REGENERATE"):
        API.write_text(made)
    assert made == API.read_text(), "see the first line of tests/api.txt"
