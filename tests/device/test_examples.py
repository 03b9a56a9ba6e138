"""The example of the C loader, the adapters for decoders, the canary, and what the wheel holds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from test_hevc import ROOT, SOURCES, compiled

from weightvid.loader import open_archive

GOLDEN: Final = ROOT / "data" / "golden"
BASE: Final = tuple(SOURCES / name for name in ("example.c", "weightvid.c", "hevc.c"))
#: name of the adapter: header that it needs, libraries.
LIBRARIES: Final = {
    "libavcodec": ("libavcodec/avcodec.h", ("-lavcodec", "-lavutil")),
    "libde265": ("libde265/de265.h", ("-lde265",)),
}
ENTRIES: Final = (b"hvc1", b"av01", b"avc1")
#: what may be wrong with a device for the canary to notice it; the number is what DEVICE is told.
FAULTS: Final = ("opens not", "decodes not", "changes a sample", "fails later")
#: takes the place of libavcodec's adapter.
DEVICE: Final = """
    #include "decoders.h"
    #include <stdlib.h>
    static uint8_t luma[256 * 192];
    static wv_hevc *decoder;
    static double memory[4096];
    static int fault, calls;
    static wv_status opens(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                           uint32_t width, uint32_t height)
    {
        (void)user;
        fault = atoi(getenv("FAULT"));
        decoder = wv_hevc_open(config, bytes, width, height, memory, sizeof memory);
        return fault && decoder && entry[0] ? WV_OK : WV_CODEC;
    }
    static wv_status decodes(void *user, const uint8_t *packet, size_t bytes, const uint8_t **out,
                             size_t *stride)
    {
        (void)user;
        *out = luma;
        *stride = 256;
        if (fault == 1 || (fault == 3 && calls++)
            || wv_hevc_decode(decoder, packet, bytes, luma, 256))
            return WV_CODEC;
        luma[191 * 256 + 255] ^= fault == 2;
        return WV_OK;
    }
    static void closes(void *user) { (void)user; }
    wv_decoder wv_libavcodec(void **state)
    {
        const wv_decoder made = {state, opens, decodes, closes};
        return made;
    }
"""


def build(target: Path, *arguments: str | Path) -> Path:
    return compiled(target, "-O1", "-ffp-contract=off", f"-I{SOURCES}", *BASE, *arguments)


def shown(program: Path, path: Path, *tensor: str) -> list[str]:
    command = [program, path, *tensor]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def wanted(path: Path, name: str = "") -> list[str]:
    """What the example says of an archive; the first tensor of floats, or another."""
    with open_archive(path) as archive:
        specs = archive.header.tensors
        lines = [f"{s.name} ({', '.join(map(str, s.shape))})" for s in specs]
        name = name or specs[0].name
        values = archive[name].reshape(-1)[:4].astype(np.float32)
    return [*lines, *(f"{name}[{i}] = {float(v):.9g}" for i, v in enumerate(values))]


def test_example(tmp_path: Path) -> None:
    program, path = build(tmp_path / "example"), GOLDEN / "layers.mp4"
    assert shown(program, path) == wanted(path)
    assert shown(program, path, "bias") == wanted(path, "bias")
    for words in ([path, "nothing"], [GOLDEN / "golden.json"], ["nowhere"], []):
        done = subprocess.run([program, *words], capture_output=True, check=False)
        assert done.returncode in (1, 2)
        assert done.stderr
        assert (b"usage" in done.stderr) == (words == [])


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_cmake(tmp_path: Path) -> None:
    """The recipe of docs/device.md, in a folder with nothing else."""
    recipe = (ROOT / "docs" / "device.md").read_text(encoding="utf-8").split("```cmake\n")[1]
    (tmp_path / "CMakeLists.txt").write_text(recipe.split("```")[0], encoding="utf-8")
    (tmp_path / "loader").mkdir()
    for name in ("weightvid.c", "weightvid.h", "hevc.c", "hevc.h"):
        shutil.copy(SOURCES / name, tmp_path / "loader")
    shutil.copy(SOURCES / "example.c", tmp_path / "app.c")
    for step in (("-S", ".", "-B", "build"), ("--build", "build")):
        subprocess.run(["cmake", *step], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    archive = min(GOLDEN.glob("*.mp4"))
    subprocess.run([tmp_path / "build" / "app", archive], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", LIBRARIES)
def test_adapters(tmp_path: Path, name: str) -> None:
    header, libraries = LIBRARIES[name]
    cc = shutil.which("cc") or pytest.skip("needs a C compiler: cc")
    probe = subprocess.run(
        [cc, "-E", "-xc", "-"],
        input=f"#include <{header}>",
        text=True,
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip(f"needs {header}, of Debian's {name}-dev")
    adapters = (SOURCES / "decoder_canary.c", SOURCES / f"decoder_{name}.c")
    program = build(tmp_path / name, f"-DDECODER=wv_{name}", *adapters, *libraries)
    golden = ("example", "hard", "lossy") + (("integers", "weights") * (name == "libavcodec"))
    for path in (GOLDEN / f"{stem}.mp4" for stem in golden):
        assert shown(program, path) == [*wanted(path), "decoded by the device"]
        data = bytearray(path.read_bytes())  # says that its pictures are larger than they are
        at = min(data.index(entry, data.index(b"stsd")) for entry in ENTRIES if entry in data) + 28
        data[at : at + 4] = bytes((8, 128, 4, 0))
        (tmp_path / "larger.mp4").write_bytes(data)
        command = [program, tmp_path / "larger.mp4"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("the decoder refused it")) == (1, 1)


def test_canary(tmp_path: Path, long_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a device does wrong, the built-in decoder takes over."""
    (tmp_path / "device.c").write_text(DEVICE)
    device = (SOURCES / "decoder_canary.c", tmp_path / "device.c")
    program = build(tmp_path / "canary", "-DDECODER=wv_libavcodec", *device)
    expected = wanted(long_archive, "b.weight")
    for number, fault in enumerate((*FAULTS, "nothing")):
        monkeypatch.setenv("FAULT", str(number))
        decoder = "the device" if fault == "nothing" else "the built-in decoder"
        assert shown(program, long_archive, "b.weight") == [*expected, f"decoded by {decoder}"]
