#!/usr/bin/env python3
"""Size and encoding time of each x265 preset, lossless, on the frames of a packed checkpoint.

    .venv/bin/python tools/bench_presets.py MODEL [--frames 4] [--out tools/results/presets]

Prints a table and writes OUT.json and OUT.md. The frames are those that `weightvid pack` makes.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from weightvid.codec.decode import Decoder, DecoderSettings
from weightvid.codec.encode import EncoderSettings, Video, open_encoder
from weightvid.codec.registry import X265_PRESETS
from weightvid.container import reader
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.version import __version__

Samples = npt.NDArray[np.uint8]


def frames_of(model: Path, limit: int) -> list[Samples]:
    """The first ``limit`` frames of the packed model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mp4"
        pack_checkpoint(model, path, PackOptions(verify=False))
        with open_archive(path) as archive:
            packets = [
                (number, reader.read_fragment(archive._source, entry, archive._head).packet)
                for number, entry in enumerate(archive.index.frames[:limit])
            ]
            settings = DecoderSettings(archive.track.record, archive.header.form)
            return [luma.copy() for _, luma in Decoder(settings).decode(packets)]


def measure(frames: list[Samples], preset: str) -> tuple[int, float]:
    """Bytes of all frames, and seconds to encode them with one encoder."""
    height, width = frames[0].shape
    encoder = open_encoder(EncoderSettings(width, height, Video(preset=preset)))
    begin = time.perf_counter()
    size = sum(len(encoder.encode(frame)) for frame in frames)
    return size, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--presets", nargs="+", default=[p for p in X265_PRESETS if p != "placebo"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    frames = frames_of(options.model, options.frames)
    samples = sum(frame.size for frame in frames)
    first = None
    rows = []
    lines = [
        "| preset | bytes | bits per sample | size against the first | time against the first |",
        "|---|---|---|---|---|",
    ]
    for preset in options.presets:
        size, seconds = measure(frames, preset)
        first = first or (size, seconds)
        rows.append({"preset": preset, "bytes": size, "seconds": round(seconds, 3)})
        lines.append(
            f"| {preset} | {size:,} | {8 * size / samples:.4f} | "
            f"{100 * (size / first[0] - 1):+.2f} % | {seconds / first[1]:.2f} x |"
        )
        print(lines[-1])
    if options.out:
        record = {
            "model": options.model.name,
            "frames": len(frames),
            "samples": samples,
            "weightvid": __version__,
            "av": av.__version__,
            "machine": platform.machine(),
            "rows": rows,
        }
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        command = f"tools/bench_presets.py {options.model.name} --frames {options.frames}"
        text = "\n".join([f"`{command}`: {len(frames)} frames, {samples:,} samples.", "", *lines])
        options.out.with_suffix(".md").write_text(f"# x265 presets, lossless\n\n{text}\n")


if __name__ == "__main__":
    main()
