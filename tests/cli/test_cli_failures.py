"""Wrong usage, failures, interruptions: exit status, one line, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, Run, Start


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("pack",),
        ("pack", "{model}", "--recipe", "tiny"),
        ("pack", "{model}", "--step", "-1"),
        ("pack", "{model}", "--step", "nan"),
        ("pack", "{model}", "--step", "1", "--recipe", "small"),
        ("pack", "{model}", "--keep", "nothing.*"),
        ("pack", "{model}", "--jobs", "-2"),
        ("pack", "{model}", "--cluster", "slurm"),
        ("pack", "{model}", "-o", "{model}"),
        ("unpack", "{archive}"),
        ("unpack", "{archive}", "-o", "{folder}/m.tar"),
        ("unpack", "{archive}", "-o", "{folder}/m.npz", "--dtype", "int4"),
        ("preview", "{archive}", "--frames", "first"),
        ("preview", "{archive}", "--frames", "3-1"),
        ("preview", "{archive}", "--frames", "0", "--tensor", "conv.*"),
        ("inspect", "{archive}", "--nonsense"),
    ],
)
def test_wrong_usage(
    run: Run, model: Path, archive: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    before = set(model.parent.iterdir())
    places = {"model": model, "archive": archive, "folder": tmp_path}
    result = run(*(text.format(**places) for text in arguments), status=2)
    assert result.stderr or arguments == ("pack",)
    assert set(model.parent.iterdir()) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("pack", "{folder}/absent.safetensors"),
        ("pack", "{archive}", "-o", "{folder}/out"),
        ("pack", "{folder}"),
        ("pack", "{model}", "-o", "{folder}/no/such/folder.mp4"),
        ("pack", "{model}", "-o", "{archive}"),
        ("pack", "{model}", "-o", "{folder}/m.mp4", "--preset", "warp"),
        ("unpack", "{folder}/absent.mp4", "-o", "{folder}/m.npz"),
        ("unpack", "{model}", "-o", "{folder}/m.npz"),
        ("unpack", "{archive}", "-o", "{folder}/m.npz", "--tensor", "nothing.*"),
        ("inspect", "{model}"),
        ("inspect", "{folder}"),
        ("verify", "{folder}/absent.mp4"),
        ("verify", "{archive}", "--against", "{folder}/absent.npz"),
        ("preview", "{archive}", "-o", "{folder}/p", "--tensor", "count"),
    ],
)
def test_failure_is_one_line(
    run: Run, model: Path, archive: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    places = {"model": model, "archive": archive, "folder": tmp_path}
    result = run(*(text.format(**places) for text in arguments), status=1)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_memory_error(run: Run, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightvid import summary

    def exhaust(_: Any, details: bool) -> Any:
        raise MemoryError

    monkeypatch.setattr(summary, "summarize_archive", exhaust)
    assert run("inspect", archive, status=1).stderr.startswith("error: out of memory")


def test_pipe_in(start: Start, archive: Path, tmp_path: Path) -> None:
    unpack = start("unpack", "-", "-o", tmp_path / "m.npz", stdin=subprocess.PIPE)
    _, error = unpack.communicate(archive.read_bytes())
    assert unpack.returncode == 0, error
    assert (tmp_path / "m.npz").is_file()
    verify = start("verify", "-", stdin=subprocess.PIPE)
    output, _ = verify.communicate(archive.read_bytes())
    assert verify.returncode == 0
    assert b"ok" in output


def test_cut_pipe(start: Start, archive: Path, tmp_path: Path) -> None:
    unpack = start("unpack", "-", "-o", tmp_path / "m.npz", stdin=subprocess.PIPE)
    _, error = unpack.communicate(archive.read_bytes()[:-500])
    assert unpack.returncode == 1
    assert error.startswith(b"error: ")
    assert not list(tmp_path.iterdir())


def test_reader_that_leaves(start: Start, archive: Path) -> None:
    inspect = start("inspect", archive, "--tensors", bufsize=0)
    assert inspect.stdout is not None
    inspect.stdout.close()
    _, error = inspect.communicate()
    assert b"Traceback" not in error
    assert b"Exception" not in error


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_interruption_leaves_nothing(
    start: Start, large_model: Path, tmp_path: Path, number: int, status: int
) -> None:
    pack = start("pack", large_model, "-o", tmp_path / "m.mp4")
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and pack.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # The temporary file is there: the work has begun and cannot be over yet.
    assert pack.poll() is None
    pack.send_signal(number)
    _, error = pack.communicate(timeout=120)
    assert pack.returncode == status, error
    assert b"Traceback" not in error
    if number == signal.SIGINT:
        assert error.strip().endswith(b"interrupted")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs (needs root): {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_full_disk_leaves_nothing(
    start: Start, tiny_disk: Path, large_model: Path, archive: Path, verb: str
) -> None:
    arguments = {
        "pack": ("pack", large_model, "-o", tiny_disk / "m.mp4"),
        "unpack": ("unpack", archive, "-o", tiny_disk / "m.safetensors", "--dtype", "F64"),
    }[verb]
    process = start(*arguments)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith(b"error: cannot write")
    assert b"space" in error
    assert not list(tiny_disk.iterdir())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from weightvid.cli import main\n"
        "sys.argv = ['weightvid', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'numpy', 'av', 'torch', 'safetensors', 'imageio', 'PIL'}\n"
        "sys.exit(','.join(heavy & set(sys.modules)) or None)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("verb", "unwanted"),
    [("inspect", {"torch", "safetensors", "imageio"}), ("verify", {"torch", "imageio"})],
)
def test_verbs_import_what_they_use(archive: Path, verb: str, unwanted: set[str]) -> None:
    code = (
        "import sys\n"
        "from weightvid.cli import main\n"
        f"sys.argv = ['weightvid', {verb!r}, {str(archive)!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as done:\n"
        "    assert not done.code\n"
        f"sys.exit(','.join({unwanted!r} & set(sys.modules)) or None)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
