"""Archives by other codecs, and 10-bit against 8-bit lossy ones.

``--part codecs``: bytes, and weights per second of processor time for packing and loading (one
worker, one decoding thread, the ffmpeg program's own time included), by codec, with the default
recipe. Codecs take turns; medians of the rounds. ``--part depth``: bytes and SQNR of lossy archives
over QPs at 8 and 10 bits, and the rate of 10 bits against 8 at equal SQNR.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np

from weightvid.codec.encode import Lossy
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, PackReport, pack_checkpoint
from weightvid.summary import summarize_archive
from weightvid.version import __version__

CODECS = ("x265", "x264", "svtav1", "aom", "vp9", "kvazaar", "ffv1", "jpeg2000", "png")
DEEP = ("x265", "x264", "svtav1")
QPS = {"x265": (2, 8, 14, 20, 26, 32), "x264": (8, 14, 20, 26, 32), "svtav1": (5, 13, 22, 32, 43)}
#: x264 counts QPs of deeper samples from its finest one, so that 12 more mean the same.
DEEP_QPS = {**QPS, "x264": (20, 26, 32, 38, 44)}
Row = dict[str, Any]


def cpu() -> float:
    """Processor seconds of this process and of the programs that it ran."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came of it."""
    began = cpu()
    found = work()
    return cpu() - began, found


def load(path: Path) -> None:
    """Every tensor, as a program loads it."""
    with open_archive(path, threads=1) as archive:
        for _ in archive:
            pass


def by_codec(model: str, codecs: Sequence[str], rounds: int) -> list[Row]:
    """One row for each codec, in turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in codecs}
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mp4"
        for _ in range(rounds):
            for name in codecs:
                options = PackOptions(codec=name, jobs=1, verify=False, force=True)

                def pack(options: PackOptions = options) -> PackReport:
                    return pack_checkpoint(model, path, options)

                packing, made = timed(pack)
                loading, _ = timed(lambda: load(path))
                seconds[name].append((packing, loading))
                about = summarize_archive(path)
                rows[name] = {
                    "model": model, "codec": name, "bytes": made.file_bytes,
                    "bits_per_weight": made.bits_per_weight, "weights": made.weights,
                    "packet_bytes": about.account.get("packets", 0),
                    "profile": about.video.profile, "level": about.video.level,
                }  # fmt: skip
    for name, row in rows.items():
        packing, loading = (median(column) for column in zip(*seconds[name], strict=True))
        row |= {"pack_m_per_cpu_s": row["weights"] / packing / 1e6}
        row |= {"load_m_per_cpu_s": row["weights"] / loading / 1e6}
    return list(rows.values())


def by_depth(model: str, codecs: Sequence[str]) -> list[Row]:
    """Lossy archives of both depths over the QPs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mp4"
        for name in codecs:
            for bits in (8, 10):
                for qp in (QPS if bits == 8 else DEEP_QPS)[name]:
                    options = PackOptions(
                        codec=name, lossy=Lossy("qp", qp), bit_depth=bits, verify=False, force=True
                    )
                    made = pack_checkpoint(model, path, options)
                    rows.append(
                        {"model": model, "codec": name, "bits": bits, "qp": qp,
                         "bytes": made.file_bytes, "bits_per_weight": made.bits_per_weight,
                         "sqnr_db": made.sqnr_db}
                    )  # fmt: skip
    return rows


def show_codecs(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| model | codec | bytes | bpw | video, % | pack M/s | load M/s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {Path(r['model']).parent.name or r['model']} | {r['codec']} | {r['bytes']:,} | "
        f"{r['bits_per_weight']:.3f} | {100 * r['packet_bytes'] / r['bytes']:.0f} | "
        f"{r['pack_m_per_cpu_s']:.2f} | {r['load_m_per_cpu_s']:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def show_depth(rows: list[Row]) -> str:
    """Markdown: a line for each QP of each codec."""
    lines = ["| model | codec | QP | 8 bit: bpw, dB | 10 bit: bpw, dB | 10 bit at the dB of 8 |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    curves: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        curves.setdefault((row["model"], row["codec"]), {}).setdefault(row["bits"], []).append(row)
    for (model, codec), both in curves.items():
        name = Path(model).parent.name or model
        deep = sorted((row["sqnr_db"], row["bits_per_weight"]) for row in both[10])
        for low, high in zip(both[8], both[10], strict=True):
            lines.append(
                f"| {name} | {codec} | {low['qp']} | {low['bits_per_weight']:.3f}, "
                f"{low['sqnr_db']:.2f} | {high['bits_per_weight']:.3f}, {high['sqnr_db']:.2f} | "
                f"{_saving(low, deep)} |"
            )
    return "\n".join(lines)


def _saving(row: Row, curve: list[tuple[float, float]]) -> str:
    """Rate of a curve at a point's SQNR, against the point's; by straight lines."""
    wanted = row["sqnr_db"]
    if not curve[0][0] <= wanted <= curve[-1][0]:
        return ""
    rate = float(np.interp(wanted, [db for db, _ in curve], [bpw for _, bpw in curve]))
    return f"{100 * (rate / row['bits_per_weight'] - 1):+.1f} %"


def main() -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--part", choices=("codecs", "depth"), default="codecs")
    parser.add_argument("--codecs", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for model in options.models:
        if options.part == "codecs":
            rows += by_codec(model, options.codecs or CODECS, options.rounds)
        else:
            rows += by_depth(model, options.codecs or DEEP)
    print(show_codecs(rows) if options.part == "codecs" else show_depth(rows))
    if options.json is not None:
        about = {
            "command": sys.argv, "weightvid": __version__, "pyav": av.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
