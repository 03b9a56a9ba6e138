"""Processes of a comparison: points, and judges that stay; none outlives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from weightvid.compare.judge import Question
from weightvid.compare.point import Request
from weightvid.compare.row import ERROR
from weightvid.packing.children import ONE_THREAD

_PACKAGE_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_TAIL_BYTES: Final = 4096


class Children:
    """Starts processes, and ends them all at the end.

    Parameters
    ----------
    jobs : int
        Points that run side by side.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def start(self, folder: Path, *arguments: str, answers: bool) -> subprocess.Popen[bytes]:
        """Start a module; ``answers``: its standard output is read."""
        environment = dict(os.environ)
        path = [str(_PACKAGE_ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        environment["TMPDIR"] = str(folder)
        if self._jobs > 1:
            environment |= ONE_THREAD
        with (folder / "stderr").open("ab") as log, self._lock:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )
            self._running.add(process)
            if self._ended:
                process.kill()
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a process."""
        try:
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            with self._lock:
                self._running.discard(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def point(self, request: Request, folder: Path) -> dict[str, Any]:
        """Measure a point; however its process ends, there is a result."""
        asked = folder / "request.json"
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        process = self.start(folder, "weightvid.compare.point", str(asked), answers=False)
        status = self.finish(process)
        return _result(Path(request.result)) or {
            "status": ERROR,
            "message": _ending("the point's process", status, folder / "stderr"),
        }

    def end(self) -> None:
        """End all that runs."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()


class Judge:
    """A process that evaluates one model after another.

    Parameters
    ----------
    children : Children
    function : str
        ``script.py:function``.
    folder : Path
        For its files.
    """

    def __init__(self, children: Children, function: str, folder: Path) -> None:
        self._children = children
        self._function = function
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: Question) -> dict[str, Any]:
        """Judge a model; a process that dies of it is an error, and the next gets a new one."""
        if self._process is None:
            self._process = self._children.start(
                self._folder, "weightvid.compare.judge", self._function, answers=True
            )
        process = self._process
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.write(json.dumps(asdict(question)).encode() + b"\n")
                process.stdin.flush()
        answered = bool(process.stdout and process.stdout.readline())
        found = _result(Path(question.result))
        if answered and found is not None:
            return found
        self._process = None
        status = self._children.finish(process)
        message = _ending("the evaluation's process", status, self._folder / "stderr")
        return {"status": ERROR, "message": message}

    def close(self) -> None:
        """Let the process end."""
        if self._process is not None:
            process, self._process = self._process, None
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
            self._children.finish(process)


def _result(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def _ending(what: str, status: int, said: Path) -> str:
    """How a process ended that left no result."""
    tail = said.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace").strip().splitlines()
    words = f": {tail[-1].strip()}" if tail else ""
    if status < 0:
        return f"{what} was ended by signal {-status}{words}"
    return f"{what} ended with status {status}{words}"
