"""Finished points on disk, what was run on what, and tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weightvid.version import code_sha256

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cache:
    """Finished measurements by what they depend on; nothing is kept without a folder."""

    folder: Path | None

    def get(self, key: Record) -> Record | None:
        """The measurement made under this key, if there is one."""
        if self.folder is None or not (path := self._path(key)).is_file():
            return None
        found: Record = json.loads(path.read_text(encoding="utf-8"))["value"]
        return found

    def put(self, key: Record, value: Record) -> None:
        """Keep a measurement."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": key, "value": value}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
            file.write(text)
        Path(file.name).replace(self._path(key))

    def made(self, key: Record, make: Callable[[], Record]) -> Record:
        """The measurement of a key, made now if it has not been made before."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def _path(self, key: Record) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return Path(self.folder or ".") / f"{digest[:32]}.json"


def versions() -> Record:
    """Versions of everything that has a part in the numbers."""
    names = ("weightvid", "av", "numpy", "torch", "zstandard", "bjontegaard", "scipy")
    found: Record = {"python": platform.python_version(), "weightvid_sha256": code_sha256()[:16]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> Record:
    """The machine, without its name."""
    return {"system": platform.system(), "cpu": _cpu(), "cores": os.cpu_count()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {names[0]}" if names else platform.machine()


def plain(record: Any) -> Record:
    """A dataclass as a dict."""
    return dataclasses.asdict(record)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Examples
    --------
    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines
    )


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number for a table; a dash for none."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def write(out: Path, record: Record, text: str) -> None:
    """Write ``out``.json and ``out``.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")
