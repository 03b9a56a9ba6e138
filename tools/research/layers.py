"""What it costs that a coarse model comes first: embedded layers (``pack --layers``) of ResNet-20.

To be set beside the pyramids of ``quantizers.py``: bytes at equal SQNR with ``--for weights``, and
at equal KL on 1,000 test images as ``pack`` does it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import divergence, logits_of, pretrained, stored_images, table, write_results

from weightvid.checkpoint import from_mapping
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.torch import load_file

FACTORS = (0.36, 0.5, 0.7)
#: dB of SQNR, and nats.
GOALS = {"weights": 17.0, "outputs": 0.02}
LAYERS = (1, 2, 3)


def main() -> None:
    torch.set_num_threads(1)
    net, restored, images = pretrained(), pretrained(), stored_images("test")[0]
    wanted = logits_of(net, images)
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    found: list[dict[str, Any]] = []
    for fidelity in GOALS:
        for layers in LAYERS:
            for factor in FACTORS:
                options = PackOptions(step_factor=factor, fidelity=fidelity, layers=layers, jobs=1)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.mp4"
                    made = pack_checkpoint(from_mapping(arrays), path, options)
                    restored.load_state_dict(load_file(path))
                kl = divergence(wanted, logits_of(restored, images))
                row = {"for": fidelity, "layers": layers, "step_factor": factor}
                found.append(row | {"bytes": made.file_bytes, "sqnr": made.sqnr_db, "kl": kl})
    rows = []
    for fidelity, goal in GOALS.items():
        sizes = []
        for layers in LAYERS:
            own = [r for r in found if (r["for"], r["layers"]) == (fidelity, layers)]
            # Bytes go with SQNR, and with the logarithm of the divergence.
            known = [r["sqnr"] if fidelity == "weights" else -np.log(r["kl"]) for r in own]
            pairs = sorted(zip(known, (r["bytes"] for r in own), strict=True))
            at = goal if fidelity == "weights" else -np.log(goal)
            quality, size = np.array(pairs).T
            sizes.append(float(np.interp(at, quality, size)))
        name = f"{goal:g} dB" if fidelity == "weights" else f"a KL of {goal}"
        rows.append((name, *(f"{s:,.0f} ({100 * (s / sizes[0] - 1):+.1f} %)" for s in sizes)))
    heads = ("bytes at", *(f"{n} layer{'s' * (n > 1)}" for n in LAYERS))
    write_results("layers", table(heads, rows), found)


if __name__ == "__main__":
    main()
