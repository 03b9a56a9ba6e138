"""Malformed archives whose checksums are right, and the code that each must give."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_archives import Box, Record, change_records, join_boxes, split_boxes
from samples import Pipe, all_same, sample, tensors

from weightvid import container, exact, loader
from weightvid.container import record, text, uint
from weightvid.errors import FormatError
from weightvid.loader import (
    ABOUT,
    ALIASES,
    BASES,
    BOXES,
    DATA,
    END,
    EXACT_UUID,
    FILES,
    FRAME,
    FRAME_UUID,
    FRAMES,
    HEADER_UUID,
    INDEX_UUID,
    ITEMS,
    METADATA,
    PART,
    ROOT,
    SPANS,
    TENSORS,
    open_archive,
)

Records = list[Record]
Mutation = Callable[[bytes], bytes]


# --- mutations ------------------------------------------------------------------------------------


def boxes(change: Callable[[list[Box]], list[Box]], indexed: bool = True) -> Mutation:
    """Another list of boxes."""
    return lambda data: join_boxes(change(split_boxes(data)), indexed)


def place_of(found: list[Box], kind: bytes, nth: int = 0) -> int:
    return [n for n, box in enumerate(found) if box.kind == kind][nth]


def payload(kind: bytes, change: Callable[[bytes], bytes], nth: int = 0) -> Mutation:
    """Another payload of one box."""

    def mutated(found: list[Box]) -> list[Box]:
        at = place_of(found, kind, nth)
        found[at] = Box(kind, change(found[at].payload))
        return found

    return boxes(mutated, indexed=kind != INDEX_UUID)


def records(kind: bytes, change: Callable[[Records], Records], nth: int = 0) -> Mutation:
    """Other records in one box."""
    return payload(kind, lambda old: change_records(old, change), nth)


def data_of(kind: bytes, which: int, change: Callable[[bytes], bytes], nth: int = 0) -> Mutation:
    """Other data of all records of a type in one box."""
    return records(kind, lambda old: [(k, change(d) if k == which else d) for k, d in old], nth)


def without(kind: bytes, which: int) -> Mutation:
    return records(kind, lambda old: [(k, d) for k, d in old if k != which])


def twice(kind: bytes, which: int) -> Mutation:
    return records(kind, lambda old: [e for k, d in old for e in [(k, d)] * (1 + (k == which))])


def added(kind: bytes, which: int, data: bytes = b"") -> Mutation:
    return records(kind, lambda old: [*old, (which, data)])


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    """Overwrite some bytes."""
    return lambda data: data[:at] + new + data[at + len(new) :]


def part(number: int = 0, **fields: Any) -> Mutation:
    """Other fields of one part of the first frame."""

    def change(old: Records) -> Records:
        places = [n for n, (kind, _) in enumerate(old) if kind == PART]
        known = open_archive(sample()).header
        found = loader.parse_part(loader.Fields(old[places[number]][1], ""), known)
        made = loader.Fields(container.part_record(replace(found, **fields)), "")
        old[places[number]] = made.uint(), made.take(made.uint())
        return old

    return records(FRAME_UUID, change)


def part_bytes(change: Callable[[bytes], bytes]) -> Mutation:
    """Other bytes of the first part: tensor, column, row, rows, columns, method, fields, step."""

    def changed(old: Records) -> Records:
        at = next(n for n, (kind, _) in enumerate(old) if kind == PART)
        old[at] = PART, change(old[at][1])
        return old

    return records(FRAME_UUID, changed)


def tensor_list(*fields: bytes) -> Mutation:
    """A header whose list of tensors is this."""
    return data_of(HEADER_UUID, TENSORS, lambda _: uint(len(fields)) + b"".join(fields))


def spec(name: bytes, code: int = 1, *shape: int) -> bytes:
    return uint(len(name)) + name + uint(code) + uint(len(shape)) + b"".join(map(uint, shape))


def header_list(kind: int, *items: bytes) -> Mutation:
    return data_of(HEADER_UUID, kind, lambda _: uint(len(items)) + b"".join(items))


def body(kind: bytes, form: int, size: int, data: bytes) -> Mutation:
    """A box of ours with a right CRC-32."""
    sealed = bytes((form,)) + size.to_bytes(4, "little") + data
    return payload(kind, lambda _: zlib.crc32(sealed).to_bytes(4, "little") + sealed)


def raw(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def nested(path: bytes, at: int, new: bytes) -> Mutation:
    """Overwrite bytes of a box within moov or moof, counted from its type."""
    outer = b"moof" if path == b"mfhd" else b"moov"
    return payload(outer, lambda data: put(data.index(path) + at, new)(data))


def drop(kind: bytes, nth: int = 0) -> Mutation:
    def change(found: list[Box]) -> list[Box]:
        del found[place_of(found, kind, nth)]
        return found

    return boxes(change, indexed=False)


def swap(one: bytes, other: bytes, nth: int = 0) -> Mutation:
    def change(found: list[Box]) -> list[Box]:
        a, b = place_of(found, one), place_of(found, other, nth)
        found[a], found[b] = found[b], found[a]
        return found

    return boxes(change)


def first_items(change: Callable[[list[tuple[int, int, Any]]], Any]) -> Mutation:
    """Another first box of exact tensors: numbers, first elements, elements."""

    def changed(old: bytes) -> bytes:
        known = open_archive(sample()).header
        items = list(loader.parse_exact(old, known))
        made = change(items)
        return container.close_body(*exact.exact_records(made or items, known.tensors))

    return payload(EXACT_UUID, changed)


def sizes(*numbers: int) -> bytes:
    return b"".join(map(uint, numbers))


def behind(data: bytes) -> bytes:
    """An index whose box of exact tensors lies where the index is."""
    fields, total, numbers = loader.Fields(data, ""), 0, list[int]()
    for _ in range(fields.uint()):
        total += fields.uint()
        numbers += [fields.uint() for _ in range(fields.uint())]
    return sizes(2, total, 0, 9, len(numbers), *numbers)


def sidecar() -> int:
    """Bytes of the first sidecar: a frame that began behind it would begin with its moof."""
    return 24 + len(next(box.payload for box in split_boxes(sample()) if box.kind == FRAME_UUID))


# --- the corpus -----------------------------------------------------------------------------------

#: name: mutation, code. Any reader finds it, also one that reads a pipe.
CORPUS: dict[str, tuple[Mutation, str]] = {
    "empty file": (lambda _: b"", "ftyp"),
    "text": (lambda _: b"#!/bin/sh\necho this is a script\n" * 40, "ftyp"),
    "png": (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(500), "ftyp"),
    "safetensors": (lambda _: (80).to_bytes(8, "little") + b"{}" * 300, "ftyp"),
    "another brand": (payload(b"ftyp", put(16, b"mp42")), "ftyp"),
    "no ftyp": (drop(b"ftyp"), "ftyp"),
    "empty moov": (payload(b"moov", lambda _: b""), "moov"),
    "no trak": (nested(b"trak", 0, b"free"), "moov"),
    "unknown codec": (nested(b"hvc1", 0, b"vp09"), "moov"),
    "another codec": (nested(b"hvc1", 0, b"av01"), "moov"),
    "no configuration": (nested(b"hvcC", 0, b"free"), "moov"),
    "narrow": (nested(b"hvc1", 28, b"\0\x80"), "moov"),
    "wide": (nested(b"hvc1", 28, b"\x08\xc0"), "moov"),
    "odd": (nested(b"hvc1", 28, b"\0\xc8"), "moov"),
    "large": (nested(b"hvc1", 28, b"\x08\x80\x08\x80"), "moov"),
    "box of 7 bytes": (lambda data: put(data.index(b"moov") - 4, b"\0\0\0\7")(data), "box-size"),
    "box of 4 GB": (lambda data: put(data.index(b"moof") - 4, b"\xff" * 4)(data), "box-size"),
    "inner box of 7 bytes": (nested(b"mdia", -4, b"\0\0\0\7"), "box-size"),
    "inner box beyond": (nested(b"mdia", -4, b"\0\1\0\0"), "box-size"),
    "mfhd beyond": (nested(b"mfhd", -4, b"\0\1\0\0"), "box-size"),
    # order
    "no moov": (drop(b"moov"), "order"),
    "no header": (drop(HEADER_UUID), "order"),
    "moov behind the header": (swap(b"moov", HEADER_UUID), "order"),
    "no sidecar": (drop(FRAME_UUID), "order"),
    "no moof": (drop(b"moof"), "order"),
    "no mdat": (drop(b"mdat"), "order"),
    "empty mdat": (payload(b"mdat", lambda _: b""), "order"),
    "no mfhd": (nested(b"mfhd", 0, b"free"), "order"),
    "number of another fragment": (nested(b"mfhd", 8, b"\0\0\0\7"), "order"),
    "number of another frame": (data_of(FRAME_UUID, FRAME, put(0, b"\x01")), "order"),
    "frames change places": (swap(FRAME_UUID, FRAME_UUID, 1), "order"),
    "no exact box": (drop(EXACT_UUID), "order"),
    "no index": (drop(INDEX_UUID), "order"),
    "no part": (without(FRAME_UUID, PART), "order"),
    "part twice": (twice(FRAME_UUID, PART), "order"),
    "no end": (without(FRAME_UUID, END), "order"),
    "end twice": (twice(FRAME_UUID, END), "order"),
    "end of another": (data_of(FRAME_UUID, END, put(0, b"\x05")), "order"),
    "part of later rows": (
        part(first_row=1, rows=19, row_steps=None, energies=None, escapes=None),
        "order",
    ),
    "part of fewer rows": (part(rows=19, row_steps=None, energies=None, escapes=None), "order"),
    "part behind the frame": (part(column=4 * 576), "order"),
    "parts overlap": (part(1, column=4), "order"),
    "element missing": (first_items(lambda i: [(i[0][0], 0, i[0][2][:-1]), *i[1:]]), "order"),
    "element late": (first_items(lambda i: [(i[0][0], 1, i[0][2][1:]), *i[1:]]), "order"),
    "exact tensor twice": (first_items(lambda items: [*items, items[-1]]), "order"),
    # damage
    "cut": (lambda data: data[:-2000], "truncated"),
    "cut behind a sidecar": (lambda data: data[: data.index(b"moof") - 4], "truncated"),
    "header CRC": (payload(HEADER_UUID, put(0, bytes(4))), "digest"),
    "sidecar CRC": (payload(FRAME_UUID, put(0, bytes(4)), 1), "digest"),
    "exact CRC": (payload(EXACT_UUID, put(0, bytes(4))), "digest"),
    "sidecar of 8 bytes": (payload(FRAME_UUID, lambda _: bytes(8)), "digest"),
    "no deflate stream": (body(HEADER_UUID, 1, 3, b"abc"), "deflate"),
    "deflate cut": (body(EXACT_UUID, 1, 999, raw(bytes(999))[:-3]), "deflate"),
    "deflate and more": (body(EXACT_UUID, 1, 999, raw(bytes(999)) + b"x"), "deflate"),
    "deflates to less": (body(HEADER_UUID, 1, 1000, raw(bytes(999))), "deflate"),
    "bomb": (body(HEADER_UUID, 1, 999, raw(bytes(1 << 20))), "deflate"),
    "frame hash": (data_of(FRAME_UUID, FRAME, put(1, bytes(32))), "frame-digest"),
    "tensor hash": (data_of(FRAME_UUID, END, put(1, bytes(8))), "tensor-digest"),
    "another step": (part(step=0.5), "tensor-digest"),
    "another basis": (
        data_of(HEADER_UUID, BASES, lambda d: d[:-4] + bytes(4)),
        "tensor-digest",
    ),
    # records
    "stored body of another size": (body(HEADER_UUID, 0, 4, b"abc"), "record"),
    "record cut short": (body(HEADER_UUID, 0, 2, b"\x02\x05"), "record"),
    "number cut short": (body(HEADER_UUID, 0, 1, b"\x82"), "record"),
    "no tensors": (without(HEADER_UUID, TENSORS), "record"),
    "tensors twice": (twice(HEADER_UUID, TENSORS), "record"),
    "aliases twice": (twice(HEADER_UUID, ALIASES), "record"),
    "metadata twice": (twice(HEADER_UUID, METADATA), "record"),
    "files twice": (twice(HEADER_UUID, FILES), "record"),
    "bases twice": (twice(HEADER_UUID, BASES), "record"),
    "about twice": (twice(HEADER_UUID, ABOUT), "record"),
    "more tensors than listed": (data_of(HEADER_UUID, TENSORS, put(0, b"\x01")), "record"),
    "fewer tensors than listed": (data_of(HEADER_UUID, TENSORS, put(0, b"\x7f")), "record"),
    "names alike": (tensor_list(spec(b"a"), spec(b"a")), "record"),
    "name not UTF-8": (tensor_list(spec(b"\xff")), "record"),
    "alias like a name": (header_list(ALIASES, text("conv") + uint(0)), "record"),
    "aliases alike": (header_list(ALIASES, *[text("x") + uint(0)] * 2), "record"),
    "metadata cut": (data_of(HEADER_UUID, METADATA, lambda data: data[:-1]), "record"),
    "basis cut": (data_of(HEADER_UUID, BASES, lambda data: data[:-1]), "record"),
    "no frame record": (without(FRAME_UUID, FRAME), "record"),
    "frame record twice": (twice(FRAME_UUID, FRAME), "record"),
    "frame record longer": (data_of(FRAME_UUID, FRAME, lambda data: data + b"x"), "record"),
    "end longer": (data_of(FRAME_UUID, END, lambda data: data + b"x"), "record"),
    "end shorter": (data_of(FRAME_UUID, END, lambda data: data[:-1]), "record"),
    "part longer": (part_bytes(lambda data: data + b"x"), "record"),
    "part shorter": (part_bytes(lambda data: data[:-1]), "record"),
    "part of no rows": (part_bytes(put(3, b"\0")), "record"),
    "part of too many rows": (part_bytes(put(3, b"\x15")), "record"),
    "part of no columns": (part_bytes(put(4, b"\0")), "record"),
    "columns that do not divide": (part_bytes(put(4, b"\x6b")), "record"),
    "part of an exact type": (part_bytes(put(0, b"\x08")), "record"),
    "steps of frequencies without any": (part(bases=(), shift=0), "record"),
    "precise beyond measure": (part(shift=25), "record"),
    "step 0": (part(step=0.0), "record"),
    "step negative": (part(step=-1.0), "record"),
    "step NaN": (part(step=float("nan")), "record"),
    "step infinite": (part(step=float("inf")), "record"),
    "step tiny": (part(step=2.0**-111), "record"),
    "step huge": (part(step=2.0**111), "record"),
    "energy 64": (
        part(energies=tuple(np.full(n, 64, np.uint8) for n in (20, 12, 9))),
        "record",
    ),
    "escape outside": (part(escapes=(np.array([2160]), np.ones(1, np.float32))), "record"),
    "no escape": (part(escapes=(np.array([], int), np.array([], np.float32))), "record"),
    "no items": (without(EXACT_UUID, ITEMS), "record"),
    "items twice": (twice(EXACT_UUID, ITEMS), "record"),
    "no data": (without(EXACT_UUID, DATA), "record"),
    "data twice": (twice(EXACT_UUID, DATA), "record"),
    "data too long": (data_of(EXACT_UUID, DATA, lambda data: data + b"x"), "record"),
    "data too short": (data_of(EXACT_UUID, DATA, lambda data: data[:-1]), "record"),
    "item leaves its tensor": (data_of(EXACT_UUID, ITEMS, put(2, b"\x7f")), "record"),
    # later formats
    "unknown record in the header": (added(HEADER_UUID, 14), "version"),
    "unknown record in a sidecar": (added(FRAME_UUID, 1 << 20, b"abc"), "version"),
    "unknown record in an exact box": (added(EXACT_UUID, 52), "version"),
    "unknown method": (part_bytes(put(5, b"\x02")), "version"),
    "unknown fields": (part_bytes(put(6, b"\x15")), "version"),
    # limits
    "box form 2": (body(HEADER_UUID, 2, 3, b"abc"), "limit"),
    "body of 65 MiB": (body(HEADER_UUID, 1, 65 << 20, raw(b"")), "limit"),
    "number of ten bytes": (data_of(HEADER_UUID, TENSORS, put(0, b"\xff" * 9 + b"\x01")), "limit"),
    "too many tensors": (data_of(HEADER_UUID, TENSORS, put(0, uint((1 << 20) + 1))), "limit"),
    "long name": (tensor_list(spec(b"a" * 4097)), "limit"),
    "unknown type": (tensor_list(spec(b"a", 24)), "limit"),
    "33 axes": (tensor_list(spec(b"a", 1, *[1] * 33)), "limit"),
    "long axis": (tensor_list(spec(b"a", 1, (1 << 38) + 1)), "limit"),
    "large tensor": (tensor_list(spec(b"a", 1, 1 << 20, 1 << 19)), "limit"),
    "large empty tensor": (tensor_list(spec(b"a", 1, 1 << 38, 0, 1 << 38)), "limit"),
    "alias of nothing": (header_list(ALIASES, text("x") + uint(99)), "limit"),
    "long path": (header_list(FILES, text("x" * 1025) + text("file") + sizes(1, 50)), "limit"),
    "large kernel matrix": (part(shift=24), "limit"),
    "large kernel": (header_list(BASES, uint(1025)), "limit"),
    "too many bases": (data_of(HEADER_UUID, BASES, put(0, uint(257))), "limit"),
    "part of nothing": (part_bytes(put(0, b"\x7f")), "limit"),
    "end of nothing": (data_of(FRAME_UUID, END, put(0, b"\x7f")), "limit"),
    "basis of nothing": (part(bases=(0, 9)), "limit"),
    "five kernel axes": (part(bases=(0,) * 5), "limit"),
    "item of nothing": (data_of(EXACT_UUID, ITEMS, put(1, b"\x7f")), "limit"),
}
#: readers that can seek find these.
INDEX_CORPUS: dict[str, tuple[Mutation, str]] = {
    "index CRC": (payload(INDEX_UUID, put(0, bytes(4))), "digest"),
    "index not deflated": (body(INDEX_UUID, 1, 3, b"abc"), "deflate"),
    "unknown record": (added(INDEX_UUID, 72), "version"),
    "frames twice": (twice(INDEX_UUID, FRAMES), "record"),
    "spans twice": (twice(INDEX_UUID, SPANS), "record"),
    "no spans": (without(INDEX_UUID, SPANS), "index"),
    "no exact boxes": (without(INDEX_UUID, BOXES), "index"),
    "span of nothing": (data_of(INDEX_UUID, SPANS, put(1, b"\x7f")), "limit"),
    "span behind the end": (data_of(INDEX_UUID, SPANS, put(2, b"\x7f")), "limit"),
    "span too short": (data_of(INDEX_UUID, SPANS, put(3, b"\0")), "index"),
    "frames elsewhere": (data_of(INDEX_UUID, FRAMES, lambda _: sizes(3, sidecar(), 1, 1)), "index"),
    "exact boxes elsewhere": (data_of(INDEX_UUID, BOXES, behind), "index"),
    "root and more": (data_of(INDEX_UUID, ROOT, lambda root: root + b"\0"), "record"),
}  # fmt: skip


def code_of(data: bytes, pipe: bool) -> str:
    """Code of the first error: in order, then tensor by tensor."""
    with pytest.raises(FormatError) as caught:
        archive = open_archive(Pipe(data) if pipe else data, check_tensors=True)
        for _ in archive.items():
            pass
        for name in () if pipe else archive:
            archive[name]
    return caught.value.code


@pytest.mark.parametrize("name", CORPUS)
def test_malformed(name: str) -> None:
    mutation, code = CORPUS[name]
    data = mutation(sample())
    assert data != sample()
    assert (code_of(data, False), code_of(data, True)) == (code, code)


@pytest.mark.parametrize("name", INDEX_CORPUS)
def test_malformed_index(name: str) -> None:
    mutation, code = INDEX_CORPUS[name]
    data = mutation(sample())
    assert code_of(data, False) == code
    assert all_same(dict(open_archive(Pipe(data)).items()), tensors())


@cache
def documented() -> set[str]:
    section = Path("FORMAT.md").read_text().partition("## 9. ")[2].partition("## 10")[0]
    return set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE))


def test_every_code_has_a_case() -> None:
    given = {code for _, code in (*CORPUS.values(), *INDEX_CORPUS.values())}
    assert given | {"not-seekable", "base"} == documented()  # see tests/loader, test_updates


def test_the_mutations_alone_change_nothing() -> None:
    same = join_boxes(split_boxes(sample()))
    assert same == sample()
    resealed = records(FRAME_UUID, lambda old: old)(sample())
    assert all_same(dict(open_archive(resealed, check_tensors=True)), tensors())


def test_unknown_odd_records_are_skipped() -> None:
    data = sample()
    for kind in (HEADER_UUID, FRAME_UUID, EXACT_UUID, INDEX_UUID):
        data = added(kind, 77, b"from the future")(data)
        data = records(kind, lambda old: [((1 << 31) + 1, b""), *old])(data)
    assert all_same(dict(open_archive(io.BytesIO(data), check_tensors=True)), tensors())
    assert record(77, b"x") == b"\x4d\x01x"
