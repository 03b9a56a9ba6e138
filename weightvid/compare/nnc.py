"""NNCodec in an environment of its own: its pins clash with ours, so another Python runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.compare.coded import Coded, Decoded
from weightvid.errors import CodecError

#: names the Python that has NNCodec; the option ``--nncodec`` sets it.
VARIABLE: Final = "WEIGHTVID_NNCODEC"
_RUNNER: Final = Path(__file__).with_name("nnc_runner.py")
_TIMEOUT_S: Final = 60


def python() -> str | None:
    """The Python to run NNCodec by; None where none is known."""
    named = os.environ.get(VARIABLE)
    return named or (sys.executable if find_spec("nncodec") is not None else None)


@lru_cache
def version(program: str) -> str:
    """Version of NNCodec in another Python's environment.

    Raises
    ------
    CodecError
        It has none, or is no Python.
    """
    script = "from importlib.metadata import version; print(version('nncodec'))"
    try:
        done = subprocess.run(
            [program, "-c", script], capture_output=True, text=True, check=False,
            timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CodecError(f"{program} cannot be run: {error}") from None
    if done.returncode:
        raise CodecError(f"{program} has no NNCodec: pip install nncodec==2.1.3 into it")
    return done.stdout.strip()


def missing() -> str | None:
    """Why NNCodec cannot run here, or None where it can."""
    program = python()
    if program is None:
        return f"needs NNCodec: name a Python that has it by --nncodec or {VARIABLE}"
    try:
        version(program)
    except CodecError as error:
        return str(error)
    return None


def encode(tensors: Mapping[str, npt.NDArray[Any]], qp: int) -> Coded:
    """Bitstream of a model, with NNCodec's own defaults and dependent quantization.

    Tensors other than float32 go through float32 or int32, which are all that NNCodec takes.
    """
    with tempfile.TemporaryDirectory(prefix="weightvid-") as name:
        folder = Path(name)
        # Names may hold what a path may not.
        arrays: dict[str, Any] = {
            str(number): array for number, array in enumerate(tensors.values())
        }
        np.savez(folder / "model.npz", **arrays)
        (folder / "names.json").write_text(json.dumps(list(tensors)), encoding="utf-8")
        seconds, peak = _run("encode", folder, str(qp))
        return Coded({"data": (folder / "stream.nnc").read_bytes()}, seconds=seconds,
                     peak_bytes=peak)  # fmt: skip


def decode(data: bytes) -> Decoded:
    """Tensors of a bitstream."""
    with tempfile.TemporaryDirectory(prefix="weightvid-") as name:
        folder = Path(name)
        (folder / "stream.nnc").write_bytes(data)
        seconds, peak = _run("decode", folder)
        with np.load(folder / "restored.npz", allow_pickle=False) as restored:
            names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
            tensors = {name: restored[str(number)] for number, name in enumerate(names)}
        return Decoded(tensors, seconds=seconds, peak_bytes=peak)


def _run(task: str, folder: Path, *more: str) -> tuple[float, int | None]:
    program = python()
    if program is None:
        raise CodecError(str(missing()))
    done = subprocess.run(
        [program, "-I", str(_RUNNER), task, str(folder), *more], capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise CodecError(f"NNCodec failed: {words[-1] if words else done.returncode}")
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(peak) or None
