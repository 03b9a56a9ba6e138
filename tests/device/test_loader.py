"""The C loader against weightvid.loader: every way of reading, every type, damage, sizes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from random import Random
from typing import Any, Final

import fuzz_archives as fuzz
import numpy as np
import pytest
from check import FLAGS, LEVELS, LOADER, OK, STATUSES, TRUNCATED, Read, reader
from independent import sources
from malformed.test_corpus import CORPUS, INDEX_CORPUS, without
from samples import Pipe, sample
from test_hevc import ROOT, SANITIZED, SOURCES, STRICT, compiled

from weightvid.errors import WeightvidError
from weightvid.loader import (
    ABOUT,
    HEADER_UUID,
    PACKABLE,
    Archive,
    TensorNotFoundError,
    from_float32,
    open_archive,
    to_float32,
)
from weightvid.pack import PackOptions, pack_checkpoint

CHECK: Final = Path(__file__).with_name("check.c")


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """By the machine's own compiler, with sanitizers if it has them."""
    target = tmp_path_factory.mktemp("check") / "check"
    try:
        return reader(compiled(target, *SANITIZED, *FLAGS, CHECK, *LOADER))
    except subprocess.CalledProcessError:
        return reader(compiled(target, "-O2", *FLAGS, CHECK, *LOADER))


# --- what comes out is what weightvid.loader gives ------------------------------------------------


def in_type(archive: Archive, name: str, kind: str) -> bytes:
    """A tensor as the C loader should give it."""
    dtype, array = archive.spec(name).dtype, archive.stored(name)
    if (kind, dtype) == ("f16", "F64"):  # rounded once
        with np.errstate(over="ignore"):
            array = array.astype(np.float16)
    elif kind != "stored" and dtype in PACKABLE and dtype != kind.upper():
        with np.errstate(over="ignore"):
            array = from_float32(to_float32(array, dtype), kind.upper())
    return array.tobytes()


def levels_of(archive: Archive, name: str) -> Any:
    try:
        levels = archive.levels(name)
    except TensorNotFoundError:
        return LEVELS
    return levels.values.tobytes(), np.float32(levels.step).tobytes()


def add_pictures(path: Path) -> None:
    """Beside an archive: stride, bytes of the packet, packet and rows of its frames."""
    with open_archive(path) as archive, Path(f"{path}.luma").open("wb") as file:
        assert archive.index is not None
        numbers = range(len(archive.index.frames))
        packets = [archive.packet(number)[1] for number in numbers]
        for packet, (_, luma) in zip(packets, archive.frames(numbers), strict=True):
            rows = np.pad(luma, ((0, 0), (0, 5)))
            file.write(b"".join(n.to_bytes(4, "little") for n in (rows.shape[1], len(packet))))
            file.write(packet + rows.tobytes())


GOLDEN: Final = sorted((ROOT / "data" / "golden").glob("*.mp4"))
#: that add to another one, which test_loader_layers.py gives them; status of those without it.
UPDATES: Final = ("update",)
BASE: Final = 13
#: whose pictures need another decoder than the built-in one.
PICTURED: Final = ("integers", "lossy", "weights")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Golden archives, new ones of all kinds of layers and parts, and any field with any other."""
    folder = tmp_path_factory.mktemp("archives")
    made = [Path(shutil.copy(path, folder)) for path in GOLDEN]
    for path in made:
        if path.stem in PICTURED:
            add_pictures(path)
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"layers": 2}')
    (model / "vocab.txt").write_text("word\n" * 500)
    sources.safetensors(model / "model.safetensors", sources.kernels())
    packs: dict[str, tuple[Path, PackOptions]] = {
        "parts": (model, PackOptions(fidelity="weights", jobs=1)),
        "levels": (model, PackOptions(step_factor=0.002, fidelity="integers", jobs=1)),
    }
    for name, (source, options) in packs.items():
        with sources.small_frames(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("weightvid.levels.code.PART_WEIGHTS", 3000)
            patch.setattr("weightvid.writer.EXACT_BOX_BYTES", 500)
            made.append(folder / f"{name}.mp4")
            pack_checkpoint(source, made[-1], options)
    for seed in range(4):
        made.append(folder / f"random{seed}.mp4")
        sources.write_random(made[-1], seed)
    return made


@pytest.mark.parametrize("kind", ["stored", "f32", "f16"])
def test_same_as_python(read: Read, archives: list[Path], kind: str) -> None:
    compare(read, archives, kind)


def compare(read: Read, paths: Sequence[Path], kind: str = "stored") -> None:
    one, every, streamed = (read(mode, kind, paths) for mode in ("one", "all", "stream"))
    for path, *found in zip(paths, one, every, streamed, strict=True):
        if path.stem in UPDATES:
            assert {each.status for each in found} == {BASE}
            continue
        assert [each.status for each in found] == [OK] * 3, path.stem
        with open_archive(path) as archive:
            wanted = {name: in_type(archive, name, kind) for name in archive}
            assert found[0].tensors == wanted, path.stem
            for name in archive.header.aliases:
                del wanted[name]
            assert found[1].tensors == found[2].tensors == wanted, path.stem
            header = archive.header
            assert found[0].metadata == header.metadata
            assert found[0].files == {f.path: archive.read_file(f.path) for f in header.files}
            if kind == "stored":
                floats = (name for name in archive if archive.spec(name).dtype in PACKABLE)
                assert found[0].levels == {name: levels_of(archive, name) for name in floats}
            assert max(each.peak for each in found) <= memory(archive), path.stem


def memory(archive: Archive) -> int:
    """Bytes for the largest picture, packet and part, all tensors' names, and boxes of ours."""
    assert archive.index is not None
    parts = (part for name in archive for part in archive.info(name).parts)
    kernels = ((part, prod(len(archive.header.bases[b]) for b in part.bases)) for part in parts)
    largest = max((4 * p.rows + 10 * p.columns + 2 * size**2 for p, size in kernels), default=0)
    packet = max((size for _, size in archive.index.frames), default=0)
    names = 256 * len(archive)
    if archive.header.layers:  # sums are of the tensor's own type, and levels lie beside them
        largest += 5 * max(spec.size for spec in archive.header.tensors)
    return archive.track.width * archive.track.height + packet + largest + names + (64 << 10)


def test_without_memory(read: Read, archives: list[Path]) -> None:
    paths = [path for path in archives if path.stem in ("layers", "parts", "random1", "types")]
    assert [found.status for found in read("starve", "stored", paths)] == [OK] * len(paths)


@pytest.mark.parametrize("name", ["cifar10_resnet20", "cifar10_resnet44", "mlperf_kws"])
def test_real_models(read: Read, eval_dir: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.mp4"
    pack_checkpoint(eval_dir / name / "model.safetensors", path, PackOptions(jobs=1))
    compare(read, [path])
    with open_archive(path) as archive:
        assert archive.index is not None
        frames = range(len(archive.index.frames))
        packet = max(len(archive.packet(number)[1]) for number in frames)
        most = archive.track.width * archive.track.height + packet + (64 << 10)
    for mode in ("one", "all", "stream"):
        assert read(mode, "stored", [path])[0].peak <= most


# --- other machines -------------------------------------------------------------------------------

#: tables for unwinding the stack, which C does not need, are neither text nor data.
BARE: Final = ("-fno-unwind-tables", "-fno-asynchronous-unwind-tables")
#: compiler, emulator, flags, most bytes of the loader and the decoder.
MACHINES: Final = {
    "arm64": ("aarch64-linux-gnu-gcc", "qemu-aarch64", (), 34_000),
    "thumb2": ("arm-linux-gnueabihf-gcc", "qemu-arm", ("-mthumb",), 26_000),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_other_machines(tmp_path: Path, archives: list[Path], machine: str) -> None:
    cc, emulator, flags, _ = MACHINES[machine]
    if not (shutil.which(cc) and shutil.which(emulator)):
        pytest.skip(f"needs {cc} and {emulator}")
    program = tmp_path / "check"
    command = [cc, *STRICT, "-O2", "-static", *flags, *FLAGS, CHECK, *LOADER, "-o", program]
    subprocess.run(command, check=True)
    compare(reader(emulator, program), archives)


@pytest.mark.parametrize("machine", MACHINES)
def test_sizes(tmp_path: Path, machine: str) -> None:
    cc, _, flags, most = MACHINES[machine]
    if not shutil.which(cc):
        pytest.skip(f"needs {cc}")
    total = 0
    for source in LOADER:
        subprocess.run(
            [cc, *STRICT, "-Os", *BARE, "-c", *flags, *FLAGS, source, "-o", tmp_path / "one.o"],
            check=True,
        )
        size = [cc.replace("gcc", "size"), tmp_path / "one.o"]
        text = subprocess.run(size, check=True, capture_output=True, text=True).stdout
        total += int(text.splitlines()[1].split()[0])
    assert total <= most


# --- damage ---------------------------------------------------------------------------------------


def test_malformed(read: Read, tmp_path: Path) -> None:
    """Each defect of the corpus has the status of its code, read front to back or by the index."""
    cases = CORPUS | INDEX_CORPUS
    paths = numbered(tmp_path, len(cases))
    write_all({path: cases[name][0](sample()) for path, name in zip(paths, cases, strict=True)})
    found = zip(cases, read("one", "stored", paths), read("stream", "stored", paths), strict=True)
    wrong = {}
    for name, one, streamed in found:
        code, expected = cases[name][1], STATUSES[cases[name][1]]
        if streamed.status not in (expected if name in CORPUS else {OK}):
            wrong[name, "stream"] = code, streamed.status
        # Without its index a file is one that was cut.
        if one.status not in expected | ({TRUNCATED} if name == "no index" else set()):
            wrong[name, "one"] = code, one.status
    assert wrong == {}


def python_reads(data: bytes) -> dict[bytes, bytes] | None:
    """All tensors; None: weightvid.loader refuses the archive."""
    try:
        archive = open_archive(Pipe(data), check_tensors=True)
        return {spec.name: array.tobytes() for spec, array in archive.stored_items()}
    except WeightvidError:
        return None


def mutated(data: bytes, random: Random) -> bytes:
    """An archive with one record changed, and sealed again."""
    boxes = fuzz.split_boxes(data)
    at = random.choice([n for n, box in enumerate(boxes) if box.kind in fuzz.RECORD_BOXES])

    def changed(old: list[fuzz.Record]) -> list[fuzz.Record]:
        place = random.randrange(len(old))
        old[place] = old[place][0], fuzz.mutate_bytes(old[place][1], random)
        return old

    boxes[at] = fuzz.Box(boxes[at].kind, fuzz.change_records(boxes[at].payload, changed))
    return fuzz.join_boxes(boxes)


def test_mutations(read: Read, tmp_path: Path) -> None:
    """Either reader finds a fault, or both give the same tensors."""
    whole = without(HEADER_UUID, ABOUT)(sample())  # which the C loader skips
    every = {path: mutated(whole, Random(path.stem)) for path in numbered(tmp_path, 90)}
    wanted = list(map(python_reads, write_all(every)))
    for path, python, found in zip(every, wanted, read("stream", "stored", [*every]), strict=True):
        assert (found.tensors if found.status == OK else None) == python, path.stem
    assert 20 < wanted.count(None) < 80


def test_cut_short(read: Read, tmp_path: Path) -> None:
    """What has arrived of a file that is cut short is right, and nothing else comes."""
    whole, wanted = sample(), python_reads(sample())
    paths = numbered(tmp_path, 40)
    cuts = [Random("cuts").randrange(30, len(whole) - 200) for _ in paths]
    write_all({path: whole[:cut] for path, cut in zip(paths, cuts, strict=True)})
    for mode in ("stream", "all"):
        for cut, found in zip(cuts, read(mode, "stored", paths), strict=True):
            assert wanted is not None
            assert found.status == TRUNCATED, cut
            assert found.tensors.items() <= wanted.items()


INFLATE: Final = """#include "weightvid.c"
int unpack(const uint8_t *data, size_t size, uint8_t *out, size_t room);
int unpack(const uint8_t *data, size_t size, uint8_t *out, size_t room)
{
    return inflate(data, size, out, room);
}
"""


def inflated(data: bytes, size: int) -> bytes | None:
    """By zlib; None: the stream is damaged, or of another size."""
    stream = zlib.decompressobj(-15)
    try:
        found = stream.decompress(data, size + 1)
    except zlib.error:
        return None
    return found if stream.eof and not stream.unused_data and len(found) == size else None


def test_deflate(tmp_path: Path) -> None:
    """Blocks of all kinds, whole and damaged: what zlib takes is taken, and nothing else."""
    source, target = tmp_path / "inflate.c", tmp_path / "inflate.so"
    source.write_text(INFLATE)
    flags = ("-O1", "-fPIC", "-shared", *FLAGS)
    unpack = ctypes.CDLL(str(compiled(target, *flags, source, SOURCES / "hevc.c"))).unpack
    unpack.argtypes = [ctypes.c_char_p, ctypes.c_size_t] * 2
    random, taken = Random("deflate"), 0
    for _ in range(2000):
        size = random.randrange(1, 400)
        raw = bytes(random.choices(random.choice((b"a", b"abc", range(256))), k=size))
        strategy = random.choice((zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED))
        packer = zlib.compressobj(random.randrange(10), zlib.DEFLATED, -15, 9, strategy)
        data = bytearray(packer.compress(raw) + packer.flush())
        for _ in range(random.randrange(3)):
            data[random.randrange(min(len(data), 40))] ^= 1 << random.randrange(8)
        room, wanted = ctypes.create_string_buffer(size), inflated(data, size)
        code = unpack(bytes(data), len(data), room, size)
        assert (None if code else room.raw) == wanted
        taken += wanted is not None
    assert 500 < taken < 1800


def numbered(folder: Path, count: int) -> list[Path]:
    return [folder / f"device {number}" for number in range(count)]


def write_all(every: dict[Path, bytes]) -> list[bytes]:
    for path, data in every.items():
        path.write_bytes(data)
    return [*every.values()]
