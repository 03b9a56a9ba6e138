"""Functions that judge a model: where they are found, and what they are told apart by."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from weightvid.errors import EvaluationError

_MODULE: Final = "weightvid_evaluation_script"
_TORCH: Final = re.compile(r"^\s*(?:import|from)\b.*(?<![\w.])torch\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Function:
    """A function that judges a model.

    Attributes
    ----------
    call : callable
        Takes a dict of name to tensor.
    name : str
        For messages.
    digest : str or None
        SHA-256 of its source file and its name; None where there is no source to tell it by.
    torch : bool
        It wants torch tensors: its file imports torch, or something that it imports does.
    """

    call: Callable[[dict[str, Any]], Any]
    name: str
    digest: str | None
    torch: bool

    def __call__(self, state: dict[str, Any]) -> Any:
        """Judge a model; what the function prints goes to stderr, as stdout is data.

        Raises
        ------
        EvaluationError
            The function failed.
        """
        try:
            with redirect_stdout(sys.stderr):
                return self.call(state)
        except (Exception, SystemExit) as error:
            raise EvaluationError(f"{self.name} failed: {described(error)}") from error


def described(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def load_function(wanted: str | Function | Callable[[dict[str, Any]], Any]) -> Function:
    """The function that a text names, or a callable as a function.

    Parameters
    ----------
    wanted : str, Function or callable
        ``module:function`` or ``script.py:function``.

    Raises
    ------
    EvaluationError
        There is no such function, or its module cannot be imported.
    """
    if isinstance(wanted, Function):
        return wanted
    if not isinstance(wanted, str):
        return _function(wanted, getattr(wanted, "__qualname__", type(wanted).__name__), wanted)
    place, colon, name = wanted.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise EvaluationError(
            f"{wanted!r} is not of the form module:function or script.py:function"
        )
    before = "torch" in sys.modules
    try:
        module = _script(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise EvaluationError(f"{place} cannot be imported: {described(error)}") from error
    call = getattr(module, name, None)
    if not callable(call):
        raise EvaluationError(f"{place} defines no function {name!r}")
    found = _function(call, wanted, module)
    return found if before or "torch" not in sys.modules else replace(found, torch=True)


def _script(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(spec)
    # As if it were run: its folder can be imported from, and its classes can be pickled.
    sys.modules[_MODULE] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
    return module


def _function(call: Callable[[dict[str, Any]], Any], name: str, source: Any) -> Function:
    """Known by the source of its whole file, as it may call others there."""
    try:
        file = inspect.getsourcefile(source)
        text = Path(file).read_text(encoding="utf-8") if file else None
    except (OSError, TypeError, UnicodeDecodeError):
        text = None
    if text is None:
        return Function(call, name, None, "torch" in sys.modules)
    qualified = getattr(call, "__qualname__", name)
    digest = hashlib.sha256(f"{qualified}\n{text}".encode()).hexdigest()
    if "<lambda>" in qualified or "<locals>" in qualified:
        # Two of one name may differ in what they close over.
        return Function(call, name, None, bool(_TORCH.search(text)))
    return Function(call, name, digest, bool(_TORCH.search(text)))
