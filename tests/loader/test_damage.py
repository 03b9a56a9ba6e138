"""Cut and damaged archives: right tensors, or an error that says what is wrong."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import fuzz_archives as fuzz
import numpy as np
import pytest
from samples import Array, Pipe, all_same, same, sample, tensors

from weightvid.errors import CodecError, FormatError, TruncatedError, WeightvidError
from weightvid.loader import EXACT_UUID, FILE_UUID, HEADER_UUID, INDEX_UUID, open_archive


class Span(NamedTuple):
    """A box: its type, where it begins, where its payload does, and its end."""

    kind: bytes
    begin: int
    payload: int
    end: int


@cache
def spans() -> tuple[Span, ...]:
    found, at = [], 0
    while at < len(sample()):
        size = int.from_bytes(sample()[at : at + 4], "big")
        ours = sample()[at + 4 : at + 8] == b"uuid"
        kind = sample()[at + 8 : at + 24] if ours else sample()[at + 4 : at + 8]
        found.append(Span(kind, at, at + (24 if ours else 8), at + size))
        at += size
    return tuple(found)


def end_of(kind: bytes) -> int:
    return [span.end for span in spans() if span.kind == kind][-1]


@cache
def frames() -> dict[str, range]:
    with open_archive(sample()) as archive:
        return {name: archive.info(name).frames for name in archive}


def whole(length: int) -> set[str]:
    """Names whose frames, or exact boxes, lie in the first ``length`` bytes."""
    count = sum(span.kind == b"mdat" and span.end <= length for span in spans())
    found = {name for name, own in frames().items() if own and own[-1] < count}
    ends = [span.end for span in spans() if span.kind == EXACT_UUID]
    with open_archive(sample()) as archive:
        for end, (_, numbers) in zip(ends, archive.index.boxes, strict=True):
            found |= {archive.header.tensors[n].name for n in numbers if end <= length}
        aliases = archive.header.aliases.items()
        return found | {name for name, n in aliases if archive.header.tensors[n].name in found}


def source(data: bytes, seekable: bool) -> Any:
    return io.BytesIO(data) if seekable else Pipe(data)


def cuts() -> list[int]:
    edges = {place for span in spans() for place in (span.begin, span.payload)}
    near = {edge + shift for edge in edges for shift in (-1, 0, 1, 4)}
    random = np.random.default_rng(0).integers(0, len(sample()), 60).tolist()
    return sorted(cut for cut in near | set(random) if 0 <= cut < len(sample()))


@pytest.mark.parametrize("seekable", [True, False])
def test_truncation(seekable: bool) -> None:
    head = end_of(FILE_UUID if seekable else HEADER_UUID)
    for cut in cuts():
        data, found = sample()[:cut], dict[str, Array]()
        if cut < head:
            with pytest.raises(FormatError) as refused:
                dict(open_archive(source(data, seekable)).items())
            assert refused.value.code == ("truncated" if cut else "ftyp")
            continue
        archive = open_archive(source(data, seekable))
        if cut >= end_of(INDEX_UUID):  # `mfra` alone is cut
            assert all_same(dict(archive.items()), tensors())
            continue
        assert archive.index is None
        with pytest.raises(TruncatedError) as caught:
            for name, array in archive.items():
                found[name] = array
        assert caught.value.code == "truncated"
        assert found.keys() == whole(cut)
        assert all(same(array, tensors()[name]) for name, array in found.items())
        missing = set(tensors()) - found.keys() - {"tied"}
        assert set(caught.value.missing) == missing
        assert not missing or any(name in str(caught.value) for name in missing)


def test_single_tensors_of_a_cut_file() -> None:
    for cut in (cut for cut in cuts() if end_of(FILE_UUID) <= cut < end_of(INDEX_UUID)):
        archive = open_archive(sample()[:cut])
        for name in frames() if cut % 7 == 0 else ("conv", "bias"):
            if name in whole(cut):
                assert same(archive[name], tensors()[name])
            else:
                with pytest.raises(TruncatedError, match=rf"missing:.*{name}|cut short"):
                    archive[name]


@pytest.mark.parametrize("garbage", [b"\0", b"x" * 15, bytes(100), b"\0\0\0\x10mfro" + bytes(8)])
def test_what_lies_behind_the_end_is_not_looked_at(garbage: bytes) -> None:
    archive = open_archive(sample() + garbage)
    assert archive.index is None
    assert all_same(dict(archive.items()), tensors())
    assert all_same(dict(open_archive(Pipe(sample() + garbage)).items()), tensors())


def read(data: bytes, seekable: bool) -> WeightvidError | None:
    """Read everything; what comes must be right. The error, if there was one."""
    try:
        for name, array in open_archive(source(data, seekable)).items():
            assert same(array, tensors()[name]), name
    except FormatError as error:
        assert error.code
        return error
    except CodecError as error:
        return error
    return None


def flipped(place: int, bits: int) -> bytes:
    data = bytearray(sample())
    data[place] ^= bits
    return bytes(data)


def places() -> Iterator[tuple[int, bool]]:
    """Bytes of everything but packets, and whether a CRC-32 is on them; and some of packets."""
    for span in spans():
        sealed = len(span.kind) == 16
        begin = span.payload if span.kind == b"mdat" else span.end
        yield from ((place, sealed) for place in range(span.begin, begin))
    packets = [place for s in spans() if s.kind == b"mdat" for place in range(s.payload, s.end)]
    yield from ((place, True) for place in np.random.default_rng(1).choice(packets, 60).tolist())


def test_flips() -> None:
    """Every byte, of one bit or all, by a reader that seeks or by one that does not, in turn."""
    undetected = []
    for number, (place, sealed) in enumerate(places()):
        error = read(flipped(place, (0x01, 0xFF)[number % 2]), seekable=number % 4 < 2)
        if sealed and error is None:
            undetected.append(place)
    # Readers of pipes look at the type of the index alone, and nobody needs side files.
    unread = {FILE_UUID, INDEX_UUID}
    assert set(undetected) <= {
        place for span in spans() if span.kind in unread for place in range(span.begin, span.end)
    }


def test_a_damaged_index_is_seen_by_those_who_use_it() -> None:
    span = next(span for span in spans() if span.kind == INDEX_UUID)
    for place in range(span.payload, span.end - 4):
        with pytest.raises(FormatError) as caught:
            open_archive(flipped(place, 0x10))
        assert caught.value.code == "digest"


def test_a_damaged_side_file_is_seen_when_it_is_read() -> None:
    span = next(span for span in spans() if span.kind == FILE_UUID)
    for place in range(span.payload, span.end):
        archive = open_archive(flipped(place, 0x10))
        with pytest.raises(FormatError) as caught:
            archive.read_file("config.json")
        assert caught.value.code == "digest"


def test_a_damaged_frame_spares_other_frames() -> None:
    packets = [span for span in spans() if span.kind == b"mdat"]
    data = flipped(packets[-1].payload + 40, 0x10)
    for seekable in (True, False):
        found = {}
        with pytest.raises((FormatError, CodecError)):
            for name, array in open_archive(source(data, seekable)).items():
                found[name] = array
        last = len(packets) - 1
        assert found.keys() == {n for n, own in frames().items() if own and own[-1] < last}
    archive = open_archive(data)
    assert same(archive["bias"], tensors()["bias"])


def test_a_wrong_hash_of_a_tensor_is_looked_at_on_demand() -> None:
    """Frame and box are whole: the sidecar itself says another hash."""
    boxes = fuzz.split_boxes(sample())
    at = next(n for n, box in enumerate(boxes) if box.kind == b"weightvid-frame\0")

    def change(records: list[fuzz.Record]) -> list[fuzz.Record]:
        return [(kind, data[:1] + bytes(8) + data[9:] if kind == 36 else data)
                for kind, data in records]  # fmt: skip

    boxes[at] = boxes[at]._replace(payload=fuzz.change_records(boxes[at].payload, change))
    data = fuzz.join_boxes(boxes)
    assert all_same(dict(open_archive(data).items()), tensors())
    with pytest.raises(FormatError, match="'conv'") as caught:
        open_archive(data, check_tensors=True)["conv"]
    assert (caught.value.code, caught.value.tensor) == ("tensor-digest", "conv")
