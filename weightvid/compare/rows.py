"""Measured points, kept in a folder so that a comparison can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from weightvid.calibrate.evaluation import Function, Judge, Verdict
from weightvid.compare.model import Method, Model
from weightvid.errors import OutputError, WeightvidError
from weightvid.version import code_sha256

OK: Final = "ok"
FAILED: Final = "failed"
MISSING: Final = "missing"
_PACKAGES: Final = tuple("weightvid av numpy torch zstandard constriction gguf bjontegaard".split())


@dataclass(frozen=True, slots=True)
class Row:
    """One point of a comparison.

    Attributes
    ----------
    label, curve, kind, parameter, value
        Name of the point, and what its method says (see `Method`).
    status, message : str
        ``ok``; ``failed``: it failed or did not come back as it should; ``missing``: this machine
        lacks what it needs; and why.
    file_bytes : int
        Everything that a reader needs.
    bits_per_weight : float
        8 x ``file_bytes`` over all floating-point elements of the model.
    sqnr_db : float or None
        Over all weights that ``weightvid pack`` quantizes, but for outliers; None: all are exact.
    metric, kl, cosine, agreement : float or None
        See `weightvid.calibrate.evaluation.Verdict`.
    encode_s, decode_s, cpu_s, load : float
        Wall seconds; CPU seconds of both and of the measuring; the machine's load average before.
    command : str
        Gives the point again.
    """

    label: str
    curve: str
    kind: str
    parameter: str = ""
    value: float = 0.0
    status: str = OK
    message: str = ""
    file_bytes: int = 0
    bits_per_weight: float = 0.0
    sqnr_db: float | None = None
    metric: float | None = None
    kl: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    encode_s: float = 0.0
    decode_s: float = 0.0
    cpu_s: float = 0.0
    load: float = 0.0
    command: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def measure(
    model: Model,
    method: Method,
    value: float,
    judge: Judge | None = None,
    earlier: Row | None = None,
) -> Row:
    """Store and restore a model one way, and say what came of it; errors become rows, too.

    Of a row that was measured ``earlier``, without the judge, the tensors alone are wanted.
    """
    about: dict[str, Any] = {
        "label": method.label(value), "curve": method.name, "kind": method.kind,
        "parameter": method.parameter, "value": value, "settings": dict(method.settings),
    }  # fmt: skip
    if method.missing:
        return Row(**about, status=MISSING, message=method.missing)
    # Programs that wanted a core in the last minute; 0 where nobody counts them.
    load, cpu = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, _cpu_seconds()
    try:
        if earlier is not None and method.restore is not None:
            row, tensors = earlier, method.restore(model, value)
        else:
            coded = method.code(model, value)
            tensors = coded.tensors
            row = earlier or Row(
                **about,
                file_bytes=coded.file_bytes,
                bits_per_weight=8 * coded.file_bytes / model.weights,
                sqnr_db=model.sqnr_db(tensors),
                encode_s=coded.encode_s,
                decode_s=coded.decode_s,
                cpu_s=_cpu_seconds() - cpu,
                load=load,
                details=dict(coded.details),
            )
        verdict = Verdict() if judge is None else judge.judge(model.state(tensors))
    except (WeightvidError, OSError, MemoryError) as error:
        return Row(**about, status=FAILED, message=str(error) or type(error).__name__)
    return replace(row, **asdict(verdict))


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def with_torch(function: Function) -> Function:
    """A function that takes numpy arrays and hands torch tensors to another one."""

    @wraps(function)
    def judged(state: dict[str, Any]) -> Any:
        import torch

        return function({name: torch.from_numpy(array) for name, array in state.items()})

    return judged


class RowStore:
    """Rows by what they depend on, in ``rows.jsonl`` of a folder, which is made; None: nowhere.

    What a function says of a point is kept by itself: sizes and seconds do not depend on it. An
    OutputError says that the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._path = None if folder is None else Path(folder) / "rows.jsonl"
        self._kept: dict[str, Any] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            foreign = not self._path.exists() and any(self._path.parent.iterdir())
        except OSError as error:
            raise OutputError(f"cannot make the folder {folder}: {error}") from None
        if foreign:
            raise OutputError(f"{folder} holds no comparison but other files: name another folder")
        self._path.touch()
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError):  # the last line may be cut short
                key, found = json.loads(line)
                self._kept[key] = (Row if "curve" in found else Verdict)(**found)

    def measure(self, model: Model, method: Method, value: float, judge: Judge | None) -> Row:
        """A row that is there already, or one that is measured now."""
        key = _key(model, method, value)
        judged = f"{key} {judge.fingerprint}" if judge else key
        row, verdict = self._kept.get(key), self._kept.get(judged)
        if row is None or verdict is None:
            fresh = measure(model, method, value, judge, row)
            if fresh.status != OK:
                return fresh
            row = replace(fresh, **asdict(Verdict()))
            verdict = Verdict(**{each.name: getattr(fresh, each.name) for each in fields(Verdict)})
            self._keep(key, row)
            self._keep(judged, verdict)
        return replace(row, **asdict(verdict)) if judge else row

    def _keep(self, key: str, found: Row | Verdict) -> None:
        if key not in self._kept:
            self._kept[key] = found
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, asdict(found)]) + "\n")


def _key(model: Model, method: Method, value: float) -> str:
    """Key of everything that a row depends on but the judge: model, settings, code, versions."""
    parts = {
        "model": model.sha256,
        "method": [method.name, method.kind, method.parameter, value, dict(method.settings)],
        "code": code_sha256(method.depends, ("cli", "compare/report")),
        "versions": versions(),
        "row": [item.name for item in fields(Row)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of everything that has a part in the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, str | int]:
    """The machine, in words, without its name."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return {"system": platform.system(), "processor": processor, "cores": os.cpu_count() or 1}
