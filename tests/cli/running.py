"""How the tests run the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = (sys.executable, "-c", "from weightvid.cli import main; main()")

#: arguments of a verb, and the exit status expected -> what it gave.
Run = Callable[..., Any]
#: arguments of a verb -> subprocess.Popen.
Start = Callable[..., Any]
