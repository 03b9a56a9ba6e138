#!/usr/bin/env python3
"""Time and memory of packing and unpacking by the size of the model.

    python tools/bench_large.py --folder /tmp --gigabytes 0.1 8 --jobs 2

Makes checkpoints with tools/make_large.py in the folder (which needs two and a half times the
largest size free), packs them, checks included, unpacks them, each in a process of its own, and
removes them (``--keep``: leaves checkpoints and archives there, and uses a checkpoint that lies
there). The smallest is measured before and after each other one: a busy machine slows all
alike. Writes large.json and large.md in the output folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from measure import worker
from measure.report import Record, machine, number, table, versions, write

from weightvid.checkpoint import open_checkpoint

MEGABYTE: Final = 10**6


def make(folder: Path, gigabytes: float) -> Path:
    """A synthetic checkpoint."""
    path = folder / f"large-{round(1000 * gigabytes)}mb"
    if path.exists():
        return path
    tool = Path(__file__).resolve().with_name("make_large.py")
    command = [sys.executable, str(tool), str(path), "--gigabytes", str(gigabytes)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def measured(source: Path, jobs: int, keep: bool) -> Record:
    """Pack and unpack a checkpoint: one row of the table."""
    archive, restored = source.with_suffix(".mp4"), source.with_name(source.name + "-restored")
    with open_checkpoint(source) as reader:
        specs = reader.contents.tensors
    found: Record = {
        "weights": sum(spec.size for spec in specs),
        "source_bytes": sum(spec.stored_bytes for spec in specs),
        "largest_bytes": max(spec.stored_bytes for spec in specs),
    }
    found["pack"] = worker.run(
        "pack", source=str(source), archive=str(archive), options={"jobs": jobs}
    )
    found["archive_bytes"] = archive.stat().st_size
    found["unpack"] = worker.run("unpack", archive=str(archive), destination=str(restored))
    found["jobs"] = jobs
    if not keep:
        archive.unlink()
    shutil.rmtree(restored)
    return found


def row(run: Record) -> list[str]:
    cells = [f"{run['source_bytes'] / 1e9:.2f}", f"{run['weights'] / 1e6:,.0f}"]
    cells.append(f"{run['largest_bytes'] / MEGABYTE:,.0f}")
    for task in ("pack", "unpack"):
        each = run[task]
        cells += [
            number(each["wall_s"], 1),
            number(run["weights"] / 1e6 / each["wall_s"], 2),
            number(run["weights"] / 1e6 / each["cpu_s"], 2),
            f"{peak(each, run['jobs'] if task == 'pack' else 1) / MEGABYTE:.0f}",
        ]
    return cells


def peak(each: Record, jobs: int) -> float:
    """At most what all processes together held at a time."""
    own: float = each["import_bytes"] + each["peak_bytes"]
    return own + (jobs - 1) * float(each["largest_child_bytes"])


HEAD: Final = (
    "GB", "M weights", "largest tensor MB",
    "pack s", "M weights/s", "per CPU s", "peak MB",
    "unpack s", "M weights/s", "per CPU s", "peak MB",
)  # fmt: skip

NOTES: Final = """\
Float32, sharded, recipe balanced, the archive decoded and checked as `pack` does. Peak: the sum of
the peaks of all processes, imports included. Rates by wall clock are this machine's with whatever
else ran on it; rates per second of the processes' own CPU time are less touched by that."""


def markdown(record: Record) -> str:
    rows = [row(run) for run in record["runs"]]
    where = record["machine"]
    parts = ["# Models of any size", f"`{record['command']}`", NOTES, table(HEAD, rows)]
    parts.append(f"{where['cores']} cores, {where['cpu']}.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the models go meanwhile")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 8.0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and archives there")
    parser.add_argument("--out", type=Path, default=Path("tools/results"))
    options = parser.parse_args()
    smallest, *others = sorted(options.gigabytes)
    order = [smallest]
    for size in others:
        order += [size, smallest]
    runs = []
    for size in order:
        source = make(options.folder, size)
        try:
            runs.append(measured(source, options.jobs, options.keep))
        finally:
            if not options.keep:
                shutil.rmtree(source)
        print(table(HEAD, [row(runs[-1])]), flush=True)
    sizes = " ".join(f"{size:g}" for size in options.gigabytes)
    record = {
        "command": f"python tools/bench_large.py --folder FOLDER --gigabytes {sizes} "
        f"--jobs {options.jobs}",
        "versions": versions(),
        "machine": machine(),
        "runs": runs,
    }
    write(options.out / "large", record, markdown(record))


if __name__ == "__main__":
    main()
