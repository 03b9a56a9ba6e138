"""Train the demo's digit classifier; write it and the held-out digits to data/digits/.

Needs PyTorch and scikit-learn: ``tools/setup --dev``, then ``.venv/bin/pip install scikit-learn``.
The same machine and PyTorch build give the same bytes; elsewhere the last bits of float32 sums,
and with them the trained weights, may differ.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sklearn
import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import nn

SEED = 20
HOLDOUT = 450
EPOCHS = 40
BATCH = 64
PEAK_LEARNING_RATE = 4e-3
LICENCE = "weights: Apache-2.0; digits: CC BY 4.0, https://doi.org/10.24432/C50P49"

Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Split:
    """8x8 images with grey levels 0..16 and their digits; ``holdout`` is never trained on."""

    train_images: Array
    train_labels: Array
    holdout_images: Array
    holdout_labels: Array


class DigitsNet(nn.Module):
    """A small CNN of 96,298 parameters: plain, depthwise and pointwise convolutions, two linears.

    ``weightvid/demo.py`` runs the same network in numpy, from the names given here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(1, 32, kernel=3)
        self.depthwise = _conv_bn_relu(32, 32, kernel=3, groups=32)
        self.pointwise = _conv_bn_relu(32, 64, kernel=1)
        self.conv = _conv_bn_relu(64, 96, kernel=3)
        self.fc1 = nn.Linear(96 * 2 * 2, 96)
        self.fc2 = nn.Linear(96, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8) with values 0..1."""
        x = self.pointwise(self.depthwise(self.stem(x)))
        x = self.conv(nn.functional.max_pool2d(x, 2))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        x = self.dropout(torch.relu(self.fc1(self.dropout(x))))
        logits: torch.Tensor = self.fc2(x)
        return logits


def _conv_bn_relu(inputs: int, outputs: int, *, kernel: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def split_digits() -> Split:
    """Scikit-learn's 1797 digits in file order: the last 450 are held out.

    Harder than a shuffled split (99.8 % with this network), which shows the same hands on both
    sides.
    """
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    first = len(images) - HOLDOUT
    return Split(images[:first], labels[:first], images[first:], labels[first:])


def as_input(images: Array) -> torch.Tensor:
    """Images (n, 8, 8) with grey levels 0..16 as float32 (n, 1, 8, 8) in 0..1."""
    return torch.from_numpy(images.astype(np.float32) / 16).unsqueeze(1)


def shifted(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The batch moved by -1, 0 or 1 pixels each way, one move for all, edges filled with 0."""
    dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
    return nn.functional.pad(batch, (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]


def train(split: Split) -> DigitsNet:
    """Train with AdamW under a one-cycle schedule; single thread, fixed seed."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(SEED)
    images, labels = as_input(split.train_images), torch.from_numpy(split.train_labels).long()
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = net(shifted(images[rows], generator))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    return net


def accuracy(net: DigitsNet, images: Array, labels: Array) -> float:
    """Share of images whose largest logit is the label, 0..1."""
    with torch.no_grad():
        predicted = net(as_input(images)).argmax(1).numpy()
    return float((predicted == labels).mean())


def checkpoint_bytes(net: DigitsNet, metadata: dict[str, str]) -> bytes:
    """The network as a safetensors file whose header keys are in a fixed order.

    The safetensors library writes metadata in the order of a hash map, which differs between
    runs; a JSON header may be written in any order, so it is sorted here.
    """
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    raw: bytes = save(tensors, metadata)
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[end:]


def main() -> None:
    """Train, report the accuracies, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parent.parent / "data" / "digits"
    parser.add_argument("--output", type=Path, default=default, help="folder to write to")
    output: Path = parser.parse_args().output

    split = split_digits()
    net = train(split)
    held_out = accuracy(net, split.holdout_images, split.holdout_labels)
    metadata = {
        "format": "pt",
        "description": "weightvid's demo network: 10 classes of 8x8 digits",
        "licence": LICENCE,
        "trained_by": f"tools/train_digits.py, seed {SEED}, torch {torch.__version__}, "
        f"scikit-learn {sklearn.__version__}",
        "holdout_top1": f"{held_out:.4f}",
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "digits_cnn.safetensors").write_bytes(checkpoint_bytes(net, metadata))
    np.savez_compressed(
        output / "digits_holdout.npz",
        images=split.holdout_images,
        labels=split.holdout_labels,
    )
    print(f"parameters      {sum(p.numel() for p in net.parameters()):,}")
    print(f"train top-1     {accuracy(net, split.train_images, split.train_labels):.2%}")
    print(f"held-out top-1  {held_out:.2%} of {len(split.holdout_labels)}")
    print(f"written to      {output}")


if __name__ == "__main__":
    main()
