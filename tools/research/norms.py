"""BatchNorm folding and local scaling (NNC's tools), on ResNet-20 at several steps.

Folding: a BatchNorm's scale goes into the rows of the weights before it, its four vectors become
one. Local scaling: after quantization, each row gets the scale of least squared error, which costs
nothing where a BatchNorm follows: it goes into that one's weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cifar import (
    State,
    archived,
    divergence,
    logits_of,
    pretrained,
    stored_images,
    table,
    write_results,
)

FACTORS = (0.25, 0.36, 0.5, 0.7)
IMAGES = 500
EPSILON = 1e-5


def pairs(state: State) -> list[tuple[str, str]]:
    """Convolutions and the BatchNorms behind them, by name."""
    names = [name for name in state if name.endswith("weight") and state[name].ndim == 4]
    return [(name, name.removesuffix("weight").replace("conv", "bn")) for name in names]


def folded(state: State) -> dict[str, Any]:
    """The same network with BatchNorms that only add."""
    found = dict(state)
    for weight, norm in pairs(state):
        gain = state[norm + "weight"] / torch.sqrt(state[norm + "running_var"] + EPSILON)
        found[weight] = state[weight] * gain[:, None, None, None]
        found[norm + "bias"] = state[norm + "bias"] - state[norm + "running_mean"] * gain
        found[norm + "weight"] = torch.ones_like(gain)
        found[norm + "running_mean"] = torch.zeros_like(gain)
        found[norm + "running_var"] = torch.full_like(gain, 1 - EPSILON)
    return found


def rescaled(state: State, restored: State) -> dict[str, Any]:
    """A restored network whose rows have the scale of least squared error."""
    found = dict(restored)
    for weight, norm in pairs(state):
        before, after = state[weight].flatten(1), restored[weight].flatten(1)
        power = after.square().sum(1)
        scale = torch.where(power > 0, (before * after).sum(1) / power.clamp(min=1e-30), 1.0)
        found[norm + "weight"] = restored[norm + "weight"] * scale
    return found


def main() -> None:
    torch.set_num_threads(1)
    net, images = pretrained(), stored_images("test")[0][:IMAGES]
    state, wanted = dict(net.state_dict()), logits_of(net, images)

    def harm(network: State) -> float:
        other = pretrained()
        other.load_state_dict(network)
        return divergence(wanted, logits_of(other, images))

    rows: list[dict[str, Any]] = []
    for name, source in (("plain", state), ("folded", folded(state))):
        for factor in FACTORS:
            size, restored = archived(source, step_factor=factor)
            row = {"network": name, "step_factor": factor, "bytes": size, "kl": harm(restored)}
            rows.append(row | {"kl_rescaled": harm(rescaled(source, restored))})
    heads = ("network", "step factor", "bytes", "KL", "KL with rows rescaled")
    lines = table(heads, (
        (r["network"], r["step_factor"], f"{r['bytes']:,}", f"{r['kl']:.4f}",
         f"{r['kl_rescaled']:.4f}") for r in rows
    ))  # fmt: skip
    for column in ("kl", "kl_rescaled"):
        sizes = {}
        for name in ("plain", "folded"):
            own = [r for r in rows if r["network"] == name]
            logs = [np.log(r[column]) for r in own]
            sizes[name] = np.exp(np.interp(np.log(0.03), logs, [np.log(r["bytes"]) for r in own]))
        said = ", ".join(f"{n} {v:,.0f}" for n, v in sizes.items())
        lines.append(f"\nBytes at a KL of 0.03 ({column}): {said}")
    write_results("norms", lines, rows)


if __name__ == "__main__":
    main()
