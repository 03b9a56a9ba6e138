"""The C decoder against FFmpeg's: archives, pictures of all kinds, damaged packets."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hevc_seeds import HEIGHT, WIDTH, coded, seeds

from weightvid.loader import Bytes, open_archive
from weightvid.video.encoder import CODECS

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCES: Final = ROOT / "weightvid" / "device"
STRICT: Final = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-pedantic", "-Werror")
SANITIZED: Final = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
#: what the loader finds there for the decoder: all HEVC but the lossy one.
GOLDEN: Final = ("example", "fields", "hard", "layers", "types")


def compiled(target: Path, *arguments: str | Path) -> Path:
    """A file that the C compiler made; skips where there is none."""
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        pytest.skip("needs a C compiler: cc, gcc or clang")
    subprocess.run([cc, *STRICT, *arguments, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("hevc") / "libhevc.so"
    loaded = ctypes.CDLL(str(compiled(path, "-O2", "-fPIC", "-shared", SOURCES / "hevc.c")))
    size, pointer, side = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint32
    loaded.wv_hevc_memory.restype, loaded.wv_hevc_memory.argtypes = size, [side, side]
    loaded.wv_hevc_open.restype = pointer
    loaded.wv_hevc_open.argtypes = [ctypes.c_char_p, size, side, side, pointer, size]
    loaded.wv_hevc_decode.argtypes = [pointer, ctypes.c_char_p, size, pointer, size]
    return loaded


class Decoder:
    """A decoder, or ``handle`` None where the record is refused."""

    def __init__(self, library: ctypes.CDLL, record: bytes, shape: tuple[int, int]) -> None:
        self._library, self._shape = library, shape
        size = library.wv_hevc_memory(shape[1], shape[0])
        self._memory = np.zeros(size // 16 + 2, np.complex128)
        start = -(-self._memory.ctypes.data // 16) * 16
        self.handle = library.wv_hevc_open(record, len(record), shape[1], shape[0], start, size)

    def luma(self, packet: bytes, padding: int = 0) -> Bytes | None:
        """Rows of the picture; None where the packet is refused."""
        assert self.handle is not None
        height, width = self._shape
        rows = np.full((height, width + padding), 0xA5, np.uint8)
        code = self._library.wv_hevc_decode(
            self.handle, packet, len(packet), rows.ctypes.data, width + padding
        )
        assert np.all(rows[:, width:] == 0xA5)
        assert code <= 0
        return None if code else rows[:, :width]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_archives(library: ctypes.CDLL, name: str) -> None:
    with open_archive(ROOT / "data" / "golden" / f"{name}.mp4") as archive:
        track = archive.track
        decoder = Decoder(library, bytes(track.record), (track.height, track.width))
        assert archive.index is not None
        for number in range(len(archive.index.frames)):
            sidecar, packet = archive.packet(number)
            luma = decoder.luma(packet)
            assert luma is not None
            assert hashlib.sha256(luma.tobytes()).digest() == sidecar.sha256


@pytest.mark.parametrize("name", ["lossy", "integers", "weights"])
def test_other_tracks_are_refused(library: ctypes.CDLL, name: str) -> None:
    with open_archive(ROOT / "data" / "golden" / f"{name}.mp4") as archive:
        track = archive.track
        assert Decoder(library, track.record, (track.height, track.width)).handle is None


@pytest.mark.parametrize("preset", CODECS["x265"].presets)
def test_pictures_come_back(library: ctypes.CDLL, preset: str) -> None:
    record, frames = coded(preset)
    decoder = Decoder(library, record, (HEIGHT, WIDTH))
    for number, (luma, packet) in enumerate(frames):
        found = decoder.luma(packet, padding=number)
        assert found is not None
        assert np.array_equal(found, luma)


def test_short_and_long_packets_are_refused(library: ctypes.CDLL) -> None:
    record, frames = coded("superfast")
    decoder = Decoder(library, record, (HEIGHT, WIDTH))
    for _, packet in frames:
        for size in [*range(12), *range(12, len(packet), len(packet) // 20 + 1), len(packet) - 1]:
            assert decoder.luma(packet[:size]) is None
            assert decoder.luma(max(size - 4, 0).to_bytes(4, "big") + packet[4:size]) is None
        assert decoder.luma(packet + b"\0") is None
        assert decoder.luma(packet) is not None


def test_damaged_records_are_refused(library: ctypes.CDLL) -> None:
    record, _ = coded("superfast")
    shape = (HEIGHT, WIDTH)
    assert Decoder(library, record, shape).handle is not None
    assert Decoder(library, record, (HEIGHT, WIDTH + 64)).handle is None
    assert all(Decoder(library, record[:n], shape).handle is None for n in range(len(record)))
    size = library.wv_hevc_memory(WIDTH, HEIGHT)
    memory = ctypes.create_string_buffer(size)
    assert not library.wv_hevc_open(record, len(record), WIDTH, HEIGHT, memory, size - 1)


def test_sizes_of_frames(library: ctypes.CDLL) -> None:
    good, bad = [(192, 192), (2176, 1024), (1024, 2176)], [(128, 192), (192, 200), (2240, 192)]
    assert all(library.wv_hevc_memory(*sides) for sides in good)
    assert not any(library.wv_hevc_memory(*sides) for sides in [*bad, (2176, 1088), (0, 0)])
    assert max(library.wv_hevc_memory(*sides) for sides in good) < 1 << 12


def test_damage_does_no_harm(tmp_path: Path) -> None:
    """Mutated inputs of the fuzz driver, under the sanitizers of memory and arithmetic."""
    sources = (SOURCES / "fuzz_hevc.c", SOURCES / "hevc.c")
    try:
        program = compiled(tmp_path / "run", *SANITIZED, "-DWV_FUZZ_MAIN", *sources)
    except subprocess.CalledProcessError:
        pytest.skip("this C compiler has no sanitizers")
    rng = np.random.default_rng(5)
    names: list[Path] = []
    for seed in seeds(("ultrafast", "slower")):
        for flips in (0, 1, 2, 5, 50):
            data = np.frombuffer(seed, np.uint8).copy()
            # In the packet, or, one of three times, anywhere.
            first = 1 if rng.random() < 1 / 3 else 1 + data[0]
            data[rng.integers(first, len(data), flips)] ^= np.uint8(1 << rng.integers(8))
            names.append(tmp_path / str(len(names)))
            names[-1].write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)].tobytes())
    # Arithmetic code that begins beyond its range, behind any header of a slice.
    seed = next(seeds(("slower",)))
    for header in range(256):
        names.append(tmp_path / str(len(names)))
        names[-1].write_bytes(seed[: 1 + seed[0] + 2] + bytes((header, 255, 255, 255)))
    done = subprocess.run([program, *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
