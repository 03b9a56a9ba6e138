#!/usr/bin/env python3
"""File size against the settings of the layout: classes of energy, width and choice of cores.

    python tools/bench_folds.py MODEL... [--steps 0.12 0.18 0.33] [--out tools/results/folds]

Whole files by `weightvid pack`; the settings differ, the levels do not. Prints a table and writes
OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

from measure.report import Record, machine, table, versions, write

from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.packing import layout
from weightvid.summary import summarize_archive

RADII = {
    "all": tuple(range(1, 16)),
    "1 2 4 7 11 15": (1, 2, 4, 7, 11, 15),
    "1 2 4 8 12": (1, 2, 4, 8, 12),
}
OCTAVES = (0.25, 0.5)
SIGMAS = (1.5, 1.8)


def packed(model: Path, step: float, folder: Path) -> Record:
    """Size of an archive, and the parts of it that the settings move."""
    path = folder / "model.mp4"
    pack_checkpoint(model, path, PackOptions(step_factor=step, verify=False, force=True))
    account = summarize_archive(path).account
    return {"bytes": path.stat().st_size} | {
        name: account[name] for name in ("packets", "digits", "orders")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--steps", nargs="+", type=float, default=[0.12, 0.18, 0.33])
    parser.add_argument("--out", type=Path, default=Path("tools/results/folds"))
    options = parser.parse_args()
    points: list[Record] = []
    constants = vars(layout)
    with tempfile.TemporaryDirectory() as folder:
        for model, step, octaves, sigmas, (name, radii) in product(
            options.models, options.steps, OCTAVES, SIGMAS, RADII.items()
        ):
            constants |= {"_CLASS_OCTAVES": octaves, "_CORE_SIGMAS": sigmas, "_RADII": radii}
            point = {"model": f"{model.parent.name}/{model.name}", "step": step}
            point |= {"octaves": octaves, "sigmas": sigmas, "radii": name}
            points.append(point | packed(model, step, Path(folder)))
            print(" ".join(str(value) for value in points[-1].values()), flush=True)
    steps = " ".join(f"{step:g}" for step in options.steps)
    command = f"python tools/bench_folds.py MODEL... --steps {steps}"
    record = {"command": command, "versions": versions(), "machine": machine(), "points": points}
    rows = [[str(value) for value in point.values()] for point in points]
    text = f"# Folds\n\n`{command}`\n\n{table(list(points[0]), rows)}\n"
    write(options.out, record, text)


if __name__ == "__main__":
    main()
