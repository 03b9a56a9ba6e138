"""Finished points on the disk: one small file each, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import av
import numpy as np

from weightvid.atomic import atomic_output
from weightvid.codec.program import Program
from weightvid.compare import nnc
from weightvid.compare.baselines import BASELINES
from weightvid.compare.settings import Setting
from weightvid.errors import OutputError
from weightvid.version import __version__

#: of what points hold; another one measures everything again.
SCHEMA: Final = 1
#: rooms of this package that no point depends on.
NOT_MEASURING: Final = ("cli", "compare/report")


class Cache:
    """Records by key, in a folder.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def path(self, key: str, suffix: str = ".json") -> Path:
        """File of a key."""
        return self.folder / f"{key}{suffix}"

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key; None if there is none, or it is damaged."""
        try:
            found = json.loads(self.path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record."""
        with atomic_output(self.path(key), force=True) as file:
            file.write(json.dumps(record, indent=1).encode())


def make_folder(folder: Path) -> None:
    """Make a folder, and be sure that files can be written there.

    Raises
    ------
    OutputError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    with atomic_output(folder / ".weightvid-probe", force=True) as file:
        file.write(b"")
    (folder / ".weightvid-probe").unlink(missing_ok=True)


def default_folder() -> Path:
    """Where points are kept unless another folder is named: the user's cache folder."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        base = Path(named)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "weightvid" / "compare"


def key_of(parts: Mapping[str, Any]) -> str:
    """Key of everything that a point depends on.

    Examples
    --------
    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps({"schema": SCHEMA, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def versions(setting: Setting, program: Program | None = None) -> dict[str, str]:
    """Versions of everything that a point is measured by."""
    found = {
        "weightvid": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "numpy": np.__version__,
    }
    if setting.kind in ("pack", "lossless", "lossy"):
        found["av"] = av.__version__
        found |= {
            name: ".".join(map(str, numbers))
            for name, numbers in av.library_versions.items()
            if name in ("libavcodec", "libavutil")
        }
    if program is not None:
        found["ffmpeg"] = program.version
    if setting.kind == "baseline":
        for name in BASELINES[setting.method].modules:
            found[name] = installed(name) or ""
        python = nnc.python()
        if setting.method == "nncodec" and python is not None:
            found["nncodec"] = nnc.version(python)
    return found


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
