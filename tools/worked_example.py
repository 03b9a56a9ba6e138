"""Print section 12 of FORMAT.md, the worked example: the bytes of data/golden/example.mp4.

python tools/worked_example.py            print it
python tools/worked_example.py --write    put it into FORMAT.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from weightvid.levels.trellis import next_state
from weightvid.loader import open_archive, trellis_index

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## 12. Worked example\n"
#: what the boxes of this very file hold, line by line: a letter for each field (see `Listing`),
#: and what is said of them.
HEAD = (("b4", "{}, `{}`"), ("x", "{}"), ("cul", "CRC-32 {:08x}, form {}, body of {} bytes"))
BOXES = {
    "header": (
        ("uuu", "record {} (tensors), {} bytes: {} tensors"),
        ("tuuuu", "name `{}`, element type {} (F32), {} axes: {} x {}"),
        ("tuuu", "name `{}`, element type {} (F32), {} axis: {}"),
        ("uuu", "record {} (about), {} bytes: {} entries"),
        ("t", "key `{}`"), ("t", "value `{}`"), ("t", "key `{}`"), ("t", "value `{}`"),
    ),
    "frame": (
        ("uuu", "record {} (frame), {} bytes: number {}"),
        ("s", "SHA-256 of the luma"),
        ("uu", "record {} (part), {} bytes"),
        ("uuuuu", "tensor {}, column {}, first row {}, {} rows, {} columns"),
        ("uu", "method {} (trellis), fields {} (escapes)"),
        ("f", "step {:.9g}"),
        ("u", "{} kernel axes"),
        ("uu", "{} escape, gap {}"), ("f", "its number, {:.9g}"),
        ("uuu", "record {} (end), {} bytes: tensor {}"),
        ("8", "start of the SHA-256 of its elements"), ("h", "SQNR, {} hundredths of a dB"),
    ),
    "exact": (
        ("uuu", "record {} (items), {} bytes: {} item"),
        ("uuu", "tensor {}, first element {}, {} elements"),
        ("uu", "record {} (data), {} bytes"),
        *(("3", f"byte {plane} of each element") for plane in range(4)),
    ),
    "index": (
        ("uuuu", "record {} (frames), {} bytes: {} frame, sidecar, moof and mdat of {} bytes"),
        ("uuuuuu", "record {} (spans), {} bytes: {} tensor: {}, first frame {}, frames {}"),
        ("uuuuuu", "record {} (exact boxes), {} bytes: {} box: {} bytes, {} tensor: {}"),
        ("uu", "record {} (root), {} bytes"),
        ("s", "SHA-256 of the data of record 2, and of the first 8 bytes of each tensor's SHA-256"),
        ("l", "bytes of the index box, {}"),
    ),
}  # fmt: skip


class Listing:
    """Bytes on the left, what they say on the right."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.lines = data, 0, list[str]()

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.at += count
        return self.data[self.at - count : self.at]

    def field(self, kind: str) -> Any:
        """One field.

        u, l, h: little-endian numbers, LEB128 of one or two bytes, 4, 2; b: big-endian, 4;
        c: a CRC-32; f: binary32; t: text; x: 16 characters; 4: four; s, 8, 3: 32, 8, 3 bytes.
        """
        if kind == "u":
            low = self.take(1)[0]
            return low if low < 128 else low & 127 | self.take(1)[0] << 7
        if kind == "f":
            return float(np.frombuffer(self.take(4), "<f4")[0])
        if kind in "x4t":
            size = {"x": 16, "4": 4}.get(kind) or self.take(1)[0]
            return self.take(size).rstrip(b"\0").decode()
        size = {"l": 4, "b": 4, "c": 4, "h": 2, "s": 32}.get(kind) or int(kind)
        return int.from_bytes(self.take(size), "big" if kind == "b" else "little")

    def line(self, kinds: str, says: str) -> None:
        """Some fields, 16 bytes to a line."""
        start = self.at
        text = says.format(*[self.field(kind) for kind in kinds])
        for place in range(start, self.at, 16):
            shown = self.data[place : min(place + 16, self.at)].hex(" ")
            self.lines.append(f"    {shown:47}  {text if place == start else ''}".rstrip())


def first_weights(path: Path) -> list[str]:
    """How the start of row 3 becomes weights."""
    with open_archive(path) as archive:
        part = archive.info("w").parts[0]
        _, luma = next(archive.frames(range(1)))
        weights = archive["w"][3, :7].tolist()
    samples = luma[48:55, 0].tolist()
    levels, states = [sample - 128 for sample in samples], [0]
    for level in levels:
        states.append(next_state(states[-1], level & 1))
    numbers = trellis_index(np.array([levels], np.int8))[0].tolist()
    rows = {"sample": samples, "level k": levels, "state": states[:-1], "number n": numbers}
    rows["weight"] = [f"{weight:.7f}" for weight in weights]
    place, escaped = (int(one[0]) for one in part.escapes or ())
    return [
        "Row 3 of `w` begins at number 48, which is column 0, row 48 of the ribbon:", "",
        *(f"    {name:9}" + "".join(f"{one:>11}" for one in row) for name, row in rows.items()),
        "", f"A unit is step / 4 = {part.step / 4:.9g}; the escape at {place} = 3 x 16 + 5 makes n "
        f"{escaped}.",
    ]  # fmt: skip


def section(path: Path) -> str:
    """The section without its heading."""
    data = path.read_bytes()
    lines = [
        "`data/golden/example.mp4`: `w`, F32 of 16 x 16, and `b`, F32 of 3: 0.5, -1, 0.25. `ftyp`,",
        "`moov`, `moof`, `mdat` and `mfra` are left out.",
    ]
    for name, fields in BOXES.items():
        at = data.index(b"uuidweightvid-" + name.encode()) - 4
        box = Listing(data[at : at + int.from_bytes(data[at : at + 4], "big")])
        for kinds, says in (*HEAD, *fields):
            box.line(kinds, says)
        if box.at != len(box.data):
            raise SystemExit(f"the box {name} goes on: this script knows the example alone")
        lines += ["", *box.lines]
    return "\n".join([*lines, "", *first_weights(path), ""])


def main() -> None:
    """Print the section, or write it."""
    options = argparse.ArgumentParser(description="The worked example of FORMAT.md.")
    options.add_argument("--write", action="store_true", help="put it into FORMAT.md")
    text = section(ROOT / "data" / "golden" / "example.mp4")
    if not options.parse_args().write:
        print(text, end="")
        return
    page = ROOT / "FORMAT.md"
    before = page.read_text().split(HEADING)[0]
    page.write_text(f"{before}{HEADING}\n{text}")


if __name__ == "__main__":
    main()
