"""Learned levels: all levels and norms of ResNet-20 trained together, 500 images and no more.

Layer by layer as `pack --calibrate` does, but with levels that are rounded; then each level becomes
a number that Adam moves, rounded in the forward pass, with gradients passed straight through
(Bengio et al., 2013; Esser et al., 2020). The loss is the squared change of the logits and of what
BatchNorms put out, on images mirrored, moved and cut into one another, and the bits of the levels
as geometric distributions of their rows and columns have them. Steps stay what they are.

    learned.py [STEP_FACTOR...]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
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
    write_results,
)
from torch import nn
from torch.func import functional_call

from weightvid.calibrate import Calibration, CalibrationConfig
from weightvid.calibrate.layers import Examples
from weightvid.levels.code import code_part
from weightvid.levels.steps import TensorPlan
from weightvid.levels.transform import forward, whole_basis
from weightvid.loader import UNIFORM
from weightvid.survey import Survey

FACTORS = (0.9,)
MOVES = ((0, 0), (3, 2), (-2, -3))
STEPS, BATCH, RATE, NORM_RATE, WARM_UP = 2400, 32, 1e-3, 3e-4, 20
#: how far from its middle a level begins, towards the weight.
REACH = 0.4


class Rounded(Survey):
    """A survey whose tensors are rounded, whatever else they would be."""

    def plans(self, factor: float) -> dict[int, TensorPlan]:
        """Plans at a step factor."""
        found = super().plans(factor)
        return {n: replace(p, method=UNIFORM, balanced=False) for n, p in found.items()}


class Levels:
    """Levels of one tensor on their way."""

    def __init__(self, plan: TensorPlan, restored: torch.Tensor, original: torch.Tensor) -> None:
        self.plan, self.shape = plan, restored.shape
        scale = plan.column_steps() * plan.row_factors(slice(None))[:, None]
        self._scale = torch.from_numpy(np.asarray(scale, np.float32))
        basis = whole_basis(plan.kernel).astype(np.float32)
        self._basis = torch.from_numpy(basis)
        start, wanted = (self._coefficients(each) / self._scale for each in (restored, original))
        start = start.round()
        sizes = start.abs()
        mean = sizes.mean() + 1e-6
        by_row, by_column = (
            (sizes.sum(axis, True) + 16 * mean) / (sizes.shape[axis] + 16) for axis in (1, 0)
        )
        ratio = (by_row * by_column / mean).clamp(min=0.02)
        #: bits that a level costs more than the next smaller one.
        self._slope = -torch.log2(ratio / (1 + ratio))
        self.moving = (start + (wanted - start).clamp(-REACH, REACH)).requires_grad_(True)

    def _coefficients(self, weights: torch.Tensor) -> torch.Tensor:
        matrix = weights.detach().numpy().reshape(self.plan.view.rows, -1)
        return torch.from_numpy(forward(matrix, self.plan.kernel))

    def weights(self) -> torch.Tensor:
        """What the levels stand for; gradients go to what is rounded."""
        levels = self.moving + (self.moving.round() - self.moving).detach()
        kernels = (levels * self._scale).unflatten(1, (len(self._basis), -1))
        return torch.einsum("ofc,fk->ock", kernels, self._basis).reshape(self.shape)

    def bits(self) -> torch.Tensor:
        """Bits of all levels, but for a constant."""
        return (self._slope * self.moving.abs()).sum()


class Learned(Examples):
    """Examples by which all levels are trained together."""

    def recalibrate(self, survey: Survey, factor: float, progress: Any) -> Any:
        """Layer by layer, and then together."""
        survey = Rounded(*(getattr(survey, field.name) for field in fields(survey)))
        found = super().recalibrate(survey, factor, progress)
        if isinstance(found, str):
            return found
        net, plans = pretrained(), survey.plans(factor)
        names = {number: plan.spec.name for number, plan in plans.items()}
        state = net.state_dict()
        originals = {name: state[name].clone() for name in names.values()}
        for number, parts in found[0].items():
            stored = np.concatenate([part.stored for part in parts])
            state[names[number]].copy_(
                torch.from_numpy(stored).view(originals[names[number]].shape)
            )
        levels = {n: Levels(plans[i], state[n], originals[n]) for i, n in names.items()}
        learn(net, levels)
        for name, each in levels.items():
            state[name].copy_(each.weights().detach())
        self.net = net
        elements = {i: state[n].numpy().reshape(plans[i].view.rows, -1) for i, n in names.items()}
        return {i: [code_part(elements[i], plans[i], i, 0)] for i in plans}, found[1]


def images_for(rows: torch.Tensor, images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Some images, moved, mirrored, and half the time with a square of another one."""
    batch = normalized(augmented(images[rows], draws))
    if torch.rand(1, generator=draws) < 0.5:
        side = int(32 * math.sqrt(torch.rand(1, generator=draws)))
        y, x = torch.randint(33 - side, (2,), generator=draws)
        batch[:, :, y : y + side, x : x + side] = batch.roll(1, 0)[:, :, y : y + side, x : x + side]
    return batch


def learn(net: ResNet, levels: dict[str, Levels]) -> None:
    """Train levels, and gains and offsets of BatchNorms, on the first 500 training images."""
    images, draws = stored_images("train")[0][:500], torch.Generator().manual_seed(1)
    original, seen = pretrained(), dict[str, list[torch.Tensor]](net=[], original=[])
    for name, each in (("net", net), ("original", original)):
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda *call, to=seen[name]: to.append(call[2]))
    for parameter in (*net.parameters(), *original.parameters()):
        parameter.requires_grad_(False)
    norms = [p.requires_grad_(True) for n, p in net.named_parameters() if n not in levels]
    moving = [each.moving for each in levels.values()]
    groups: list[dict[str, Any]] = [
        {"params": moving, "lr": RATE}, {"params": norms, "lr": NORM_RATE}
    ]  # fmt: skip
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * s / STEPS)),
    )
    count, first = sum(each.numel() for each in moving), None
    for step in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=draws)
        batch = images_for(rows, images, draws)
        seen["net"].clear()
        seen["original"].clear()
        wanted = centered(original(batch))
        made = {name: each.weights() for name, each in levels.items()}
        change = (centered(functional_call(net, made, (batch,))) - wanted).square().sum(1).mean()
        pairs = zip(seen["net"], seen["original"], strict=True)
        inner = sum((a - b).square().mean() / b.var() for a, b in pairs) / len(seen["net"])
        first = first or (float(change.detach()), float(torch.as_tensor(inner).detach()))
        bits = sum(each.bits() for each in levels.values()) / count
        # A bit for every level is a quarter of both changes.
        loss = change / first[0] + inner / first[1] + 2 * math.log(4) * bits
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 300 == 0:
            print(f"step {step}: {change.item():.3f} {bits.item():.3f}", flush=True)


def centered(logits: torch.Tensor) -> torch.Tensor:
    """Logits without what softmax takes off."""
    return logits - logits.mean(1, keepdim=True)


def main(factors: Sequence[float]) -> None:
    """Statistics alone, layer by layer, and learned, judged on test images."""
    net, images = pretrained(), stored_images("test")[0]
    wanted = logits_of(net, images)
    inputs = [
        torch.cat([e.roll(by, (2, 3)) for by in MOVES for e in (batch, batch.flip(3))])
        for batch in normalized(stored_images("train")[0][:500]).split(50)
    ]
    learned = Learned(pretrained(), inputs, CalibrationConfig())
    stats = learned.statistics(lambda _: None)
    ways = {
        "statistics": Calibration(stats),
        "layer by layer": Calibration.from_examples(pretrained(), inputs),
        "learned": Calibration(stats, learned),
    }
    rows, found, weights = [], [], sum(t.numel() for t in net.state_dict().values() if t.ndim)
    for factor in factors:
        for way, known in ways.items():
            size, state = archived(net.state_dict(), step_factor=factor, calibration=known)
            judged = pretrained()
            judged.load_state_dict(state)
            if way == "learned":  # the norms' floats, which cost what others do
                judged = learned.net
            logits = logits_of(judged, images)
            change = float((centered(logits) - centered(wanted)).square().sum(1).mean())
            bits, kl = 8 * size / weights, divergence(wanted, logits)
            found.append(
                {"way": way, "step_factor": factor, "bits": bits, "kl": kl, "change": change}
            )
            rows.append((way, factor, f"{bits:.3f}", f"{kl:.4f}", f"{change:.2f}"))
            print(rows[-1], flush=True)
    heads = ("levels", "step factor", "bits per weight", "KL", "squared change")
    write_results("learned", table(heads, rows), found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([float(each) for each in sys.argv[1:]] or FACTORS)
