#!/usr/bin/env python3
"""Sizes on checkpoints that no rule or constant of weightvid was chosen on; no evaluation needed.

    python tools/bench_unseen.py NAME=CHECKPOINT ... --nncodec .venv-nncodec/bin/python

Checkpoints of any kind that weightvid reads. For each: the archives of two recipes beside their
own integers in xz; and BD-rates over SQNR against NNCodec with dependent quantization and one
global step in xz. Writes unseen.json and unseen.md in the output folder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, Final

from measure import archives, nncodec, plain
from measure.curves import bd_rate
from measure.evaluation import State, sqnr_db
from measure.report import Record, machine, number, table, versions, write

from weightvid.checkpoint import open_checkpoint
from weightvid.pack import MIN_MANTISSA_BITS, PackOptions, pack_checkpoint
from weightvid.quantize.mantissa import FULL_BITS

RECIPES: Final = ("balanced", "small")
STEP_FACTORS: Final = tuple(round(0.22 * 2 ** (i / 2), 4) for i in range(-3, 4))
GLOBAL_FACTORS: Final = tuple(round(0.35 * 2 ** (i / 2), 4) for i in range(-3, 4))
DQ_QPS: Final = tuple(range(-34, -17, 2))
OURS: Final = "weightvid for SQNR"
PEERS: Final = ("NNCodec DQ", "one global step + xz", "the same, short 1-D floats")


class Bench:
    """One checkpoint."""

    def __init__(self, name: str, source: Path, folder: Path) -> None:
        from safetensors.torch import save_file

        self.name = name
        self.state = _state(source)
        self.checkpoint = folder / "model.safetensors"
        save_file(self.state, self.checkpoint)
        self.floats = sum(t.numel() for t in self.state.values() if t.is_floating_point())

    def recipe(self, recipe: str) -> Record:
        """An archive beside its own integers in xz."""
        path = self._packed(PackOptions(recipe=recipe, force=True))
        restored = archives.restored_state(path)
        account = archives.account(path)
        levels = list(archives.quantized_levels(path))
        exact = [restored[name] for name in archives.exact_names(path)]
        return {
            "recipe": recipe,
            **self._size(account.file_bytes),
            "sqnr_db": sqnr_db(self.state, restored),
            "same_integers_xz_bytes": plain.same_integers(levels, len(levels), exact),
            "stream_and_orders_over_entropy": account.overhead_with_layout,
        }

    def curves(self, python: Path | None) -> dict[str, list[Record]]:
        """Points of every way, over SQNR."""
        found: dict[str, list[Record]] = {OURS: []}
        for factor in STEP_FACTORS:
            options = PackOptions(step_factor=factor, rule="sqnr", force=True)
            path = self._packed(options)
            found[OURS].append(self._point(path.stat().st_size, archives.restored_state(path)))
        if python is not None:
            found[PEERS[0]] = self._nncodec(python)
        for peer, bits in zip(PEERS[1:], (FULL_BITS, MIN_MANTISSA_BITS), strict=True):
            stored = [plain.global_step(self.state, f, bits) for f in GLOBAL_FACTORS]
            found[peer] = [self._point(each.xz(), each.restored) for each in stored]
        return found

    def run(self, python: Path | None) -> Record:
        """Everything about this checkpoint."""
        int8 = plain.per_channel(self.state, 8).xz()
        recipes = [self.recipe(recipe) for recipe in RECIPES]
        curves = self.curves(python)
        ours = _pairs(curves[OURS])
        return {
            "model": self.name,
            "floats": self.floats,
            "int8_xz_bytes": int8,
            "recipes": recipes,
            "bd_rate_sqnr": {
                peer: bd_rate(_pairs(points), ours) if points else "fails"
                for peer, points in curves.items()
                if peer != OURS
            },
            "curves": curves,
        }

    def _nncodec(self, python: Path) -> list[Record]:
        """Points of NNCodec; none where it fails."""
        try:
            runs = nncodec.run(python, self.checkpoint, DQ_QPS, opt_qp=False, restore=True)
            return [self._point(peer["bytes"], restored) for peer, restored in runs]
        except SystemExit as error:
            print(f"{self.name}: {error}", flush=True)
            return []

    def _packed(self, options: PackOptions) -> Path:
        path = self.checkpoint.with_name("model.mp4")
        pack_checkpoint(self.checkpoint, path, options)
        return path

    def _point(self, file_bytes: int, restored: State) -> Record:
        return {**self._size(file_bytes), "sqnr_db": sqnr_db(self.state, restored)}

    def _size(self, file_bytes: int) -> Record:
        return {"bytes": file_bytes, "bits_per_weight": 8 * file_bytes / self.floats}


def _state(source: Path) -> State:
    import torch

    with open_checkpoint(source) as reader:
        specs = reader.contents.tensors
        return {s.name: torch.from_numpy(reader.read(s.name).copy()) for s in specs}


def _pairs(points: list[Record]) -> list[tuple[float, float]]:
    return [(p["bits_per_weight"], p["sqnr_db"]) for p in points]


NOTES: Final = """\
Whole files, bpw over all floats of the checkpoint. *Same integers in xz*: the archive's own levels
and exact tensors in one `xz -9e`, without names, shapes or index. *Stream over H0*: packets,
digits, orders and folds over the zero-order entropy of the levels. BD-rate over SQNR (PCHIP, by
`bjontegaard`), percent of the peer's rate: negative means that weightvid (`--rule sqnr`, 8 states)
is smaller; *fails*: the peer ended with an error. *Short 1-D floats*: with the same 11 bits of
mantissa that weightvid keeps. All of these files hold the weights alone, without the graph of an
ONNX model."""


def markdown(record: Record) -> str:
    """Both tables."""
    sizes, rates = [], []
    for m in record["models"]:
        for r in m["recipes"]:
            change = 100 * (r["bytes"] / r["same_integers_xz_bytes"] - 1)
            sizes.append(
                [
                    m["model"],
                    f"{m['floats']:,}",
                    r["recipe"],
                    f"{m['int8_xz_bytes']:,}",
                    f"{r['same_integers_xz_bytes']:,}",
                    f"{r['bytes']:,}",
                    f"{change:+.1f} %",
                    number(r["bits_per_weight"]),
                    number(r["sqnr_db"]),
                    f"{100 * r['stream_and_orders_over_entropy']:+.2f} %",
                ]
            )
        rates.append([m["model"], *(_percent(m["bd_rate_sqnr"].get(peer)) for peer in PEERS)])
    head = ["model", "weights", "recipe", "int8 + xz", "same integers in xz", "weightvid"]
    head += ["against xz", "bpw", "SQNR dB", "stream over H0"]
    where = record["machine"]
    return "\n\n".join(
        [
            "# Models that nothing was chosen on",
            f"`{record['command']}`",
            NOTES,
            table(head, sizes),
            "## BD-rate over SQNR",
            table(["model", *PEERS], rates),
            f"{where['cores']} cores, {where['cpu']}; weightvid {record['versions']['weightvid']}.",
        ]
    )


def _percent(found: Any) -> str:
    if isinstance(found, str):
        return found
    if found is None:
        return "–"
    return f"{found['percent']:+.1f} %"


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--nncodec", type=Path, metavar="PYTHON", help="see NNCODEC.md")
    parser.add_argument("--out", type=Path, default=Path("tools/results"))
    options = parser.parse_args()
    models = []
    for pair in options.checkpoints:
        name, _, source = pair.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            models.append(Bench(name, Path(source), Path(folder)).run(options.nncodec))
        print(f"{name}: done", flush=True)
    names = " ".join(f"{m['model']}=CHECKPOINT" for m in models)
    peer = " --nncodec PYTHON" if options.nncodec else ""
    record = {
        "command": f"python tools/bench_unseen.py {names}{peer}",
        "versions": versions(),
        "machine": machine(),
        "models": models,
    }
    text = markdown(record)
    write(options.out / "unseen", record, text)
    print(text)


if __name__ == "__main__":
    main()
