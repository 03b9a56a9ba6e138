"""Sources and archives for two readers to agree on: every layer, type and field of the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from weightvid import loader
from weightvid.levels.frames import FrameSize, lay_out
from weightvid.loader import End, Floats, FormatError, Header, Part, Sidecar, TensorSpec, Track
from weightvid.video import Video, open_encoder
from weightvid.writer import ArchiveWriter

Arrays = dict[str, Any]
#: element types of `typed` that numpy lacks, or that are not the array's own.
TYPED = {f"exact.{name}": name for name in loader.DTYPES if name != "BOOL"}
TYPED |= {"matrix.BF16": "BF16", "conv.BF16": "BF16"}


def small_frames() -> Any:
    """Within this context archives have frames of 256 x 192, so that small models fill several."""
    return patch("weightvid.pack.choose_frame_size", lambda _: FrameSize(256, 192))


def normal(seed: int, *shape: int, kind: str = "f4", scale: float = 0.05) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    if kind == "BF16":
        return loader.from_float32(values.astype(np.float32), "BF16")
    return values.astype(kind)


def smooth(array: Any) -> Any:
    return array + np.mean(array, axis=tuple(range(2, array.ndim)), keepdims=True)


def kernels() -> Arrays:
    """Every shape of layer."""
    return {
        "conv1d": smooth(normal(1, 24, 20, 5)),
        "conv2d": smooth(normal(2, 32, 16, 3, 3)),
        "conv3d": smooth(normal(3, 8, 6, 3, 3, 3)),
        "wide": normal(4, 12, 8, 1, 7),
        "depthwise": normal(5, 64, 1, 3, 3),
        "pointwise": normal(6, 40, 24, 1, 1),
        "linear": normal(7, 160, 200),
        "column": normal(8, 300, 1),
        "bias": normal(9, 96),
    }


def hard() -> Arrays:
    """Scales that differ by orders, outliers, and values that no step can hold."""
    rows = normal(10, 64, 48) * np.float32(2.0) ** np.arange(64)[:, None]
    outliers, kernel = normal(11, 64, 64), normal(12, 16, 8, 3, 3)
    outliers.reshape(-1)[::701] = 3e5
    kernel[3, 2, 1, 1] = -77.0
    tailed = np.random.default_rng(13).standard_t(2.2, (80, 40)).astype(np.float32)
    broken = normal(14, 20, 20)
    broken[3, 3], broken[4, 4] = np.nan, np.inf
    tiny, constant = normal(15, 30, 30) * np.float32(1e-35), np.full((20, 20), 0.5, np.float32)
    return {"rows": rows, "outliers": outliers, "kernel": kernel, "tailed": tailed,
            "broken": broken, "tiny": tiny, "constant": constant}  # fmt: skip


def typed() -> Arrays:
    """Every element type, empty and 0-d tensors, names of more than ASCII."""
    tied = normal(20, 60, 50)
    found: Arrays = {
        f"exact.{name}": np.frombuffer(np.random.default_rng(21).bytes(32), kind)
        for name, kind in loader.DTYPES.items()
        if name != "BOOL"
    }
    for kind in ("f2", "f4", "f8", "BF16"):
        found[f"matrix.{kind}"] = normal(22, 40, 30, kind=kind)
        found[f"conv.{kind}"] = normal(23, 20, 10, 3, 3, kind=kind)
    return found | {
        "tied.a": tied,
        "tied.b": tied,
        "empty": np.empty((0, 4), np.float32),
        "häufig/\ud800": np.array(7, np.int64),
        "flags": np.array([True, False]),
    }


def safetensors(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Write a file by hand, with metadata."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        kind = {"f4": "F32", "f2": "F16", "f8": "F64", "u2": "BF16"}[array.dtype.str[1:]]
        span = [len(data), len(data) + array.nbytes]
        head[name] = {"dtype": kind, "shape": array.shape, "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def random_part(draw: np.random.Generator, number: int, columns: int, kind: str) -> dict[str, Any]:
    """Fields of a part, each there or not, over nearly the ranges that they have."""
    rows, reach = int(draw.integers(1, 7)), 60 if kind == "F16" else 127

    def steps(count: int) -> Any:
        return draw.integers(-reach, reach + 1, count, np.int8) if draw.random() < 0.7 else None

    found: dict[str, Any] = {"tensor": number, "rows": rows, "columns": columns, "column": 0}
    found |= {"method": int(draw.integers(2)), "row_steps": steps(rows), "steps": steps}
    exponent = -30 if kind == "F16" else int(draw.integers(-110, 20))
    found["step"] = float(np.float32(draw.uniform(1, 2) * 2.0**exponent))
    if draw.random() < 0.7:
        places = np.flatnonzero(draw.random(rows * columns) < 0.05)
        numbers = draw.standard_normal(places.size).astype(np.float32) * 1000
        found["escapes"] = (places, numbers) if places.size else None
    return found


def with_shift(part: Part, bases: Sequence[Floats]) -> Part:
    """A part with as precise a kernel matrix as is allowed."""
    for shift in range(loader.MAX_SHIFT, 0, -1) if part.bases else ():
        with suppress(FormatError):
            loader.kernel_matrix(replace(part, shift=shift), bases)
            return replace(part, shift=shift)
    return part


def write_random(path: Path, seed: int) -> None:
    """Write an archive of parts that the packer would not choose: any field with any other."""
    draw = np.random.default_rng(seed)
    bases = tuple(draw.standard_normal((n, n)).astype(np.float32) for n in (1, 2, 3, 5))
    specs: list[TensorSpec] = []
    items: list[tuple[Part, Any]] = []
    ends: dict[int, End] = {}
    for number in range(16):
        axes = tuple(draw.integers(0, 4, draw.integers(0, 5)).tolist())
        kernel, kind = (
            prod(len(bases[place]) for place in axes),
            ("F32", "F64", "BF16", "F16")[number % 4],
        )
        columns, rows, stored = kernel * int(draw.integers(1, 17)), 0, []
        for _ in range(draw.integers(1, 4)):
            fields = random_part(draw, number, columns, kind)
            make = fields.pop("steps")
            sizes = fields["rows"], columns // kernel, kernel
            energies = tuple(draw.integers(0, draw.integers(1, 64), n, np.uint8) for n in sizes)
            fields |= {"bases": axes, "first_row": rows}
            if axes and (steps := make(kernel)) is not None:
                fields["frequency_steps"] = steps // 16
            part = Part(**fields, energies=energies if draw.random() < 0.7 else None)  # type: ignore[arg-type]
            part = with_shift(part, [bases[place] for place in axes])
            samples = draw.integers(0, 256, part.size, np.uint8)
            matrix = loader.from_sequence((samples ^ np.uint8(128)).view(np.int8), part)
            values = loader.dequantize(matrix, part, [bases[place] for place in axes])
            stored.append(loader.from_float32(values, kind))
            items.append((part, samples))
            rows += part.rows
        specs.append(TensorSpec(f"t{number}", kind, (rows, columns)))
        ends[number] = End(number, loader.tensor_sha256(np.concatenate(stored))[:8], None)
    encoder = open_encoder(Video(), 192, 192)
    track, header = (
        Track(192, 192, b"hvc1", encoder.record),
        Header(tuple(specs), {}, {}, (), bases, {}),
    )
    with path.open("wb") as file:
        writer = ArchiveWriter(file, track, header)
        for number, luma, starts, done in lay_out(items, FrameSize(192, 192)):
            parts = tuple(replace(part, column=column) for part, column in starts)
            last = tuple(
                ends[p.tensor] for p in done if p.first_row + p.rows == specs[p.tensor].shape[0]
            )
            sidecar = Sidecar(number, hashlib.sha256(luma.tobytes()).digest(), parts, last)
            writer.add_frame(sidecar, encoder.encode(luma))
        writer.finish()
