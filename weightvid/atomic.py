"""Output files that appear whole under their real name, or not at all."""

import errno
import io
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from weightvid.errors import OutputError

#: errno of ``link`` on file systems that have no hard links (FAT, some network mounts).
_NO_LINKS: Final = frozenset(
    getattr(errno, name)
    for name in ("EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EINVAL")
    if hasattr(errno, name)
)
#: hidden names of what is not complete; nobody else may use such.
_TEMPORARY: Final = re.compile(r"\.weightvid-\w{8,16}\.tmp")
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+[^/]")


class AtomicFile:
    """A file being written under a hidden temporary name beside its destination.

    A symbolic link is followed: the file that it points at is replaced. ``file`` is open for
    writing and reading back (``w+b``), with the mode of the file there or one that follows the
    umask; a failing write raises an OutputError that names the destination, as does one that exists
    (without ``force``) or is no regular file. ``temporary`` is where the bytes lie until `commit`.
    """

    file: BinaryIO

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        self._shown = os.fspath(path)
        self._force = force
        self._target = real_destination(self._shown, force)
        remove_remains(self._target.parent)
        while True:
            # Random, so it never needs to be long enough to hold the target's own name.
            self.temporary = temporary_path(self._target.parent)
            # Registered before the file exists: whatever happens from here on, it gets removed.
            self._cleanup = weakref.finalize(self, _remove, self.temporary, os.getpid())
            try:
                raw = _OutputFile(self.temporary, self._shown)
            except OSError as error:
                self._cleanup()
                raise output_error(self._shown, error) from None
            if hold(raw.fileno(), self.temporary):
                break
            raw.close()
        with suppress(OSError):  # there may be no such file
            shutil.copymode(self._target, self.temporary)
        self.file = io.BufferedRandom(raw, 1 << 16)

    def commit(self) -> None:
        """Flush to disk and rename into place; on failure nothing is left.

        An OutputError says that the disk is full, or that (without ``force``) somebody made the
        destination meanwhile.
        """
        if not self._cleanup.alive:
            raise OutputError(f"the output {self._shown} was finished already")
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self._rename()
        except OutputError:
            raise
        except OSError as error:
            raise output_error(self._shown, error) from None
        finally:
            self.abort()
        with suppress(OSError):  # the rename itself, where folders can be opened (not on Windows)
            descriptor = os.open(self._target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def abort(self) -> None:
        """Close and remove the temporary file. Does nothing after :meth:`commit`."""
        # A full disk makes the close fail again on what is still buffered; nobody wants it now.
        with suppress(OSError, ValueError):
            self.file.close()
        self._cleanup()

    def _rename(self) -> None:
        if not self._force:
            try:
                os.link(self.temporary, self._target)
            except FileExistsError:
                raise _exists(self._shown) from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if self._target.exists():
                    raise _exists(self._shown) from None
            else:
                return
        self.temporary.replace(self._target)


@contextmanager
def atomic_output(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[BinaryIO]:
    """The ``file`` of an `AtomicFile`, which is committed at a clean exit and removed otherwise."""
    output = AtomicFile(path, force=force)
    try:
        yield output.file
    except BaseException:
        output.abort()
        raise
    output.commit()


def is_source(path: str | os.PathLike[str], *sources: object) -> bool:
    """Whether what would be written is one of those that are read, by whatever name.

    Or may be: of a folder that is read, any file but an archive.
    """
    given = [os.fspath(each) for each in sources if isinstance(each, (str, os.PathLike))]
    real, places = Path(path).resolve(), [Path(place).resolve() for place in given if place]
    inside = real.suffix != ".mp4" and any(place in real.parents for place in places)
    return real.exists() and (inside or real in places)


def output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """Say that ``path`` cannot be written, and why; ``errno`` is carried over."""
    why = error.strerror or (os.strerror(error.errno) if error.errno else error)
    made = OutputError(f"cannot write {os.fspath(path)}: {why}")
    made.errno = error.errno
    return made


class _OutputFile(io.FileIO):
    """Raw file whose failing writes name the destination, whoever calls them."""

    def __init__(self, temporary: Path, shown: str) -> None:
        super().__init__(temporary, "x+")
        self._shown = shown

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise output_error(self._shown, error) from None


def temporary_path(folder: Path) -> Path:
    """A new hidden name in a folder."""
    return folder / f".weightvid-{secrets.token_hex(8)}.tmp"


def hold(descriptor: int, path: Path) -> bool:
    """Mark a temporary file or folder as in use, as long as it is open in some process.

    False: another run took it for a remain of a killed one, and removes it. Where locks are not to
    be had, nothing is marked, and nothing is removed either.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    with suppress(OSError):  # a run that looks at it has it for a moment
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return path.exists()


def remains(folder: Path) -> Iterator[Path]:
    """Temporary files and folders of runs that were killed, each locked while it is given out.

    Where there are no locks, nobody knows: there are none.
    """
    names = list[str]()
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError), os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _TEMPORARY.fullmatch(entry.name))
    for name in names:
        with suppress(OSError):
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield folder / name
            finally:
                os.close(descriptor)


def remove_remains(folder: Path) -> list[Path]:
    """Remove what killed runs have left in a folder; what that was."""
    removed = []
    for path in remains(folder):
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path)
    return removed


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder (of ``TMPDIR``); the next one removes what killed runs have left."""

    def __init__(self) -> None:
        remove_remains(Path(tempfile.gettempdir()))
        super().__init__(prefix=".weightvid-", suffix=".tmp", ignore_cleanup_errors=True)
        self._let_go: Any = None
        if sys.platform != "win32":
            descriptor = os.open(self.name, os.O_RDONLY)
            self._let_go = weakref.finalize(self, os.close, descriptor)
            hold(descriptor, Path(self.name))

    def cleanup(self) -> None:
        """Remove the folder."""
        super().cleanup()
        if self._let_go is not None:
            self._let_go()


def refuse_address(shown: str) -> None:
    """Say of an address what it is, rather than that no such folder exists: an OutputError."""
    # pathlib leaves one slash of the two.
    if _ADDRESS.match(shown) and not Path(shown).parent.exists():
        raise OutputError(
            f"cannot write {shown}: it is an address, and this output must be a file or a folder; "
            "write it here and upload it"
        )


def real_destination(shown: str, force: bool) -> Path:
    """What ``shown`` leads to; an `OutputError` if no file can be written there."""
    refuse_address(shown)
    target = Path(shown)  # in a current folder that is gone
    try:
        target = Path(os.path.realpath(shown))
        # Not of the target: /dev/stdout on a pipe resolves to a path that does not exist.
        mode = Path(shown).stat().st_mode
    except FileNotFoundError:
        return target
    except ValueError as error:  # a zero byte in the name
        raise OutputError(f"cannot write {shown!r}: {error}") from None
    except OSError as error:
        raise output_error(shown, error) from None
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {shown}: it is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise OutputError(
            f"cannot write {shown}: the output needs a regular file (it is written under a "
            "temporary name, checked, and renamed), not a pipe or a device"
        )
    if not force:
        raise _exists(shown)
    return target


def _exists(shown: str) -> OutputError:
    made = OutputError(f"{shown} exists already; use --force (force=True) to replace it")
    made.errno = errno.EEXIST
    return made


def _remove(path: Path, owner: int) -> None:
    # A forked worker inherits the finalizer, but the file is its parent's.
    if os.getpid() == owner:
        with suppress(OSError):
            path.unlink()
