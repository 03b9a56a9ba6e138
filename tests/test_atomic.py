"""Output files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from weightvid import atomic
from weightvid.atomic import AtomicFile, ScratchFolder, atomic_output
from weightvid.errors import OutputError


def listing(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def run(code: str, folder: Path) -> str:
    """What a program prints, in another process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_clean_exit_renames(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_output(target) as file:
        file.write(b"hello")
        (hidden,) = listing(tmp_path)
        assert hidden.startswith(".")
        file.seek(0)
        assert file.read() == b"hello"
    assert target.read_bytes() == b"hello"
    assert listing(tmp_path) == ["out.bin"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [False, True])
def test_any_exception_leaves_what_was_there(
    tmp_path: Path, kind: type[BaseException], old: bool
) -> None:
    if old:
        (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(kind), atomic_output(tmp_path / "out", force=True) as file:
        file.write(b"half")
        raise kind
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"] * old


def test_existing_output_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"out exists already.*--force") as caught:
        AtomicFile(target)
    assert caught.value.errno == errno.EEXIST
    with atomic_output(target, force=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("taken", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, taken: bool
) -> None:
    """Also on file systems without hard links."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(atomic.os, "link", refuse)
    output = AtomicFile(tmp_path / "out")
    output.file.write(b"new")
    if taken:
        (tmp_path / "out").write_bytes(b"theirs")
        with pytest.raises(OutputError, match="exists already"):
            output.commit()
    else:
        output.commit()
        output.abort()
        with pytest.raises(OutputError, match="finished"):
            output.commit()
    assert (tmp_path / "out").read_bytes() == (b"theirs" if taken else b"new")
    assert listing(tmp_path) == ["out"]


def test_mode_and_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    old = os.umask(0o027)
    try:
        for data in (b"new", b"newer"):
            with atomic_output(tmp_path / "link", force=True) as file:
                file.write(data)
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"newer"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640
    with atomic_output(tmp_path / "link", force=True) as file:  # the mode of what is replaced
        file.write(b"newest")
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640


def test_destinations_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "plain").write_bytes(b"")
    for path, said in (
        (tmp_path, "folder"),
        (tmp_path / "pipe", "needs a regular file"),
        ("/dev/null", "needs a regular file"),
        (tmp_path / "missing" / "out", "No such file"),
        (tmp_path / "plain" / "out", "Not a directory"),
        ("a\0b", "null"),
        ("s3://bucket/m.mp4", "it is an address"),
    ):
        with pytest.raises(OutputError, match=said):
            AtomicFile(path, force=True)
    assert listing(tmp_path) == ["pipe", "plain"]


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    code = """
    import os
    from weightvid.atomic import atomic_output
    from weightvid.errors import OutputError
    os.rmdir(os.getcwd())
    try:
        with atomic_output("out.bin"):
            pass
    except OutputError as error:
        print(error)
    """
    (tmp_path / "gone").mkdir()
    assert run(code, tmp_path / "gone") == "cannot write out.bin: No such file or directory\n"


def test_processes(tmp_path: Path) -> None:
    """A forked child leaves the file alone; what is dropped is removed."""
    code = """
    import os, sys
    from weightvid.atomic import AtomicFile
    output, dropped = AtomicFile("out"), AtomicFile("dropped")
    dropped.file.close()
    if os.fork() == 0:
        output.file.close()
        sys.exit(0)
    os.wait()
    output.commit()
    """
    run(code, tmp_path)
    assert listing(tmp_path) == ["out"]


def test_what_a_kill_leaves_is_removed_by_the_next_run(tmp_path: Path) -> None:
    """But never what a running program writes."""
    code = """
    import os, sys
    from pathlib import Path
    from weightvid.atomic import AtomicFile
    from weightvid.checkpoint import Contents, create_checkpoint
    running = sys.argv[1] == "run"
    output, folder = AtomicFile("out"), create_checkpoint(Path("folder"), Contents(()))
    print(output.temporary.name, folder._folder.name, flush=True)
    sys.stdin.read()
    if running:
        output.commit()
        folder.commit()
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    pipes: dict[str, Any] = {
        "cwd": tmp_path, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True,
        "env": {**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])},
    }  # fmt: skip
    with (
        subprocess.Popen([*program, "run"], **pipes) as running,
        subprocess.Popen([*program, "die"], **pipes) as dying,
    ):
        assert running.stdout is not None
        assert dying.stdout is not None
        live, dead = running.stdout.readline().split(), dying.stdout.readline().split()
        dying.kill()
        dying.wait()
        assert listing(tmp_path) == sorted(live + dead)
        with atomic_output(tmp_path / "other"):
            assert set(dead).isdisjoint(listing(tmp_path))
            assert set(live) <= set(listing(tmp_path))
        running.communicate("")
        assert running.returncode == 0
    assert listing(tmp_path) == ["folder", "other", "out"]


@pytest.mark.parametrize("size", [5_000, 300_000])
def test_full_disk(tmp_path: Path, size: int) -> None:
    """A file size limit stands in for a full disk: small writes fail in the flush, big at once."""
    code = f"""
    import resource
    from weightvid.atomic import atomic_output
    from weightvid.errors import OutputError
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        with atomic_output("out.bin") as file:
            file.write(bytes({size}))
    except OutputError as error:
        print(error, error.errno)
    """
    assert run(code, tmp_path) == f"cannot write out.bin: File too large {errno.EFBIG}\n"
    assert listing(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="locks of folders are not to be had there")
def test_scratch_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run left is removed by the next one, and what is in use is not."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from weightvid.atomic import ScratchFolder\n"
        "folder = ScratchFolder(); open(folder.name + '/model', 'w').close()\n"
        "os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=environment)
    (left,) = tmp_path.iterdir()
    descriptors = len(list(Path("/dev/fd").iterdir()))
    with ScratchFolder() as mine, ScratchFolder() as other:
        assert not left.exists()
        assert {Path(mine), Path(other)} == set(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    assert len(list(Path("/dev/fd").iterdir())) == descriptors
