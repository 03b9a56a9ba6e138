"""Golden archives: what a released format version once meant, it means for ever.

Made by ``tools/make_golden.py --write``; nothing here writes them, and a missing one fails.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import pytest
from independent import golden, reader

from weightvid.errors import TruncatedError
from weightvid.loader import open_archive

#: spelled out, so that an archive cannot vanish together with its entry.
NAMES = (
    "av1",
    "avc",
    "exact",
    "ffv1",
    "jpeg2000",
    "layout",
    "layout2",
    "lossy",
    "main10",
    "mixed",
    "mixed2",
    "nothing",
    "packed",
    "packed2",
    "png",
    "tiny",
    "tiny2",
    "trellis",
    "truncated",
    "uniform",
    "vp9",
    "vvc",
)
Row = tuple[str, str, list[int], str]


def expected(name: str) -> dict[str, Any]:
    """Entry of golden.json."""
    record: dict[str, Any] = json.loads(golden.EXPECTED.read_text(encoding="utf-8"))
    found: dict[str, Any] = record["archives"][name]
    return found


def rows(name: str) -> list[Row]:
    """Name, dtype, shape and SHA-256 of every tensor that must come out."""
    tensors = expected(name)["tensors"]
    return [(t["name"], t["dtype"], t["shape"], t["sha256"]) for t in tensors]


def archive(name: str) -> bytes:
    """A golden archive, unchanged."""
    data = (golden.FOLDER / f"{name}.mp4").read_bytes()
    assert hashlib.sha256(data).hexdigest() == expected(name)["sha256"]
    return data


def test_all_are_there() -> None:
    assert sorted(path.stem for path in golden.FOLDER.glob("*.mp4")) == list(NAMES)
    record = json.loads(golden.EXPECTED.read_text(encoding="utf-8"))
    assert sorted(record["archives"]) == list(NAMES)
    assert set(golden.MAKERS) < set(NAMES)
    assert sum(path.stat().st_size for path in golden.FOLDER.iterdir()) < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_weightvid_reads_it(name: str) -> None:
    found: list[Row] = []
    with open_archive(io.BytesIO(archive(name)), check_tensors=True) as ours:
        aliases: dict[str, list[str]] = {}
        for alias, target in ours.header.aliases.items():
            aliases.setdefault(target, []).append(alias)
        try:
            for spec, array in ours.iter_stored():
                digest = hashlib.sha256(array.tobytes()).hexdigest()
                for each in (spec.name, *aliases.get(spec.name, [])):
                    found.append((each, spec.dtype, list(spec.shape), digest))
            missing: list[str] = []
        except TruncatedError as error:
            missing = list(error.missing)
    assert sorted(found) == sorted(rows(name))
    assert missing == expected(name).get("missing", [])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "truncated"])
def test_weightvid_reads_each_tensor_alone(name: str) -> None:
    with open_archive(io.BytesIO(archive(name)), check_tensors=True) as ours:
        assert set(ours.names) == {row[0] for row in rows(name)}
        for tensor, dtype, shape, digest in rows(name):
            assert (ours.spec(tensor).dtype, list(ours.spec(tensor).shape)) == (dtype, shape)
            assert hashlib.sha256(ours.stored(tensor).tobytes()).hexdigest() == digest


@pytest.mark.parametrize("name", NAMES)
def test_the_independent_reader_reads_it(name: str) -> None:
    found = reader.read_stream(archive(name))
    given = [
        (key, tensor.spec.dtype, list(tensor.spec.shape), hashlib.sha256(tensor.data).hexdigest())
        for key, tensor in found.tensors.items()
    ]
    assert sorted(given) == sorted(rows(name))
    assert found.missing == expected(name).get("missing", [])


def test_the_document_is_up_to_date() -> None:
    text = golden.DOCUMENT.read_text(encoding="utf-8")
    assert golden.generated(text) == text, "run tools/make_golden.py --document"
