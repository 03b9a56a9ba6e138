#!/usr/bin/env python3
"""Speed and memory: each command measures in processes of its own, and writes tools/results.

    python tools/bench.py load MODEL.safetensors ...     loading against the bare decode
    python tools/bench.py encode MODEL.safetensors ...   packing against NNCodec's encoder
    python tools/bench.py workers --gigabytes 0.5        two local processes against one
    python tools/bench.py large --gigabytes 8            packing and unpacking above memory

Ratios are taken within a round and the medians of the rounds are printed, so that a busy machine
slows both sides alike. ``workers`` and ``large`` make a synthetic model (a sharded Hugging Face
folder of float32: an embedding of a quarter of the weights, and layers of a language model, rows
and columns of different spread) in ``--folder``, and remove it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import av
import numpy as np
import numpy.typing as npt

from weightvid.checkpoint import (
    CheckpointReader,
    Contents,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.compare.model import load_model
from weightvid.compare.rivals import peer_methods
from weightvid.loader import Decoder, TensorSpec, open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.unpack import unpack_archive
from weightvid.version import __version__

GIGABYTE: Final = 10**9
#: bytes of all tensors from which the layers have this width.
WIDTHS: Final = ((4 * GIGABYTE, 4096), (GIGABYTE // 2, 2048), (0, 512))
BLOCK_WEIGHTS: Final = 1 << 20
Row = dict[str, Any]


# --- the synthetic model --------------------------------------------------------------------------


def plan(total_bytes: int) -> list[TensorSpec]:
    """Tensors of a language model of about so many bytes."""
    width = next(width for least, width in WIDTHS if total_bytes >= least)
    hidden = 11 * width // 4
    inner = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    layer = sum(rows * columns for rows, columns in inner.values()) + 2 * width
    rows = total_bytes // 16 // width
    specs = [TensorSpec("model.embed_tokens.weight", "F32", (rows, width))]
    for number in range(max(1, round((total_bytes // 4 - rows * width) / layer))):
        head = f"model.layers.{number}"
        specs.append(TensorSpec(f"{head}.input_layernorm.weight", "F32", (width,)))
        specs += [TensorSpec(f"{head}.{n}.weight", "F32", shape) for n, shape in inner.items()]
    return [*specs, TensorSpec("model.norm.weight", "F32", (width,))]


def values(spec: TensorSpec) -> Iterator[npt.NDArray[np.float32]]:
    """Blocks of rows of a tensor; the same each time."""
    random = np.random.default_rng(list(spec.name.encode()))
    rows, columns = spec.shape if len(spec.shape) == 2 else (1, spec.size)
    across = np.exp(0.2 * random.standard_normal(columns)).astype(np.float32) / columns**0.5
    step = max(1, BLOCK_WEIGHTS // columns)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        block = random.standard_normal((count, columns), np.float32) * across
        block *= np.exp(0.2 * random.standard_normal((count, 1))).astype(np.float32)
        yield block.reshape(spec.shape) if len(spec.shape) == 1 else block


def make_model(folder: Path, gigabytes: float) -> Path:
    """A synthetic sharded checkpoint."""
    path = folder / f"weightvid-bench-{round(1000 * gigabytes)}mb"
    path.mkdir(parents=True)
    shards: list[list[TensorSpec]] = [[]]
    for spec in plan(round(gigabytes * GIGABYTE)):
        if shards[-1] and sum(s.stored_bytes for s in shards[-1]) + spec.stored_bytes > GIGABYTE:
            shards.append([])
        shards[-1].append(spec)
    weight_map = {}
    for number, group in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with create_checkpoint(path / name, Contents(tuple(group))) as writer:
            for spec in group:
                writer.write_parts(spec.name, values(spec))
                weight_map[spec.name] = name
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


# --- one measurement, in a process of its own -----------------------------------------------------


def child(task: str, *arguments: str) -> Row:
    """Result of a task of `run_child` in a fresh process: seconds, CPU seconds, peak bytes."""
    command = [sys.executable, str(Path(__file__).resolve()), "child", task, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: Row = json.loads(done.stdout)
    return found


def run_child(task: str, arguments: list[str]) -> Row:
    """Do one task and say what it took."""
    began, cpu = perf_counter(), process_time()
    if task == "pack":
        source, target, workers, jobs, *unchecked = arguments
        options = PackOptions(workers=workers, jobs=int(jobs), force=True, verify=not unchecked)
        made = pack_checkpoint(source, target, options)
        found: Row = {"weights": made.weights, "file_bytes": made.file_bytes}
    elif task == "unpack":
        found = {"weights": unpack_archive(arguments[0], arguments[1]).weights}
    else:
        return load_rounds(Path(arguments[0]).read_bytes(), int(arguments[1]))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return found | {
        "seconds": perf_counter() - began, "cpu_seconds": process_time() - cpu,
        "peak_bytes": 1024 * own, "peak_child_bytes": 1024 * children,
    }  # fmt: skip


def load_rounds(data: bytes, rounds: int) -> Row:
    """CPU seconds of the bare decode of all packets, and of loading, by turns."""
    times: dict[str, list[float]] = {"decode": [], "load": [], "load_all_hashes": []}
    for _ in range(rounds):
        with open_archive(data) as archive:
            count = len(archive.index.frames) if archive.index else 0
            packets = [archive.packet(number)[1] for number in range(count)]
            began, decoder = process_time(), Decoder(archive.track)
            for number, packet in enumerate(packets):
                decoder.decode(number, packet)
            decoder.decode(-1, None)
            times["decode"].append(process_time() - began)
        for name, check in (("load", False), ("load_all_hashes", True)):
            began = process_time()
            with open_archive(data, check_tensors=check) as archive:
                weights = sum(tensor.size for _, tensor in archive.items())
            times[name].append(process_time() - began)
    ratios = {
        f"{name}_ratio": statistics.median(
            a / b for a, b in zip(times[name], times["decode"], strict=True)
        )
        for name in ("load", "load_all_hashes")
    }
    return {"weights": weights, **{k: statistics.median(v) for k, v in times.items()}, **ratios}


# --- commands -------------------------------------------------------------------------------------


def bench_load(models: list[str], rounds: int, folder: Path) -> list[Row]:
    """Loading one thread, frames hashed, against the decode of the same packets."""
    rows = []
    for model in models:
        archive = folder / "weightvid-bench-load.mp4"
        packed = child("pack", model, str(archive), "threads", "1")
        rows.append({"model": Path(model).parent.name, **child("load", str(archive), str(rounds))})
        rows[-1]["pack_cpu_seconds"] = packed["cpu_seconds"]
        archive.unlink()
    return rows


def peer_seconds(reader: CheckpointReader) -> tuple[float, float]:
    """CPU seconds of a process that codes and restores a model by NNCodec; share of coding."""
    model = load_model(reader)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    coded = next(peer_methods()).code(model, -26.0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, coded.encode_s / (coded.encode_s + coded.decode_s)


def bench_encode(models: list[str], rounds: int, folder: Path) -> list[Row]:
    """Packing by one thread, with the check of the file and without, and NNCodec, by turns.

    CPU seconds. NNCodec (the Python that has it is in WEIGHTVID_NNCODEC) codes and restores with
    dependent quantization at a step of 2 ** -6.5; what its process takes for a model of 256 weights
    is subtracted, and so is the share of its decoder.
    """
    rows = []
    for path in models:
        archive = folder / "weightvid-bench-encode.mp4"
        times: dict[str, list[float]] = {"pack": [], "pack_unchecked": [], "nncodec": []}
        weights = 0
        for _ in range(rounds):
            for name, more in (("pack", ()), ("pack_unchecked", ("unchecked",))):
                made = child("pack", path, str(archive), "threads", "1", *more)
                times[name].append(made["cpu_seconds"])
                weights = made["weights"]
            with from_mapping({"w": np.ones((16, 16), np.float32)}) as reader:
                start, _ = peer_seconds(reader)
            with open_checkpoint(path) as reader:
                spent, share = peer_seconds(reader)
            times["nncodec"].append((spent - start) * share)
        archive.unlink()
        medians = {f"{name}_seconds": statistics.median(each) for name, each in times.items()}
        ratios = {
            f"{name}_ratio": statistics.median(
                a / b for a, b in zip(times["nncodec"], times[name], strict=True)
            )
            for name in ("pack", "pack_unchecked")
        }
        rows.append({"model": Path(path).parent.name, "weights": weights, **medians, **ratios})
    return rows


def bench_workers(gigabytes: float, rounds: int, folder: Path) -> list[Row]:
    """Two worker processes against one, on the same model, by turns."""
    source, rows = make_model(folder, gigabytes), []
    target = folder / "weightvid-bench.mp4"
    try:
        for _ in range(rounds):
            one = child("pack", str(source), str(target), "processes", "1")
            two = child("pack", str(source), str(target), "processes", "2")
            rows.append(
                {
                    "one_seconds": one["seconds"],
                    "two_seconds": two["seconds"],
                    "ratio": one["seconds"] / two["seconds"],
                    "weights": one["weights"],
                }
            )
    finally:
        shutil.rmtree(source)
        target.unlink(missing_ok=True)
    median = statistics.median(row["ratio"] for row in rows)
    return [*rows, {"median_ratio": median}]


def bench_large(gigabytes: float, jobs: int, folder: Path) -> list[Row]:
    """Time and peak memory of packing (checks included) and unpacking."""
    source = make_model(folder, gigabytes)
    target, restored = folder / "weightvid-bench.mp4", folder / "weightvid-bench-restored"
    try:
        packed = child("pack", str(source), str(target), "threads", str(jobs))
        unpacked = child("unpack", str(target), str(restored))
    finally:
        shutil.rmtree(source)
        target.unlink(missing_ok=True)
        shutil.rmtree(restored, ignore_errors=True)
    return [{"gigabytes": gigabytes, "what": "pack", **packed}, {"what": "unpack", **unpacked}]


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(run_child(sys.argv[2], sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["load", "encode", "workers", "large"])
    parser.add_argument("models", nargs="*", help="safetensors files to load")
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="for temporary files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.command == "load":
        rows = bench_load(options.models, options.rounds, options.folder)
    elif options.command == "encode":
        rows = bench_encode(options.models, options.rounds, options.folder)
    elif options.command == "workers":
        rows = bench_workers(options.gigabytes, options.rounds, options.folder)
    else:
        rows = bench_large(options.gigabytes, options.jobs, options.folder)
    for row in rows:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(shown))
    versions = {"weightvid": __version__, "av": av.__version__, "numpy": np.__version__}
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "versions": versions}
    options.out.mkdir(exist_ok=True)
    made = {"command": " ".join(["python", "tools/bench.py", *sys.argv[1:]]), **about, "rows": rows}
    (options.out / f"bench_{options.command}.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
