"""Wrong usage, failures, interruptions: exit status, one line, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemas
from running import ROOT, Run, Start
from safetensors.numpy import save_file
from small_models import weights


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
        ("pack", "{model}", "--jobs", "100000"),
        ("pack", "{model}", "--workers", "slurm"),
        ("pack", "{model}", "--target", ""),
        ("pack", "{model}", "--calibrate="),
        ("pack", "{model}", "--calibrate", "none.stats", "--for", "weights"),
        ("pack", "{model}", "--calibrate", "none.stats", "--lossless"),
        ("pack", "{model}", "--for", "glory"),
        ("pack", "{model}", "--for", "weights", "--integer"),
        ("pack", "{model}", "--codec", "vp9"),
        ("pack", "{model}", "--preset", "warp"),
        ("pack", "{model}", "--qp", "99"),
        ("pack", "{model}", "--qp", "20", "--target", "3bpw"),
        ("pack", "{model}", "--target", "12 apples"),
        ("pack", "{model}", "--target", "0"),
        ("pack", "{model}", "--target", "-3bpw"),
        ("pack", "{model}", "--target", "nanbpw"),
        ("pack", "{model}", "--target", "infdB"),
        ("pack", "{model}", "--target", "3bpw", "--step", "0.2"),
        ("pack", "{model}", "--max-kl", "0.1"),
        ("pack", "{model}", "--max-drop", "1%"),
        ("pack", "{model}", "-o", "{model}"),
        ("pack", "{model}", "-o", "{folder}/other.NPZ"),
        ("apply", "{archive}", "{archive}", "-o", "{folder}/other.npz"),
        ("apply", "{archive}", "{archive}", "-o", "-"),
        ("sign", "{archive}", "--key", "{model}", "-o", "-"),
        ("sign", "{archive}", "--key", "{archive}.pem", "-o", "{folder}/m.npz"),
        ("fetch", "https://host/a.mp4", "-o", "-"),
        ("unpack", "{archive}"),
        ("unpack", "{archive}", "-o", "{folder}/m.tar"),
        ("unpack", "{archive}", "-o", "{folder}/m.npz", "--dtype", "int4"),
        ("verify", "{archive}", "--min-sqnr", "20"),
        ("verify", "{archive}", "--repair", "-o", "{model}"),
        ("preview", "{archive}", "-o", "s3://bucket/pictures"),
        ("device", "-o", "s3://bucket/loader"),
        ("demo", "-o", "s3://bucket/demo"),
        ("demo", "-o", ""),
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


FAILED, DAMAGED, MISSING = 1, 3, 4


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (MISSING, ("pack", "{folder}/absent.safetensors")),
        (FAILED, ("pack", "{archive}", "-o", "{folder}/out")),
        (FAILED, ("pack", "{folder}")),
        (MISSING, ("pack", "{model}", "-o", "{folder}/no/such/folder.mp4")),
        (FAILED, ("pack", "{model}", "-o", "{archive}")),
        (MISSING, ("unpack", "{archive}", "-o", "{folder}/no/such", "--kind", "folder")),
        (FAILED, ("pack", "{model}", "-o", "https://example.org/m.mp4")),
        (MISSING, ("unpack", "{folder}/absent.mp4", "-o", "{folder}/m.npz")),
        (DAMAGED, ("unpack", "{model}", "-o", "{folder}/m.npz")),
        (FAILED, ("unpack", "{archive}", "-o", "{folder}/m.npz", "--tensor", "nothing.*")),
        (DAMAGED, ("inspect", "{model}")),
        (FAILED, ("inspect", "{folder}")),
        (MISSING, ("verify", "{folder}/absent.mp4")),
        (MISSING, ("verify", "{archive}", "--against", "{folder}/absent.npz")),
        (MISSING, ("verify", "http://127.0.0.1:9/m.mp4")),
        (FAILED, ("preview", "{archive}", "-o", "{folder}/p", "--tensor", "count")),
    ],
)
def test_failure_is_one_line_and_one_object(
    run: Run, model: Path, archive: Path, tmp_path: Path, status: int, arguments: tuple[str, ...]
) -> None:
    places = {"model": model, "archive": archive, "folder": tmp_path}
    call = [text.format(**places) for text in arguments]
    result = run(*call, status=status)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    record = json.loads(run(*call, "--json", status=status).stdout)
    schemas.check(record, "failure")
    assert (record["ok"], record["status"]) == (False, status)
    assert record["message"].split() == result.stderr.removeprefix("error: ").split()


def test_an_archive_without_pictures_is_not_damaged(run: Run, model: Path, tmp_path: Path) -> None:
    run("pack", model, "-o", tmp_path / "m.mp4", "--lossless")
    call = ("preview", tmp_path / "m.mp4", "-o", tmp_path / "p")
    assert "no pictures" in run(*call, status=FAILED).stderr
    assert "conv.weight.png" in run(*call, "--kernels").stdout


def test_long_names_make_no_long_message(run: Run, run_json: Run, tmp_path: Path) -> None:
    path, arrays = tmp_path / "m.mp4", {c * 4000: weights(k, 40, 50) for k, c in enumerate("abc")}
    save_file(arrays, tmp_path / "m.safetensors")
    run("pack", tmp_path / "m.safetensors", "-o", path)
    path.write_bytes(path.read_bytes()[:-900])
    for target in ("m.npz", "m.safetensors"):
        done = run("unpack", path, "-o", tmp_path / target, "-f", "--tensor", "a*", status=3)
        assert "aaa" in done.stderr
        assert len(done.stderr) < 1100
    record = run_json("unpack", path, "-o", tmp_path / "m.npz", status=3)
    assert len(record["message"]) <= 1000


def test_wrong_usage_is_one_object_too(run_json: Run, archive: Path) -> None:
    record = run_json("inspect", archive, "--nonsense", status=2)
    schemas.check(record, "failure")
    assert record["status"] == 2


def test_without_typer_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from weightvid.cli import main"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the command line needs typer: pip install typer rich\n"


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("gcsfs", ("inspect", "gs://bucket/m.mp4")),
        ("fsspec", ("pack", "s3://bucket/m.safetensors")),
        ("fsspec", ("inspect", "http://127.0.0.1:9/m.mp4")),
        ("huggingface_hub", ("pack", "hf://org/model")),
    ],
)
def test_a_missing_package_is_no_missing_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, package: str, call: tuple[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'weightvid[" in run(*call, status=FAILED).stderr


def test_force_replaces(run: Run, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.mp4"
    path.write_bytes(b"precious")
    assert "exists" in run("pack", model, "-o", path, status=1).stderr
    assert path.read_bytes() == b"precious"
    run("pack", model, "-o", path, "--force")
    assert path.stat().st_size > 100


def test_memory_error(run: Run, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("weightvid.inspect.summarize_archive", exhaust)
    assert run("inspect", archive, status=1).stderr.startswith("error: out of memory")


def test_pipes(start: Start, archive: Path, tmp_path: Path) -> None:
    for data, status in ((archive.read_bytes(), 0), (archive.read_bytes()[:-500], 3)):
        unpack = start("unpack", "-", "-o", tmp_path / f"{status}.npz", stdin=subprocess.PIPE)
        _, error = unpack.communicate(data)
        assert unpack.returncode == status, error
        assert error.startswith(b"error: ") == bool(status)
        verify = start("verify", "-", stdin=subprocess.PIPE)
        output, _ = verify.communicate(data)
        assert verify.returncode == status
        assert (b"ok" in output) == (not status)
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


def test_reader_that_leaves(start: Start, archive: Path) -> None:
    inspect = start("inspect", archive, "--tensors", bufsize=0)
    assert inspect.stdout is not None
    inspect.stdout.close()
    _, error = inspect.communicate()
    assert b"Traceback" not in error
    assert b"Exception" not in error


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
    ids=["INT", "TERM", "HUP", "QUIT"],
)
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_interruption_leaves_nothing(
    start: Start, large_model: Path, tmp_path: Path, number: int, status: int
) -> None:
    # Who runs the tests may ignore the signal (nohup, a job in the background): children inherit.
    handler = signal.signal(number, signal.SIG_DFL)
    try:
        pack = start("pack", large_model, "-o", tmp_path / "m.mp4")
    finally:
        signal.signal(number, handler)
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and pack.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # The temporary file is there: the work has begun and cannot be over yet.
    assert pack.poll() is None
    pack.send_signal(number)
    _, error = pack.communicate(timeout=120)
    assert pack.returncode == status, error
    assert b"Traceback" not in error
    assert error.strip().endswith(b"interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_a_signal_ends_a_comparison_within_an_evaluation(
    start: Start, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "calls = []\n"
        "def number(state):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2:\n"
        f"        pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "        time.sleep(600)\n"
        "    return 1.0\n"
    )
    call = ("compare", model, "-o", tmp_path / "c", "--codecs", "none", "--no-plain", "--no-peers")
    compare = start(*call, "--eval", f"{tmp_path / 'slow.py'}:number")
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists() and compare.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    compare.terminate()
    _, error = compare.communicate(timeout=120)
    assert compare.returncode == 143
    assert b"1 points are kept in" in error
    assert error.strip().endswith(b"interrupted")


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_a_signal_while_the_help_is_made() -> None:
    code = (
        "import os, signal\n"
        "from weightvid.cli import app\n"
        "def imported(name):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "app.import_module = imported\n"
        "app.main()\n"
    )
    command = [sys.executable, "-c", code, "-h"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (143, b"interrupted\n")


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


@pytest.mark.parametrize("verb", ["pack", "unpack", "folder"])
def test_full_disk_leaves_nothing(
    start: Start, tiny_disk: Path, large_model: Path, archive: Path, verb: str
) -> None:
    arguments = {
        "pack": ("pack", large_model, "-o", tiny_disk / "m.mp4"),
        "unpack": ("unpack", archive, "-o", tiny_disk / "m.safetensors", "--dtype", "F64"),
        "folder": ("unpack", archive, "-o", tiny_disk / "m", "--dtype", "F64"),
    }[verb]
    process = start(*arguments)
    _, error = process.communicate()
    assert process.returncode == FAILED
    assert error.startswith(f"error: cannot write {arguments[3]}: No space".encode())
    assert not list(tiny_disk.iterdir())


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ("--help", "numpy av torch safetensors imageio PIL"),
        ("inspect {archive}", "torch safetensors imageio"),
        ("verify {archive}", "torch imageio"),
        ("pack {model} -o {folder}/m.mp4", "torch imageio weightvid.unpack weightvid.cli.unpack"),
    ],
)
def test_verbs_import_what_they_use(
    model: Path, archive: Path, tmp_path: Path, arguments: str, unwanted: str
) -> None:
    call = arguments.format(model=model, archive=archive, folder=tmp_path).split()
    code = (
        "import sys\n"
        "from weightvid.cli import main\n"
        f"sys.argv = ['weightvid', *{call!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as done:\n"
        "    assert not done.code\n"
        f"sys.exit(','.join(set({unwanted.split()!r}) & set(sys.modules)) or None)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_what_is_read_is_never_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    (base, again), key = (tmp_path / f"{n}.mp4" for n in "ab"), tmp_path / "key"
    run("pack", model, "-o", base)
    run("pack", model, "--base", base, "-o", again)
    key.write_text("key")
    script = tmp_path / "script.py"
    script.write_text("make = print")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for line in (
        ("pack", model, "--base", base, "-o", base),
        ("pack", model, "--eval", f"{script}:make", "--max-kl", 1, "-o", script),
        ("unpack", again, "--base", base, "-o", base),
        ("unpack", base, "--key", key, "-o", key, "--kind", "npz"),
        ("unpack", base, "-o", ""),
        ("apply", base, again, "-o", base),
        ("apply", base, again, "-o", again),
        ("sign", base, "--key", key, "-o", key),
        ("sign", base, "--key", key, "-o", base, "--detached"),
        ("sign", base, "--key", key, "-o", base, "--openssf"),
        ("calibrate", f"{script}:make", "-o", script),
    ):
        run(*line, "--force", status=2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run("pack", model, "--lossless", "--step", 0.3, "-o", tmp_path / "c.mp4", status=2)
