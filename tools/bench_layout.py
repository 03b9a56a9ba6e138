"""Measure how close layouts of quantized levels on HEVC frames come to the zero-order entropy.

Each idea turns the levels of a checkpoint into frames (and, for some, a stream of digits beside
them), codes them with lossless x265 and counts everything a decoder needs. Overheads are in percent
over H0, the sum of the zero-order entropies of the tensors' levels. An idea's prediction is the
change against the plain ribbon that theory, bounds or earlier figures let expect.

    python tools/bench_layout.py --name resnet --out tools/results model.safetensors

`layout.json` and `layout.md` in the output folder keep the models of earlier runs, and
layout.md the text above its tables.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from layout_coding import (
    ALL_RADII,
    FEW_RADII,
    UNITS,
    Cost,
    Ints,
    Layout,
    adaptive_bits,
    class_order,
    code,
    encode_bits,
    frames_of,
    h0_bits,
    huffman_bytes,
    level_bytes,
    matrix,
    ribbon,
)
from safetensors.numpy import load_file

#: heading of the tables in layout.md; what stands above it is kept.
MARKER = "## Tables by bench_layout.py"

Run = Callable[[Sequence[Ints]], Cost]


@dataclass(frozen=True, slots=True)
class Idea:
    """One row of the table. `predicted` is the change in percentage points of H0."""

    name: str
    predicted: float
    run: Run


# -- ideas ------------------------------------------------------------------------------------


def laid_out(**changes: object) -> Run:
    layout = replace(Layout(), **changes)  # type: ignore[arg-type]
    return lambda tensors: code(tensors, layout)


def best_radii(core: float) -> Run:
    """Try three sets of core radii (fewer sets, fewer Huffman tables) and keep the smallest."""
    base = Layout(order="class", core=core, wide_tails=True)
    sets = (ALL_RADII, FEW_RADII, (0, round(2 * core)))
    return lambda tensors: min(
        (code(tensors, replace(base, radii=s)) for s in sets), key=lambda c: c.total
    )


def class_core(core: float, **changes: object) -> Run:
    return laid_out(order="class", core=core, wide_tails=True, **changes)


def reshaped(how: Callable[[Ints], Ints]) -> Run:
    return lambda tensors: code([how(t) for t in tensors], Layout())


def spatial_first(levels: Ints) -> Ints:
    if levels.ndim != 4:
        return levels
    return np.ascontiguousarray(levels.transpose(2, 3, 0, 1)).reshape(-1, levels.shape[1])


def spatial_outer(levels: Ints) -> Ints:
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1)) if levels.ndim == 4 else levels


def by_spread(tensors: Sequence[Ints]) -> Cost:
    return code(sorted(tensors, key=lambda t: float(t.std())), Layout())


def lowest_bit_raw(tensors: Sequence[Ints]) -> Cost:
    cost = code([t >> 1 for t in tensors], Layout())
    cost.digits = sum(t.size for t in tensors)
    return cost


def flat_references(tensors: Sequence[Ints]) -> Cost:
    """Data in every other 32x32 block only, so that each block's references are mostly 128."""
    samples = np.concatenate([ribbon(matrix(t), 64) for t in tensors])
    blocks = np.concatenate([samples, np.zeros(-len(samples) % 2048, np.int32)])
    pairs = blocks.reshape(-1, 2, 32, 32)
    unit = np.zeros((len(pairs), 64, 64), np.int32)
    unit[:, :32, :32], unit[:, 32:, 32:] = pairs[:, 0], pairs[:, 1]
    # a CTU is one 64-column stretch of the ribbon, which frames_of lays column-major
    return Cost(
        video=encode_bits(frames_of(unit.transpose(0, 2, 1).reshape(-1), Layout()), Layout())
    )


def plain(coder: Callable[[bytes], int]) -> Run:
    return lambda tensors: Cost(digits=sum(8 * coder(level_bytes(t)) for t in tensors))


def xz_bytes(data: bytes) -> int:
    """LZMA without literal contexts, which suits independent bytes better than its defaults."""
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0}]
    return len(lzma.compress(data, lzma.FORMAT_ALONE, filters=filters))


def class_huffman(tensors: Sequence[Ints]) -> Cost:
    cost = Cost()
    for tensor in tensors:
        seq = class_order(tensor, Layout())
        cost.digits += 8 * huffman_bytes(level_bytes(seq.levels))
        cost.side += seq.side_bits
    return cost


def bound(*, classes: bool) -> Run:
    """Ideal adaptive arithmetic code: per tensor, or per class with the permutation counted."""

    def run(tensors: Sequence[Ints]) -> Cost:
        cost = Cost()
        for tensor in tensors:
            best, side = adaptive_bits(tensor.reshape(-1)), 1.0
            if classes:
                seq = class_order(tensor, Layout(bucket=0.5))
                split = sum(
                    adaptive_bits(seq.levels[seq.classes == k]) for k in np.unique(seq.classes)
                )
                if split + seq.side_bits < best:
                    best, side = split, seq.side_bits
            cost.side += best + side
        return cost

    return run


CU8 = "ctu=64:min-cu-size=8:max-tu-size=32"

IDEAS = (
    Idea("plain ribbon (band 64, 512x512, ultrafast)", 0.0, laid_out()),
    Idea("band 32", 0.0, laid_out(band=32)),
    Idea("band 16", 0.1, laid_out(band=16)),
    Idea("frame 256x256", 0.3, laid_out(width=256, height=256)),
    Idea("frame 1024x512", -0.1, laid_out(width=1024)),
    Idea("frame 2048x1024", -0.2, laid_out(width=2048, height=1024)),
    Idea("tensors aligned to 1 column", -0.1, laid_out(align=1)),
    Idea("tensors aligned to 32 columns", 0.2, laid_out(align=32)),
    Idea("CTU 32", 0.1, laid_out(units="ctu=32:min-cu-size=16:max-tu-size=32")),
    Idea("CTU 16", 1.0, laid_out(units="ctu=16:min-cu-size=16:max-tu-size=16")),
    Idea("TU at most 16", 0.5, laid_out(units="ctu=64:min-cu-size=16:max-tu-size=16")),
    Idea("smallest CU 32", -0.2, laid_out(units="ctu=64:min-cu-size=32")),
    Idea("smallest CU 8", 0.2, laid_out(units=CU8)),
    Idea("preset slower, rd 6", -0.1, laid_out(preset="slower", units=UNITS + ":rd=6")),
    Idea("transform skip, rd penalty 2", 0.0, laid_out(units=UNITS + ":tskip=1:rdpenalty=2")),
    Idea("transposed", 0.0, reshaped(lambda t: np.ascontiguousarray(matrix(t).T))),
    Idea("conv as (k k O, I)", 2.5, reshaped(spatial_first)),
    Idea("conv as (O, k k I)", 0.5, reshaped(spatial_outer)),
    Idea("tensors in order of spread", -0.3, by_spread),
    Idea("levels in the chroma planes too", 0.1, laid_out(chroma=True)),
    Idea("flat reference blocks (checkerboard)", -0.3, flat_references),
    Idea("lowest bit raw", 2.0, lowest_bit_raw),
    Idea("columns sorted by what was decoded before", -0.7, laid_out(order="causal")),
    Idea("rows sorted", -0.6, laid_out(order="rows")),
    Idea("rows and columns sorted", -1.0, laid_out(order="sorted")),
    Idea("class order", -2.0, laid_out(order="class")),
    Idea("class order, smallest CU 8", -2.5, laid_out(order="class", units=CU8)),
    Idea("core/tail 0.5 sigma, file order", -2.5, laid_out(core=0.5, wide_tails=True)),
    Idea("core/tail 1.0 sigma, file order", -3.5, laid_out(core=1.0, wide_tails=True)),
    Idea("class order, core 0.5 sigma", -4.0, best_radii(0.5)),
    Idea("class order, core 0.7 sigma", -4.5, best_radii(0.7)),
    Idea("class order, core 1.0 sigma", -5.5, best_radii(1.0)),
    Idea("the same, smallest CU 8", -5.6, class_core(1.0, units=CU8)),
    Idea("the same, one core radius per tensor", -4.5, class_core(1.0, per_class=False)),
    Idea("the same, digits packed, not deflated", -4.5, class_core(1.0, deflate_digits=False)),
    Idea("the same, buckets twice as wide", -5.0, class_core(1.0, bucket=0.5)),
    Idea("the same, frame 1024x512", -5.6, class_core(1.0, width=1024)),
    Idea("class order, core 1.5 sigma", -6.0, best_radii(1.5)),
    Idea("class order, core 2.5 sigma", -6.0, best_radii(2.5)),
)

# For reference, not layouts: what plain coders and ideal ones need.
REFERENCES = (
    Idea("no video: zlib, Huffman only", -3.0, plain(huffman_bytes)),
    Idea("no video: zlib -9", 0.0, plain(lambda d: len(zlib.compress(d, 9)))),
    Idea("no video: xz -9e, lc=0 pb=0", 1.0, plain(xz_bytes)),
    Idea("no video: class order, Huffman only", -4.0, class_huffman),
    Idea("bound: adaptive arithmetic coder", -4.8, bound(classes=False)),
    Idea("bound: the same per class, order counted", -7.0, bound(classes=True)),
)


# -- models -----------------------------------------------------------------------------------


def load_matrices(path: Path, match: str, max_rows: int) -> list[npt.NDArray[np.float32]]:
    """Float tensors of two dimensions or more, at most `max_rows` evenly spaced rows of each."""
    tensors = load_file(path)
    return [
        value[:: -(-len(value) // max_rows)].astype(np.float32)
        for name, value in tensors.items()
        if value.dtype.kind == "f"
        and value.ndim >= 2
        and value.size >= 64
        and re.search(match, name)
    ]


def quantize(weights: Sequence[npt.NDArray[np.float32]], rule: str, bpw: float) -> list[Ints]:
    """Levels whose mean entropy is `bpw`; step = k sigma sqrt(n) per tensor, or one for all."""
    scales = [float(w.std()) * w.size**0.5 if rule == "sigma" else 1.0 for w in weights]
    count = sum(w.size for w in weights)
    low, high = 1e-8, 1e4
    while high / low > 1.002:
        k = (low * high) ** 0.5
        levels = [
            np.rint(w / (k * s)).astype(np.int32) for w, s in zip(weights, scales, strict=True)
        ]
        low, high = (k, high) if sum(map(h0_bits, levels)) > bpw * count else (low, k)
    return levels


def small_tensor_shares(tensors: Sequence[Ints], run: Run) -> list[dict[str, float]]:
    """What groups of tensors of one size add to the archive, against coding each of them plainly.

    The addition is the whole minus the whole without the group, so it holds no fixed cost.
    """
    whole, out = run(tensors).total, []
    for low, high in ((64, 512), (512, 2048), (2048, 8192), (8192, 32768)):
        group = [t for t in tensors if low <= t.size < high]
        rest = [t for t in tensors if not low <= t.size < high]
        if not group or not rest:
            continue
        bits = {
            "h0": sum(map(h0_bits, group)),
            "added to the archive": whole - run(rest).total,
            "zlib Huffman": sum(8.0 * huffman_bytes(level_bytes(t)) for t in group),
            "zlib -9": sum(8.0 * len(zlib.compress(level_bytes(t), 9)) for t in group),
            "xz": sum(8.0 * xz_bytes(level_bytes(t)) for t in group),
            "packed": sum(float(t.size * int(np.ptp(t)).bit_length()) for t in group),
        }
        count = sum(t.size for t in group)
        row = {"from": low, "below": high, "tensors": len(group)}
        out.append(row | {f"{k} bpw": round(v / count, 3) for k, v in bits.items()})
    return out


# -- report -----------------------------------------------------------------------------------


def measure(
    weights: Sequence[npt.NDArray[np.float32]], points: Sequence[tuple[str, float]], only: str
) -> dict[str, object]:
    """Every idea at every point: percent over H0, and the shares of video and side bits."""
    columns = [f"{rule} {bpw}" for rule, bpw in points]
    levels = [quantize(weights, rule, bpw) for rule, bpw in points]
    rows = []
    for idea in (*IDEAS, *REFERENCES):
        if not re.search(only, idea.name):
            continue
        costs = [idea.run(tensors) for tensors in levels]
        floors = [sum(map(h0_bits, tensors)) for tensors in levels]
        over = [round(100 * (c.total / h - 1), 2) for c, h in zip(costs, floors, strict=True)]
        row = {
            "idea": idea.name,
            "predicted_change": idea.predicted,
            "over_h0_percent": over,
            "video_percent": [round(100 * c.video / c.total, 1) for c in costs],
            "side_percent": [round(100 * c.side / c.total, 2) for c in costs],
        }
        print(f"{idea.name:45s} {over}", file=sys.stderr, flush=True)
        rows.append(row)
    recommended = next(i.run for i in IDEAS if i.name == "class order, core 1.0 sigma")
    return {
        "weights": sum(w.size for w in weights),
        "points": columns,
        "ideas": rows,
        "small_tensors": {
            column: small_tensor_shares(tensors, recommended)
            for column, tensors in zip(columns, levels, strict=True)
            if column.startswith("sigma")
        },
    }


def markdown(results: dict[str, dict[str, object]]) -> str:
    """The tables of layout.md."""
    lines = [
        MARKER,
        "",
        "Percent over the sum of the tensors' H0, permutations and digits counted, at the bits per",
        "weight in the column; `sigma` is step = k sigma sqrt(n), `global` one step. `predicted`",
        "is the change against the plain ribbon, in points, that was expected (see the notes);",
        "`measured` its mean over the columns. `video` is the share of the bytes that is HEVC.",
        '"The same" refers to class order, core 1.0 sigma.',
    ]
    for name, model in results.items():
        points, ideas = model["points"], model["ideas"]
        assert isinstance(points, list)
        assert isinstance(ideas, list)
        lines += ["", f"### {name} ({model['weights']:,} weights)", ""]
        lines += [
            "| idea | predicted | measured | " + " | ".join(points) + " | video |",
            "|---|---|---|" + "---|" * (len(points) + 1),
        ]
        base = float(np.mean(ideas[0]["over_h0_percent"]))
        for row in ideas:
            over = row["over_h0_percent"]
            cells = " | ".join(f"{v:+.2f}" for v in over)
            lines.append(
                f"| {row['idea']} | {row['predicted_change']:+.1f} | {np.mean(over) - base:+.2f} "
                f"| {cells} | {np.mean(row['video_percent']):.0f} % |"
            )
        small = model["small_tensors"]
        assert isinstance(small, dict)
        flat = [{"point": c} | r for c, group in small.items() for r in group]
        if flat:
            lines += ["", "Tensors by size, bits per weight:", ""]
            lines += ["| " + " | ".join(flat[0]) + " |", "|" + "---|" * len(flat[0])]
            lines += ["| " + " | ".join(str(v) for v in r.values()) + " |" for r in flat]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a safetensors file")
    parser.add_argument("--name", required=True, help="heading of the model in the tables")
    parser.add_argument("--match", default="", help="regular expression on tensor names")
    parser.add_argument(
        "--max-rows", type=int, default=1 << 30, help="rows kept of each tensor, evenly spaced"
    )
    parser.add_argument("--bpw", default="4.3,3.8,3.0,2.2", help="entropies to quantize to")
    parser.add_argument("--only", default="", help="regular expression on the ideas' names")
    parser.add_argument("--out", type=Path, help="folder for layout.json and layout.md")
    args = parser.parse_args()

    rates = [float(v) for v in args.bpw.split(",")]
    points = [(rule, bpw) for rule in ("sigma", "global") for bpw in rates]
    model = measure(load_matrices(args.checkpoint, args.match, args.max_rows), points, args.only)
    if args.out is None:
        print(markdown({args.name: model}))
        return
    store = args.out / "layout.json"
    old = json.loads(store.read_text()) if store.exists() else {"models": {}}
    versions = {"av": av.__version__, "numpy": np.__version__, "python": platform.python_version()}
    models = {**old["models"], args.name: model | {"versions": versions, "match": args.match}}
    store.write_text(json.dumps({"models": models}, indent=1) + "\n")
    report = args.out / "layout.md"
    notes = report.read_text().split(MARKER)[0] if report.exists() else ""
    report.write_text(notes + markdown(models))


if __name__ == "__main__":
    main()
