"""What updates and layers cost, and what they keep: models and evaluations of WEIGHTVID_EVAL.

    .venv/bin/python tools/updates.py updates layers > tools/results/updates.json

Of each line the divergence (KL, nats) and top-1 are those of the decoded archive against the
checkpoint's own logits on held-out data; steps are in the units of ``pack --step``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from weightvid.calibrate import Calibration, calibrate
from weightvid.layers import Layering, pack_layers
from weightvid.loader import Archive, open_archive
from weightvid.pack import PackOptions, pack_checkpoint

VERSIONS = "cifar10_resnet20_versions"
CUTS = 12


class Model:
    """A checkpoint with its evaluation, and statistics of training images where there are any."""

    def __init__(self, folder: Path, name: str, evaluation: str) -> None:
        self.path = folder / name
        place = folder.parent / evaluation / "eval.py"
        spec = importlib.util.spec_from_file_location(evaluation, place)
        if spec is None or spec.loader is None:
            sys.exit(f"{place} cannot be read")
        self._eval: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._eval)
        self._state = load_file(self.path)
        self._before, self._labels = self._eval.logits(self._state)
        self._calibration: Calibration | None = None

    def calibration(self) -> Calibration | None:
        """Statistics of the model on 1000 training images; None for language models."""
        if self._calibration is None and hasattr(self._eval, "Net"):
            net = self._eval.Net()
            net.load_state_dict(self._state)
            data = self.path.parent.parent / "_data" / "cifar10_train1000_lossless.npz"
            images, _ = self._eval._data(1000, str(data))
            batches = [(batch,) for batch in images.split(100)]
            self._calibration = Calibration(calibrate(net.eval(), batches))
        return self._calibration

    def judge(self, archive: Archive) -> dict[str, float]:
        """Divergence and top-1 of a decoded archive."""
        return self.judge_tensors(dict(archive.items()))

    def judge_tensors(self, tensors: dict[str, Any]) -> dict[str, float]:
        """Divergence and top-1 of tensors."""
        after, labels = self._eval.logits(
            {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        )
        p, q = (torch.log_softmax(z.float(), -1) for z in (self._before, after))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        top1 = float((after.argmax(-1) == labels).float().mean())
        return {"kl": round(kl, 5), "top1": round(100 * top1, 2)}


def updates(root: Path, folder: Path, step: float) -> Iterator[dict[str, Any]]:
    """An update beside the archive of the new version alone, of the same step."""
    pairs = [(VERSIONS, f"v{n}.safetensors", f"v{n + 1}.safetensors") for n in (1, 2, 3)]
    pairs.append(("lm_books", "model.safetensors", "v2.safetensors"))
    for name, one, other in pairs:
        before, after = (Model(root / name, each, name) for each in (one, other))
        for calibrated in (False, True):
            if calibrated and after.calibration() is None:
                continue
            first, second = (
                PackOptions(
                    step_factor=step,
                    calibration=m.calibration() if calibrated else None,
                    force=True,
                )
                for m in (before, after)
            )
            base, alone, update = (folder / f"{each}.mp4" for each in ("base", "alone", "update"))
            pack_checkpoint(before.path, base, first)
            fresh = pack_checkpoint(after.path, alone, second)
            made = pack_layers(after.path, update, Layering(base=(base,)), second)
            with open_archive(alone) as a, open_archive(update, base=base) as u:
                yield {
                    "model": f"{name}: {one} -> {other}", "calibrated": calibrated, "step": step,
                    "alone": {"bytes": fresh.file_bytes} | after.judge(a),
                    "update": {"bytes": made.file_bytes} | after.judge(u),
                }  # fmt: skip


def layers(root: Path, folder: Path, step: float) -> Iterator[dict[str, Any]]:
    """Two layers beside one, and what a file gives that is cut."""
    for name in ("cifar10_resnet20", "cifar10_resnet44"):
        model = Model(root / name, "model.safetensors", name)
        for calibrated in (False, True):
            statistics = model.calibration() if calibrated else None
            options = PackOptions(step_factor=step, calibration=statistics, force=True)
            one, two = folder / "one.mp4", folder / "two.mp4"
            alone = pack_checkpoint(model.path, one, options)
            made = pack_layers(model.path, two, Layering(2), options)
            data = two.read_bytes()
            with open_archive(one) as a, open_archive(two) as whole:
                row: dict[str, Any] = {
                    "model": name, "calibrated": calibrated, "step": step,
                    "one layer": {"bytes": alone.file_bytes} | model.judge(a),
                    "whole": {"bytes": made.file_bytes} | model.judge(whole),
                }  # fmt: skip
                index = whole.index
            if index is None:
                sys.exit(f"{two} has no index")
            start = index.frames[index.stages[0][0]][0]
            row["cut"] = [
                {"bytes": cut} | model.judge_tensors(arrived(data[:cut]))
                for cut in np.linspace(start, len(data), CUTS).astype(int).tolist()
            ]
            yield row


def arrived(data: bytes) -> dict[str, Any]:
    """Tensors of the bytes that have arrived."""
    found = dict[str, Any]()
    try:
        for arrival in open_archive(data).arrivals():
            found[arrival.spec.name] = arrival.array
    except ValueError:
        return found
    return found


def main() -> None:
    """Print one JSON object a line."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("what", nargs="+", choices=("updates", "layers"))
    options.add_argument("--step", type=float, default=0.33)
    chosen = options.parse_args()
    root = Path(os.environ["WEIGHTVID_EVAL"])
    for what in chosen.what:
        with tempfile.TemporaryDirectory() as name:
            measure = {"updates": updates, "layers": layers}[what]
            for row in measure(root, Path(name), chosen.step):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
