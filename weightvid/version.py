"""The package version, the only place it is written, and the state of its code."""

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent


@cache
def code_sha256(only: tuple[str, ...] = ("",), leave: tuple[str, ...] = ()) -> str:
    """SHA-256 of this package's own code: what was measured with other code is not used again.

    Paths within the package count that begin as one of ``only``, and not as one of ``leave``.
    """
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        name = path.relative_to(_PACKAGE).as_posix()
        if name.startswith(only) and not name.startswith(leave):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
