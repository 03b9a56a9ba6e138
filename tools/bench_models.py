#!/usr/bin/env python3
"""Size, fidelity, seconds and memory of each recipe on models with evaluations: the README's table.

    python tools/bench_models.py --eval-dir EVAL --minilm MINILM.safetensors --cache CACHE

Writes models.json and models.md in the output folder. Packing, unpacking and iterating run each
in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure.models
from measure import archives, plain, worker
from measure.evaluation import Model, State
from measure.report import (
    Cache,
    Record,
    machine,
    number,
    table,
    versions,
    write,
)
from measure.report import plain as as_dict

from weightvid.allocate import RECIPES
from weightvid.version import code_sha256

SCHEMA = 1
MB = 1e6


def row(model: Model, name: str, file_bytes: int, restored: State) -> Record:
    """One way to store a model, judged."""
    return {
        "stored": name,
        "bytes": file_bytes,
        "bits_per_weight": 8 * file_bytes / model.floats,
        "sqnr_db": model.sqnr_db(restored),
        **as_dict(model.judge(restored)),
    }


class Bench:
    """All rows of one model."""

    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        self.model = model
        self.cache = Cache(options.cache)
        self.recipes: list[str] = options.recipes
        self.key = {"schema": SCHEMA, "model": model.sha256, "samples": model.samples}
        self.code = code_sha256()

    def rows(self) -> Iterator[Record]:
        size = self.model.checkpoint.stat().st_size
        yield {
            "stored": "the checkpoint",
            "bytes": size,
            "bits_per_weight": 8 * size / self.model.floats,
            "metric": self.model.metric,
        }
        yield self.cache.made(self.key | {"row": "fp16"}, self.half)
        yield self.cache.made(self.key | {"row": "int8"}, self.int8)
        for recipe in self.recipes:
            key = self.key | {"row": "weightvid", "recipe": recipe, "code": self.code}
            yield self.cache.made(key, partial(self.packed, recipe))

    def half(self) -> Record:
        stored = plain.half_precision(self.model.state)
        return row(self.model, "fp16 + zstd -19", stored.zstd(), stored.restored)

    def int8(self) -> Record:
        stored = plain.per_channel(self.model.state, 8)
        return row(self.model, "int8 per channel + xz -9e", stored.xz(), stored.restored)

    def packed(self, recipe: str) -> Record:
        """An archive: its row, what it is made of, and what making and reading it costs."""
        with tempfile.TemporaryDirectory() as folder:
            path, back = Path(folder) / "model.mp4", Path(folder) / "back.safetensors"
            costs = {
                "pack": worker.run(
                    "pack",
                    source=str(self.model.checkpoint),
                    archive=str(path),
                    options={"recipe": recipe},
                ),
                "unpack": worker.run("unpack", archive=str(path), destination=str(back)),
                "iterate": worker.run("iterate", archive=str(path)),
            }
            restored = archives.restored_state(path)
            found = row(self.model, f"weightvid {recipe}", path.stat().st_size, restored)
            account = archives.account(path)
            exact = [restored[name] for name in archives.exact_names(path)]
            steps = len(list(archives.quantized_levels(path)))
            levels = archives.quantized_levels(path)
            same = plain.same_integers(levels, steps, exact)
        return found | {
            "recipe": recipe,
            "account": as_dict(account),
            "stream_over_entropy": account.overhead,
            "stream_and_orders_over_entropy": account.overhead_with_layout,
            "metadata_share": account.metadata_share,
            "same_integers_xz_bytes": same,
            "largest_tensor_bytes": max(
                (t.numel() * t.element_size() for t in self.model.state.values()), default=0
            ),
            **costs,
        }


def summary(models: list[Record]) -> str:
    """One line per model: bytes of each way, and the metric at the default recipe."""
    rows = []
    for m in models:
        by_name = {r["stored"]: r for r in m["rows"]}
        packed = [r for r in m["rows"] if "recipe" in r]
        ours = next((r for r in packed if r["recipe"] == "balanced"), packed[0])
        rows.append(
            [
                m["model"],
                f"{m['floats']:,}",
                *(f"{r['bytes']:,}" for name, r in by_name.items() if "recipe" not in r),
                f"{ours['same_integers_xz_bytes']:,}",
                f"{ours['bytes']:,}",
                number(ours["bits_per_weight"]),
                f"{m['metric_before']:.2f}",
                f"{ours['metric']:.2f} ({_plus_minus(ours)})",
                f"{m['loss_name']} {ours['loss']:.4f}",
                _agreement(ours),
            ]
        )
    head = ["model", "weights", "checkpoint", "fp16 + zstd", "int8 + xz", "same integers in xz"]
    head += ["weightvid", "bpw", "metric before", "after", "fidelity", "agreement %"]
    return table(head, rows)


def _plus_minus(r: Record) -> str:
    return f"{r['change']:+.2f} ± {r['change_se']:.2f}"


def _agreement(r: Record) -> str:
    return number(100 * r["agreement"], 1) if r.get("agreement") is not None else "–"


def sizes(m: Record) -> str:
    """Every way to store a model."""
    rows = []
    for r in m["rows"]:
        judged = "loss" in r
        rows.append(
            [
                r["stored"],
                f"{r['bytes']:,}",
                number(r["bits_per_weight"]),
                number(r["sqnr_db"]) if judged else "–",
                number(r["metric"]),
                _plus_minus(r) if judged else "–",
                f"{r['loss']:.5f} ± {r['loss_se']:.5f}" if judged else "–",
                _agreement(r),
                f"{r['same_integers_xz_bytes']:,}" if "recipe" in r else "–",
            ]
        )
    head = ["stored as", "bytes", "bpw", "SQNR dB", m["metric_name"], "change", m["loss_name"]]
    return table([*head, "agreement %", "same integers in xz -9e"], rows)


def parts(m: Record) -> str:
    """What the archives of a model are made of."""
    rows = []
    for r in m["rows"]:
        if "recipe" not in r:
            continue
        a = r["account"]
        names = ("stream_bytes", "plain_bytes", "exact_bytes", "layout_bytes", "metadata_bytes")
        rows.append(
            [
                r["recipe"],
                *(f"{a[name]:,}" for name in names),
                f"{100 * r['stream_over_entropy']:+.2f} %",
                f"{100 * r['stream_and_orders_over_entropy']:+.2f} %",
                f"{100 * r['metadata_share']:.2f} %",
            ]
        )
    head = ["recipe", "packets and digits", "plain levels", "exact tensors", "orders and folds"]
    head += ["metadata", "stream over H0", "with orders", "metadata share"]
    return table(head, rows)


def costs(m: Record) -> str:
    """Seconds and memory."""
    rows = []
    for r in m["rows"]:
        if "recipe" not in r:
            continue
        cells = [r["recipe"]]
        for task in ("pack", "unpack", "iterate"):
            cells.append(f"{r[task]['wall_s']:.2f} ({r[task]['cpu_s']:.2f})")
        cells += [f"{r[task]['peak_bytes'] / MB:.1f}" for task in ("pack", "iterate")]
        rows.append([*cells, f"{r['largest_tensor_bytes'] / MB:.1f}"])
    head = ["recipe", "pack s (CPU)", "unpack s (CPU)", "iterate s (CPU)"]
    head += ["pack peak MB", "iterate peak MB", "largest tensor MB"]
    return table(head, rows)


NOTES = """\
Whole files; bpw = 8 x bytes / all floats of the model. The change of the metric, the loss (KL
divergence of the logits in nats, or one minus the mean cosine of the embeddings) and the agreement
of the predictions are paired with the original, sample by sample; ± is a standard error.
*Same integers in xz*: the archive's own levels as int8 (one tensor after another, natural order), a
4-byte step each and the archive's exact tensors raw, in one `xz -9e`; no names, shapes or index.
*Stream over H0*: packets and digits over the sum of the tensors' zero-order entropies (tensors on
frames). *Orders and folds* lie in the sidecars; they belong to the coding of the levels, and *with
orders* counts them so. *Metadata*: every other byte of boxes, sidecars, header and index; its share
is that of the file without its exact tensors. Pack includes the check of the finished
archive. Peaks are above what was resident after the imports."""


def markdown(record: Record) -> str:
    pieces = ["# Models", f"`{record['command']}`", NOTES, summary(record["models"])]
    for m in record["models"]:
        pieces += [f"## {m['model']}", sizes(m), parts(m), costs(m)]
    where = record["machine"]
    pieces.append(f"{where['cores']} cores, {where['cpu']}; weightvid {m['weightvid']}.")
    return "\n\n".join(pieces)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.models.add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--samples", type=int, help="evaluate on so many samples")
    return parser.parse_args()


def main() -> None:
    import torch

    options = parse()
    torch.set_num_threads(1)
    models: list[dict[str, Any]] = []
    for source in measure.models.sources(options):
        model = source.load(options.samples)
        rows = []
        for found in Bench(model, options).rows():
            rows.append(found)
            print(
                f"{model.name:20s} {found['stored']:28s} {found['bytes']:>12,d} B "
                f"{found['bits_per_weight']:6.3f} bpw  metric {found['metric']:.2f}",
                flush=True,
            )
        models.append(
            {
                "model": model.name,
                "weightvid": versions()["weightvid"],
                "floats": model.floats,
                "samples": model.samples,
                "metric_name": model.metric_name,
                "loss_name": model.loss_name,
                "metric_before": model.metric,
                "rows": rows,
            }
        )
    record = {
        "command": measure.models.shown_command("bench_models.py", options),
        "versions": versions(),
        "machine": machine(),
        "models": models,
    }
    text = markdown(record)
    write(options.out / "models", record, text)
    print(text)


if __name__ == "__main__":
    main()
