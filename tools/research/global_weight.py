"""Global weight sharing: a residual network with one bank of kernels, and its ordinary twin.

Both are trained alike on 20,000 training images of CIFAR-10 and judged on 1,000 test images; then
both are packed. Two processes, one for each network, take two cores:

    global_weight.py train bank FOLDER & global_weight.py train twin FOLDER; wait
    global_weight.py report FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cifar import ResNet, accuracy, plain_convolution, stored_images, train, training_images
from torch import nn

from weightvid.pack import PackOptions
from weightvid.torch import GlobalWeightBank, GlobalWeightConv2d, load_file, save_file

WIDTHS, BLOCKS, STEM_STRIDE = (32, 64, 128), 2, 4
BANK = (144, 144, 3, 3)
EPOCHS, PEAK = 10, 0.2
FACTORS = (0.13, 0.18, 0.25, 0.36, 0.5, 0.7)
KINDS = ("bank", "twin")
RESULTS = Path(__file__).resolve().parents[1] / "results"


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
    test, found = stored_images("test"), {}
    for kind in KINDS:
        net = network(kind)
        saved = torch.load(folder / f"{kind}.pt", weights_only=False)
        net.load_state_dict(saved["state"])
        weights = sum(parameter.numel() for parameter in net.parameters())
        entry: dict[str, Any] = {
            "weights": weights, "fp32_bytes": 4 * weights, "top1": round(accuracy(net, test), 2),
            "processor_seconds": round(saved["seconds"]), "epochs": saved["epochs"], "archives": [],
        }  # fmt: skip
        for factor in FACTORS:
            with tempfile.TemporaryDirectory() as name:
                path = Path(name) / "model.mp4"
                size = save_file(net, path, options=PackOptions(step_factor=factor)).file_bytes
                restored = network(kind)
                restored.load_state_dict(load_file(path))
            top1 = round(accuracy(restored, test), 2)
            entry["archives"].append({"step_factor": factor, "bytes": size, "top1": top1})
        found[kind] = entry
    twin = found["twin"]["fp32_bytes"]
    lines = [
        "| network | weights | step factor | bytes | against the twin in fp32 | top-1 % |",
        "|---|---|---|---|---|---|",
    ]
    for kind, entry in found.items():
        rows = [{"step_factor": "fp32", "bytes": entry["fp32_bytes"], "top1": entry["top1"]}]
        for row in rows + entry["archives"]:
            size = row["bytes"]
            name = f"{kind}, {entry['epochs']} epochs"
            lines.append(
                f"| {name} | {entry['weights']:,} | {row['step_factor']} | {size:,} | "
                f"{twin / size:.2f}x | {row['top1']} |"
            )
    (RESULTS / "research_global_weight.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "research_global_weight.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        place = Path(sys.argv[3]) / f"{sys.argv[2]}.pt"
        train(network(sys.argv[2]), training_images(), EPOCHS, PEAK, place)
    else:
        report(Path(sys.argv[2]))
