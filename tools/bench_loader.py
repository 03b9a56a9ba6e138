"""Time and memory of packing and loading a checkpoint, against the bare HEVC decode.

    python tools/bench_loader.py MODEL [--json OUT] [--threads N] [--rounds N]

Each figure comes from a fresh process or from rounds run in turns, so that a busy machine slows
both sides of a ratio. Memory is the peak resident set above that of the same process after its
imports. Needs a system that reports it (Linux).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import av
import numpy as np

from weightvid.codec.decode import Decoder, DecoderSettings
from weightvid.container import reader
from weightvid.container.reader import Fragment
from weightvid.container.source import Source
from weightvid.loader import open_archive
from weightvid.version import __version__


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured; seconds are medians, memory is in MB (10**6 bytes) above import."""

    weights: int
    largest_tensor_mb: float
    file_mb: float
    bits_per_weight: float
    frames: int
    frame_mb: float
    pack_s: float
    pack_peak_mb: float
    pack_largest_tensors: float
    bare_decode_s: float
    iterate_hash_s: float
    iterate_to_decode: float
    iterate_mweights_per_s: float
    iterate_peak_mb: float


def peak_mb() -> float:
    """Peak resident set of this process so far."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def run_pack(model: str, archive: str) -> dict[str, float]:
    """Pack in this process; called in a fresh one."""
    from weightvid.checkpoint import open_checkpoint
    from weightvid.pack import PackOptions, pack_checkpoint

    with open_checkpoint(model) as source:
        specs = source.contents.tensors
    before = peak_mb()
    report = pack_checkpoint(model, archive, PackOptions(force=True))
    return {
        "pack_s": report.seconds,
        "pack_peak_mb": peak_mb() - before,
        "weights": report.weights,
        "bits_per_weight": report.bits_per_weight,
        "frames": report.frames,
        "frame_mb": report.width * report.height / 1e6,
        "file_mb": report.file_bytes / 1e6,
        "largest_tensor_mb": max((spec.stored_bytes for spec in specs), default=0) / 1e6,
    }


def run_iterate(archive: str, threads: int) -> dict[str, float]:
    """Iterate in this process; called in a fresh one."""
    before = peak_mb()
    iterate(archive, threads)
    return {"iterate_peak_mb": peak_mb() - before}


def iterate(archive: str, threads: int) -> float:
    """Seconds to decode, dequantize and hash every tensor."""
    began = perf_counter()
    with open_archive(archive, threads=threads) as found:
        for _, array in found:
            hashlib.sha256(np.ascontiguousarray(array).data).digest()
    return perf_counter() - began


def packets(archive: str) -> tuple[DecoderSettings, list[bytes]]:
    """Packets of an archive, in memory."""
    with Path(archive).open("rb") as stream:
        source = Source(stream)
        head = reader.read_head(source)
        events = reader.read_events(source, head)
        found = [event.packet for event in events if isinstance(event, Fragment)]
    return DecoderSettings(head.track.record, head.header.form, head.header.codec), found


def decode(settings: DecoderSettings, found: list[bytes]) -> float:
    """Seconds of the bare decode of packets that are in memory."""
    began = perf_counter()
    for _ in Decoder(settings).decode(enumerate(found)):
        pass
    return perf_counter() - began


def fresh(*arguments: str) -> dict[str, float]:
    """Run one part of this tool in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return cast(dict[str, float], json.loads(done.stdout))


def measure(model: str, threads: int, rounds: int) -> Row:
    """Pack into a temporary folder and measure everything."""
    with tempfile.TemporaryDirectory() as folder:
        archive = str(Path(folder) / "model.mp4")
        values = fresh("--part", "pack", model, archive)
        values |= fresh("--part", "iterate", archive, archive, "--threads", str(threads))
        settings, found = packets(archive)
        settings = replace(settings, threads=threads)
        times: list[tuple[float, float]] = []
        for _ in range(rounds):
            times.append((decode(settings, found), iterate(archive, threads)))
    bare, full = (median(column) for column in zip(*times, strict=True))
    values |= {
        "pack_largest_tensors": values["pack_peak_mb"] / max(values["largest_tensor_mb"], 1e-9),
        "bare_decode_s": bare,
        "iterate_hash_s": full,
        "iterate_to_decode": median(b / a for a, b in times),
        "iterate_mweights_per_s": values["weights"] / full / 1e6,
    }
    return Row(**cast(dict[str, Any], values))


def main() -> None:
    """Print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("archive", nargs="?")
    parser.add_argument("--part", choices=("pack", "iterate"))
    parser.add_argument("--threads", type=int, default=0, help="decoder threads; 0: one per core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.part == "pack":
        print(json.dumps(run_pack(chosen.model, chosen.archive)))
        return
    if chosen.part == "iterate":
        print(json.dumps(run_iterate(chosen.archive, chosen.threads)))
        return
    row = asdict(measure(chosen.model, chosen.threads, chosen.rounds))
    for name, value in row.items():
        print(f"{name:24} {value:12.3f}" if isinstance(value, float) else f"{name:24} {value:12}")
    if chosen.json is not None:
        settings = {
            "model": Path(chosen.model).name,
            "threads": chosen.threads,
            "rounds": chosen.rounds,
        }
        machine = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        }
        versions = {
            "weightvid": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "av": av.__version__,
            "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        }
        record = {"settings": settings, "machine": machine, "versions": versions, "result": row}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
