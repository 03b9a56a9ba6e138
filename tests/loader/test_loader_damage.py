"""Damaged and truncated archives: right tensors or a WeightvidError, never anything else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import Pipe, normal, packed, same, small_frames, spans

from weightvid.errors import TruncatedError, WeightvidError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions

Array = np.ndarray[Any, Any]
FRAMES = (b"weightvid-frame\0", b"moof", b"mdat")


@cache
def good() -> bytes:
    """Four frames; cheap to decode, since most levels are zero."""
    weights = normal(1, 190, 400)
    weights[3, 5] = 30.0
    arrays = {
        "a.weight": weights,
        "a.bias": normal(2, 190),
        "b.weight": normal(3, 64, 900),
        "count": np.array(3),
        "c.weight": normal(4, 40, 30, 3, 3),
        "d.weight": normal(5, 100, 640),
    }
    with small_frames():
        return packed(arrays, PackOptions(step_factor=1.4, mantissa_bits=23))


@cache
def expected() -> dict[str, Array]:
    with open_archive(io.BytesIO(good()), check_tensors=True) as archive:
        return dict(archive)


@cache
def frames_of() -> dict[str, range]:
    with open_archive(io.BytesIO(good())) as archive:
        return {name: archive.frames_of(name) for name in archive.names}


def source(data: bytes, seekable: bool) -> Any:
    return io.BytesIO(data) if seekable else Pipe(data)


def try_all(data: bytes, seekable: bool) -> WeightvidError | None:
    """Iterate; what arrives must be right."""
    try:
        with open_archive(source(data, seekable), threads=1) as archive:
            for name, array in archive:
                assert same(array, expected()[name]), name
    except WeightvidError as error:
        return error
    return None


def try_each(data: bytes) -> None:
    """One tensor after the other; what arrives must be right."""
    try:
        archive = open_archive(io.BytesIO(data), threads=1)
    except WeightvidError:
        return
    for name in archive.names:
        try:
            if name in expected():
                assert same(archive[name], expected()[name]), name
        except WeightvidError:
            continue


def whole_tensors(length: int) -> set[str]:
    """Tensors whose frames, or exact boxes, lie in the first ``length`` bytes."""
    boxes = [span for span in spans(good()) if span.end <= length]
    frames = sum(span.kind == b"mdat" for span in boxes)
    exact = any(span.kind == b"weightvid-exact\0" for span in boxes)
    return {
        name
        for name, numbers in frames_of().items()
        if (numbers[-1] < frames if numbers else exact)
    }


def cuts() -> list[int]:
    edges = {span.begin for span in spans(good())} | {span.payload for span in spans(good())}
    near = {edge + shift for edge in edges for shift in (-1, 0, 1, 4, 12)}
    random = np.random.default_rng(0).integers(0, len(good()), 60).tolist()
    return sorted({cut for cut in near | set(random) if 0 <= cut < len(good())})


@pytest.mark.parametrize("seekable", [True, False])
def test_truncation(seekable: bool) -> None:
    exacts = sum(span.kind == b"weightvid-exact\0" for span in spans(good()))
    assert exacts == 1
    head = next(span.end for span in spans(good()) if span.kind == b"weightvid-header")
    index = next(span.end for span in spans(good()) if span.kind == b"weightvid-index\0")
    for cut in cuts():
        data, found = good()[:cut], {}
        if cut < head:
            error = try_all(data, seekable)
            assert error is not None
            assert getattr(error, "code", "") in ("truncated", "not-an-archive")
            continue
        archive = open_archive(source(data, seekable), threads=1)
        if cut >= index:  # only mfra is cut, which no reader of ours needs
            assert dict(archive).keys() == expected().keys()
            continue
        if seekable:
            assert archive.complete is False
        with pytest.raises(TruncatedError) as caught:
            for name, array in archive:
                found[name] = array
        assert set(found) == whole_tensors(cut)
        assert all(same(array, expected()[name]) for name, array in found.items())
        missing = set(expected()) - set(found)
        assert set(caught.value.missing) == missing
        assert all(name in str(caught.value) for name in sorted(missing)[:1])


def test_random_access_to_a_truncated_file() -> None:
    head = next(span.end for span in spans(good()) if span.kind == b"weightvid-header")
    for cut in (c for c in cuts() if c >= head):
        archive = open_archive(io.BytesIO(good()[:cut]), threads=1)
        whole = whole_tensors(cut)
        for name in archive.names:
            if name in whole:
                assert same(archive[name], expected()[name])
                assert archive.info(name).shape == expected()[name].shape
            elif not archive.complete:
                with pytest.raises(TruncatedError) as caught:
                    archive[name]
                assert caught.value.missing == (name,)


def header_places() -> Iterator[int]:
    """Every byte of ftyp, moov, the model header, moof, mfra, and of all box headers."""
    for span in spans(good()):
        named = span.kind in (b"ftyp", b"moov", b"weightvid-header", b"moof", b"mfra")
        yield from range(span.begin, span.end if named else span.payload)


@pytest.mark.parametrize("flip", [0xFF, 0x01])
def test_every_header_byte_flipped(flip: int) -> None:
    """Every byte by one reader; the readers take turns, and change places with the flip."""
    for number, place in enumerate(header_places()):
        data = bytearray(good())
        data[place] ^= flip
        try_all(bytes(data), seekable=(number + flip) % 2 == 0)
        if number % 14 == 0:
            try_each(bytes(data))


def mutated(rng: np.random.Generator) -> bytes:
    data = bytearray(good())
    kind = rng.integers(7)
    at = int(rng.integers(len(data)))
    if kind == 0:
        data[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] = rng.integers(256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + int(rng.integers(1, 300))]
    elif kind == 4:
        data[at:at] = rng.integers(0, 256, rng.integers(1, 50), np.uint8).tobytes()
    elif kind == 5:
        size = int(rng.integers(1, 300))
        other = int(rng.integers(len(data)))
        data[at : at + size] = data[other : other + size]
    else:
        first, second = sorted(int(n) for n in rng.integers(0, len(list(spans(good()))), 2))
        boxes = [good()[span.begin : span.end] for span in spans(good())]
        boxes[first], boxes[second] = boxes[second], boxes[first]
        data = bytearray(b"".join(boxes))
    return bytes(data)


def test_random_mutations() -> None:
    rng = np.random.default_rng(int(os.environ.get("WEIGHTVID_FUZZ_SEED", "1")))
    for number in range(int(os.environ.get("WEIGHTVID_FUZZ", "200"))):
        data = mutated(rng)
        if number % 3:
            try_all(data, seekable=bool(number % 3 == 1))
        else:
            try_each(data)


def test_a_flipped_frame_spares_the_tensors_before_it() -> None:
    mdats = [span for span in spans(good()) if span.kind == b"mdat"]
    data = bytearray(good())
    data[mdats[-1].payload + 40] ^= 0x10
    for seekable in (True, False):
        error, names = None, []
        try:
            for name, _ in open_archive(source(bytes(data), seekable)):
                names.append(name)
        except WeightvidError as caught:
            error = caught
        assert error is not None
        last = len(mdats) - 1
        assert set(names) == {n for n, r in frames_of().items() if r and r[-1] < last}


def test_edges_are_where_they_should_be() -> None:
    for before, after in pairwise(spans(good())):
        assert before.end == after.begin


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loader_needs_numpy_and_av_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.mp4"
    path.write_bytes(good())
    code = """
        import sys
        from weightvid.loader import open_archive
        with open_archive(sys.argv[1]) as archive:
            for name, array in archive:
                archive.info(name)
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
        print(*sorted(name for name in sys.modules if name.startswith("weightvid")))
    """
    top, ours = (set(line.split()) for line in run(code, str(path)).splitlines())
    assert not top & {"torch", "safetensors", "typer", "rich", "imageio", "click", "hypothesis"}
    outside = {n for n in top - set(sys.stdlib_module_names) if not n.startswith(("_", "sitecust"))}
    assert outside <= {"weightvid", "numpy", "av", "zipp", "distutils", "cython_runtime"}
    assert not any(
        name.startswith(("weightvid.checkpoint", "weightvid.pack", "weightvid.cli"))
        or name.endswith(("encode", "_search", "_torch"))
        for name in ours
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS as Linux keeps it")
def test_damaged_files_allocate_little(tmp_path: Path) -> None:
    """Files that claim giant things, read with 700 MB of address space beyond import."""
    paths = []
    for number, span in enumerate(spans(good())):
        data = bytearray(good())
        data[span.begin : span.begin + 4] = b"\x7f\xff\xff\xff"
        paths.append(tmp_path / f"size{number}.mp4")
        paths[-1].write_bytes(data)
    rng = np.random.default_rng(3)
    for number in range(60):
        paths.append(tmp_path / f"any{number}.mp4")
        paths[-1].write_bytes(mutated(rng))
    code = """
        import resource, sys
        from weightvid.errors import WeightvidError
        from weightvid.loader import open_archive
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 700_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for path in sys.argv[1:]:
            try:
                with open_archive(path, threads=1) as archive:
                    for name, array in archive:
                        del array
            except WeightvidError:
                continue
        print("done")
    """
    assert run(code, *map(str, paths)).strip() == "done"
