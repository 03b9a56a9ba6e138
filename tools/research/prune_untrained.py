"""Pruning without training (``pack --prune``) on ResNet-20, beside coarser steps.

Bytes and KL on 1,000 test images, without statistics, and with those of 500 training images: their
error feedback makes up for weights that are pruned.
"""

from __future__ import annotations

import torch
from cifar import (
    archived,
    divergence,
    logits_of,
    normalized,
    pretrained,
    stored_images,
    table,
    write_results,
)

from weightvid.calibrate import Calibration

POINTS = (
    (None, 0.36), (None, 0.5), (None, 0.7), (None, 1.0), (0.3, 0.36), (0.6, 0.36), (0.9, 0.36),
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    net, restored, images = pretrained(), pretrained(), stored_images("test")[0]
    wanted, rows = logits_of(net, images), []
    inputs = normalized(stored_images("train")[0][:500]).split(50)
    known = Calibration.from_examples(net, inputs)
    ways = {"none": None, "statistics": Calibration(known.stats), "layer by layer": known}
    for factor, step in POINTS:
        for name, calibration in ways.items():
            size, state = archived(
                net.state_dict(), step_factor=step, prune=factor, calibration=calibration
            )
            restored.load_state_dict(state)
            kl = divergence(wanted, logits_of(restored, images))
            below = "nothing" if factor is None else f"{factor} x mean"
            rows.append((below, step, name, f"{size:,}", f"{kl:.4f}"))
            print(rows[-1], flush=True)
    heads = ("pruned below", "step factor", "calibration", "bytes", "KL")
    write_results("prune_untrained", table(heads, rows))


if __name__ == "__main__":
    main()
