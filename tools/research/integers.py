"""Weights that are int8 already: through the video, or deflated? Bits per weight of both.

Real checkpoints are quantized here as exporters do, with one scale a tensor or one a row:

    integers.py MODEL.safetensors [MODEL.safetensors ...]
"""

from __future__ import annotations

import lzma
import sys
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from weightvid.levels.frames import choose_energies, choose_frame_size, lay_out, to_sequence
from weightvid.loader import ZERO_SAMPLE, Array
from weightvid.video import Video, open_encoder

RESULTS = Path(__file__).resolve().parents[1] / "results"
STRATEGIES = {"deflate": zlib.Z_DEFAULT_STRATEGY, "Huffman codes alone": zlib.Z_HUFFMAN_ONLY}


def quantized(weights: Array, scale: str) -> Array:
    """Weights as int8, -127..127."""
    rows = weights.reshape(len(weights), -1)
    reach = np.abs(rows).max(axis=1, keepdims=True) if scale == "row" else np.abs(rows).max()
    levels: Array = np.rint(rows * (127 / np.maximum(reach, 1e-12))).astype(np.int8)
    return levels


def entropy(levels: Array) -> float:
    """Bits of all levels, if each were independent of the others."""
    share = np.unique(levels, return_counts=True)[1] / levels.size
    return float(-(share * np.log2(share)).sum() * levels.size)


def video_bytes(levels: Array) -> int:
    """Packets and energies of levels in the order that suits the video best."""
    energies = choose_energies(levels)
    samples = to_sequence(levels.view(np.uint8) ^ np.uint8(ZERO_SAMPLE), energies)
    size = choose_frame_size(-(-samples.size // 64))
    encoder = open_encoder(Video(), size.width, size.height)
    packets = sum(len(encoder.encode(frame.luma)) for frame in lay_out([(0, samples)], size))
    return packets + sum(map(len, energies or ()))


def deflated_bytes(levels: Array, strategy: int) -> int:
    """Bytes of levels in a raw deflate stream."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return len(packer.compress(levels.tobytes()) + packer.flush())


def main() -> None:
    names = ("entropy", *STRATEGIES, "xz", "video")
    lines = [f"| model | scale | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for path in map(Path, sys.argv[1:]):
        tensors = [w for w in load_file(path).values() if w.ndim > 1 and w.dtype == np.float32]
        for scale in ("tensor", "row"):
            sizes = dict.fromkeys(names, 0.0)
            for weights in tensors:
                levels = quantized(weights, scale)
                sizes["entropy"] += entropy(levels) / 8
                for name, strategy in STRATEGIES.items():
                    sizes[name] += deflated_bytes(levels, strategy)
                sizes["xz"] += len(lzma.compress(levels.tobytes()))
                sizes["video"] += video_bytes(levels)
            count = sum(weights.size for weights in tensors)
            bits = " | ".join(f"{size * 8 / count:.3f}" for size in sizes.values())
            lines.append(f"| {path.parent.name} | {scale} | {bits} |")
            print(lines[-1], flush=True)
    (RESULTS / "research_integers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
