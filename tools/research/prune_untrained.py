"""Pruning without training (``pack --prune``) on ResNet-20: bytes and KL beside plain packing."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from cifar import evaluation_folder
from safetensors.torch import load_file

from weightvid import torch as archives
from weightvid.pack import PackOptions

RESULTS = Path(__file__).resolve().parents[1] / "results"
IMAGES = 500
POINTS = ((None, 0.36), (None, 0.7), (0.3, 0.36), (0.6, 0.36), (0.9, 0.36))


def main() -> None:
    torch.set_num_threads(1)
    folder = evaluation_folder() / "cifar10_resnet20"
    spec = importlib.util.spec_from_file_location("eval_script", folder / "eval.py")
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    state = load_file(folder / "model.safetensors")
    wanted = torch.log_softmax(script.logits(state, IMAGES)[0].double(), 1)
    lines = ["| pruned below | step factor | bytes | KL |", "|---|---|---|---|"]
    for factor, step in POINTS:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.mp4"
            options = PackOptions(step_factor=step, prune=factor)
            size = archives.save_file(state, path, options=options).file_bytes
            found = torch.log_softmax(
                script.logits(archives.load_file(path), IMAGES)[0].double(), 1
            )
        divergence = float((wanted.exp() * (wanted - found)).sum(1).mean())
        below = "nothing" if factor is None else f"{factor} x mean"
        lines.append(f"| {below} | {step} | {size:,} | {divergence:.4f} |")
        print(lines[-1], flush=True)
    (RESULTS / "research_prune_untrained.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
