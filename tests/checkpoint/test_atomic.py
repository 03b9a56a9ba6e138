"""Output files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from weightvid import atomic
from weightvid.atomic import AtomicFile, atomic_output
from weightvid.errors import OutputError


def listing(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_clean_exit_renames(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_output(target) as file:
        file.write(b"hello")
        assert not target.exists()
        (hidden,) = listing(tmp_path)
        assert hidden.startswith(".")
        file.seek(0)
        assert file.read() == b"hello"
    assert target.read_bytes() == b"hello"
    assert listing(tmp_path) == ["out.bin"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_removes_everything(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), atomic_output(tmp_path / "out") as file:
        file.write(b"half")
        raise kind
    assert listing(tmp_path) == []


def test_failed_force_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_output(target, force=True) as file:
        file.write(b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    with atomic_output(target, force=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert listing(tmp_path) == ["out"]


def test_existing_output_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"out exists already.*--force") as caught:
        AtomicFile(target)
    assert caught.value.errno == errno.EEXIST
    assert isinstance(caught.value, OSError)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), atomic_output(target) as file:
        file.write(b"mine")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("taken", [False, True])
def test_file_systems_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "link", refuse)
    target = tmp_path / "out"
    output = AtomicFile(target)
    output.file.write(b"new")
    if taken:
        target.write_bytes(b"theirs")
        with pytest.raises(OutputError, match="exists already"):
            output.commit()
        assert target.read_bytes() == b"theirs"
    else:
        output.commit()
        assert target.read_bytes() == b"new"
    assert listing(tmp_path) == ["out"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_output(tmp_path / "out") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "file"
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    with atomic_output(link, force=True) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_destinations_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder"):
        AtomicFile(tmp_path, force=True)
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with pytest.raises(OutputError, match="needs a regular file"):
        AtomicFile(fifo, force=True)
    with pytest.raises(OutputError, match="needs a regular file"):
        AtomicFile("/dev/null", force=True)
    with pytest.raises(OutputError, match="No such file"):
        AtomicFile(tmp_path / "missing" / "out")
    with pytest.raises(OutputError, match="Not a directory"):
        (tmp_path / "plain").write_bytes(b"")
        AtomicFile(tmp_path / "plain" / "out")
    with pytest.raises(OutputError, match="null"):
        AtomicFile("a\0b")
    assert listing(tmp_path) == ["pipe", "plain"]


def test_standard_output_on_a_pipe() -> None:
    code = """
    from weightvid.atomic import AtomicFile
    try:
        AtomicFile("/dev/stdout", force=True)
    except OSError as error:
        print(error)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "/dev/stdout: the output needs a regular file" in ran.stdout


def test_a_dangling_link_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_output(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "target").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        AtomicFile(tmp_path / "out")


def test_dropped_without_commit(tmp_path: Path) -> None:
    output = AtomicFile(tmp_path / "out")
    output.file.write(b"x")
    output.file.close()
    del output
    assert listing(tmp_path) == []


def test_a_forked_child_leaves_the_file_alone(tmp_path: Path) -> None:
    code = """
    import os, sys
    from weightvid.atomic import AtomicFile
    output = AtomicFile("out")
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    output.commit()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])},
        check=True,
    )
    assert listing(tmp_path) == ["out"]


def test_commit_twice_and_abort_after_commit(tmp_path: Path) -> None:
    output = AtomicFile(tmp_path / "out")
    output.commit()
    output.abort()
    with pytest.raises(OutputError, match="finished"):
        output.commit()
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("size", [5_000, 300_000])
def test_full_disk(tmp_path: Path, size: int) -> None:
    """A file size limit stands in for a full disk: small writes fail in the flush, big at once."""
    code = f"""
    import resource, sys
    from weightvid.atomic import atomic_output
    from weightvid.errors import OutputError
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        with atomic_output("out.bin") as file:
            file.write(bytes({size}))
    except OutputError as error:
        print(error)
        sys.exit(0 if error.errno else 3)
    sys.exit(4)
    """
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout.startswith("cannot write out.bin: ")
    assert listing(tmp_path) == []
