#!/usr/bin/env python3
"""Bits per weight at equal fidelity, weightvid next to NNCodec and plain ways, in one run.

    WEIGHTVID_EVAL=EVAL python tools/measure.py cifar10_resnet20 --only weightvid
    WEIGHTVID_EVAL=EVAL python tools/measure.py --nncodec .venv-nncodec/bin/python

EVAL holds NAME/eval.py with NAME/model.safetensors. Whole files count, 8 x bytes over all floats of
the model, and everything is judged by one function on what each codec gives back: the KL divergence
of the logits, the cosine of the embeddings, or the perplexity over the original's. The rate at a
goal comes from a straight line through log loss over bits per weight, as one draw of a quantizer is
noisy. Writes ``measure_NAME.json`` and ``.md`` into the output folder; finished points are kept in
``--cache``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from weightvid.calibrate import Calibration, CalibrationConfig, calibrate
from weightvid.calibrate.evaluation import Judge
from weightvid.checkpoint import open_checkpoint
from weightvid.compare.curves import Measure, Pair, crossing, measures
from weightvid.compare.model import Method, Model, load_model
from weightvid.compare.rivals import peer_methods, plain_methods
from weightvid.compare.rows import OK, Row, RowStore, machine, versions, with_torch
from weightvid.compare.video import archive_method
from weightvid.pack import PackOptions

MODELS: Final = ("cifar10_resnet20", "cifar10_resnet44", "mlperf_kws", "minilm_l6", "lm_books")
#: pairs of sentences that MiniLM is judged on.
PAIRS: Final = 300
#: models above are measured at fewer points, and those above the second not layer by layer.
MIDDLE: Final = 1_000_000
LARGE: Final = 10_000_000
GROUPS: Final = ("weightvid", "calibrated", "refined", "own", "own-refined", "nncodec", "plain")
#: quarter octaves.
FACTORS: Final = tuple(round(0.18 * 2 ** (i / 4), 4) for i in range(-5, 12))
DQ_QPS: Final = tuple(range(-38, -17))
OPT_QPS: Final = tuple(range(-40, -19))
#: points so many bits per weight around a crossing take part in its straight line.
FIT_HALF_WIDTH: Final = 1.0
FIT_POINTS: Final = 4
#: of plain integers.
BITS: Final = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0)

#: samples that calibrate, and of a batch; of the keyword model the first of its test data.
CALIBRATING: Final = 500
BATCH: Final = 50
#: by how many pixels photographs are moved, each also mirrored, for layers to be fitted to.
MOVES: Final = ((0, 0), (3, 2), (-2, -3))


class ByName(torch.nn.Module):  # type: ignore[misc]
    """A function of named tensors and inputs, as a module with parameters of these names."""

    def __init__(self, tensors: dict[str, torch.Tensor], function: Any) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            owner: torch.nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
        self._function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._function(dict(self.named_parameters()), *inputs)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its evaluation."""

    name: str
    folder: Path
    weights: Path
    script: Any
    model: Model
    judge: Judge

    @property
    def speaks(self) -> bool:
        """Whether it is a language model."""
        return hasattr(self.script, "windows")

    @property
    def measure(self) -> Measure:
        return (
            perplexity(self.judge.original.metric or 1.0)
            if self.speaks
            else measures()["cosine" if self.judge.embeds else "kl"]
        )

    @property
    def goals(self) -> tuple[float, ...]:
        if self.speaks:
            return (1.01, 1.03)
        return (0.98, 0.99) if self.judge.embeds else (0.02,)

    def examples(self, moved: bool = False) -> tuple[torch.nn.Module, list[Any]]:
        """A module, and inputs that nothing is judged on; of photographs moved copies as well."""
        if self.speaks:
            net, batches = self.script.examples()
            return net, list(batches)
        tensors = {n: torch.from_numpy(a) for n, a in self.model.tensors.items()}
        if not self.judge.embeds:
            net = self.script.Net()
            net.load_state_dict(tensors, strict=False)
            data = self.folder / "_data" / "cifar10_train1000_lossless.npz"
            images = self.script._data(
                CALIBRATING, data if self.name.startswith("cifar") else None
            )[0]
            batches = list(images.split(BATCH))
            if moved and images.shape[1] == 3:
                batches = [
                    torch.cat([each.roll(by, (2, 3)) for by in MOVES for each in (b, b.flip(3))])
                    for b in batches
                ]
            return net.eval(), batches
        text = (self.folder / "_data" / "calibration_sentences.txt").read_text(encoding="utf-8")
        by_length: dict[int, list[list[int]]] = {}
        for ids in self.script.tokens([line for line in text.split("\n") if line]):
            by_length.setdefault(len(ids), []).append(ids)
        batches = [torch.tensor(ids[:BATCH]) for _, ids in sorted(by_length.items())]
        floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
        inputs = [(batch, torch.ones_like(batch)) for batch in batches]
        return ByName(floats, self.script.forward), inputs

    def own(self) -> Calibration | None:
        """Without any data, on what the network makes itself; None if nothing builds it."""
        folder, network = self.weights.parent, getattr(self.script, "Net", None)
        alone = not (folder / "config.json").is_file()
        if alone and network is None:
            return None
        with open_checkpoint(self.weights if alone else folder) as reader:
            return Calibration.from_checkpoint(reader, network() if alone and network else None)


def perplexity(original: float) -> Measure:
    """Perplexity over the original's; the log of its excess falls about straight with the rate."""

    def level(ratio: float) -> float:
        return math.log(math.log(ratio)) if ratio > 1 else -math.inf

    def value(row: Row) -> float | None:
        return None if row.metric is None else row.metric / original

    return Measure("perplexity ratio", "perplexity over the original's", value, level)


def load_subject(name: str, folder: Path, minilm: Path | None) -> Subject:
    """Read a model and its evaluation."""
    spec = importlib.util.spec_from_file_location(f"eval_{name}", folder / name / "eval.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder / name} has no eval.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = folder / name / "model.safetensors"
    if name == "minilm_l6":
        path = minilm or path
    if not path.is_file():
        raise SystemExit(f"{name} has no weights: give --minilm MODEL.safetensors")
    model = load_model(open_checkpoint(path))

    def function(state: dict[str, Any]) -> Any:
        if hasattr(script, "embeddings"):
            vectors = script.embeddings(state, PAIRS)
            return vectors, script.score(vectors, PAIRS)
        if hasattr(script, "windows"):
            logits, labels = script.logits(state, script.windows()[:, 1:].numel())
            return logits, math.exp(torch.nn.functional.cross_entropy(logits, labels).item())
        logits, labels = script.logits(state)
        first = 0 if name.startswith("cifar") else CALIBRATING
        return logits[first:], labels[first:]

    judge = Judge(with_torch(function), model.state(model.tensors))
    return Subject(name, folder, path, script, model, judge)


def methods(subject: Subject, options: argparse.Namespace) -> Iterator[Method]:
    """All curves that were asked for."""
    large = subject.model.weights > LARGE
    stride, factors = (2, FACTORS[1:11]) if subject.model.weights > MIDDLE else (1, FACTORS)
    factors = FACTORS[3:14] if subject.speaks else factors
    if "nncodec" in options.only:
        yield from peer_methods(options.nncodec, DQ_QPS[::stride], OPT_QPS[::stride])
    if "plain" in options.only:
        for method in plain_methods():
            if method.parameter:
                yield replace(method, values=BITS) if method.parameter == "bits" else method
            elif subject.speaks:
                yield method
    if "weightvid" in options.only:
        for fidelity in options.fidelity:
            name = "weightvid" if fidelity == "outputs" else f"weightvid {fidelity}"
            chosen = PackOptions(fidelity=fidelity, jobs=options.jobs)
            yield archive_method(name, chosen, factors)
    if "calibrated" in options.only:
        config = CalibrationConfig(trust_inputs=options.trust_inputs)
        known = Calibration(calibrate(*subject.examples(), config))
        chosen = PackOptions(calibration=known, jobs=options.jobs)
        trusted = ", inputs trusted" if options.trust_inputs else ""
        yield archive_method(f"weightvid calibrated{trusted}", chosen, factors)
    if "refined" in options.only and not large:
        known = Calibration.from_examples(*subject.examples(moved=True))
        chosen = PackOptions(calibration=known, jobs=options.jobs)
        yield archive_method("weightvid layer by layer", chosen, factors[-8:])
    own = subject.own() if {"own", "own-refined"} & set(options.only) else None
    if own is not None and "own" in options.only:
        chosen = PackOptions(calibration=Calibration(own.stats), jobs=options.jobs)
        yield archive_method("weightvid, own inputs", chosen, factors)
    if own is not None and "own-refined" in options.only and not large:
        chosen = PackOptions(calibration=own, jobs=options.jobs)
        yield archive_method("weightvid, own inputs, layer by layer", chosen, factors[-8:])


def run(subject: Subject, options: argparse.Namespace) -> list[Row]:
    """Measure every point."""
    store, rows = RowStore(options.cache), []
    for method in methods(subject, options):
        for value in method.points():
            row = store.measure(subject.model, method, value, subject.judge)
            rows.append(row)
            print(f"  {row.label:44} {summary(subject, row)}", flush=True)
    return rows


def summary(subject: Subject, row: Row) -> str:
    """A point in a line."""
    if row.status != OK:
        return row.message
    value = subject.measure.value(row)
    return (
        f"{row.bits_per_weight:7.3f} bpw  {subject.measure.name} {value:.5f}  {row.sqnr_db:.2f} dB"
    )


class Crossing(NamedTuple):
    """Rate at which a curve reaches a level, in bits per weight.

    ``interpolated`` lies between the two neighbouring points; None: never reached. ``fitted`` is by
    a straight line through the levels within 1 bit around, ``fitted_se`` its standard error: one
    draw of a quantizer is noisy, and a line through many averages that out. None: too few points.
    """

    interpolated: float | None = None
    fitted: float | None = None
    fitted_se: float | None = None


def fitted_crossing(curve: Sequence[Pair], level: float) -> Crossing:
    """Rate of a curve of (bits per weight, level) at a level, between two points and by a line."""
    interpolated = at = crossing(curve, level)
    error = None
    for _ in range(10):
        near = [p for p in curve if at is not None and abs(p[0] - at) <= FIT_HALF_WIDTH]
        if at is None or len(near) < FIT_POINTS:
            return Crossing(interpolated)
        before, (at, error) = at, line(sorted(near), level)
        if at is not None and abs(at - before) < 1e-9:
            break
    return Crossing(interpolated, at, error)


def line(points: Sequence[Pair], level: float) -> tuple[float | None, float | None]:
    """Where a straight line through the points has a level, and its standard error."""
    x, y = np.array(points).T
    slope, offset = np.polyfit(x, y, 1)
    if slope >= 0:
        return None, None
    at = float((level - offset) / slope)
    spread = float(np.square(y - slope * x - offset).sum() / max(1, len(x) - 2))
    lever = 1 / len(x) + (at - x.mean()) ** 2 / np.square(x - x.mean()).sum()
    return at, float(math.sqrt(spread * lever) / -slope)


def crossings(subject: Subject, rows: Sequence[Row]) -> dict[str, list[Crossing]]:
    """Rates of each curve at each goal."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == OK:
            curves.setdefault(row.curve, []).append(row)
    return {
        name: [
            fitted_crossing(subject.measure.levels(points), subject.measure.level(goal))
            for goal in subject.goals
        ]
        for name, points in curves.items()
    }


def table(subject: Subject, found: dict[str, list[Crossing]]) -> str:
    """Rates at the goals as Markdown: by the line, and between the two nearest points."""
    goals = [f"{subject.measure.name} {goal:g}" for goal in subject.goals]
    lines = [f"| bits per weight at | {' | '.join(goals)} |", "|---" * (1 + len(goals)) + "|"]
    for name, rates in found.items():
        cells = [
            "–" if rate.interpolated is None
            else f"{rate.interpolated:.3f}" if rate.fitted is None
            else f"{rate.fitted:.3f} ± {rate.fitted_se or 0:.3f} ({rate.interpolated:.3f})"
            for rate in rates
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(subject: Subject, rows: Sequence[Row], found: Any, options: argparse.Namespace) -> None:
    """Write the results."""
    shown = [Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if "/" not in a)]
    record = {
        "command": "python tools/" + " ".join(shown),
        "model": subject.name,
        "weights": subject.model.weights,
        "original_metric": subject.judge.original.metric,
        "goals": subject.goals,
        "versions": versions(),
        "machine": machine(),
        "rates": {name: [rate._asdict() for rate in rates] for name, rates in found.items()},
        "rows": [row.record() for row in rows],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / f"measure_{subject.name}"
    base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = f"# {subject.name}\n\n`{record['command']}`\n\n{table(subject, found)}\n"
    base.with_suffix(".md").write_text(text, encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("models", nargs="*", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    add("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="curves to measure")
    add("--fidelity", nargs="+", default=["outputs"], help="of the data-free archives")
    add("--trust-inputs", action="store_true", help="of the calibrated archives")
    add("--minilm", type=Path, metavar="SAFETENSORS", help="weights of minilm_l6")
    add("--nncodec", metavar="PYTHON", help="Python that has NNCodec 2.1.3")
    add("--cache", type=Path, help="folder that keeps finished points")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder for results")
    add("--jobs", type=int, default=1, help="workers of the packer")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every model."""
    options = parse(argv)
    folder = os.environ.get("WEIGHTVID_EVAL")
    if not folder:
        raise SystemExit("name the folder of evaluation models by WEIGHTVID_EVAL")
    torch.set_num_threads(1)
    for name in options.models:
        subject = load_subject(name, Path(folder), options.minilm)
        print(f"{name}: {subject.model.weights:,} weights, metric {subject.judge.original.metric}")
        rows = run(subject, options)
        found = crossings(subject, rows)
        print(table(subject, found), flush=True)
        write(subject, rows, found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
