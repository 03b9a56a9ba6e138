"""What the scripts of this folder share: networks, images, training, judging, results."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from weightvid import torch as archives
from weightvid.pack import PackOptions

RESULTS = Path(__file__).resolve().parents[1] / "results"
Batch = tuple[torch.Tensor, torch.Tensor]
State = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def evaluation_folder() -> Path:
    """Folder of the evaluation data."""
    named = os.environ.get("WEIGHTVID_EVAL")
    if not named:
        raise SystemExit("WEIGHTVID_EVAL is not set: it names the folder of the evaluation data")
    return Path(named)


def evaluation_script(folder: Path) -> Any:
    """``eval.py`` of a model's folder, as a module."""
    spec = importlib.util.spec_from_file_location("eval_script", folder / "eval.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def training_images() -> Batch:
    """20,000 training images as uint8 (n, 3, 32, 32), and their classes."""
    images, labels = [], []
    with tarfile.open(evaluation_folder() / "_data" / "cifar10_train_jpeg20k.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".jpg") else None
            if file is not None:
                images.append(np.array(Image.open(io.BytesIO(file.read())).convert("RGB")))
                labels.append(int(Path(member.name).parent.name))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def stored_images(name: str) -> Batch:
    """1,000 lossless images, ``train`` or ``test``, as uint8."""
    with np.load(evaluation_folder() / "_data" / f"cifar10_{name}1000_lossless.npz") as data:
        images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2)
        return images, torch.from_numpy(data["y"].astype(np.int64))


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Images of uint8 as networks take them."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


def augmented(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to 4 pixels, half of them mirrored."""
    count, _, height, width = batch.shape
    padded = nn.functional.pad(batch, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, count, 1), generator=generator)
    across = torch.arange(width).repeat(count, 1)
    flip = torch.rand(count, generator=generator) < 0.5
    across[flip] = across[flip].flip(1)
    rows, columns = dy + torch.arange(height), dx + across
    number = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def batches(data: Batch, generator: torch.Generator, size: int = 125) -> Iterator[Batch]:
    """One pass over the images in random order."""
    images, labels = data
    for rows in torch.randperm(len(images), generator=generator).split(size):
        yield normalized(augmented(images[rows], generator)), labels[rows]


def cross_entropy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the classes."""
    return nn.functional.cross_entropy(net(images).float(), labels)


def train(
    net: nn.Module, data: Batch, epochs: int, peak: float, path: Path, loss_of: Loss = cross_entropy
) -> None:
    """SGD with Nesterov's momentum under a one-cycle schedule, in bfloat16.

    What is needed to go on is kept at ``path`` after each epoch. In eval mode BatchNorms keep their
    statistics.
    """
    began, generator = time.process_time(), torch.Generator().manual_seed(20)
    torch.set_num_threads(1)
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(data[0]) // 125)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.25)
    first, before = 0, 0.0
    if path.exists():
        kept = torch.load(path, weights_only=False)
        first, before = kept["epochs"], kept["seconds"]
        net.load_state_dict(kept["state"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        generator.set_state(kept["generator"])
    for epoch in range(first, epochs):
        for images, labels in batches(data, generator):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net, images.contiguous(memory_format=torch.channels_last), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = before + time.process_time() - began
        kept = {
            "epochs": epoch + 1, "seconds": seconds, "state": net.state_dict(),
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "generator": generator.get_state(),
        }  # fmt: skip
        torch.save(kept, path)
        print(f"epoch {epoch} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
    net.eval()


def logits_of(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of images of uint8, in float32."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(normalized(part)) for part in images.split(250)])


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence, in nats, of what logits say from what was wanted."""
    target, other = (torch.log_softmax(logits.double(), 1) for logits in (wanted, found))
    return float((target.exp() * (target - other)).sum(1).mean())


def archived(state: State, **options: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of an archive of a network, and what comes out of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mp4"
        size = archives.save_file(state, path, options=PackOptions(**options)).file_bytes
        return size, archives.load_file(path)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    first, *others = ("| " + " | ".join(map(str, row)) + " |" for row in (heads, *rows))
    return [first, "|" + "---|" * len(heads), *others]


def write_results(name: str, lines: Sequence[str], found: object = None) -> None:
    """Keep the results of a script: what people read, and all that was found."""
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / f"research_{name}.md").write_text(text)
    if found is not None:
        (RESULTS / f"research_{name}.json").write_text(json.dumps(found, indent=1) + "\n")


class Pad(nn.Module):
    """Every second pixel, zeros for the new channels."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


class Block(nn.Module):
    """Two convolutions with BatchNorm, and what goes past them."""

    def __init__(
        self, inputs: int, outputs: int, make: Callable[[int, int, int], nn.Module]
    ) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1, self.bn1 = make(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = make(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential() if stride == 1 else Pad(outputs - inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def plain_convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """3x3 without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class ResNet(nn.Module):
    """A residual network of three stages; names and layers as in ResNet-20 for CIFAR-10."""

    def __init__(
        self,
        widths: tuple[int, int, int] = (16, 32, 64),
        blocks: int = 3,
        stem_stride: int = 1,
        make: Callable[[int, int, int], nn.Module] = plain_convolution,
    ) -> None:
        super().__init__()
        size = max(3, 2 * stem_stride - 1)
        self.conv1 = nn.Conv2d(3, widths[0], size, stem_stride, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, outputs in enumerate(widths, 1):
            layers = [Block(inputs, outputs, make)]
            layers += [Block(outputs, outputs, make) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            inputs = outputs
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def pretrained() -> ResNet:
    """ResNet-20 of the evaluation data."""
    net = ResNet()
    net.load_state_dict(load_file(evaluation_folder() / "cifar10_resnet20" / "model.safetensors"))
    net.eval()
    return net
