"""Which files beside the weights of a Hugging Face folder belong to the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from weightvid.errors import CheckpointError
from weightvid.spec import (
    SIDE_FILE_BYTES,
    SIDE_FILES,
    SIDE_FILES_BYTES,
    SideFile,
    is_safe_path,
)

#: weights, in whatever kind: those beside the ones that are packed are the same model again.
WEIGHTS: Final = frozenset(
    {
        *(".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".onnx", ".gguf", ".h5", ".keras"),
        *(".msgpack", ".tflite", ".ot", ".npz", ".mlmodel", ".onnx_data", ".data", ".pdparams"),
        *(".tar", ".gz", ".zip", ".mp4"),
    }
)
#: what training leaves behind, beside the weights.
_STATE: Final = frozenset({"optimizer", "scheduler", "training_args", "rng_state", "scaler"})


def gather(folder: Path) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Small files of a model folder, and what is left out as ``"path (why)"``.

    Hidden files, weights and their index files are not side files; weights of a further module of
    sentence-transformers (named in ``modules.json``) are, if small enough.

    Raises
    ------
    CheckpointError
        A file cannot be read.
    """
    modules = _modules(folder)
    files: list[SideFile] = []
    skipped: list[str] = []
    total = 0
    seen: set[str] = set()
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if reason := _foreign(PurePosixPath(name), modules):
            if reason != "index":
                skipped.append(f"{name} ({reason})")
            continue
        try:
            size = path.stat().st_size
            reason = _unfit(name, size, total, len(files), seen)
            if reason:
                skipped.append(f"{name} ({reason})")
                continue
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
        files.append(SideFile(name, data))
        seen.add(name.casefold())
        total += len(data)
    return tuple(files), tuple(skipped)


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files that are not hidden, in an order that depends on their names alone."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        for name in sorted(names):
            path = Path(root, name)
            if name[0] != "." and path.is_file():
                yield path


def _foreign(name: PurePosixPath, modules: frozenset[str]) -> str:
    """Why a file is no side file, whatever its size; empty if it is one."""
    if name.name.endswith(".index.json"):
        return "index"
    if name.suffix.lower() not in WEIGHTS:
        return ""
    if len(name.parts) > 1 and str(name.parent) in modules:
        return ""
    if len(name.parts) == 1 and not _STATE.isdisjoint({name.stem, name.stem.partition("-")[0]}):
        return "training state"
    return "other weights"


def _unfit(name: str, size: int, total: int, count: int, seen: set[str]) -> str:
    """Why a side file cannot be kept; empty if it can."""
    if not is_safe_path(name) or name.casefold() in seen:
        return "its name is not safe on every system"
    if size > SIDE_FILE_BYTES:
        return f"larger than {SIDE_FILE_BYTES >> 20} MiB"
    if total + size > SIDE_FILES_BYTES or count >= SIDE_FILES:
        return f"beyond {SIDE_FILES} files or {SIDE_FILES_BYTES >> 20} MiB of side files"
    return ""


def _modules(folder: Path) -> frozenset[str]:
    """Sub-folders that sentence-transformers loads."""
    try:
        listed = json.loads((folder / "modules.json").read_text("utf-8"))
        return frozenset(entry["path"] for entry in listed if entry["path"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return frozenset()
