"""Evaluations that are finished, kept on the disk: a search that was broken off goes on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from weightvid.planning.verdict import Verdict


def default_folder() -> Path:
    """Where evaluations are kept unless told otherwise: in the user's cache folder."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "weightvid" / "evaluations"


def steps_key(steps: Mapping[str, float]) -> str:
    """Key of a model whose tensors are quantized with these steps, all others exact."""
    text = json.dumps(sorted((name, float(step).hex()) for name, step in steps.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Memory:
    """Verdicts by the steps of the tensors, in memory and in one file.

    Each verdict is a line, written as soon as it is there. A line that was cut off is ignored.

    Parameters
    ----------
    folder : path or None
        None: in memory alone.
    identity : mapping
        All that verdicts depend on, besides the steps.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.path = folder / f"{name}.jsonl" if folder is not None else None
        self._known: dict[str, Verdict] = {}
        if self.path is not None:
            with suppress(OSError, UnicodeDecodeError):
                self._load(self.path.read_text(encoding="utf-8"))

    def _load(self, text: str) -> None:
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                metric = record["metric"]
                verdict = Verdict(
                    float(record["loss"]),
                    float(record["drive"]),
                    None if metric is None else float(metric),
                )
                if isfinite(verdict.loss) and isfinite(verdict.drive):
                    self._known[str(record["steps"])] = verdict

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Verdict | None:
        """A verdict, if it is known."""
        return self._known.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict. Where the disk refuses it, it is kept in memory."""
        self._known[key] = verdict
        if self.path is None:
            return
        record = {
            "steps": key,
            "loss": verdict.loss,
            "drive": verdict.drive,
            "metric": verdict.metric,
        }
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A line that was cut off must not swallow this one.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(record)}\n")
