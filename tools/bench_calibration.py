#!/usr/bin/env python3
"""Size and fidelity of archives with and without calibration.

    python tools/bench_calibration.py --eval-dir EVAL --minilm MINILM.safetensors \
        --models cifar10_resnet20,minilm_l6 --out tools/results

Whole files count, 8 x bytes over all floats of the model. Curves: ``none`` (what pack does by
itself), ``calibrated`` (``--calibration``), ``sequential`` (``--calibrate``, the CNNs: the model is
at hand, and layers are quantized one after another) and, for ResNet-20 and MiniLM, ``noise`` (16
random images or token sequences as calibration data).
CNNs are judged by the KL divergence of their logits to the original's on test images, sentence
embeddings by their mean cosine. Of the smallest model pairs of archives of one size are compared
sample by sample. Writes calibration.json and, from it, calibration.md; models that were measured
before and are not measured now are kept. ``--stats FOLDER`` keeps the statistics there, and takes
those that are there already.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file as load_safetensors
from torch import nn

from weightvid.calibrate import CalibrationStats, ModuleExamples, calibrate, load_stats
from weightvid.pack import PackOptions, Target, pack_checkpoint
from weightvid.torch import load_file
from weightvid.version import __version__

#: images (or spectrograms) to calibrate on.
IMAGES: Final = 500
BATCH: Final = 50
#: models that are calibrated on noise, too.
NOISY: Final = ("cifar10_resnet20", "minilm_l6")
TARGETS: Final = {"kl": (0.05, 0.02, 0.01), "cosine": (0.97, 0.98, 0.99)}

Record = dict[str, Any]


class ByName(nn.Module):  # type: ignore[misc]
    """A model that is a function of named tensors, as a module with these very names."""

    def __init__(self, tensors: dict[str, torch.Tensor], forward: Any) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if tensor.is_floating_point():
                owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(last, tensor)
        self._forward = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Call the function with all parameters by name, then the inputs."""
        return self._forward(dict(self.named_parameters()), *inputs)


class Model:
    """A model of the evaluation folder."""

    def __init__(self, name: str, eval_dir: Path, minilm: Path, pairs: int) -> None:
        self.name = name
        self.source = minilm if name == "minilm_l6" else eval_dir / name / "model.safetensors"
        self._eval = _script(eval_dir / name / "eval.py")
        self._train = eval_dir / "_data" / "cifar10_train1000_lossless.npz"
        self._lines = eval_dir / "_data" / "calibration_sentences.txt"
        self._pairs = pairs
        self.state = load_safetensors(self.source)
        self.floats = sum(t.numel() for t in self.state.values() if t.is_floating_point())
        self.measure = "cosine" if name == "minilm_l6" else "kl"
        self._reference = self._output(self.state)

    def calibration(self) -> tuple[nn.Module, list[Any]]:
        """Module and example inputs; never test data."""
        if self.measure == "cosine":
            lines = self._lines.read_text(encoding="utf-8").split("\n")
            by_length: dict[int, list[list[int]]] = {}
            for ids in self._eval.tokens([line for line in lines if line]):
                by_length.setdefault(len(ids), []).append(ids)
            batches = []
            for _, alike in sorted(by_length.items()):
                for first in range(0, len(alike), BATCH):
                    ids = torch.tensor(alike[first : first + BATCH])
                    batches.append((ids, torch.ones_like(ids)))
            return ByName(self.state, self._eval.forward), batches
        return self._net(), list(self._images().split(BATCH))

    def noise(self) -> tuple[nn.Module, list[Any]]:
        """The module and 16 images of random pixels, or sentences of 16 random tokens."""
        if self.measure == "cosine":
            generator = torch.Generator().manual_seed(0)
            size = len(self.state["embeddings.word_embeddings.weight"])
            ids = torch.randint(999, size, (16, 16), generator=generator)
            batches = [(part, torch.ones_like(part)) for part in ids.split(2)]
            return ByName(self.state, self._eval.forward), batches
        like = self._images()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((16, *like.shape[1:]), generator=generator)
        return self._net(), list(images.split(2))

    def loss(self, state: dict[str, torch.Tensor]) -> float:
        """KL divergence, or one minus the mean cosine."""
        return float(self.losses(state).mean())

    def losses(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """The same of each test sample."""
        output = self._output(state)
        if self.measure == "cosine":
            return 1 - (self._reference * output).sum(1)
        p, q = (torch.log_softmax(z.double(), 1) for z in (self._reference, output))
        return (p.exp() * (p - q)).sum(1)

    def _net(self) -> nn.Module:
        net = self._eval.Net()
        state = {k: v.float() if v.is_floating_point() else v for k, v in self.state.items()}
        net.load_state_dict(state, strict=False)
        made: nn.Module = net.eval()
        return made

    def _images(self) -> torch.Tensor:
        # The keyword model comes with test data alone: its first half calibrates.
        data = self._train if self.name.startswith("cifar") else None
        images: torch.Tensor = self._eval._data(IMAGES, data)[0]
        return images

    def _output(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor
        if self.measure == "cosine":
            output = self._eval.embeddings(state, self._pairs)
        elif self.name.startswith("cifar"):
            output = self._eval.logits(state)[0]
        else:
            output = self._eval.logits(state)[0][IMAGES:]
        return output


def _script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"eval_{path.parent.name}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Known(ModuleExamples):
    """A module and inputs whose statistics are there already."""

    def __init__(self, model: Model, stats: CalibrationStats) -> None:
        super().__init__(*model.calibration())
        self._statistics = stats


def curve(
    model: Model,
    factors: Sequence[float],
    known: CalibrationStats | ModuleExamples | None,
    folder: Path,
) -> list[Record]:
    """One point for each step factor."""
    points: list[Record] = []
    for factor in factors:
        archive = folder / "model.mp4"
        options = PackOptions(step_factor=factor, calibration=known, force=True, verify=False)
        began = time.process_time()
        report = pack_checkpoint(model.source, archive, options)
        points.append(
            {
                "step_factor": factor,
                "bytes": report.file_bytes,
                "bits_per_weight": report.bits_per_weight,
                "loss": model.loss(load_file(archive)),
                "cpu_s": round(time.process_time() - began, 1),
            }
        )
        if report.calibration:
            points[-1]["kept"] = report.calibration.split(",")[0].split(":")[0]
        print(model.name, type(known).__name__, points[-1], flush=True)
    return points


def pairs(
    model: Model, factors: Sequence[float], stats: CalibrationStats, folder: Path
) -> list[Record]:
    """Archives of one size: calibrated ones are searched for the size of those without."""
    found = []
    archive = folder / "model.mp4"
    for factor in factors:
        options = PackOptions(step_factor=factor, force=True, verify=False)
        plain = pack_checkpoint(model.source, archive, options)
        without = model.losses(load_file(archive))
        target = Target("size", plain.file_bytes)
        options = PackOptions(target=target, calibration=stats, force=True, verify=False)
        made = pack_checkpoint(model.source, archive, options)
        change = model.losses(load_file(archive)) - without
        found.append(
            {
                "without_bytes": plain.file_bytes,
                "calibrated_bytes": made.file_bytes,
                "without": float(without.mean()),
                "change": float(change.mean()),
                "change_se": float(change.std() / math.sqrt(len(change))),
            }
        )
        print(model.name, "pair", found[-1], flush=True)
    return found


def fitted_rate(points: Sequence[Record], loss: float) -> tuple[float, float]:
    """Bits per weight at a loss: line of rate against log loss near it, and its scatter."""
    near = sorted(points, key=lambda p: abs(math.log(p["loss"] / loss)))[:6]
    x = np.log([p["loss"] for p in near])
    y = np.array([p["bits_per_weight"] for p in near])
    slope, offset = np.polyfit(x, y, 1)
    scatter = float((y - slope * x - offset).std(ddof=2)) if len(near) > 2 else 0.0
    return float(slope * math.log(loss) + offset), scatter


def shown(points: Sequence[Record], loss: float) -> str:
    """Rate at a loss, in words."""
    rate, scatter = fitted_rate(points, loss)
    reached = min(p["loss"] for p in points) <= loss <= max(p["loss"] for p in points)
    return f"{'' if reached else '~'}{rate:.2f} ± {scatter:.2f}"


def statistics(model: Model, folder: Path | None) -> tuple[CalibrationStats, float | None]:
    """Statistics of a model, and the seconds they took, if they are not there already."""
    path = folder / f"{model.name}.stats" if folder is not None else None
    if path is not None and path.exists():
        return load_stats(path), None
    began = time.perf_counter()
    stats = calibrate(*model.calibration())
    seconds = time.perf_counter() - began
    if path is not None:
        stats.save(path)
    return stats, round(seconds, 1)


def measure(model: Model, points: int, kinds: Sequence[str], kept: Path | None) -> Record:
    """Some curves of a model."""
    large = model.floats > 10_000_000
    finest, coarsest = (0.14, 0.38) if large else (0.25, 0.75)
    if model.floats < 50_000:
        finest, coarsest = 0.1, 0.45
    factors = [round(float(f), 4) for f in np.geomspace(finest, coarsest, points)]
    stats, seconds = statistics(model, kept)
    finer = [round(0.75 * f, 4) for f in factors]
    record: Record = {
        "measure": model.measure,
        "floats": model.floats,
        "samples": stats.samples,
        "calibrate_s": seconds,
        "profit": sum(m.useful for m in stats.tensors.values()),
        "tensors": len(stats.tensors),
        "curves": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "calibrated" in kinds:
            record["curves"]["calibrated"] = curve(model, factors, stats, folder)
        if "sequential" in kinds and not large:
            # Of a deep model the coarser half, which takes minutes a point.
            some = factors if model.floats < 300_000 else factors[points // 2 :]
            record["curves"]["sequential"] = curve(model, some, Known(model, stats), folder)
        if "none" in kinds:
            record["curves"]["none"] = curve(model, finer, None, folder)
        if "pairs" in kinds and model.floats < 50_000:
            record["pairs"] = pairs(model, finer[::2], stats, folder)
        if "noise" in kinds and model.name in NOISY:
            noise = calibrate(*model.noise())
            record["noise_profit"] = sum(m.useful for m in noise.tensors.values())
            some = factors[1::3] if large else finer
            record["curves"]["noise"] = curve(model, some, noise, folder)
    record["codes"] = dict.fromkeys([*record["curves"]], commit())
    return record


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).resolve().parent
    made = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return made.stdout.strip() or "unknown"


def merged(before: Record, now: Record) -> Record:
    """A model's record with the curves that were measured now in place of earlier ones."""
    joined = {key: {**before.get(key, {}), **now[key]} for key in ("curves", "codes")}
    return {**before, **now, **joined}


def markdown(results: Record) -> str:
    """The tables."""
    lines = [
        "# Archives with and without calibration",
        "",
        f"`python tools/bench_calibration.py`, weightvid {results['weightvid']}, torch "
        f"{results['torch']}. Whole files, 8 x bytes over all floats. Rates at a target are read "
        "off a line through the six nearest points (rate against the logarithm of the loss); "
        "± is the scatter of single points about it, ~ marks a target beyond the curve. CNNs: "
        "KL divergence of the logits; MiniLM: mean cosine of the embeddings. Calibration data and "
        "test data are apart. CPU times include judging the archive.",
        "",
        "| model | target | without | calibrated | saved | layer by layer | saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in results["models"].items():
        for target in TARGETS[model["measure"]]:
            loss = target if model["measure"] == "kl" else 1 - target
            curves = model["curves"]
            without, _ = fitted_rate(curves["none"], loss)
            cells = f" {shown(curves['none'], loss)} |"
            for kind in ("calibrated", "sequential"):
                if kind in curves:
                    saved = 100 * (1 - fitted_rate(curves[kind], loss)[0] / without)
                    cells += f" {shown(curves[kind], loss)} | {saved:.0f} % |"
                else:
                    cells += " | |"
            lines.append(f"| {name} | {model['measure']} {target} |{cells}")
    for name, model in results["models"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{model['samples']} samples; {model['profit']} of {model['tensors']} tensors profit."
            + " Measured at "
            + ", ".join(f"{code} ({kind})" for kind, code in model["codes"].items())
            + ".",
            "",
            "| curve | step factor | bytes | bits per weight | loss | CPU s | kept |",
            "|---|---|---|---|---|---|---|",
        ]
        for kind, points in model["curves"].items():
            lines += [
                f"| {kind} | {p['step_factor']} | {p['bytes']:,} | {p['bits_per_weight']:.3f} | "
                f"{p['loss']:.4f} | {p.get('cpu_s', '')} | {p.get('kept', '')} |"
                for p in points
            ]
        if "pairs" in model:
            lines += [
                "",
                "Pairs of one size (calibrated: at most 1 % smaller); the change of the loss is "
                "paired, with its standard error over the test samples.",
                "",
                "| bytes without | calibrated | loss without | change when calibrated |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {p['without_bytes']:,} | {p['calibrated_bytes']:,} | {p['without']:.4f} | "
                f"{p['change']:+.4f} ± {p['change_se']:.4f} |"
                for p in model["pairs"]
            ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eval-dir", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument(
        "--models", default="cifar10_resnet20,cifar10_resnet44,mlperf_kws,minilm_l6"
    )
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--curves", default="calibrated,sequential,none,pairs,noise")
    parser.add_argument("--pairs", type=int, default=300, help="sentence pairs MiniLM is judged on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stats", type=Path, help="folder of statistics made before")
    parser.add_argument("--out", type=Path, default=Path("tools/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.out / "calibration.json"
    results: Record = json.loads(path.read_text()) if path.exists() else {"models": {}}
    results.update(
        weightvid=__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        machine=platform.machine(),
        pairs=arguments.pairs,
    )
    for name in arguments.models.split(","):
        model = Model(name, arguments.eval_dir, arguments.minilm, arguments.pairs)
        found = measure(model, arguments.points, arguments.curves.split(","), arguments.stats)
        results["models"][name] = merged(results["models"].get(name, {}), found)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "calibration.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
