"""Write the golden archives of data/golden anew: small files of every record type and method.

    .venv/bin/python tools/make_golden.py --force

The archives of a released format are never made again: this is for a format that is not released.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from weightvid.checkpoint import from_mapping
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.update import apply_updates
from weightvid.video import Video

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "data" / "golden"
sys.path.insert(0, str(ROOT / "tests"))
sources: Any = importlib.import_module("independent.sources")
reader: Any = importlib.import_module("independent.reader")


def example(path: Path) -> None:
    """The worked example of FORMAT.md: one matrix, one bias."""
    weight = sources.normal(1, 16, 16)
    weight[3, 5] = 9.0
    arrays = {"w": weight, "b": np.array([0.5, -1.0, 0.25], np.float32)}
    with from_mapping(arrays) as checkpoint:
        pack_checkpoint(checkpoint, path, PackOptions(jobs=1, force=True))


def layers(path: Path) -> None:
    """Kernels of one to three axes, matrices, side files; several frames."""
    with tempfile.TemporaryDirectory() as name, sources.small_frames():
        folder = Path(name)
        (folder / "config.json").write_text('{"layers": 2}')
        (folder / "vocab.txt").write_text("word\n" * 100)
        sources.safetensors(folder / "model.safetensors", sources.kernels())
        pack_checkpoint(folder, path, PackOptions(recipe="small", jobs=1, force=True))


def pack(arrays: Any, path: Path, **options: Any) -> None:
    """Pack arrays by a recipe of few bits."""
    with from_mapping(arrays) as checkpoint:
        settings = PackOptions(recipe="small", jobs=1, force=True, **options)
        pack_checkpoint(checkpoint, path, settings)


def types(path: Path) -> None:
    """Every element type, aliases, empty and 0-d tensors, metadata."""
    with from_mapping(sources.typed(), dtypes=sources.TYPED, metadata={"k": "ü"}) as checkpoint:
        pack_checkpoint(checkpoint, path, PackOptions(recipe="small", jobs=1, force=True))


def progressive(path: Path) -> None:
    """Three layers; a model of many types."""
    arrays = sources.kernels() | {"count": np.array([7]), "half": sources.normal(40, 50, kind="f2")}
    with from_mapping(arrays) as checkpoint:
        options = PackOptions(recipe="small", layers=3, jobs=1, force=True)
        pack_checkpoint(checkpoint, path, options)


def update(path: Path) -> None:
    """What changes the archive of three layers: tensors of all kinds of change."""
    arrays = sources.kernels()
    changed = {name: array * array.dtype.type(1.05) for name, array in arrays.items()}
    same = dict(list(arrays.items())[:1])
    gone = list(arrays)[-2]
    arrays = changed | same | {"count": np.array([9]), "half": sources.normal(41, 50, kind="f2")}
    arrays |= {"new": sources.normal(42, 40, 30), "new.bias": sources.normal(43, 40)}
    del arrays[gone]
    with from_mapping(arrays) as checkpoint:
        base = (GOLDEN / "progressive.mp4",)
        options = PackOptions(recipe="small", base=base, jobs=1, force=True)
        pack_checkpoint(checkpoint, path, options)


def merged(path: Path) -> None:
    """Both of them in one archive."""
    apply_updates(GOLDEN / "progressive.mp4", [GOLDEN / "update.mp4"], path, force=True)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "example": example,
    "layers": layers,
    "types": types,
    "fields": lambda path: sources.write_random(path, 1),
    "hard": lambda path: pack(sources.hard(), path),
    "integers": lambda path: pack(sources.hard(), path, fidelity="integers", video=Video("x264")),
    "weights": lambda path: pack(
        sources.kernels(), path, fidelity="weights", video=Video("svt-av1")
    ),
    "lossy": lambda path: pack(sources.kernels(), path, video=Video(qp=24)),
    "progressive": progressive,
    "update": update,
    "merged": merged,
}


#: what an archive is an update to.
BASES = {"update": "progressive"}


def hashes(path: Path) -> dict[str, Any]:
    """SHA-256 of the tensors' bytes and of the frames' luma."""
    archive = reader.Archive(io.BytesIO(path.read_bytes()))
    base = BASES.get(path.stem)
    if base:
        archive.use_base(reader.Archive(io.BytesIO((GOLDEN / f"{base}.mp4").read_bytes())))
    tensors = {name: hashlib.sha256(data).hexdigest() for name, data in archive.stream()}
    found = {"tensors": tensors, "frames": archive.lumas}
    return found | ({"base": base} if base else {})


def main() -> None:
    """Write all archives and golden.json."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--force", action="store_true", help="replace the archives that are there")
    if any(GOLDEN.glob("*.mp4")) and not options.parse_args().force:
        sys.exit(f"{GOLDEN} holds archives: nothing is written without --force")
    found = {}
    for name, make in MAKERS.items():
        path = GOLDEN / f"{name}.mp4"
        make(path)
        found[name] = hashes(path)
        print(f"{name}.mp4: {path.stat().st_size} bytes, {len(found[name]['tensors'])} tensors")
    (GOLDEN / "golden.json").write_text(json.dumps(found, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
