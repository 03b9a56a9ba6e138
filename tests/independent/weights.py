"""Samples to levels to weights, as sections 8 and 9 of FORMAT.md have them.

Standard library only; part of the independent reader.
"""

from __future__ import annotations

import hashlib
import re
import struct
from typing import Any

from independent.container import Bad, Card, Spec, Start, Tensor, inflate

TRELLIS = {
    4: (0b10, 0b01),
    8: (0b101, 0b010),
    16: (0b1100, 0b0001),
    32: (0b11000, 0b00101),
    64: (0b110101, 0b011101),
}


# Order and folds: section 8.


def sequence_of(start: Start, spec: Spec) -> list[tuple[int, int, int]]:
    """Row, column and class of every number of the sequence (section 8.3)."""
    rows, columns = spec.matrix
    found = []
    if start.row_energy is None or start.column_energy is None:
        for s in range(rows * columns):
            group = min(s // (64 * columns), rows // 64)
            height = min(64, rows - 64 * group)
            t = s - 64 * group * columns
            found.append((64 * group + t % height, t // height, 0))
        return found
    share = columns // len(start.column_energy)
    for energy in range(len(start.folds) - 1, -1, -1):
        for row_energy in range(energy, -1, -1):
            wanted = [i for i in range(rows) if start.row_energy[i] == row_energy]
            across = [
                j for j in range(columns) if start.column_energy[j // share] == energy - row_energy
            ]
            found += [(i, j, energy) for i in wanted for j in across]
    return found


def unpack_digits(data: bytes, radix: int) -> list[int]:
    """Digits of a stream, up to those that fill its last byte (section 8.4)."""
    each = 1
    while radix ** (each + 1) <= 256:
        each += 1
    found = []
    for byte in inflate(data, -15, "digits"):
        if byte >= radix**each:
            raise Bad("digits")
        found += [byte // radix**place % radix for place in range(each)]
    return found


class DigitStreams:
    """Hands out the digits of a frame."""

    def __init__(self, card: Card, skip: bool) -> None:
        self.found = {
            (kind, n): unpack_digits(data, 2 * n + 1 if kind == "core" else n)
            for (kind, n), data in card.streams.items()
        }
        self.at = {key: card.carried[key] if skip else 0 for key in self.found}

    def next(self, kind: str, number: int) -> int:
        key = (kind, number)
        if key not in self.found or self.at[key] >= len(self.found[key]):
            raise Bad("digits")
        self.at[key] += 1
        return self.found[key][self.at[key] - 1]


def unfold(sample: int, fold: tuple[int, int], digits: DigitStreams, zero: int = 128) -> int:
    """Level of a sample (section 8.4)."""
    core, width = fold
    x = sample - zero
    if zero != 128 and fold != (0, 1):
        raise Bad("schema")
    if x == 0:
        return digits.next("core", core) - core if core else 0
    tail = digits.next("tail", width) if width > 1 else 0
    return (1 if x > 0 else -1) * (core + 1 + (abs(x) - 1) * width + tail)


def ribbon_columns(spec: Spec) -> int:
    """Section 8.1."""
    needed = -(-spec.size // 64)
    return 4 * -(-needed // 4)


# Quantizers: section 9.


def binary32(value: float) -> float:
    """To nearest binary32, ties to even."""
    try:
        (found,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return float(found)


def dequantize(levels: list[int], spec: Spec, record: dict[str, Any]) -> bytes:
    """Stored bytes of a tensor from its true levels, row-major."""
    text = record["step"]
    if not re.fullmatch(r"0x1(\.[0-9a-f]{1,6})?p(0|-?[1-9][0-9]{0,2})", text):
        raise Bad("quantizer", text)
    step = float.fromhex(text)
    if "states" in record:
        numbers, unit = trellis(levels, spec.matrix, record), step / 4
    elif "shifts" in record:
        numbers = [shifted(q, record["shifts"]) for q in levels]
        unit = step / 256
    else:
        numbers, unit = levels, step
    # A product of two binary32 is exact in binary64, so rounding it to binary32 is one rounding.
    return b"".join(store(binary32(binary32(float(n)) * unit), spec.dtype) for n in numbers)


def shifted(q: int, shifts: list[int]) -> int:
    """Reconstruction index with shifts (section 9.1)."""
    if q == 0:
        return 0
    shift = shifts[min(abs(q), 3) - 1]
    return 256 * q - (shift if q > 0 else -shift)


def trellis(levels: list[int], matrix: tuple[int, int], record: dict[str, Any]) -> list[int]:
    """Section 9.2."""
    states = record["states"]
    feedback, output = TRELLIS[states]
    rows, columns = matrix
    numbers = [0] * len(levels)
    if record.get("axis", 1) == 1:
        runs = [range(i * columns, (i + 1) * columns) for i in range(rows)]
    else:
        runs = [range(j, rows * columns, columns) for j in range(columns)]
    for run in runs:
        state = 0
        for place in run:
            k = levels[place]
            second = (state & output).bit_count() & 1
            if record.get("numbering", 0):
                numbers[place] = 4 * k + 2 if second else 4 * k
            else:
                numbers[place] = 1 - 4 * k if second else 4 * k - 1
            w = (k & 1) ^ ((state & feedback).bit_count() & 1)
            state = ((state << 1) | w) & (states - 1)
    return numbers


def store(value: float, dtype: str) -> bytes:
    """Section 9.3; ``value`` is a binary32."""
    if dtype == "F32":
        return struct.pack("<f", value)
    if dtype == "F64":
        return struct.pack("<d", value)
    if dtype == "F16":
        try:
            return struct.pack("<e", value)
        except OverflowError:
            return struct.pack("<e", float("inf") if value > 0 else float("-inf"))
    if dtype == "BF16":
        (u,) = struct.unpack("<I", struct.pack("<f", value))
        return struct.pack("<H", (u + 0x7FFF + ((u >> 16) & 1)) >> 16)
    raise Bad("schema", dtype)


def finish(spec: Spec, levels: list[int], record: dict[str, Any], tensor_hash: bytes) -> Tensor:
    """Dequantized tensor, checked."""
    data = dequantize(levels, spec, record)
    if hashlib.sha256(data).digest()[:16] != tensor_hash:
        raise Bad("tensor-digest", spec.name)
    return Tensor(spec, data, levels)
