"""Time and memory of a piece of work."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Generic, TypeVar

_T = TypeVar("_T")
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Metered(Generic[_T]):
    """What work gave, its wall time, and the memory it took on top of what was held before.

    ``peak_bytes`` is None where the system does not tell.
    """

    result: _T
    seconds: float
    peak_bytes: int | None


def metered(work: Callable[[], _T]) -> Metered[_T]:
    """Run work, the only one of this process."""
    before = _resident("VmRSS") if _reset_peak() else None
    began = perf_counter()
    result = work()
    seconds = perf_counter() - began
    peak = None if before is None else _resident("VmHWM")
    return Metered(
        result, seconds, None if peak is None or before is None else max(0, peak - before)
    )


def _reset_peak() -> bool:
    """Linux: let the high-water mark begin again (proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def _resident(field: str) -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * _KIB for line in lines if line.startswith(field))
    return None


def machine() -> dict[str, str | int]:
    """The machine, in words, without its name."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "processor": _processor(),
        "cores": cores(),
        "python": platform.python_version(),
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return platform.processor() or platform.machine()
