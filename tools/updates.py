"""What updates and layers cost, and what they keep: models and evaluations of WEIGHTVID_EVAL.

    .venv/bin/python tools/updates.py updates > tools/results/updates.json
    .venv/bin/python tools/updates.py layers >> tools/results/updates.json
    .venv/bin/python tools/updates.py plot tools/results/updates.json docs/progressive.png

Of each line, the divergence (KL, nats; of embeddings 1 - cosine) is that of what the archive gives
against the model itself on held-out data; the score is top-1, or Spearman's correlation times 100.
``equal``: bytes of one layer, or of an archive of the new version alone, at that very divergence,
if a bit for every weight makes it 4 times less. Steps are in the units of ``pack --step``.

The divergence of a single archive scatters by some 4 % of the bytes. So layers are packed with
several steps near the one that is named; the first layer's share, the excess over one layer of
equal divergence (with its standard error) and scores are means over them, and ``worst`` is the
least score of all the cuts. The archive of the step itself is told in full.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from math import expm1, log
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final

import numpy as np
import torch
from matplotlib import pyplot
from safetensors.torch import load_file

from weightvid.calibrate import Calibration, calibrate
from weightvid.loader import Archive, open_archive
from weightvid.pack import PackOptions, pack_checkpoint

VERSIONS: Final = "cifar10_resnet20_versions"
#: steps of ResNet-20 are such that an archive has some 105,000 bytes.
STEP: Final = 0.4
#: steps of archives with layers, about those of the recipes balanced and small, and a coarser one;
#: and those near them that are packed as well.
STEPS: Final = (0.15, 0.04, 0.33)
NEAR: Final = (1.0, 0.87, 0.93, 1.07, 1.15)
CUTS: Final = 8
PAIRS: Final = 300
Row = dict[str, Any]


class Model:
    """A checkpoint with its evaluation, and statistics of training data where there are any."""

    def __init__(self, path: Path, evaluation: Path) -> None:
        self.path = path
        spec = importlib.util.spec_from_file_location("evaluation", evaluation / "eval.py")
        if spec is None or spec.loader is None:
            sys.exit(f"{evaluation} has no eval.py")
        self._eval: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._eval)
        self._data = evaluation.parent / "_data" / "cifar10_train1000_lossless.npz"
        self._state = load_file(path)
        self._before = self._outputs(self._state)
        self.score = self._judged(self._before)["score"]
        self._calibration: Calibration | None = None

    def _outputs(self, state: dict[str, Any]) -> tuple[Any, Any]:
        if hasattr(self._eval, "embeddings"):
            return self._eval.embeddings(state, PAIRS), None
        found: tuple[Any, Any] = self._eval.logits(state)
        return found

    def calibration(self) -> Calibration | None:
        """Statistics of the model on training data; None for embeddings."""
        if self._calibration is None and not hasattr(self._eval, "embeddings"):
            if hasattr(self._eval, "examples"):
                net, batches = self._eval.examples(state_dict=self._state)
            else:
                net = self._eval.Net()
                net.load_state_dict(self._state)
                batches = self._eval._data(1000, str(self._data))[0].split(100)
            self._calibration = Calibration(calibrate(net.eval(), [(each,) for each in batches]))
        return self._calibration

    def judge(self, archive: Archive) -> Row:
        """Divergence and score of a decoded archive."""
        return self.judge_tensors(dict(archive.items()))

    def judge_tensors(self, tensors: dict[str, Any]) -> Row:
        """Divergence and score of tensors."""
        state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        return self._judged(self._outputs(state))

    def _judged(self, outputs: tuple[Any, Any]) -> Row:
        after, labels = outputs
        if labels is None:
            loss = float(1 - (self._before[0] * after).sum(-1).mean())
            return {"loss": round(loss, 6), "score": round(self._eval.score(after, PAIRS), 2)}
        p, q = (torch.log_softmax(z.float(), -1) for z in (self._before[0], after))
        loss = float((p.exp() * (p - q)).sum(-1).mean())
        score = 100 * float((after.argmax(-1) == labels).float().mean())
        return {"loss": round(loss, 6), "score": round(score, 2)}

    def pack(self, path: Path, options: PackOptions) -> Row:
        """An archive of the model alone."""
        report = pack_checkpoint(self.path, path, options)
        with open_archive(path) as archive:
            return {"bytes": report.file_bytes} | self.judge(archive)

    def options(self, step: float, calibrated: bool) -> PackOptions:
        """Settings of a packing."""
        known = self.calibration() if calibrated else None
        return PackOptions(step_factor=step, calibration=known, force=True)


def equal(alone: Row, weights: int, loss: float) -> int:
    """Bytes at a loss near that of an archive: a bit for every weight is worth a factor of 4."""
    size, harm = float(alone["bytes"]), float(alone["loss"])
    return round(size + weights / 8 * log(harm / loss, 4))


def updates(root: Path, folder: Path, names: list[str]) -> Iterator[Row]:
    """An update beside the archive of the new version alone, of the same step."""
    pairs = [(VERSIONS, f"v{n}", f"v{n + 1}", STEP) for n in (1, 2, 3)]
    pairs.append(("lm_books", "model", "v2", 0.3))
    for name, old, new, step in pairs:
        if names and name not in names:
            continue
        script = root / ("cifar10_resnet20" if name == VERSIONS else name)
        before, after = (Model(root / name / f"{each}.safetensors", script) for each in (old, new))
        for calibrated in (True, False):
            base, other, update = (folder / f"{each}.mp4" for each in ("base", "other", "update"))
            pack_checkpoint(before.path, base, before.options(step, calibrated))
            options = after.options(step, calibrated)
            alone = after.pack(other, options)
            made = pack_checkpoint(after.path, update, replace(options, base=(base,)))
            with open_archive(update, base=base) as archive:
                row = {"bytes": made.file_bytes} | after.judge(archive)
            yield {
                "what": "update", "model": f"{name}: {old} to {new}", "calibrated": calibrated,
                "step": step, "alone": alone, "update": row,
                "equal": equal(alone, made.weights, row["loss"]),
            }  # fmt: skip


def layers(root: Path, folder: Path, names: list[str]) -> Iterator[Row]:
    """Two layers beside one, and what a file gives that is cut."""
    kinds = [
        ("cifar10_resnet20", "model", True, STEPS), ("cifar10_resnet44", "model", True, STEPS),
        ("minilm_l6", "model", False, STEPS[:1]), ("cifar10_resnet20", "model", False, STEPS[:1]),
        (VERSIONS, "v2", True, STEPS[:1]), ("mlperf_kws", "model", True, STEPS[:1]),
    ]  # fmt: skip
    for name, file, calibrated, steps in kinds:
        if names and name not in names:
            continue
        path = root / name / f"{file}.safetensors"
        if name == "minilm_l6":
            path = Path(os.environ.get("MINILM", path))
        model = Model(path, root / ("cifar10_resnet20" if name == VERSIONS else name))
        for step in steps:
            rows = [
                two_layers(model, folder, model.options(step * near, calibrated)) for near in NEAR
            ]
            cost = [log(row["whole"]["bytes"] / row["equal"]) for row in rows]
            share = [row["coarse"]["bytes"] / row["whole"]["bytes"] for row in rows]
            yield {
                "what": "layers", "model": name, "calibrated": calibrated, "step": step,
                "original": model.score,
                "share": round(mean(share), 4),
                "excess": [round(expm1(mean(cost)), 4), round(stdev(cost) / len(cost) ** 0.5, 4)],
                "coarse score": round(mean(row["coarse"]["score"] for row in rows), 2),
                "whole score": round(mean(row["whole"]["score"] for row in rows), 2),
                "worst": min(cut["score"] for row in rows for cut in row["cut"]),
                **rows[0],
            }  # fmt: skip


def two_layers(model: Model, folder: Path, options: PackOptions) -> Row:
    """An archive of two layers beside one of one."""
    one, two = folder / "one.mp4", folder / "two.mp4"
    alone = model.pack(one, options)
    made = pack_checkpoint(model.path, two, replace(options, layers=2))
    data = two.read_bytes()
    with open_archive(two) as whole, open_archive(two, layers=1) as coarse:
        index = whole.index
        if index is None:
            sys.exit(f"{two} has no index")
        start = index.frames[index.stages[0][0]][0]
        row = {"bytes": made.file_bytes} | model.judge(whole)
        first = {"bytes": start} | model.judge(coarse)
    cuts = np.linspace(start, len(data), CUTS).astype(int).tolist()[1:-1]
    return {
        "one layer": alone, "whole": row, "coarse": first,
        "equal": equal(alone, made.weights, row["loss"]),
        "cut": [{"bytes": cut} | model.judge_tensors(arrived(data[:cut])) for cut in cuts],
    }  # fmt: skip


def arrived(data: bytes) -> dict[str, Any]:
    """Tensors of the bytes that have arrived."""
    found = dict[str, Any]()
    try:
        for arrival in open_archive(data).arrivals():
            found[arrival.spec.name] = arrival.array
    except ValueError:
        return found
    return found


def plot(results: Path, picture: Path) -> None:
    """Draw the score over the bytes received."""
    rows: dict[str, Row] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["what"] == "layers":
            rows.setdefault(row["model"], row)
    figure, axes = pyplot.subplots(1, len(rows), figsize=(3.6 * len(rows), 3), layout="tight")
    for axis, row in zip(np.atleast_1d(axes), rows.values(), strict=True):
        points = [row["coarse"], *row["cut"], row["whole"]]
        size, whole = row["coarse"]["bytes"], row["whole"]["bytes"]
        axis.axvspan(0, 100 * size / whole, color="0.92")
        axis.axhline(row["original"], color="0.5", linestyle=":", label="original")
        axis.plot(
            [100 * p["bytes"] / whole for p in points], [p["score"] for p in points], "o-",
            markersize=4, label="two layers, cut here",
        )  # fmt: skip
        axis.set(
            title=f"{row['model']}, {whole / 1000:,.0f} kB", xlim=(0, 102),
            xlabel="share of the file that has arrived, %",
            ylabel="Spearman x 100" if row["model"] == "minilm_l6" else "top-1, %",
        )  # fmt: skip
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, high - 3), high + 0.2)
    np.atleast_1d(axes)[0].legend(loc="lower left", fontsize=8)
    figure.savefig(picture, dpi=90)


def main() -> None:
    """Print one JSON object a line, or draw them."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = options.add_subparsers(dest="what", required=True)
    for what in ("updates", "layers"):
        kinds.add_parser(what).add_argument("names", nargs="*")
    drawing = kinds.add_parser("plot")
    drawing.add_argument("results", type=Path)
    drawing.add_argument("picture", type=Path)
    chosen = options.parse_args()
    if chosen.what == "plot":
        plot(chosen.results, chosen.picture)
        return
    root = Path(os.environ["WEIGHTVID_EVAL"])
    with tempfile.TemporaryDirectory() as name:
        measure = {"updates": updates, "layers": layers}[chosen.what]
        for row in measure(root, Path(name), chosen.names):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
