"""Decoders of other people, and the loader copied out of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from samples import Array, all_same, same, sample, tensors

from weightvid import loader
from weightvid.errors import CodecError, FormatError
from weightvid.loader import open_archive

Decode = Callable[[bytes], Array]


def by_pyav(packet: bytes) -> Array:
    """Luma of an access unit that stands alone."""
    context: Any = av.CodecContext.create("hevc", "r")
    (frame,) = [*context.decode(av.Packet(packet)), *context.decode(None)]
    return np.asarray(frame.reformat(format="gray").to_ndarray())


def wrong(packet: bytes) -> Array:
    return by_pyav(packet) ^ np.uint8(1)


def transposed(packet: bytes) -> Array:
    return by_pyav(packet).T


def short(packet: bytes) -> Array:
    return by_pyav(packet)[:64]


def raising(_: bytes) -> Array:
    raise ZeroDivisionError("the driver is gone")


def late() -> Decode:
    """Right for one packet, then broken."""
    seen: list[bytes] = []

    def decode(packet: bytes) -> Array:
        seen.append(packet)
        return by_pyav(packet) if len(seen) < 2 else raising(packet)

    return decode


def test_a_right_one_is_used() -> None:
    calls: list[bytes] = []

    def decode(packet: bytes) -> Array:
        calls.append(packet)
        return by_pyav(packet)

    with open_archive(sample(), decoder=decode) as archive:
        assert all_same(dict(archive.items()), tensors())
        assert archive.index is not None
        assert len(calls) == len(archive.index.frames)
        # VPS, SPS, PPS and a slice: Annex B.
        assert all(packet.count(b"\0\0\0\1") >= 4 for packet in calls)
        assert same(archive["line"], tensors()["line"])


def test_its_memory_may_be_used_again() -> None:
    room: dict[tuple[int, ...], Array] = {}

    def decode(packet: bytes) -> Array:
        luma = by_pyav(packet)
        room.setdefault(luma.shape, luma.copy())[:] = luma
        return room[luma.shape]

    with open_archive(sample(), decoder=decode) as archive:
        for name in archive:
            archive.get(name)
            for luma in room.values():
                luma[:] = 0
            assert same(archive[name], tensors()[name])


@pytest.mark.parametrize(
    ("decode", "said"),
    [(wrong, "frame-digest"), (transposed, "frame-digest"), (short, "reshape"),
     (raising, "driver is gone"), (late(), "driver is gone")],
)  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2])
def test_software_takes_over(decode: Decode, said: str, threads: int) -> None:
    with (
        open_archive(sample(), decoder=decode, threads=threads) as archive,
        pytest.warns(RuntimeWarning, match=rf"{said}.*software decoder takes over"),
    ):
        assert all_same(dict(archive.items()), tensors())


def test_auto_finds_one_that_is_right() -> None:
    with open_archive(sample(), decoder="auto") as archive:
        assert all_same(dict(archive.items()), tensors())


def test_a_device_that_is_not_there() -> None:
    archive = open_archive(sample(), decoder="abacus")
    with pytest.raises(CodecError, match="abacus"):
        archive["conv"]


def test_damage_is_no_fault_of_the_decoder() -> None:
    """Where software gives the same, the frame is to blame."""
    data = sample()
    at = data.index(b"mdat") + 1500
    changed = data[:at] + bytes((data[at] ^ 0x10,)) + data[at + 1 :]
    with (
        pytest.warns(RuntimeWarning, match="takes over"),
        pytest.raises((FormatError, CodecError)),
    ):
        list(open_archive(changed, decoder=by_pyav).items())


def python(code: str, *options: str, cwd: Path | None = None) -> set[str]:
    """Modules that a program has at its end."""
    run = subprocess.run(
        [sys.executable, *options, "-c", code + "\nimport sys\nprint('\\n', *sys.modules)"],
        capture_output=True, text=True, check=True, cwd=cwd, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    return set(run.stdout.splitlines()[-1].split())


def test_the_file_alone(tmp_path: Path) -> None:
    """Copied into an app that has numpy and PyAV, and nothing else of ours."""
    shutil.copy(loader.__file__, tmp_path / "loader.py")
    (tmp_path / "model.mp4").write_bytes(sample())
    np.savez(tmp_path / "expected.npz", **tensors())
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import loader
        sys.path.pop(0)
        with loader.open_archive("model.mp4", check_tensors=True) as archive:
            found = dict(archive.items())
            archive.info("conv"), archive.read_file("config.json")
        known = set(sys.modules)
        import numpy as np
        with np.load("expected.npz") as expected:
            for name in expected.files:
                assert found[name].tobytes() == expected[name].tobytes(), name
        for name in set(sys.modules) - known:
            del sys.modules[name]
    """.replace("\n        ", "\n")
    modules = python(code, "-I", cwd=tmp_path)
    top = {name.partition(".")[0] for name in modules}
    started = {name.partition(".")[0] for name in python("", "-I")}  # what site brings
    others = top - started - set(sys.stdlib_module_names) - {"numpy", "av", "loader"}
    assert not {name for name in others if not name.startswith("_")} - {"cython_runtime"}


def test_the_module_in_the_package() -> None:
    modules = python("import weightvid.loader", cwd=Path(loader.__file__).parents[1])
    ours = {name for name in modules if name.startswith("weightvid")}
    assert ours == {"weightvid", "weightvid.loader", "weightvid.version"}
    assert modules.isdisjoint({"torch", "safetensors", "typer", "rich"})
