"""Scripts that give a model and example inputs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

from weightvid.cli.options import usage_error
from weightvid.errors import WeightvidError

_MODULE: Final = "weightvid_calibration_script"


def load_examples(script: str, option: str) -> tuple[Any, Any]:
    """The module and the inputs that a function of a script returns.

    Parameters
    ----------
    script : str
        ``script.py:function``; it is run as Python code.
    option : str
        Named where the call is wrong.

    Raises
    ------
    WeightvidError
        There is no torch; or the script fails.
    """
    name, colon, wanted = script.rpartition(":")
    if not (colon and name and wanted.isidentifier()):
        usage_error(f"{script!r} is not of the form script.py:function", option)
    path = Path(name)
    if not path.is_file():
        usage_error(f"{path} is no file", option)
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        usage_error(f"{path} is no Python file", option)
    loader = spec.loader
    module = importlib.util.module_from_spec(spec)
    # As if it were run: its folder can be imported from, and its classes can be pickled.
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    _run(script, lambda: loader.exec_module(module))
    function = getattr(module, wanted, None)
    if not callable(function):
        usage_error(f"{path} defines no function {wanted!r}", option)
    try:
        import weightvid.calibrate  # noqa: F401
    except ImportError as error:
        raise WeightvidError(
            f"calibrating needs PyTorch ({error}); install it with: pip install 'weightvid[torch]'"
        ) from None
    given = _run(script, function)
    if not isinstance(given, tuple) or len(given) != 2:
        usage_error("the function must return two things: a module and its inputs", option)
    return given


def _run(script: str, work: Callable[[], Any]) -> Any:
    """Run some of a script; what it prints goes to stderr, as stdout is data."""
    from weightvid.planning.function import described

    try:
        with redirect_stdout(sys.stderr):
            return work()
    except (Exception, SystemExit) as error:
        raise WeightvidError(f"{script} failed: {described(error)}") from error
