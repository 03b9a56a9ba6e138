"""Malformed archives and the error code that each must give."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
from archives import Pipe, Span, child, first, normal, packed, same, small_frames, spans
from hypothesis import given
from hypothesis import strategies as st

from weightvid.container.boxes import deflate, from_json, inflate, seal, to_json, unseal
from weightvid.errors import FormatError, WeightvidError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions

HEADER, FRAME, EXACT, INDEX = (
    f"weightvid-{name}".encode().ljust(16, b"\0") for name in ("header", "frame", "exact", "index")
)
Mutation = Callable[[bytes], bytes]
Record = dict[str, Any]


@cache
def good() -> bytes:
    weights = normal(1, 130, 600)
    weights[2, 3] = 40.0
    with small_frames():
        return packed(
            {"a.w": weights, "a.b": normal(2, 130), "b.w": normal(3, 70, 300), "n": np.array(3)},
            PackOptions(step_factor=1.0),
        )


@cache
def tensors() -> dict[str, np.ndarray[Any, Any]]:
    with open_archive(io.BytesIO(good())) as archive:
        return dict(archive)


def replace(data: bytes, span: Span, payload: bytes) -> bytes:
    """Put another payload into a top-level box; the size in its header follows."""
    head = data[span.begin + 4 : span.payload]
    size = (4 + len(head) + len(payload)).to_bytes(4, "big")
    return data[: span.begin] + size + head + payload + data[span.end :]


def payload(data: bytes, kind: bytes) -> bytes:
    span = first(data, kind)
    return data[span.payload : span.end]


def sealed(kind: bytes, change: Callable[[Record], Any]) -> Mutation:
    """Change the JSON of the header or of the index, and seal it again."""

    def mutate(data: bytes) -> bytes:
        tail = 4 if kind == INDEX else 0
        body = payload(data, kind)
        record = from_json(inflate(unseal(body[: len(body) - tail], ""), 1 << 20, ""), "")
        changed = change(record)
        new = seal(deflate(to_json(record if changed is None else changed)))
        if tail:
            new += (24 + len(new) + 4).to_bytes(4, "big")
        return replace(data, first(data, kind), new)

    return mutate


def exact_json(change: Callable[[Record], Any]) -> Mutation:
    def mutate(data: bytes) -> bytes:
        body = unseal(payload(data, EXACT), "")
        size = int.from_bytes(body[:4], "big")
        record = from_json(inflate(body[4 : 4 + size], 1 << 20, ""), "")
        changed = change(record)
        text = deflate(to_json(record if changed is None else changed))
        new = seal(len(text).to_bytes(4, "big") + text + body[4 + size :])
        return replace(data, first(data, EXACT), new)

    return mutate


def set_(**values: Any) -> Callable[[Record], None]:
    return lambda record: record.update(values)


def item_set(**values: Any) -> Callable[[Record], None]:
    return lambda record: record["items"][0].update(values)


def patch(path: Iterable[bytes], offset: int, new: bytes) -> Mutation:
    """Overwrite bytes of a (nested) box, counted from its beginning."""

    def mutate(data: bytes) -> bytes:
        at = child(data, path).begin + offset
        return data[:at] + new + data[at + len(new) :]

    return mutate


def without(kind: bytes) -> Mutation:
    def mutate(data: bytes) -> bytes:
        span = first(data, kind)
        return data[: span.begin] + data[span.end :]

    return mutate


def swap(one: bytes, other: bytes) -> Mutation:
    def mutate(data: bytes) -> bytes:
        a, b = first(data, one), first(data, other)
        return (
            data[: a.begin]
            + data[b.begin : b.end]
            + data[a.end : b.begin]
            + data[a.begin : a.end]
            + data[b.end :]
        )

    return mutate


def whole(kind: bytes, new: bytes) -> Mutation:
    return lambda data: replace(data, first(data, kind), new)


def body(kind: bytes, new: bytes) -> Mutation:
    return whole(kind, seal(new))


def foreign(text: bytes) -> bytes:
    """A text deflated by a dictionary that is not the format's."""
    packer = zlib.compressobj(zdict=b"something else")
    return packer.compress(text) + packer.flush()


def bomb(kind: bytes) -> Mutation:
    """Sixty-five million bytes of JSON white space in a small box."""
    return body(kind, deflate(b" " * ((64 << 20) + 1)))


STBL = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
HVC1 = (*STBL, b"stsd", b"hvc1")
CORPUS: dict[str, tuple[Mutation, str]] = {
    "empty file": (lambda data: b"", "not-an-archive"),
    "text": (lambda data: b"#!/bin/sh\necho this is a script\n" * 40, "not-an-archive"),
    "png": (lambda data: b"\x89PNG\r\n\x1a\n" + bytes(500), "not-an-archive"),
    "safetensors": (lambda data: (80).to_bytes(8, "little") + b"{}" * 300, "not-an-archive"),
    "other brand": (patch([b"ftyp"], 24, b"mp42"), "not-an-archive"),
    "no ftyp": (without(b"ftyp"), "not-an-archive"),
    "no moov": (without(b"moov"), "order"),
    "no header": (without(HEADER), "order"),
    "no sidecar": (without(FRAME), "order"),
    "header before moov": (swap(b"moov", HEADER), "order"),
    "head alone": (lambda data: data[: first(data, HEADER).begin], "truncated"),
    "sidecar size 0": (patch([FRAME], 0, bytes(4)), "box-size"),
    "sidecar size 23": (patch([FRAME], 0, b"\0\0\0\x17"), "box-size"),
    "sidecar size 4 GB": (patch([FRAME], 0, b"\xff\xff\xff\xff"), "limit"),
    "moov size 4 GB": (patch([b"moov"], 0, b"\xff\xff\xff\xff"), "limit"),
    "no trak": (patch([b"moov", b"trak"], 4, b"free"), "moov"),
    "no hvc1": (patch(HVC1, 4, b"avc1"), "moov"),
    "no hvcC": (patch((*HVC1, b"hvcC"), 4, b"free"), "moov"),
    "trak size 1": (patch([b"moov", b"trak"], 0, b"\0\0\0\1"), "box-size"),
    "trak too large": (patch([b"moov", b"trak"], 0, b"\0\1\0\0"), "box-size"),
    "empty moov": (whole(b"moov", b""), "moov"),
    "width in moov": (patch(HVC1, 8 + 24, b"\x02\x40"), "track"),
    "hvcC garbage": (patch((*HVC1, b"hvcC"), 8, b"\xff" * 23), "packet"),
    "moof without mfhd": (patch([b"moof", b"mfhd"], 4, b"free"), "moov"),
    "moof of another frame": (patch([b"moof", b"mfhd"], 12, b"\0\0\0\7"), "order"),
    "empty mdat": (whole(b"mdat", b""), "packet"),
    "mdat zeroed": (whole(b"mdat", bytes(4000)), "packet"),
    "header digest": (patch([HEADER], 24, bytes(32)), "digest"),
    "header not deflated": (body(HEADER, b"{}"), "deflate"),
    "header cut": (body(HEADER, deflate(b"{}" * 999)[:-6]), "deflate"),
    "header with more behind": (body(HEADER, deflate(b"{}") + b"x"), "deflate"),
    "header not UTF-8": (body(HEADER, deflate(b'"\xff"')), "json"),
    "header not JSON": (body(HEADER, deflate(b"{")), "json"),
    "header NaN": (body(HEADER, deflate(b'{"weightvid":NaN}')), "json"),
    "header nested": (body(HEADER, deflate(b"[" * 200_000)), "json"),
    "header long number": (body(HEADER, deflate(b"9" * 5000)), "json"),
    "header by another dictionary": (body(HEADER, foreign(b'{"weightvid":[2,0]}')), "deflate"),
    "header bomb": (bomb(HEADER), "limit"),
    "header a list": (sealed(HEADER, lambda _: []), "schema"),
    "header empty": (sealed(HEADER, lambda _: {}), "schema"),
    "version 0.9": (sealed(HEADER, set_(weightvid=[0, 9])), "version"),
    "version 3.0": (sealed(HEADER, set_(weightvid=[3, 0])), "version"),
    "version text": (sealed(HEADER, set_(weightvid="1.0")), "schema"),
    "version negative": (sealed(HEADER, set_(weightvid=[1, -1])), "schema"),
    "version short": (sealed(HEADER, set_(weightvid=[1])), "schema"),
    "must understand": (sealed(HEADER, set_(must_understand=["sorcery"])), "must_understand"),
    "must understand lists": (sealed(HEADER, set_(must_understand=[[]])), "must_understand"),
    "must understand all": (sealed(HEADER, set_(must_understand="all")), "schema"),
    "no track": (sealed(HEADER, lambda r: {k: r[k] for k in r if k != "track"}), "schema"),
    "another codec": (sealed(HEADER, lambda r: r["track"].update(codec="av9")), "track"),
    "odd width": (sealed(HEADER, lambda r: r["track"].update(width=257)), "track"),
    "giant width": (sealed(HEADER, lambda r: r["track"].update(width=1 << 20)), "schema"),
    "width a float": (sealed(HEADER, lambda r: r["track"].update(width=256.0)), "schema"),
    "width true": (sealed(HEADER, lambda r: r["track"].update(width=True)), "schema"),
    "height in header": (sealed(HEADER, lambda r: r["track"].update(height=320)), "track"),
    "tensors a dict": (sealed(HEADER, set_(tensors={})), "schema"),
    "tensor a name": (sealed(HEADER, set_(tensors=["a"])), "schema"),
    "tensor without shape": (sealed(HEADER, set_(tensors=[["a", "F32"]])), "schema"),
    "tensor name a number": (sealed(HEADER, set_(tensors=[[1, "F32", []]])), "schema"),
    "tensor dtype a list": (sealed(HEADER, set_(tensors=[["a", [], []]])), "schema"),
    "tensor twice": (sealed(HEADER, set_(tensors=[["a", "F32", []]] * 2)), "schema"),
    "unknown dtype": (sealed(HEADER, set_(tensors=[["a", "F31", [1]]])), "dtype"),
    "objects": (sealed(HEADER, set_(tensors=[["a", "npy:|O8", [1]]])), "dtype"),
    "negative shape": (sealed(HEADER, set_(tensors=[["a", "F32", [-1]]])), "schema"),
    "giant dimension": (sealed(HEADER, set_(tensors=[["a", "F32", [1 << 39]]])), "schema"),
    "giant tensor": (sealed(HEADER, set_(tensors=[["a", "F32", [1 << 30, 1 << 30]]])), "limit"),
    "33 dimensions": (sealed(HEADER, set_(tensors=[["a", "F32", [1] * 33]])), "schema"),
    "long name": (sealed(HEADER, set_(tensors=[["a" * 4097, "F32", [1]]])), "limit"),
    "alias to nothing": (sealed(HEADER, set_(aliases={"x": "gone"})), "schema"),
    "alias to a list": (sealed(HEADER, set_(aliases={"x": []})), "schema"),
    "alias over a name": (sealed(HEADER, set_(aliases={"a.w": "b.w"})), "schema"),
    "aliases a list": (sealed(HEADER, set_(aliases=["x"])), "schema"),
    "metadata number": (sealed(HEADER, set_(metadata={"x": 1})), "schema"),
    "about a list": (sealed(HEADER, set_(about=[1])), "schema"),
    "exact digest": (patch([EXACT], 24, bytes(32)), "digest"),
    "exact empty": (body(EXACT, b""), "schema"),
    "exact text too long": (body(EXACT, b"\xff\xff\xff\xff"), "schema"),
    "exact a list": (exact_json(lambda _: []), "schema"),
    "exact without items": (exact_json(lambda r: {"streams": r["streams"]}), "schema"),
    "exact without streams": (exact_json(lambda r: {"items": r["items"]}), "schema"),
    "exact id unknown": (exact_json(item_set(id=99)), "schema"),
    "exact id negative": (exact_json(item_set(id=-1)), "schema"),
    "exact first beyond": (exact_json(item_set(first=1 << 20)), "schema"),
    "exact count beyond": (exact_json(item_set(count=1 << 20)), "schema"),
    "exact levels unknown": (exact_json(item_set(levels="I64", step="0x1p-4")), "schema"),
    "exact levels a list": (exact_json(item_set(levels=[])), "schema"),
    "exact stream cut": (exact_json(lambda r: {**r, "streams": r["streams"][:-1]}), "schema"),
    "exact stream twice": (exact_json(lambda r: {**r, "streams": r["streams"] * 2}), "schema"),
    "exact codec unknown": (
        exact_json(lambda r: {**r, "streams": [["zip", n] for _, n in r["streams"]]}),
        "stream",
    ),
    "exact codec swapped": (
        exact_json(lambda r: {**r, "streams": [["lzma2", n] for _, n in r["streams"]]}),
        "stream",
    ),
}
#: only readers that can seek look at these.
INDEX_CORPUS: dict[str, tuple[Mutation, str]] = {
    "index digest": (patch([INDEX], 24, bytes(32)), "digest"),
    "index a list": (sealed(INDEX, lambda _: []), "schema"),
    "index without frames": (sealed(INDEX, lambda r: r.pop("frames") and r), "schema"),
    "index id unknown": (sealed(INDEX, set_(ribbon=[99])), "schema"),
    "index id twice": (sealed(INDEX, set_(ribbon=[0, 0])), "schema"),
    "index frame short": (sealed(INDEX, set_(frames=[[1, 2]])), "schema"),
    "index frame negative": (sealed(INDEX, set_(frames=[[-1, 2, 3]])), "schema"),
    "index frame giant": (sealed(INDEX, set_(frames=[[0, 1 << 40, 3]])), "limit"),
    "index no frames": (sealed(INDEX, set_(frames=[])), "index"),
    "index exact text": (sealed(INDEX, set_(exact="none")), "schema"),
    "index bomb": (
        lambda data: replace(
            data, first(data, INDEX), seal(deflate(b" " * ((64 << 20) + 1))) + bytes(4)
        ),
        "limit",
    ),
}
ONLY_ACCESS: dict[str, tuple[Mutation, str]] = {
    "index shifted": (
        sealed(INDEX, lambda r: r["frames"][0].__setitem__(0, r["frames"][0][0] + 8)),
        "",
    ),
    "index frame swapped": (sealed(INDEX, lambda r: r["frames"].reverse()), ""),
    "index ribbon swapped": (sealed(INDEX, lambda r: r["ribbon"].reverse()), ""),
    "index exact moved": (sealed(INDEX, lambda r: r["exact"][0].__setitem__(0, 7)), ""),
    "index exact renamed": (sealed(INDEX, lambda r: r["exact"][0].__setitem__(2, [0])), ""),
    "index beyond the end": (sealed(INDEX, lambda r: r["frames"][0].__setitem__(0, 1 << 40)), ""),
}


def read_all(data: bytes, seekable: bool) -> None:
    stream: Any = io.BytesIO(data) if seekable else Pipe(data)
    with open_archive(stream, threads=1) as archive:
        for name, array in archive:
            assert same(array, tensors()[name])


def access_all(data: bytes) -> None:
    """One tensor after the other: right, or refused."""
    with open_archive(io.BytesIO(data), threads=1) as archive:
        for name in archive.names:
            try:
                assert same(archive[name], tensors()[name])
                archive.info(name)
                archive.levels(name)
            except WeightvidError:
                continue


def test_the_good_one_is_good() -> None:
    read_all(good(), seekable=True)
    read_all(good(), seekable=False)
    access_all(good())
    assert sum(span.kind == b"moof" for span in spans(good())) >= 2


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("seekable", [True, False])
def test_malformed(name: str, seekable: bool) -> None:
    mutate, code = CORPUS[name]
    with pytest.raises(FormatError) as caught:
        read_all(mutate(good()), seekable)
    assert caught.value.code == code
    assert f"[{code}]" in str(caught.value)


@pytest.mark.parametrize("name", INDEX_CORPUS)
def test_malformed_index(name: str) -> None:
    mutate, code = INDEX_CORPUS[name]
    data = mutate(good())
    if "bomb" in name:  # the size at the end of the box must lead to it
        span = first(data, INDEX)
        data = data[: span.end - 4] + (span.end - span.begin).to_bytes(4, "big") + data[span.end :]
    with pytest.raises(FormatError) as caught:
        open_archive(io.BytesIO(data))
    assert caught.value.code == code


@pytest.mark.parametrize("name", ONLY_ACCESS)
def test_an_index_that_lies(name: str) -> None:
    access_all(ONLY_ACCESS[name][0](good()))


@pytest.mark.parametrize("unknown", [b"free", b"skip", b"emsg", b"uuid"])
def test_unknown_boxes_are_skipped(unknown: bytes) -> None:
    extra = (1000).to_bytes(4, "big") + unknown + b"not one of ours!".ljust(992, b"\0")
    for span in list(spans(good()))[1:]:
        read_all(good()[: span.begin] + extra + good()[span.begin :], seekable=False)


def test_a_large_size_is_understood() -> None:
    """A 64-bit size (ISO/IEC 14496-12 4.2) on a box of ours."""
    data = good()
    span = next(s for s in spans(data) if s.kind == b"mdat")
    content = data[span.payload : span.end]
    large = b"\0\0\0\1mdat" + (16 + len(content)).to_bytes(8, "big") + content
    read_all(data[: span.begin] + large + data[span.end :], seekable=False)


def test_a_newer_minor_version_and_unknown_keys_are_read() -> None:
    change = set_(weightvid=[2, 7], novelty={"x": 1})
    read_all(sealed(HEADER, change)(good()), seekable=False)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["a.w", "a.b", "I8", "F32", "0x1p-3", "raw", "lzma2", 0, 1, 2, -1, 256]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    found = [path]
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def edit(record: Any, data: st.DataObject) -> Any:
    """A record with one value inside replaced or removed."""
    path = data.draw(st.sampled_from(places(record)), "place")
    if not path:
        return data.draw(json_values, "value")
    owner = record
    for key in path[:-1]:
        owner = owner[key]
    if data.draw(st.booleans(), "remove"):
        del owner[path[-1]]
    else:
        owner[path[-1]] = data.draw(json_values, "value")
    return record


def survives(changed: bytes) -> None:
    """Whatever a well-sealed but senseless file does, it raises none but our errors."""
    for stream in (io.BytesIO(changed), Pipe(changed)):
        try:
            with open_archive(stream, threads=1) as archive:  # type: ignore[arg-type]
                for name in archive.names if stream.seekable() else ():
                    archive.spec(name)
                    archive.info(name)
                for _ in archive:
                    pass
        except WeightvidError:
            continue


@given(st.data())
def test_any_header_with_a_good_seal(data: st.DataObject) -> None:
    survives(sealed(HEADER, lambda record: edit(record, data))(good()))


@given(st.data())
def test_any_index_with_a_good_seal(data: st.DataObject) -> None:
    survives(sealed(INDEX, lambda record: edit(record, data))(good()))


@given(st.data())
def test_any_exact_box_with_a_good_seal(data: st.DataObject) -> None:
    survives(exact_json(lambda record: edit(record, data))(good()))


@cache
def first_luma() -> bytes:
    """Samples of the first frame, by PyAV's own demuxer."""
    import av

    with av.open(io.BytesIO(good())) as media:
        plane = next(media.decode(video=0)).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        return rows[:, : plane.width].tobytes()


@given(st.data())
def test_any_sidecar_with_a_good_digest(data: st.DataObject) -> None:
    old = payload(good(), FRAME)[32:]
    size = int.from_bytes(old[:4], "big")
    head = inflate(old[4 : 4 + size], 1 << 20, "")
    length = int.from_bytes(head[:4], "big")
    record = edit(from_json(head[4 : 4 + length], ""), data)
    text = to_json(record)
    head = deflate(len(text).to_bytes(4, "big") + text + head[4 + length :])
    new = len(head).to_bytes(4, "big") + head + old[4 + size :]
    digest = hashlib.sha256(new + first_luma()).digest()
    survives(replace(good(), first(good(), FRAME), digest + new))
