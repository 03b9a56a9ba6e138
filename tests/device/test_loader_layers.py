"""The C loader on archives of several layers, updates, and bit-exact floats, against Python's."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final

import fuzz_archives as fuzz
import numpy as np
import pytest
from independent import sources
from test_hevc import ROOT, SANITIZED, SOURCES, compiled

from weightvid.checkpoint import from_mapping
from weightvid.errors import TruncatedError
from weightvid.loader import DTYPES, open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.update import apply_updates

GOLDEN: Final = ROOT / "data" / "golden"
OK, MEMORY, TRUNCATED, BASE, COARSE, STORED, CHECK_ALL = 0, 2, 5, 13, 14, 255, 1
POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t
BEGIN: Final = ctypes.CFUNCTYPE(POINTER, POINTER, POINTER, SIZE)
END: Final = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER, ctypes.c_int)
ALLOCATE: Final = ctypes.CFUNCTYPE(POINTER, POINTER, SIZE)
FREE: Final = ctypes.CFUNCTYPE(None, POINTER, POINTER)
Found = dict[str, tuple[int, bytes]]


class Tensor(ctypes.Structure):
    """Struct wv_tensor, as far as it is looked at."""

    _fields_ = (("name", POINTER), ("bytes", SIZE), ("dtype", ctypes.c_int))

    @property
    def text(self) -> str:
        return ctypes.string_at(self.name, self.bytes).decode("utf-8", "surrogatepass")


class Options(ctypes.Structure):
    """Struct wv_options."""

    _fields_ = (
        ("user", POINTER),
        ("allocate", ALLOCATE),
        ("free", FREE),
        ("decoder", POINTER),
        ("checks", ctypes.c_int),
    )


class Sink(ctypes.Structure):
    """Struct wv_sink; ``found`` has status and bytes of each tensor that came out."""

    _fields_ = (("user", POINTER), ("type", ctypes.c_int), ("begin", BEGIN), ("end", END))

    def __init__(self, kind: int = STORED) -> None:
        super().__init__(None, kind, BEGIN(self._begin), END(self._end))
        self.rooms: dict[int, Any] = {}
        self.found: Found = {}

    def _begin(self, _: int, tensor: int, size: int) -> int:
        room = np.empty(max(size, 1), np.uint8)
        self.rooms[room.ctypes.data] = room[:size]
        return room.ctypes.data

    def _end(self, _: int, tensor: int, room: int, status: int) -> None:
        name = Tensor.from_address(tensor).text
        self.found[name] = status, self.rooms.pop(room).tobytes()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("loader") / "libweightvid.so"
    sources = (SOURCES / "weightvid.c", SOURCES / "hevc.c")
    made = ctypes.CDLL(
        str(compiled(target, "-O2", "-fPIC", "-shared", "-ffp-contract=off", *sources))
    )
    made.wv_get.restype = made.wv_find.restype = ctypes.POINTER(Tensor)
    made.wv_bytes.restype = SIZE
    made.wv_load.argtypes = [POINTER, POINTER, ctypes.c_int, POINTER, SIZE]
    made.wv_open_memory.argtypes = [POINTER, ctypes.c_char_p, SIZE, POINTER]
    made.wv_push.argtypes = [POINTER, ctypes.c_char_p, SIZE]
    made.wv_load_all.argtypes = made.wv_use_base.argtypes = [POINTER, POINTER]
    made.wv_use_layers.argtypes = made.wv_get.argtypes = [POINTER, ctypes.c_uint32]
    made.wv_close.argtypes = made.wv_count.argtypes = made.wv_finish.argtypes = [POINTER]
    return made


@contextmanager
def opened(library: ctypes.CDLL, data: Any) -> Iterator[Any]:
    """An archive in memory."""
    archive, options = POINTER(), Options(checks=CHECK_ALL)
    assert (
        library.wv_open_memory(ctypes.byref(archive), data, len(data), ctypes.byref(options)) == OK
    )
    yield archive
    library.wv_close(archive)


def one_by_one(library: ctypes.CDLL, archive: Any) -> Found:
    found = {}
    for place in range(library.wv_count(archive)):
        tensor = library.wv_get(archive, place)
        size = library.wv_bytes(tensor, STORED)
        room = ctypes.create_string_buffer(size + 1)
        status = library.wv_load(archive, tensor, STORED, room, size)
        found[tensor.contents.text] = status, room.raw[:size]
    return found


def streamed(
    library: ctypes.CDLL,
    data: bytes,
    base: Any = None,
    layers: int = 16,
    memory: tuple[Any, Any] = (ALLOCATE(), FREE()),
) -> tuple[int, Found]:
    """Status and tensors of bytes that come piece by piece."""
    archive, sink, options = POINTER(), Sink(), Options(None, *memory, checks=CHECK_ALL)
    status = library.wv_open_stream(
        ctypes.byref(archive), ctypes.byref(sink), ctypes.byref(options)
    )
    if status != OK:
        return status, {}
    assert base is None or library.wv_use_base(archive, base) == OK
    assert library.wv_use_layers(archive, layers) == OK
    for at in range(0, len(data), 777):
        piece = data[at : at + 777]
        if library.wv_push(archive, piece, len(piece)) != OK:
            break
    status = library.wv_finish(archive)
    library.wv_close(archive)
    return status, sink.found


def every_way(library: ctypes.CDLL, data: bytes, base: Any = None, layers: int = 16) -> Found:
    """Tensors as they come one by one, all at once, and from a stream: the same each time."""
    with opened(library, data) as archive:
        assert base is None or library.wv_use_base(archive, base) == OK
        assert library.wv_use_layers(archive, layers) == OK
        found, sink = one_by_one(library, archive), Sink()
        assert library.wv_load_all(archive, ctypes.byref(sink)) == OK
        assert sink.found == found
    assert streamed(library, data, base, layers) == (OK, found)
    return found


def wanted(path: Path, base: Path | None = None, layers: int = 16) -> Found:
    with open_archive(path, base=base, layers=layers, check_tensors=True) as archive:
        return {spec.name: (OK, array.tobytes()) for spec, array in archive.stored_items()}


@pytest.mark.parametrize(
    ("name", "layers"),
    [("merged", 16), ("progressive", 16), ("progressive", 2), ("progressive", 1)],
)
def test_sums_of_layers(library: ctypes.CDLL, name: str, layers: int) -> None:
    path = GOLDEN / f"{name}.mp4"
    assert every_way(library, path.read_bytes(), layers=layers) == wanted(path, layers=layers)


def test_types_of_sums(library: ctypes.CDLL) -> None:
    """Sums are of the tensor's own type; what is wanted is made of them."""
    path = GOLDEN / "merged.mp4"
    for kind, code in (("f4", 1), ("f2", 2)):
        with opened(library, path.read_bytes()) as archive, open_archive(path) as python:
            sink = Sink(code)
            assert library.wv_load_all(archive, ctypes.byref(sink)) == OK
            for name in (n for n in python if python.spec(n).dtype in ("F32", "F16")):
                assert sink.found[name] == (OK, python.stored(name).astype(kind).tobytes())


def test_float16_of_float64(library: ctypes.CDLL, tmp_path: Path) -> None:
    """Rounded once, not by way of float32."""
    ties = (1 + 2**-11, 65520, 2**-25, 3 * 2**-25, 0)
    near = [tie + other for tie in ties for other in (-(2**-40), 0, 2**-40)]
    values = np.array([*near, 1e300, 5e-324, np.inf, np.nan, 0.1])
    values = np.concatenate((values, -values))
    with from_mapping({"a": values}) as checkpoint:
        pack_checkpoint(checkpoint, tmp_path / "a.mp4", PackOptions(lossless=True, jobs=1))
    with opened(library, (tmp_path / "a.mp4").read_bytes()) as archive, np.errstate(over="ignore"):
        sink = Sink(2)
        assert library.wv_load_all(archive, ctypes.byref(sink)) == OK
        assert sink.found == {"a": (OK, values.astype(np.float16).tobytes())}


def test_file_that_is_replaced(library: ctypes.CDLL, tmp_path: Path) -> None:
    """While it is open, by another one of the same tensors: no picture of before is shown."""
    paths = [tmp_path / "1.mp4", tmp_path / "2.mp4"]
    for seed, path in enumerate(paths):
        arrays = {name: sources.normal(10 * seed + n, 90, 100) for n, name in enumerate("ab")}
        with from_mapping(arrays) as checkpoint:
            pack_checkpoint(checkpoint, path, PackOptions(jobs=1))
    before, after = sorted(paths, key=lambda path: -path.stat().st_size)
    memory = ctypes.create_string_buffer(before.read_bytes(), before.stat().st_size)
    with opened(library, memory) as archive:
        assert one_by_one(library, archive) == wanted(before)
        ctypes.memmove(memory, after.read_bytes(), after.stat().st_size)
        assert one_by_one(library, archive) == wanted(after)


def test_updates(library: ctypes.CDLL) -> None:
    path, below = GOLDEN / "update.mp4", GOLDEN / "progressive.mp4"
    with opened(library, below.read_bytes()) as base:
        assert every_way(library, path.read_bytes(), base) == wanted(path, below)


def test_bases(library: ctypes.CDLL) -> None:
    """An update without its base, with another one, or with a part of it; a base for no update."""
    update, below, other = (
        (GOLDEN / f"{name}.mp4").read_bytes() for name in ("update", "progressive", "merged")
    )
    with opened(library, update) as archive, opened(library, below) as base:
        assert {status for status, _ in one_by_one(library, archive).values()} >= {BASE}
        assert library.wv_load_all(archive, ctypes.byref(Sink())) == BASE
        assert library.wv_use_base(base, archive) == BASE
        with opened(library, other) as another:
            assert library.wv_use_base(archive, another) == BASE
        assert library.wv_use_layers(base, 2) == OK
        assert library.wv_use_base(archive, base) == BASE
        assert library.wv_use_layers(base, 3) == OK
        assert library.wv_use_base(archive, base) == OK


@pytest.mark.parametrize("small", [False, True], ids=["golden", "in pieces"])
def test_files_that_end_early(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """The same comes as from Python, also where a layer ends after some of its parts or items."""
    path, cut = GOLDEN / "progressive.mp4", tmp_path / "cut.mp4"
    if small:
        path = tmp_path / "pieces.mp4"
        monkeypatch.setattr("weightvid.levels.code.PART_WEIGHTS", 20_000)
        monkeypatch.setattr("weightvid.writer.EXACT_BOX_BYTES", 500)
        arrays = {"a": sources.normal(40, 300, 400), "b": sources.normal(41, 200, 9, kind="f2")}
        arrays |= {"bias": sources.normal(42, 50), "exact": np.arange(1400) ** 5 % 99991}
        later = arrays | {"exact": arrays["exact"] + np.arange(1400) % 5}
        base, update = tmp_path / "base.mp4", tmp_path / "later.mp4"
        options = PackOptions(recipe="small", jobs=1)
        kinds = replace(options, layers=3), replace(options, base=(base,))
        for tensors, step, kind in zip((arrays, later), (base, update), kinds, strict=True):
            with from_mapping(tensors) as checkpoint, sources.small_frames():
                pack_checkpoint(checkpoint, step, kind)
        apply_updates(base, [update], path)
    data, statuses, names = path.read_bytes(), set[int](), set(wanted(path))
    last = len(data) - 3000  # behind it, boxes of one tensor that is exact
    for size in (*range(2000, last, len(data) // 40), *range(last, len(data), 300)):
        cut.write_bytes(data[:size])
        there: dict[str, bytes] = {}
        with open_archive(cut, check_tensors=True) as archive:
            try:
                for spec, array in archive.stored_items():
                    there[spec.name] = array.tobytes()
            except TruncatedError as error:
                assert set(error.missing) == names - there.keys()
        status, found = streamed(library, data[:size])
        assert status in (OK, TRUNCATED)
        statuses |= {status for status, _ in found.values()}
        came = {name: array for name, (status, array) in found.items() if status in (OK, COARSE)}
        assert came == there
    assert statuses >= {OK, COARSE}


def test_streams_without_memory(library: ctypes.CDLL) -> None:
    """The first, second, third... allocation fails: a status says so, and all memory comes back."""
    update, below = ((GOLDEN / f"{name}.mp4").read_bytes() for name in ("update", "progressive"))
    rooms: dict[int, Any] = {}
    status, most, left = MEMORY, 0, 0

    def allocate(_: int, size: int) -> int | None:
        nonlocal left
        left -= 1
        room = (ctypes.c_uint64 * (size // 8 + 1))()
        if left < 0:
            return None
        rooms[ctypes.addressof(room)] = room
        return ctypes.addressof(room)

    memory = ALLOCATE(allocate), FREE(lambda _, room: rooms.pop(room))
    with opened(library, below) as base:
        while status == MEMORY:
            left, most = most, most + 1
            status, found = streamed(library, update, base, memory=memory)
            assert not rooms
            assert {status for status, _ in found.values()} <= {OK, MEMORY}
    assert status == OK
    assert found == wanted(GOLDEN / "update.mp4", GOLDEN / "progressive.mp4")


def test_floats(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-exact floats of all types and bits, in several boxes."""
    monkeypatch.setattr("weightvid.writer.EXACT_BOX_BYTES", 3000)
    random, arrays, types = np.random.default_rng(3), {}, {}
    for name in ("F32", "F16", "BF16"):
        for number, shape in enumerate([(), (1,), (0, 4), (7, 130), (90, 3, 3), (5, 0)]):
            bits = random.integers(
                0, 1 << 8 * DTYPES[name].itemsize, shape, f"u{DTYPES[name].itemsize}"
            )
            some = np.asarray(bits if number % 2 else bits >> 9 << 9)
            arrays[f"{name}.{number}"] = some.view(DTYPES[name])
            types[f"{name}.{number}"] = name
        smooth = random.standard_normal((60, 70)).astype(np.float32) * np.float32(0.03)
        arrays[name] = smooth if name == "F32" else smooth.astype(np.float16).view(DTYPES[name])
        types[name] = name
    with from_mapping(arrays, dtypes=types) as checkpoint:
        pack_checkpoint(checkpoint, tmp_path / "a.mp4", PackOptions(lossless=True, jobs=1))
    found = every_way(library, (tmp_path / "a.mp4").read_bytes())
    assert found == {name: (OK, array.tobytes()) for name, array in arrays.items()}


def test_damage_does_no_harm(tmp_path: Path) -> None:
    """Mutated archives, with hashes that match whatever they are, under the sanitizers."""
    sources = [SOURCES / name for name in ("fuzz_loader.c", "weightvid.c", "hevc.c")]
    flags = ("-DWEIGHTVID_FUZZ", "-DWV_FUZZ_MAIN", "-ffp-contract=off")
    try:
        program = compiled(tmp_path / "run", *SANITIZED, *flags, *sources)
    except subprocess.CalledProcessError:
        pytest.skip("this C compiler has no sanitizers")
    names: list[Path] = []
    base = (GOLDEN / "progressive.mp4").read_bytes()
    for seed in ("example", "fields", "merged", "progressive", "types", "update"):
        boxes = fuzz.split_boxes((GOLDEN / f"{seed}.mp4").read_bytes())
        behind = base + len(base).to_bytes(4, "little") if seed == "update" else b""
        for number in range(15):
            names.append(tmp_path / f"{seed}{number}")
            names[-1].write_bytes(fuzz.mutate(boxes, Random(f"loader {seed} {number}")) + behind)
    done = subprocess.run([program, *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
