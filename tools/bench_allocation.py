"""Which step each tensor should get, and how the levels should be rounded, judged by fidelity.

For one checkpoint and its evaluation script, every rule is tried over a range of rates. The rate is
the zero-order entropy of the levels plus ``--overhead`` plus ``--exact-bits`` for each float
that stays exact; the fidelity is the KL divergence of the logits from the original's, or one
minus the mean cosine of the embeddings. One draw is noisy, so the loss is fitted over all rates
with the slope that uniform quantization has (a factor of four per bit)::

    python tools/bench_allocation.py model.safetensors eval.py --target 0.02 --out points.json

``--measure DATA`` adds measured allocation: two probes of each tensor on calibration data (what
the script's ``logits`` takes as data; a text file for embeddings).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int32]
Steps = dict[str, float]

SLOPE = 2 * math.log(2)  # d ln(loss) / d bits of fine uniform quantization
SMALLEST = 64  # tensors below this stay exact
QUERY_KEY = ("query", "key", "q_proj", "k_proj")


@dataclass(frozen=True, slots=True)
class Shaping:
    """Noise shaping: ``spatial`` and ``decay`` within a kernel, ``mean`` along a row."""

    spatial: float
    decay: float
    mean: float
    sweeps: int = 2


PLAIN = Shaping(0.0, 1.0, 0.0, 0)
SHAPED = Shaping(3.0, 0.6, 0.1)


@dataclass(slots=True)
class Model:
    """A checkpoint, its evaluation and the outputs of the original, per data set."""

    state: dict[str, Any]
    script: Any
    samples: int
    references: dict[str | None, Any]

    def weights(self) -> dict[str, Matrix]:
        """The tensors that become levels."""
        return {
            name: value.float().numpy()
            for name, value in self.state.items()
            if value.is_floating_point() and value.dim() >= 2 and value.numel() >= SMALLEST
        }

    def floats(self) -> int:
        """All float values of the checkpoint."""
        return sum(v.numel() for v in self.state.values() if v.is_floating_point())

    def outputs(self, state: dict[str, Any], data: str | None) -> Any:
        """Logits, or embeddings where the script has those."""
        if hasattr(self.script, "embeddings"):
            if data is None:
                return self.script.embeddings(state, self.samples).double()
            return self.calibration_embeddings(state, Path(data))
        return self.script.logits(state, self.samples, data)[0].double()

    def calibration_embeddings(self, state: dict[str, Any], text: Path) -> Any:
        """Embeddings of the lines of a text file instead of the script's own pairs."""
        lines = [line for line in text.read_text("utf-8").splitlines() if line.strip()]
        half = min(len(lines) // 2, self.samples)
        own = self.script.pairs
        self.script.pairs = lambda *_: (None, lines[:half], lines[half : 2 * half])
        try:
            return self.script.embeddings(state, self.samples).double()
        finally:
            self.script.pairs = own

    def loss(self, state: dict[str, Any], data: str | None = None) -> float:
        """KL divergence in nats of the logits, or 1 - mean cosine of the embeddings."""
        if data not in self.references:
            self.references[data] = self.outputs(self.state, data)
        reference, outputs = self.references[data], self.outputs(state, data)
        if hasattr(self.script, "embeddings"):
            return float(1 - (reference * outputs).sum(1).mean())
        p, q = reference.log_softmax(1), outputs.log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean())


def load(checkpoint: Path, script: Path, samples: int) -> Model:
    """Read the checkpoint and import its evaluation script."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("evaluation", script)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{script}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Model(load_file(checkpoint), module, samples, {})


def entropy_bits(levels: Levels) -> float:
    """Zero-order entropy of all levels together, in bits."""
    _, counts = np.unique(levels, return_counts=True)
    return float((counts * np.log2(levels.size / counts)).sum())


def kernel_coupling(shape: tuple[int, ...], shaping: Shaping) -> npt.NDArray[np.float32]:
    """Correlation of the inputs under one kernel: ``spatial * decay ** distance`` (K x K)."""
    if len(shape) <= 2:
        return np.zeros((1, 1), np.float32)
    coupling = np.ones((1, 1))
    for extent in shape[2:]:
        distance = np.abs(np.arange(extent)[:, None] - np.arange(extent))
        coupling = np.kron(coupling, shaping.decay**distance)
    return (shaping.spatial * coupling).astype(np.float32)


def round_levels(weight: Matrix, step: float, shaping: Shaping) -> Levels:
    """Levels that make e' (I + coupling + mean) e small in every row, e = weight / step - level.

    Coordinate descent over the columns, all rows at once, from plain rounding. Only the
    choice of levels changes, never the reconstruction: the decoder knows nothing of it.
    """
    rows = weight.shape[0]
    scaled = np.ascontiguousarray((weight.reshape(rows, -1) / np.float32(step)).T)
    levels = np.rint(scaled)
    error = scaled - levels
    coupling = kernel_coupling(weight.shape, shaping)
    size = len(coupling)
    total = error.sum(0)
    weight_of_one = 1 + coupling[0, 0] + shaping.mean
    for _ in range(shaping.sweeps):
        for start in range(0, len(scaled), size):
            kernel = error[start : start + size]
            for index in range(size):
                pull = kernel[index] + coupling[index] @ kernel + shaping.mean * total
                change = np.rint(pull / weight_of_one)
                if change.any():
                    kernel[index] -= change
                    levels[start + index] += change
                    total -= change
    return levels.T.astype(np.int32).reshape(weight.shape)


def shape_rules(weights: dict[str, Matrix]) -> dict[str, Steps]:
    """Relative steps of each data-free rule; a common factor moves along the rate."""
    sigma = {name: float(w.std()) or 1.0 for name, w in weights.items()}
    mean_size = sum(w.size for w in weights.values()) / len(weights)
    size = {name: w.size / mean_size for name, w in weights.items()}
    factor = {n: 2.0 if any(key in n for key in QUERY_KEY) else 1.0 for n in weights}
    return {
        "global": dict.fromkeys(weights, float(np.mean(list(sigma.values())))),
        "sigma": dict(sigma),
        "sigma n^1/4": {n: sigma[n] * size[n] ** 0.25 for n in weights},
        "sigma sqrt(n)": {n: sigma[n] * size[n] ** 0.5 for n in weights},
        "sigma sqrt(n), query and key x2": {
            n: factor[n] * sigma[n] * size[n] ** 0.5 for n in weights
        },
    }


def quantized(
    model: Model, weights: dict[str, Matrix], steps: Steps, shaping: Shaping
) -> tuple[dict[str, Any], float]:
    """State dict with the tensors of ``steps`` quantized, and the bits of their levels."""
    import torch

    state, bits = dict(model.state), 0.0
    for name, step in steps.items():
        levels = round_levels(weights[name], step, shaping)
        bits += entropy_bits(levels)
        state[name] = torch.from_numpy(levels * np.float32(step))
    return state, bits


def measured_rule(
    model: Model, weights: dict[str, Matrix], probe: Steps, data: str | None
) -> Steps:
    """Steps at equal slope of loss against bits: step ~ sqrt(n step^2 / loss(step alone))."""
    steps: Steps = {}
    for name, step in probe.items():
        losses = []
        for jitter in (1.0, 1.07):
            state, _ = quantized(model, weights, {name: step * jitter}, SHAPED)
            losses.append(model.loss(state, data) / (step * jitter) ** 2)
        steps[name] = math.sqrt(weights[name].size / max(float(np.mean(losses)), 1e-12))
    scale = math.exp(
        float(np.mean([math.log(probe[n] / steps[n]) for n in steps]))  # back near the probe
    )
    sigma = {name: float(w.std()) or 1.0 for name, w in weights.items()}
    return {n: min(max(s * scale, 0.02 * sigma[n]), 4 * sigma[n]) for n, s in steps.items()}


def find_scale(loss: Callable[[float], float], target: float) -> float:
    """Factor at which the loss is near the target: three secant steps in the logarithm."""
    scale = 0.4
    for _ in range(3):
        scale *= math.sqrt(min(max(target / max(loss(scale), 1e-9), 0.05), 20.0))
    return scale


def rate_at(points: list[tuple[float, float]], target: float) -> tuple[float, float]:
    """Bits per weight where the fitted loss meets the target, and one point's scatter."""
    shifted = np.array([bpw + math.log(max(loss, 1e-9) / target) / SLOPE for bpw, loss in points])
    return float(shifted.mean()), float(shifted.std())


def measure(
    model: Model, steps: Steps, shaping: Shaping, args: argparse.Namespace
) -> dict[str, Any]:
    """One rule: ``--points`` rates around the target, the fitted rate there."""
    weights = model.weights()
    exact = model.floats() - sum(w.size for w in weights.values())

    def point(scale: float) -> tuple[float, float]:
        state, bits = quantized(model, weights, {n: s * scale for n, s in steps.items()}, shaping)
        total = bits * (1 + args.overhead) + exact * args.exact_bits
        return total / model.floats(), model.loss(state)

    centre = find_scale(lambda scale: point(scale)[1], args.target)
    points = [point(float(s)) for s in np.geomspace(centre * 0.8, centre * 1.25, args.points)]
    rate, scatter = rate_at(points, args.target)
    return {"bits_per_weight": rate, "scatter": scatter, "scale": centre, "points": points}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="data-free and measured step rules")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("script", type=Path, help="evaluation script with logits or embeddings")
    parser.add_argument("--target", type=float, default=0.02, help="KL in nats, or 1 - cosine")
    parser.add_argument("--samples", type=int, default=1000, help="test samples or pairs")
    parser.add_argument("--points", type=int, default=8, help="rates per rule")
    parser.add_argument("--rules", default="", help="only rules that contain this text")
    parser.add_argument("--measure", metavar="DATA", help="calibration data: measured allocation")
    parser.add_argument("--overhead", type=float, default=0.03)
    parser.add_argument("--exact-bits", type=float, default=18.0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print one line per rule and rounding; write the points."""
    args = parse(argv)
    model = load(args.checkpoint, args.script, args.samples)
    weights = model.weights()
    rules = shape_rules(weights)
    if args.measure:
        probe = {n: 0.7 * s for n, s in rules["sigma sqrt(n)"].items()}
        caps = {n: 1.5 * float(w.std()) for n, w in weights.items()}
        probe = {n: min(s, caps[n]) for n, s in probe.items()}
        rules["measured"] = measured_rule(model, weights, probe, args.measure)
    results = {}
    for rule, steps in rules.items():
        if args.rules not in rule:
            continue
        for label, shaping in (("plain", PLAIN), ("shaped", SHAPED)):
            result = measure(model, steps, shaping, args)
            results[f"{rule} | {label}"] = result
            print(
                f"{rule:32s} {label:7s} {result['bits_per_weight']:6.3f} bpw at {args.target:g}"
                f"  (scatter {result['scatter']:.3f}, k {result['scale']:.3f})",
                flush=True,
            )
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
