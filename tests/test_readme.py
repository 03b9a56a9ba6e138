"""The README's examples, run as they stand, in the order in which they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def examples(language: str) -> list[str]:
    """Fenced blocks that are marked with a language: ``sh`` and ``python`` ones are complete."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample, after the shell's examples."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("readme")
    (path / "data").symlink_to(ROOT / "data")
    code = "from weightvid.cli import main; main()"
    weightvid = f'weightvid() {{ "{sys.executable}" -c "{code}" "$@"; }}\n'
    for block in examples("sh"):
        run(["bash", "-euc", weightvid + block], path)
    return path


def run(command: list[str], folder: Path) -> None:
    """Run a command; show what it said if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def test_shell_examples(folder: Path) -> None:
    assert (folder / "digits.mp4").is_file()
    assert (folder / "restored.safetensors").is_file()
    assert list((folder / "pictures").glob("*.png"))


def test_python_examples(folder: Path) -> None:
    blocks = examples("python")
    assert blocks
    for block in blocks:
        run([sys.executable, "-W", "error", "-c", block], folder)


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:tools|data|docker|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
