"""Untrained methods of the research side by side: quantizers.py MODEL_FOLDER (with eval.py).

Rates of each at equal quality, against uniform quantization with the same entropy coder, and
weightvid's own archives.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from weightvid.compare import CompareOptions, compare
from weightvid.compare.curves import Goal

RESULTS = Path(__file__).resolve().parents[1] / "results"
GOALS = (Goal("sqnr", 4.0), Goal("sqnr", 7.0), Goal("sqnr", 12.0), Goal("sqnr", 17.0))
KL = Goal("kl", 0.05)
IMAGES = 250


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("eval_script", folder / "eval.py")
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
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
    lines = [
        f"{folder.name}: bits per weight at equal quality", "",
        "| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns),
    ]  # fmt: skip
    for name in result.curves():
        cells = [column.get(name) for column in columns.values()]
        texts = ["" if cell is None else f"{cell:.3f}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    rows = [
        {"label": r.label, "bytes": r.file_bytes, "bpw": r.bits_per_weight,
         "sqnr_db": r.sqnr_db, "kl": r.kl}
        for r in result.rows
    ]  # fmt: skip
    name = f"research_quantizers_{folder.name}"
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
