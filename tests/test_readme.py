"""README.md and docs/: their examples run, their links lead somewhere, cli.md lists every option.

A fenced block marked ``run`` is run, one marked ``file=NAME`` is written first; those of a page
share a folder, in which the sample lies in ``data/digits``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"^```(sh|python) (run|file=\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: what a shell block calls by its name; a checkout may have no installed command.
COMMAND = f'weightvid() {{ "{sys.executable}" -m weightvid "$@"; }}\n'
VERBS = (
    "pack",
    "unpack",
    "apply",
    "device",
    "inspect",
    "verify",
    "fetch",
    "sign",
    "preview",
    "calibrate",
    "compare",
    "cache",
    "demo",
)


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def section_of(verb: str) -> str:
    return text_of("cli.md").split(f"\n## {verb}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(text_of(page))])
def test_examples_run(page: str, tmp_path: Path) -> None:
    if "torch" in "".join(block for _, _, block in BLOCK.findall(text_of(page))):
        pytest.importorskip("torch")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(ROOT / "data" / "digits")
    for language, mark, block in BLOCK.findall(text_of(page)):
        if mark != "run":
            (tmp_path / mark.removeprefix("file=")).write_text(block, encoding="utf-8")
        elif language == "sh":
            run(["bash", "-euo", "pipefail", "-c", COMMAND + block], tmp_path)
        else:
            run([sys.executable, "-W", "error", "-c", block], tmp_path)


def run(command: list[str], folder: Path) -> None:
    """Run a command; show what it said if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def test_lengths() -> None:
    lines = {page: len(text_of(page).splitlines()) for page in PAGES}
    assert lines.pop("README.md") <= 150
    assert sum(lines.values()) <= 1950


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text)
    for link in (first or second for first, second in links):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`((?:tools|data|docker|docs|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def anchors(path: Path) -> set[str]:
    """What links to the headings of a page may say, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_documented(verb: str) -> None:
    from typer.main import get_command

    from weightvid.cli.app import app

    group: Any = get_command(app)
    options = [p for p in group.get_command(None, verb).params if p.param_type_name == "option"]
    real = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    cells = re.findall(r"^\| (`-[^|]*)\|", section_of(verb), re.MULTILINE)
    assert set(re.findall(r"`(-[\w-]+)`", "".join(cells))) == real - {"--help", "-h"}


def test_every_json_field_is_described() -> None:
    schema = json.loads((ROOT / "docs" / "cli.schema.json").read_text(encoding="utf-8"))
    assert {*VERBS, "failure"} <= schema["$defs"].keys()
    for name, record in schema["$defs"].items():
        assert all(field.get("description") for field in record["properties"].values()), name
