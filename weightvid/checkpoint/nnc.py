"""NNC bitstreams (ISO/IEC 15938-17), by the nncodec package in a Python of its own.

Its pins clash with ours, so the environment variable WEIGHTVID_NNCODEC names a Python that has it
(``pip install nncodec``); the script that this Python runs is that of `weightvid.compare`.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.atomic import ScratchFolder
from weightvid.checkpoint import base
from weightvid.errors import CheckpointError
from weightvid.loader import Array, TensorSpec, to_float32
from weightvid.spec import RAW_BITS

_CHILD: Final = Path(__file__).parents[1] / "compare" / "nncodec_child.py"
VARIABLE: Final = "WEIGHTVID_NNCODEC"
#: of what is written: a step of 2 ** (QP / 4), far below that of any archive.
_QP: Final = -48


class Reader(base.ArrayReader):
    """A bitstream, decoded when it is opened: floats as F32, integers as I32."""

    def __init__(self, path: Path) -> None:
        with base.explained(f"{path} cannot be read"):
            super().__init__(run_nncodec({}, "decode", stream=path.read_bytes())[2])


class Writer(base.FileWriter):
    """A bitstream; NNC quantizes floats once more, and knows no other types than int32."""

    def _plan(self) -> bytes:
        self._arrays: dict[str, Array] = {}
        for spec in self.contents.tensors:
            if spec.dtype.startswith(("C", "F8")):
                raise CheckpointError(f"NNC has no {spec.dtype}: tensor {spec.name!r}")
        self.notes = (f"NNC quantizes floats (QP {_QP}, as F32), and holds integers as I32",)
        self.notes += base.tied_note(self.contents.aliases)
        return b""

    def _write(self, spec: TensorSpec, array: Array) -> None:
        values = to_float32(array, spec.dtype) if spec.dtype in RAW_BITS else array.copy()
        for name in self._names_of[spec.name]:
            self._arrays[name] = values

    def _finish(self) -> None:
        with base.explained(f"{self._path} cannot be written"):
            stream = run_nncodec(self._arrays, str(_QP), "0")[1]
        self._output.file.write(stream)


def run_nncodec(
    arrays: Mapping[str, Array], *arguments: str, stream: bytes = b"", python: str = ""
) -> tuple[str, bytes, dict[str, Array]]:
    """Have a Python run the script: what it says, the bitstream, and what that decodes to.

    A ValueError or RuntimeError says that there is no such Python, or the script failed.
    """
    python = python or os.environ.get(VARIABLE, "")
    if not python:
        raise ValueError(f"{VARIABLE} must name a Python that has nncodec")
    with ScratchFolder() as name:
        folder = Path(name)
        (folder / "stream.nnc").write_bytes(stream)
        # Members of the file are numbers: names may hold what a path may not.
        members: dict[str, Any] = {str(n): array for n, array in enumerate(arrays.values())}
        np.savez(folder / "model.npz", **members)
        (folder / "names.json").write_text(json.dumps(list(arrays)), encoding="utf-8")
        try:
            done = subprocess.run(
                [python, "-I", str(_CHILD), name, *arguments],
                capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"{python} cannot be run: {error}") from None
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise RuntimeError(f"nncodec: {words[-1] if words else done.returncode}")
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        with np.load(folder / "restored.npz", allow_pickle=False) as file:
            restored = {key: file[str(n)] for n, key in enumerate(names)}
        return done.stdout, (folder / "stream.nnc").read_bytes(), restored
