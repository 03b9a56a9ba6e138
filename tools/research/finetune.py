"""ResNet-20 fine-tuned in three ways alike: as it is, pruned, and pulled towards predictors.

- plain: what fine-tuning alone does;
- pruned: weights below the mean of magnitudes are zero from the start (Lim and Kim, 2018);
- pulled: a penalty on what a kernel differs by from the best of the 256 before it, times 1, 1/2 or
  their negatives (Lee and Bae, 2020).

All learn the outputs of the original on 20,000 JPEG images, get the BatchNorm statistics of 1,000
lossless training images, and are judged against the original on 1,000 test images: as archives
at several steps, without and with statistics of 500 training images, and by the quantizers that
predict kernels and their rivals.

    for way in plain pruned pulled; do finetune.py train $way FOLDER; done
    finetune.py report FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from cifar import (
    ResNet,
    archived,
    augmented,
    divergence,
    logits_of,
    normalized,
    pretrained,
    stored_images,
    table,
    train,
    training_images,
    write_results,
)
from torch import nn

from weightvid.calibrate import Calibration
from weightvid.checkpoint import from_mapping
from weightvid.compare.model import load_model
from weightvid.compare.research import research_methods
from weightvid.torch import prune, pruned_state

EPOCHS, PEAK = 2, 0.02
#: mean magnitudes below which weights are pruned, one after another.
PRUNED_BELOW = (0.8, 0.8)
#: price of what kernels differ by from their predictors, in the energy of all kernels.
PULL = 20.0
WINDOW, SCALES = 256, (1.0, -1.0, 0.5, -0.5)
#: steps of training for which a kernel keeps its predictor.
SEARCH_EVERY = 20
KEPT = ("conv1", "linear")
WAYS = ("plain", "pruned", "pulled")
FACTORS = (0.36, 0.5, 0.7, 1.0, 1.4)
QUANTIZERS = (
    "uniform", "kernel prediction", "uniform + DCT", "kernel prediction + DCT",
    "uniform + DCT, rate-aware",
)  # fmt: skip


def kernels_of(net: nn.Module) -> torch.Tensor:
    """All 3x3 kernels in the order of the layers, in units of their layer's root mean square."""
    layers = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    return torch.cat([(w / w.detach().square().mean().sqrt()).flatten(0, 1) for w in layers])


def predictors(kernels: torch.Tensor) -> torch.Tensor:
    """The best scaled earlier kernel of each; zeros where none is better than none."""
    flat = kernels.flatten(1)
    padded = torch.cat([torch.zeros(WINDOW, flat.shape[1]), flat])
    # Row i: the kernels i - 256 to i - 1.
    windows = padded.unfold(0, WINDOW, 1)[: len(flat)]
    products = torch.einsum("ik,ikw->iw", flat, windows)
    energies = windows.square().sum(1)
    gains = torch.stack([2 * s * products - s * s * energies for s in SCALES], 2)
    best, chosen = gains.flatten(1).max(1)
    places, scales = chosen // len(SCALES), torch.tensor(SCALES)[chosen % len(SCALES)]
    found = windows[torch.arange(len(flat)), :, places] * scales[:, None]
    return torch.where(best[:, None] > 0, found, 0.0).view_as(kernels)


class Learning:
    """The loss: divergence from the original's outputs, and the pull if there is one."""

    def __init__(self, pull: float) -> None:
        # In training mode both see the statistics of the batch.
        self._original = pretrained().to(memory_format=torch.channels_last).train()
        self._pull, self._steps = pull, 0
        self._wanted = torch.zeros(0)

    def __call__(self, net: nn.Module, images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = torch.softmax(self._original(images).float(), 1)
        loss = nn.functional.cross_entropy(net(images).float(), wanted)
        if not self._pull:
            return loss
        kernels = kernels_of(net)
        if self._steps % SEARCH_EVERY == 0:
            self._wanted = predictors(kernels.detach())
        self._steps += 1
        return loss + self._pull * (kernels - self._wanted).square().mean()


def fine_tuned(way: str, path: Path) -> ResNet:
    """The network, trained; what is kept at ``path`` is taken up."""
    net = pretrained()
    for factor in PRUNED_BELOW if way == "pruned" else ():
        print(f"zeros: {prune(net, factor, KEPT):.3f}")
    net.train()
    train(net, training_images(), EPOCHS, PEAK, path, Learning(PULL if way == "pulled" else 0.0))
    done = pretrained()
    done.load_state_dict(pruned_state(net))
    settle(done)
    return done


def settle(net: nn.Module) -> None:
    """Give BatchNorms the statistics of lossless images, after training on JPEG ones."""
    images, generator = stored_images("train")[0], torch.Generator().manual_seed(20)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all that comes
    net.train()
    with torch.no_grad():
        for part in images.repeat(4, 1, 1, 1).split(250):
            net(normalized(augmented(part, generator)))
    net.eval()


def report(folder: Path) -> None:
    """Archives and quantizers on what training made."""
    images, labels = stored_images("test")
    wanted = logits_of(pretrained(), images)
    methods = {m.name: m for m in research_methods()}
    found: list[dict[str, Any]] = []

    def judge(way: str, coder: str, factor: float, size: int, state: Any) -> None:
        net = pretrained()
        net.load_state_dict(state)
        logits = logits_of(net, images)
        top1 = round(float((logits.argmax(1) == labels).float().mean() * 100), 2)
        kl = round(divergence(wanted, logits), 4)
        row = {"way": way, "coder": coder, "step_factor": factor, "bytes": size}
        found.append(row | {"top1": top1, "kl": kl})
        print(found[-1], flush=True)

    nets = {"original": pretrained()}
    nets |= {w: fine_tuned(w, folder / f"{w}.pt") for w in WAYS if (folder / f"{w}.pt").exists()}
    for way, net in nets.items():
        state = net.state_dict()
        judge(way, "fp32", 0.0, sum(4 * x.numel() for x in net.parameters()), state)
        inputs = normalized(stored_images("train")[0][:500]).split(50)
        known = Calibration(Calibration.from_examples(net, inputs).stats)
        for factor in FACTORS:
            judge(way, "weightvid", factor, *archived(state, step_factor=factor))
            made = archived(state, step_factor=factor, calibration=known)
            judge(way, "weightvid, calibrated", factor, *made)
        if way in ("original", "pruned"):
            continue
        model = load_model(from_mapping({name: x.numpy() for name, x in state.items()}))
        for name in QUANTIZERS:
            for factor in FACTORS:
                coded = methods[f"research {name}"].code(model, factor)
                restored = {n: torch.from_numpy(x.copy()) for n, x in coded.tensors.items()}
                judge(way, name, factor, coded.file_bytes, restored)
    heads = ("network", "coder", "step factor", "bytes", "of fp32", "top-1 %", "KL")
    whole = found[0]["bytes"]
    rows = [
        (r["way"], r["coder"], r["step_factor"], f"{r['bytes']:,}", f"1/{whole / r['bytes']:.1f}",
         r["top1"], r["kl"])
        for r in found
    ]  # fmt: skip
    write_results("finetune", table(heads, rows), found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        fine_tuned(sys.argv[2], Path(sys.argv[3]) / f"{sys.argv[2]}.pt")
    else:
        report(Path(sys.argv[2]))
