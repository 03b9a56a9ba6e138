"""Bits that dependent quantization saves at equal SQNR, and how fast it is.

For every source and a range of rates: the plain uniform quantizer (best of several prices of a bit,
with and without centroids: an entropy-coded scalar quantizer, ECSQ) against the trellis, both by
the entropy of the levels' magnitudes plus a bit for each sign, which is what HEVC can make use of,
and for the larger sources by lossless HEVC itself. Run from the repository root::

    python tools/bench_trellis.py -o tools/results/trellis --model resnet20.safetensors ...

Writes <output>.md and <output>.json. A model gives its three largest matrices of different shapes,
each cut to about 200,000 weights (whole rows, evenly spaced).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from weightvid.codec.encode import EncoderSettings, open_encoder
from weightvid.quantize import rdoq, uniform
from weightvid.quantize.params import TRELLIS_STATES, UniformParams
from weightvid.quantize.rate import IntArray, RateModel, sign_coded_bits
from weightvid.quantize.trellis import dequantize_index
from weightvid.quantize.trellis_search import (
    LAM,
    TrellisConfig,
    TrellisJob,
    quantize,
    quantize_many,
)
from weightvid.version import __version__

RATES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
PLAIN_LAMS = (0.0, 0.05, 0.1, 0.15)
TRELLIS_LAMS = (0.0, 0.05, 0.09, LAM, 0.13, 0.16)
SPEED_SHAPES = ((16, 144), (64, 576), (384, 384), (384, 1536), (1536, 384), (8192, 384))
SAMPLE = 200_000

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Point:
    """One operating point: plain step in rms of the source, bits per weight, SQNR."""

    step: float
    bits: float
    sqnr_db: float


Curve = list[Point]


def sqnr_db(weights: Matrix, values: Matrix) -> float:
    """10 log10(sum x^2 / sum (x - x')^2)."""
    error = weights.astype(np.float64) - values
    return 10.0 * math.log10(float((weights.astype(np.float64) ** 2).sum() / (error**2).sum()))


def hevc_bits(levels: IntArray) -> float:
    """Bits per level of lossless HEVC, one frame 512 wide; whole rows of 64 samples only."""
    height = levels.size // 512 // 64 * 64
    samples = np.clip(levels.ravel()[: 512 * height] + 128, 1, 255).astype(np.uint8)
    packet = open_encoder(EncoderSettings(512, height)).encode(samples.reshape(height, 512))
    return 8.0 * len(packet) / samples.size


def curve(
    weights: Matrix,
    code: Callable[[float], tuple[IntArray, Matrix]],
    measure: Callable[[IntArray], float] = sign_coded_bits,
) -> Curve:
    """Points over a geometric range of plain steps, coarse to fine."""
    rms = float(np.sqrt((weights.astype(np.float64) ** 2).mean()))
    points = []
    for step in np.geomspace(2.2, 0.11, 22):
        levels, values = code(float(np.float32(step * rms)))
        points.append(Point(float(step), measure(levels), sqnr_db(weights, values)))
        if points[-1].bits > RATES[-1] + 0.3:
            break
    return points


def plain_coder(
    weights: Matrix, lam: float, centroids: bool
) -> Callable[[float], tuple[IntArray, Matrix]]:
    """Uniform quantizer with rate-aware rounding; centroids optional."""

    def code(step: float) -> tuple[IntArray, Matrix]:
        levels = rdoq.quantize(weights, step, lam)
        shifts = rdoq.centroid_shifts(weights, levels, step) if centroids else None
        return levels, uniform.dequantize(levels, UniformParams(step, shifts))

    return code


def trellis_coder(
    weights: Matrix, config: TrellisConfig, zero: bool | None = None, centroids: bool = False
) -> Callable[[float], tuple[IntArray, Matrix]]:
    """Trellis at a quarter of the plain step; ``centroids`` moves each |n| to its mean."""

    def code(step: float) -> tuple[IntArray, Matrix]:
        (coded,) = quantize_many([TrellisJob(weights, step / 4, zero)], config)
        levels, index = coded.levels, dequantize_index(coded.levels, config.states, 1, coded.zero)
        values = index.astype(np.float32) * np.float32(step / 4)
        if centroids:
            kind = np.minimum(np.abs(index) // 2, 4).ravel()
            gap = (weights - values) * np.sign(index)
            count = np.maximum(np.bincount(kind, minlength=5), 1)
            mean = np.bincount(kind, gap.ravel().astype(np.float64), minlength=5) / count
            values = values + (np.sign(index) * mean[kind].reshape(index.shape)).astype(np.float32)
        return levels, values

    return code


def rate_at(points: Curve, quality: float) -> float:
    """Bits per weight at an SQNR, by linear interpolation."""
    return float(np.interp(quality, [p.sqnr_db for p in points], [p.bits for p in points]))


def quality_at(points: Curve, bits: float) -> float:
    """SQNR at a rate, by linear interpolation."""
    return float(np.interp(bits, [p.bits for p in points], [p.sqnr_db for p in points]))


def step_at(points: Curve, quality: float) -> float:
    """Plain step (rms) at an SQNR, interpolated in the logarithm."""
    logs = [math.log(p.step) for p in points]
    return math.exp(float(np.interp(quality, [p.sqnr_db for p in points], logs)))


def study(weights: Matrix) -> dict[str, Any]:
    """Savings in percent of the ECSQ's rate at equal SQNR, by variant and rate."""
    plain = {
        (lam, centroids): curve(weights, plain_coder(weights, lam, centroids))
        for lam in PLAIN_LAMS
        for centroids in (False, True)
    }
    reference = plain[(0.0, False)]
    rates: dict[str, Any] = {}
    trellis = {s: curve(weights, trellis_coder(weights, TrellisConfig(s))) for s in TRELLIS_STATES}
    priced = {
        lam: curve(weights, trellis_coder(weights, TrellisConfig(lam=lam))) for lam in TRELLIS_LAMS
    }
    numbered = {
        zero: curve(weights, trellis_coder(weights, TrellisConfig(), zero))
        for zero in (False, True)
    }
    moved = curve(weights, trellis_coder(weights, TrellisConfig(), centroids=True))
    for rate in RATES:
        quality = quality_at(reference, rate)
        best = min(rate_at(points, quality) for points in plain.values())

        def saving(points: Curve, base: float, quality: float = quality) -> float:
            return round(100.0 * (1.0 - rate_at(points, quality) / base), 2)

        rates[f"{rate:g}"] = {
            "sqnr_db": round(quality, 3),
            "ecsq_bits": round(best, 4),
            "plain_saving": {
                f"lam {lam:g}{' centroids' if centroids else ''}": saving(points, rate)
                for (lam, centroids), points in plain.items()
            },
            "trellis_saving": {str(s): saving(points, best) for s, points in trellis.items()},
            "trellis_lam_saving": {f"{lam:g}": saving(p, best) for lam, p in priced.items()},
            "trellis_zero_saving": {str(z): saving(p, best) for z, p in numbered.items()},
            "trellis_centroid_saving": saving(moved, best),
            "step_ratio": round(step_at(trellis[8], quality) / step_at(reference, quality), 4),
        }
    return rates


def study_hevc(weights: Matrix) -> dict[str, Any]:
    """Savings in percent of the plain quantizer's lossless HEVC stream at equal SQNR."""
    plain = curve(weights, plain_coder(weights, rdoq.LAM, True), hevc_bits)
    savings: dict[str, Any] = {f"{rate:g}": {} for rate in RATES}
    for states in (8, 64):
        points = curve(weights, trellis_coder(weights, TrellisConfig(states)), hevc_bits)
        for rate in RATES:
            bits = rate_at(points, quality_at(plain, rate))
            savings[f"{rate:g}"][str(states)] = round(100.0 * (1.0 - bits / rate), 2)
    return savings


def label(path: Path) -> str:
    """Short name of a model file."""
    return "minilm_l6" if "minilm" in str(path) else path.parent.name


def sources(models: list[Path]) -> Iterator[tuple[str, Matrix]]:
    """Synthetic and real weights."""
    rng = np.random.default_rng(1)
    yield "Gaussian", rng.normal(size=(500, 400)).astype(np.float32)
    yield "Laplacian", rng.laplace(size=(500, 400)).astype(np.float32)
    for path in models:
        with safe_open(path, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            chosen: dict[tuple[int, ...], str] = {}
            for name in sorted(shapes, key=lambda n: -math.prod(shapes[n])):
                if len(shapes[name]) >= 2:
                    chosen.setdefault(shapes[name], name)
            for name in list(chosen.values())[:3]:
                tensor = file.get_tensor(name).astype(np.float32)
                matrix = tensor.reshape(tensor.shape[0], -1)
                stride = max(1, matrix.size // SAMPLE)
                yield f"{label(path)}: {name}", np.ascontiguousarray(matrix[::stride])


def speeds() -> list[dict[str, Any]]:
    """Million weights per second, best of three, this thread alone."""
    rng = np.random.default_rng(2)
    rows = []
    for shape in SPEED_SHAPES:
        weights = rng.normal(size=shape).astype(np.float32)
        model = RateModel.laplacian(1.6)
        row: dict[str, Any] = {"shape": list(shape)}
        for states in TRELLIS_STATES:
            config = TrellisConfig(states)
            levels = quantize(weights, 0.125, config, model).astype(np.int8)
            row[f"encode_{states}"] = speed(partial(quantize, weights, 0.125, config), weights)
            row[f"decode_{states}"] = speed(partial(dequantize_index, levels, states), weights)
        row["choose_8"] = speed(partial(quantize_many, [TrellisJob(weights, 0.125)]), weights)
        row["decode_columns_8"] = speed(partial(dequantize_index, levels, 8, 0), weights)
        row["plain"] = speed(partial(rdoq.quantize, weights, 0.5), weights)
        rows.append(row)
    small = [
        TrellisJob(rng.normal(size=(rows_, columns)).astype(np.float32), 0.125)
        for rows_, columns in [(16, 144)] * 6 + [(32, 288)] * 6 + [(64, 576)] * 6
    ]
    every = np.concatenate([job.weights.ravel() for job in small])
    row = {
        "shape": "ResNet-20, all at once",
        "choose_8": speed(partial(quantize_many, small), every),
    }
    known = [TrellisJob(job.weights, job.step, False, model) for job in small]
    row["encode_8"] = speed(partial(quantize_many, known), every)
    rows.append(row)
    return rows


def speed(work: Callable[[], object], weights: Matrix) -> float:
    """Million weights per second, best of three."""
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return round(weights.size / best / 1e6, 2)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def report(results: dict[str, Any]) -> str:
    """Markdown from the JSON."""
    studies, rates = results["sources"], [f"{rate:g}" for rate in RATES]
    text = ["# Trellis-coded quantization\n", f"Command: `{results['command']}`\n"]

    def grid(
        title: str, path: tuple[str, ...], form: str = "{:.2f}", studies: dict[str, Any] = studies
    ) -> None:
        def pick(at_rate: Any) -> str:
            for key in path:
                at_rate = at_rate[key]
            return form.format(at_rate)

        rows = [[name, *(pick(found[rate]) for rate in rates)] for name, found in studies.items()]
        text.append(f"## {title}\n\n" + table(["bits per weight", *rates], rows))

    for states in TRELLIS_STATES:
        grid(
            f"{states} states: percent of the ECSQ's bits saved at equal SQNR",
            ("trellis_saving", str(states)),
        )
    for states in (8, 64):
        title = f"{states} states: percent of the plain quantizer's HEVC stream saved at equal SQNR"
        grid(title, (str(states),), studies=results["hevc"])
    grid("8 states, zero = false: percent saved", ("trellis_zero_saving", "False"))
    grid("8 states, zero = true: percent saved", ("trellis_zero_saving", "True"))
    for lam in TRELLIS_LAMS:
        grid(f"8 states, lam {lam:g}: percent saved", ("trellis_lam_saving", f"{lam:g}"))
    grid("8 states, centroids: percent saved", ("trellis_centroid_saving",))
    grid("8 states: 4 * step over the plain step at equal SQNR", ("step_ratio",), "{:.3f}")
    for lam in PLAIN_LAMS:
        for tail in ("", " centroids"):
            key = f"lam {lam:g}{tail}"
            if key != "lam 0":
                grid(
                    f"Plain quantizer, {key}: percent saved over rounding to nearest",
                    ("plain_saving", key),
                )
    names = [f"encode_{s}" for s in TRELLIS_STATES] + [
        "choose_8",
        "plain",
        "decode_8",
        "decode_columns_8",
        "decode_64",
    ]
    rows = [[str(row["shape"]), *(str(row.get(n, "")) for n in names)] for row in results["speed"]]
    text.append("## Million weights per second, one thread\n\n" + table(["shape", *names], rows))
    return "\n".join(text)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, action="append", default=[])
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python tools/bench_trellis.py -o tools/results/trellis "
        + " ".join(f"--model {label(p)}/{p.name}" for p in options.model),
        "versions": {
            "weightvid": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
        "sources": {},
        "hevc": {},
    }
    for name, weights in sources(options.model):
        print(name, weights.shape, flush=True)
        results["sources"][name] = study(weights)
        if weights.size > SAMPLE * 0.9:
            results["hevc"][name] = study_hevc(weights)
    results["speed"] = speeds()
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
