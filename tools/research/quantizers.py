"""Untrained methods of the research side by side: quantizers.py MODEL_FOLDER (with eval.py).

Rates of each at equal quality, against uniform quantization with the same entropy coder, and
weightvid's own archives.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cifar import evaluation_script, table, write_results

from weightvid.compare import CompareOptions, compare
from weightvid.compare.curves import Goal

GOALS = (Goal("sqnr", 4.0), Goal("sqnr", 7.0), Goal("sqnr", 12.0), Goal("sqnr", 17.0))
KL = Goal("kl", 0.05)
IMAGES = 250


def main(folder: Path) -> None:
    script = evaluation_script(folder)
    options = CompareOptions(
        factors=(0.09, 0.18, 0.36, 0.7, 1.0), fidelities=("outputs", "weights"),
        recipes=(), codecs=(), plain=False, peers=False, research=True,
        goals=(*GOALS, KL), anchor="research uniform",
        evaluation=lambda state: script.logits(state, IMAGES), folder=Path("out") / folder.name,
    )  # fmt: skip
    result = compare(
        folder / "model.safetensors", options, on_row=lambda row: print(row.label, flush=True)
    )
    columns = {str(goal): result.rates_at(goal) for goal in options.goals}
    rows = []
    for name in result.curves():
        cells = [column.get(name) for column in columns.values()]
        rows.append((name, *("" if cell is None else f"{cell:.3f}" for cell in cells)))
    found = [
        {"label": r.label, "bytes": r.file_bytes, "bpw": r.bits_per_weight,
         "sqnr_db": r.sqnr_db, "kl": r.kl}
        for r in result.rows
    ]  # fmt: skip
    lines = [
        f"{folder.name}: bits per weight at equal quality",
        "",
        *table(["method", *columns], rows),
    ]
    write_results(f"quantizers_{folder.name}", lines, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
