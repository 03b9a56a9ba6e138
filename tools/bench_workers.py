#!/usr/bin/env python3
"""What a second worker brings when packing, and what this machine lets it bring at most.

    python tools/bench_workers.py --minilm MINILM.safetensors --gigabytes 1 --folder /tmp --rounds 5

Packs each checkpoint with one worker, with two (processes, and threads), and twice at the same time
by two programs of one worker each, which share nothing but the machine: no way of sharing the work
can do better than these. Each run is a process of its own; every round runs each contender once, in
turn; ratios are taken within a round. ``--gigabytes`` makes a checkpoint with tools/make_large.py
and removes it. Writes workers.json and workers.md in the output folder.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench_large import make
from measure import worker
from measure.report import Record, machine, number, table, versions, write

#: name, workers, how they work, and how many programs pack at the same time.
CONTENDERS: Final = (
    ("one worker", 1, "threads", 1),
    ("two workers: processes", 2, "processes", 1),
    ("two workers: threads", 2, "threads", 1),
    ("two programs of one worker", 1, "threads", 2),
)

NOTES: Final = """\
Packing without the check. Seconds count from after the imports and hold the start of worker
processes; CPU seconds are those of all processes. Work per time: weights per second by wall clock,
over those of one worker in the same round; of two programs, of both together, until the slower one
is done. Not shared: CPU time of the main thread, over that of all."""


def packed(source: Path, folder: Path, contender: tuple[str, int, str, int]) -> Record:
    """One contender once."""
    _, jobs, cluster, programs = contender
    options: dict[str, Any] = {"jobs": jobs, "cluster": cluster, "verify": False}

    def run(place: int) -> Record:
        archive = str(folder / f"model{place}.mp4")
        return worker.run("pack", source=str(source), archive=archive, options=options)

    with ThreadPoolExecutor(programs) as together:
        runs = list(together.map(run, range(programs)))
    return {
        "wall_s": max(each["wall_s"] for each in runs),
        "cpu_s": sum(each["cpu_s"] for each in runs),
        "main_thread_cpu_s": sum(each["main_thread_cpu_s"] for each in runs),
        "programs": programs,
    }


def measured(name: str, source: Path, folder: Path, rounds: int) -> Record:
    """All rounds of a checkpoint."""
    found: list[dict[str, Record]] = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for place in range(rounds):
            found.append({c[0]: packed(source, Path(work), c) for c in CONTENDERS})
            print(f"{name}: round {place + 1} of {rounds}", flush=True)
    return {"model": name, "rounds": found}


def rows(record: Record) -> list[list[str]]:
    alone = CONTENDERS[0][0]
    made = []
    for name, *_ in CONTENDERS:
        runs = [each[name] for each in record["rounds"]]
        gains = [
            run["programs"] * each[alone]["wall_s"] / run["wall_s"]
            for run, each in zip(runs, record["rounds"], strict=True)
        ]
        share = median(run["main_thread_cpu_s"] / run["cpu_s"] for run in runs)
        made.append(
            [
                name,
                number(median(run["wall_s"] for run in runs), 2),
                number(median(run["cpu_s"] for run in runs), 2),
                f"{median(gains):.2f} x",
                f"{min(gains):.2f} to {max(gains):.2f}",
                f"{100 * share:.1f} %",
            ]
        )
    return made


def markdown(record: Record) -> str:
    parts = ["# Two workers", f"`{record['command']}`", NOTES]
    head = ["", "wall s", "CPU s", "work per time", "in the rounds", "not shared"]
    for model in record["models"]:
        parts += [f"## {model['model']}", table(head, rows(model))]
    where = record["machine"]
    parts.append(f"{where['cores']} cores, {where['cpu']}; medians of {record['rounds']} rounds.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minilm", type=Path, help="all-MiniLM-L6-v2's safetensors")
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[])
    parser.add_argument("--folder", type=Path, required=True, help="where files go meanwhile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("tools/results"))
    options = parser.parse_args()
    models = []
    if options.minilm is not None:
        models.append(measured("minilm_l6", options.minilm, options.folder, options.rounds))
    for size in options.gigabytes:
        source = make(options.folder, size)
        try:
            models.append(measured(f"{size:g} GB", source, options.folder, options.rounds))
        finally:
            shutil.rmtree(source)
    if not models:
        parser.error("name a checkpoint: --minilm or --gigabytes")
    shown = [f"--gigabytes {' '.join(f'{size:g}' for size in options.gigabytes)}"]
    shown = shown if options.gigabytes else []
    if options.minilm is not None:
        shown.insert(0, "--minilm MINILM.safetensors")
    record = {
        "command": f"python tools/bench_workers.py {' '.join(shown)} --folder FOLDER "
        f"--rounds {options.rounds}",
        "versions": versions(),
        "machine": machine(),
        "rounds": options.rounds,
        "models": models,
    }
    text = markdown(record)
    write(options.out / "workers", record, text)
    print(text)


if __name__ == "__main__":
    main()
