"""Global weight sharing: a residual network with one bank of kernels, and its ordinary twin.

Both are trained alike on 20,000 training images of CIFAR-10 and judged on 1,000 test images; then
both are packed. Two processes, one for each network, take two cores for ten minutes:

    global_weight.py train bank FOLDER & global_weight.py train twin FOLDER; wait
    global_weight.py report FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from cifar import (
    ResNet,
    accuracy,
    archived,
    plain_convolution,
    stored_images,
    table,
    train,
    training_images,
    write_results,
)
from torch import nn

from weightvid.torch import GlobalWeightBank, GlobalWeightConv2d

WIDTHS, BLOCKS, STEM_STRIDE = (32, 64, 128), 2, 2
BANK = (147, 147, 3, 3)
EPOCHS, PEAK = 30, 0.2
FACTORS = (0.13, 0.18, 0.25, 0.36, 0.5, 0.7)
KINDS = ("twin", "bank")


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
    test, found = stored_images("test"), []
    for kind in KINDS:
        net, restored = network(kind), network(kind)
        saved = torch.load(folder / f"{kind}.pt", weights_only=False)
        net.load_state_dict(saved["state"])
        weights = sum(parameter.numel() for parameter in net.parameters())
        told = {"network": kind, "weights": weights, "seconds": round(saved["seconds"])}
        top1 = round(accuracy(net, test), 2)
        found.append(told | {"step_factor": "fp32", "bytes": 4 * weights, "top1": top1})
        for factor in FACTORS:
            size, state = archived(net.state_dict(), step_factor=factor)
            restored.load_state_dict(state)
            top1 = round(accuracy(restored, test), 2)
            found.append(told | {"step_factor": factor, "bytes": size, "top1": top1})
    twin = found[0]["bytes"]
    heads = ("network", "weights", "step factor", "bytes", "of the twin in fp32", "top-1 %")
    rows = [
        (r["network"], f"{r['weights']:,}", r["step_factor"], f"{r['bytes']:,}",
         f"1/{twin / r['bytes']:.1f}", r["top1"]) for r in found
    ]  # fmt: skip
    write_results("global_weight", table(heads, rows), found)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        place = Path(sys.argv[3]) / f"{sys.argv[2]}.pt"
        train(network(sys.argv[2]), training_images(), EPOCHS, PEAK, place)
    else:
        report(Path(sys.argv[2]))
