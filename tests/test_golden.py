"""Golden archives: what was packed once gives the same bytes for ever, by two readers.

``tools/make_golden.py --force`` writes them anew, which no test ever does.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from independent.reader import Archive, children

from weightvid.loader import open_archive

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "data" / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_none_is_missing() -> None:
    assert {path.stem for path in GOLDEN.glob("*.mp4")} == set(EXPECTED) != set()
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 250_000


def base_of(name: str) -> Path | None:
    base = EXPECTED[name].get("base")
    return GOLDEN / f"{base}.mp4" if base else None


@pytest.mark.parametrize("name", EXPECTED)
def test_loader(name: str) -> None:
    path = GOLDEN / f"{name}.mp4"
    with open_archive(path, base=base_of(name), check_tensors=True) as archive:
        assert archive.index is not None
        frames = archive.frames(range(len(archive.index.frames)))
        assert [sha256(luma.tobytes()) for _, luma in frames] == EXPECTED[name]["frames"]
        streamed = {spec.name: sha256(array.tobytes()) for spec, array in archive.stored_items()}
        assert streamed == EXPECTED[name]["tensors"]
        assert {one: sha256(archive.stored(one).tobytes()) for one in streamed} == streamed


@pytest.mark.parametrize("name", EXPECTED)
def test_independent_reader(name: str) -> None:
    archive = Archive(io.BytesIO((GOLDEN / f"{name}.mp4").read_bytes()))
    base = base_of(name)
    if base is not None:
        archive.use_base(Archive(io.BytesIO(base.read_bytes())))
    tensors = {name: sha256(data) for name, data in archive.stream()}
    assert tensors == EXPECTED[name]["tensors"]
    assert archive.lumas == EXPECTED[name]["frames"]


def test_worked_example() -> None:
    page = (ROOT / "FORMAT.md").read_text()
    section = page.split("## 12. Worked example\n")[-1]
    shown = re.findall(r"^    ((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)", section, re.MULTILINE)
    boxes = children((GOLDEN / "example.mp4").read_bytes())
    own = [box.kind + box.payload for box in boxes if box.kind.startswith(b"weightvid")]
    written = b"".join((len(one) + 8).to_bytes(4, "big") + b"uuid" + one for one in own)
    assert bytes.fromhex("".join(shown)) == written
    tool = runpy.run_path(str(ROOT / "tools" / "worked_example.py"))
    assert section.strip() == tool["section"](GOLDEN / "example.mp4").strip()
