"""Global weight sharing: a residual network with one bank of kernels, and its ordinary twin.

Both are trained alike on 17,000 training images of CIFAR-10 and judged on 1,000 test images and the
other 3,000; then both are packed. Two processes, one for each network, take two cores for some
twelve minutes:

    global_weight.py train bank FOLDER & global_weight.py train twin FOLDER; wait
    global_weight.py report FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from cifar import (
    Batch,
    ResNet,
    archived,
    logits_of,
    plain_convolution,
    stored_images,
    table,
    train,
    training_images,
    write_results,
)
from torch import nn

from weightvid.torch import GlobalWeightBank, GlobalWeightConv2d

WIDTHS, BLOCKS, STEM_STRIDE = (32, 64, 256), 2, 2
BANK = (259, 260, 3, 3)
EPOCHS, PEAK, HELD = 20, 0.2, 3000
FACTORS = (0.25, 0.36, 0.5)
KINDS = ("twin", "bank")


def split() -> tuple[Batch, Batch]:
    """17,000 images for training, and the last 3,000, of which each class has as many."""
    images, labels = training_images()
    return (images[:-HELD], labels[:-HELD]), (images[-HELD:], labels[-HELD:])


def network(kind: str) -> ResNet:
    """The network with a bank, or the twin."""
    torch.manual_seed(20)
    if kind == "twin":
        return ResNet(WIDTHS, BLOCKS, STEM_STRIDE, plain_convolution)
    bank = GlobalWeightBank(BANK)

    def make(inputs: int, outputs: int, stride: int) -> nn.Module:
        return GlobalWeightConv2d(bank, inputs, outputs, stride)

    return ResNet(WIDTHS, BLOCKS, STEM_STRIDE, make)


def report(folder: Path) -> None:
    """Pack both at several steps, judge each archive, write the results."""
    images, labels = map(torch.cat, zip(stored_images("test"), split()[1], strict=True))
    found: list[dict[str, Any]] = []
    right: list[torch.Tensor] = []

    def judge(net: ResNet, told: dict[str, Any]) -> None:
        right.append((logits_of(net, images).argmax(1) == labels).double() * 100)
        behind = right[0] - right[-1]
        found.append(told | {
            "top1_test": round(float(right[-1][:-HELD].mean()), 2),
            "top1_held_out": round(float(right[-1][-HELD:].mean()), 2),
            "behind": round(float(behind.mean()), 2),
            "standard_error": round(float(behind.std()) / len(behind) ** 0.5, 2),
        })  # fmt: skip

    for kind in KINDS:
        net, restored = network(kind), network(kind)
        saved = torch.load(folder / f"{kind}.pt", weights_only=False)
        net.load_state_dict(saved["state"])
        weights = sum(parameter.numel() for parameter in net.parameters())
        told = {"network": kind, "weights": weights, "seconds": round(saved["seconds"])}
        judge(net, told | {"step_factor": "fp32", "bytes": 4 * weights})
        for factor in FACTORS:
            size, state = archived(net.state_dict(), step_factor=factor)
            restored.load_state_dict(state)
            judge(restored, told | {"step_factor": factor, "bytes": size})
    twin = found[0]["bytes"]
    heads = (
        "network", "weights", "step factor", "bytes", "of the twin in fp32", "top-1 %, test",
        "held out", "behind the twin, both",
    )  # fmt: skip
    rows = [
        (r["network"], f"{r['weights']:,}", r["step_factor"], f"{r['bytes']:,}",
         f"1/{twin / r['bytes']:.1f}", r["top1_test"], r["top1_held_out"],
         f"{r['behind']} ± {r['standard_error']}") for r in found
    ]  # fmt: skip
    write_results("global_weight", table(heads, rows), found)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        place = Path(sys.argv[3]) / f"{sys.argv[2]}.pt"
        train(network(sys.argv[2]), split()[0], EPOCHS, PEAK, place)
    else:
        report(Path(sys.argv[2]))
