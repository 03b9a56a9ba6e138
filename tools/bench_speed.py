#!/usr/bin/env python3
"""Speed of packing and loading beside NNCodec and the bare FFmpeg decoder, interleaved.

    python tools/bench_speed.py --eval-dir EVAL --minilm MINILM.safetensors \
        --nncodec .venv-nncodec/bin/python --rounds 5

Every round runs each contender once, in turn, so that a busy machine slows all alike; medians over
the rounds, ratios within a round. Writes speed.json and speed.md in the output folder.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import measure.models
from measure import nncodec, worker
from measure.models import Source
from measure.report import Cache, Record, machine, number, table, versions, write

from weightvid.version import code_sha256

WORKERS: Final = (1, 2)
#: turns of loader and bare decoder within a round.
TURNS: Final = 3
SCHEMA: Final = 3
#: archives that are loaded, and how much of them is hashed.
ARCHIVES: Final = {
    "usual": "the usual archive",
    "whole": "a whole video",
    "uniform": "a uniform whole video",
}
HASHES: Final = {"usual": "frames hashed", "all": "all hashes"}


def one_round(source: Source, options: argparse.Namespace) -> Record:
    """Each contender once: seconds by name, and the sizes of the two files."""
    found: Record = {}
    with tempfile.TemporaryDirectory() as folder:
        archive = str(Path(folder) / "model.mp4")
        for jobs in WORKERS:
            found[f"pack {jobs}"] = worker.run(
                "pack",
                source=str(source.checkpoint),
                archive=archive,
                options={"recipe": options.recipe, "jobs": jobs, "verify": False},
            )
        found["archive_bytes"] = Path(archive).stat().st_size
        if options.nncodec is not None:
            runs = nncodec.run(options.nncodec, source.checkpoint, [options.qp], False, False)
            peer = next(point for point, _ in runs)
            for task in ("encode", "decode"):
                found[f"nncodec {task}"] = {
                    kind: peer[f"{task}_{kind}"] for kind in ("wall_s", "cpu_s")
                }
            found["nncodec_bytes"] = peer["bytes"]
            found["nncodec_version"] = peer["version"]
        whole, uniform = str(Path(folder) / "whole.mp4"), str(Path(folder) / "uniform.mp4")
        plainer: dict[str, Record] = {whole: {}, uniform: {"states": 0, "shaping": False}}
        for path, settings in plainer.items():
            worker.run(
                "pack",
                source=str(source.checkpoint),
                archive=path,
                options={"recipe": options.recipe, "verify": False, "whole_video": True} | settings,
            )
        for threads in WORKERS:
            for path, kind_of in ((archive, "usual"), (whole, "whole"), (uniform, "uniform")):
                turns = worker.run("decode", archive=path, threads=threads, repeats=TURNS)
                for what, runs_of in turns.items():
                    found[f"{kind_of}-{what} {threads}"] = {
                        kind: median(run[kind] for run in runs_of) for kind in ("wall_s", "cpu_s")
                    }
    return found


def floats_of(checkpoint: Path) -> int:
    """Floating-point elements of a safetensors file, from its header."""
    from safetensors import safe_open

    total = 0
    with safe_open(checkpoint, "np") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            piece = opened.get_slice(name)
            if piece.get_dtype() in ("F64", "F32", "F16", "BF16"):
                count = 1
                for side in piece.get_shape():
                    count *= side
                total += count
    return total


def summarized(source: Source, rounds: list[Record]) -> Record:
    """Medians and ratios of a model's rounds."""
    floats = floats_of(source.checkpoint)
    first = rounds[0]
    names = [name for name, value in first.items() if isinstance(value, dict)]
    medians = {
        name: {kind: median(each[name][kind] for each in rounds) for kind in ("wall_s", "cpu_s")}
        for name in names
    }
    ratios: dict[str, float] = {}

    def compare(label: str, slow: str, fast: str, kind: str) -> None:
        if slow in first and fast in first:
            ratios[label] = median(each[slow][kind] / each[fast][kind] for each in rounds)

    compare("packing, NNCodec's encoder over weightvid, CPU", "nncodec encode", "pack 1", "cpu_s")
    compare("packing, the same, wall, one worker", "nncodec encode", "pack 1", "wall_s")
    compare("packing, the same, wall, two workers", "nncodec encode", "pack 2", "wall_s")
    compare("packing, one worker over two, wall", "pack 1", "pack 2", "wall_s")
    slow, fast = "nncodec decode", "usual-all"
    compare("loading, NNCodec's decoder over weightvid, CPU", slow, f"{fast} 1", "cpu_s")
    compare("loading, the same, wall, one worker", slow, f"{fast} 1", "wall_s")
    compare("loading, the same, wall, two workers", slow, f"{fast} 2", "wall_s")
    for threads in WORKERS:
        for what, hashes in HASHES.items():
            for kind_of, said in ARCHIVES.items():
                label = f"loading {said} over the bare decode of its packets, {hashes}"
                loaded, bare = f"{kind_of}-{what} {threads}", f"{kind_of}-bare {threads}"
                compare(f"{label}, workers: {threads}", loaded, bare, "wall_s")
        label = "loading the usual archive over the bare decode of a whole video, all hashes"
        compare(
            f"{label}, workers: {threads}", f"{fast} {threads}", f"whole-bare {threads}", "wall_s"
        )
    return {
        "model": source.name,
        "floats": floats,
        "archive_bits_per_weight": 8 * first["archive_bytes"] / floats,
        "nncodec_bits_per_weight": (
            8 * first["nncodec_bytes"] / floats if "nncodec_bytes" in first else None
        ),
        "medians": medians,
        "ratios": ratios,
        "rounds": rounds,
    }


LABELS: Final = {"pack": "weightvid: pack, workers: ", "nncodec": "NNCodec: "} | {
    f"{kind_of}-{what}": f"{told} {said}, workers: "
    for kind_of, said in ARCHIVES.items()
    for what, told in (
        ("bare", "FFmpeg alone: decode the packets of"),
        ("usual", "weightvid: load, frames hashed,"),
        ("all", "weightvid: load, frames and tensors hashed,"),
    )
}

NOTES = """\
Medians over the rounds; every round runs each contender once, in a process of its own, and counts
from after its imports; ratios are taken within a round. Packing reads the checkpoint and
writes the archive, without the check that `pack` makes by default. Loading iterates over the
archive: decode, dequantize and hash. The loader always checks the hash of each frame and its
sidecar (*frames hashed*); `check_tensors=True`, and so `load_file`, checks those of the dequantized
tensors besides, four bytes a weight. Most of an archive's bits are digits beside the video, so its
packets alone decode fast; *a whole video* is the same checkpoint packed without that split
(`--whole-video`), what a plain HEVC archive has to decode; *uniform*: with plain rounding besides.
NNCodec's encoder and decoder run on one core, from memory to memory, with dependent
quantization."""


def markdown(record: Record) -> str:
    parts = ["# Speed", f"`{record['command']}`", NOTES]
    for m in record["models"]:
        peer = m["nncodec_bits_per_weight"]
        beside = f", NNCodec (qp {record['settings']['qp']}) {peer:.2f}" if peer else ""
        rows = []
        for name, seconds in m["medians"].items():
            what, _, which = name.partition(" ")
            rate = m["floats"] / 1e6 / seconds["wall_s"]
            row = [LABELS[what] + which, number(seconds["wall_s"], 3), number(seconds["cpu_s"], 3)]
            rows.append([*row, number(rate), number(m["floats"] / 1e6 / seconds["cpu_s"])])
        head = ["what", "wall s", "CPU s", "M weights per s", "M weights per CPU second"]
        ratios = [[label, f"{value:.2f} x"] for label, value in m["ratios"].items()]
        parts += [
            f"## {m['model']}",
            f"{m['floats']:,} weights; weightvid {record['settings']['recipe']} "
            f"{m['archive_bits_per_weight']:.2f} bpw{beside}.",
            table(head, rows),
            table(["ratio of times", "median"], ratios),
        ]
    where = record["machine"]
    parts.append(f"{where['cores']} cores, {where['cpu']}; {record['settings']['rounds']} rounds.")
    return "\n\n".join(parts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.models.add_arguments(parser)
    parser.add_argument("--nncodec", type=Path, metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--qp", type=int, default=-25, help="NNCodec's QP, near balanced's rate")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = parse()
    cache = Cache(options.cache)
    code = code_sha256()
    results = []
    for source in measure.models.sources(options):
        rounds = []
        for number_of in range(options.rounds):
            key = {
                "schema": SCHEMA, "what": "speed", "code": code, "round": number_of,
                "model": source.name, "bytes": source.checkpoint.stat().st_size,
                "recipe": options.recipe, "qp": options.qp, "peer": options.nncodec is not None,
            }  # fmt: skip
            rounds.append(cache.made(key, partial(one_round, source, options)))
            print(f"{source.name}: round {number_of + 1} of {options.rounds}", flush=True)
        results.append(summarized(source, rounds))
    record = {
        "command": measure.models.shown_command(
            "bench_speed.py", options, "--nncodec PYTHON" if options.nncodec else ""
        ),
        "versions": versions() | {"nncodec": results[0]["rounds"][0].get("nncodec_version")},
        "machine": machine(),
        "settings": {"recipe": options.recipe, "qp": options.qp, "rounds": options.rounds},
        "models": results,
    }
    text = markdown(record)
    write(options.out / "speed", record, text)
    print(text)


if __name__ == "__main__":
    main()
