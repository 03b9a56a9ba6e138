"""BatchNorm folding and local scaling (NNC's tools), on ResNet-20 at several steps.

Folding: a BatchNorm's scale goes into the rows of the weights before it, its four vectors become
one. Local scaling: after quantization, each row gets the scale of least squared error, which costs
nothing where a BatchNorm follows: it goes into that one's weights.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import evaluation_folder
from safetensors.torch import load_file

from weightvid import torch as archives
from weightvid.pack import PackOptions

RESULTS = Path(__file__).resolve().parents[1] / "results"
FACTORS = (0.25, 0.36, 0.5, 0.7)
IMAGES = 500
EPSILON = 1e-5
State = dict[str, Any]


def pairs(state: State) -> list[tuple[str, str]]:
    """Convolutions and the BatchNorms behind them, by name."""
    names = [name for name in state if name.endswith("weight") and state[name].ndim == 4]
    return [(name, name.removesuffix("weight").replace("conv", "bn")) for name in names]


def folded(state: State) -> State:
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


def rescaled(state: State, restored: State) -> State:
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
    folder = evaluation_folder() / "cifar10_resnet20"
    spec = importlib.util.spec_from_file_location("eval_script", folder / "eval.py")
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    state = load_file(folder / "model.safetensors")

    def log_probabilities(network: State) -> Any:
        return torch.log_softmax(script.logits(network, IMAGES)[0].double(), 1)

    wanted = log_probabilities(state)

    def divergence(network: State) -> float:
        return float((wanted.exp() * (wanted - log_probabilities(network))).sum(1).mean())

    rows: list[dict[str, Any]] = []
    for name, source in (("plain", state), ("folded", folded(state))):
        for factor in FACTORS:
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / "model.mp4"
                made = archives.save_file(source, path, options=PackOptions(step_factor=factor))
                restored = archives.load_file(path)
            row = {
                "network": name, "step_factor": factor, "bytes": made.file_bytes,
                "kl": divergence(restored), "kl_rescaled": divergence(rescaled(source, restored)),
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    lines = [
        "| network | step factor | bytes | KL | KL with rows rescaled |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['network']} | {r['step_factor']} | {r['bytes']:,} | {r['kl']:.4f} "
        f"| {r['kl_rescaled']:.4f} |"
        for r in rows
    ]
    for column in ("kl", "kl_rescaled"):
        sizes = {}
        for name in ("plain", "folded"):
            own = [r for r in rows if r["network"] == name]
            logs = [np.log(r[column]) for r in own]
            sizes[name] = np.exp(np.interp(np.log(0.03), logs, [np.log(r["bytes"]) for r in own]))
        lines.append(
            f"\nBytes at a KL of 0.03 ({column}): "
            + ", ".join(f"{n} {v:,.0f}" for n, v in sizes.items())
        )
    (RESULTS / "research_norms.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "research_norms.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
