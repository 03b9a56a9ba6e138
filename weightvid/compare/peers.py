"""NNCodec (MPEG NNC), the peer that rates are compared with.

Its pins clash with ours, so a Python of its own runs it: its path is an option, or the value
of the environment variable WEIGHTVID_NNCODEC.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.atomic import ScratchFolder
from weightvid.compare.model import Coded, Method, Model
from weightvid.errors import CodecError

_CHILD: Final = Path(__file__).with_name("nncodec_child.py")
_VARIABLE: Final = "WEIGHTVID_NNCODEC"
_TIMEOUT_S: Final = 60
#: two to an octave of the step.
DQ_QPS: Final = tuple(range(-34, -17, 2))
OPT_QPS: Final = tuple(range(-36, -19, 2))


def peer_methods(
    nncodec: str | os.PathLike[str] | None = None,
    dq_qps: Sequence[int] = DQ_QPS,
    opt_qps: Sequence[int] = OPT_QPS,
) -> Iterator[Method]:
    """NNCodec with dependent quantization, without and with its own QP for each layer.

    ``nncodec`` is the Python that has it (None: the environment variable's). The step of a QP is
    2 ** (QP / 4).
    """
    python = os.fspath(nncodec or os.environ.get(_VARIABLE, ""))
    version, missing = _nncodec_version(python)
    for name, opt_qp, qps in (("NNCodec DQ", False, dq_qps), ("NNCodec opt_qp", True, opt_qps)):
        yield Method(
            name, "peer", partial(_nncodec, python, opt_qp), "QP", tuple(map(float, qps)), missing,
            {"version": version}, ("compare/peers", "compare/nncodec"),
        )  # fmt: skip


@lru_cache
def _nncodec_version(python: str) -> tuple[str, str]:
    """Version of NNCodec, or why it cannot run."""
    if not python:
        return "", f"NNCodec is missing: name a Python that has it by --nncodec or {_VARIABLE}"
    script = "from importlib.metadata import version; print(version('nncodec'))"
    try:
        done = subprocess.run(
            [python, "-c", script], capture_output=True, text=True, check=False,
            timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{python} cannot be run: {error}"
    if done.returncode:
        return "", f"{python} has no NNCodec: pip install nncodec==2.1.3 into it"
    return done.stdout.strip(), ""


def _nncodec(python: str, opt_qp: bool, model: Model, qp: float) -> Coded:
    with ScratchFolder() as name:
        folder = Path(name)
        # Members of the file are numbers: names may hold what a path may not.
        arrays: dict[str, Any] = {str(n): a for n, a in enumerate(model.tensors.values())}
        np.savez(folder / "model.npz", **arrays)
        (folder / "names.json").write_text(json.dumps(list(model.tensors)), encoding="utf-8")
        done = subprocess.run(
            [python, "-I", str(_CHILD), str(folder), str(round(qp)), str(int(opt_qp))],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise CodecError(f"NNCodec failed: {words[-1] if words else done.returncode}")
        encode_s, decode_s = map(float, done.stdout.split()[-2:])
        with np.load(folder / "restored.npz", allow_pickle=False) as restored:
            tensors = {
                name: restored[str(n)].reshape(before.shape).astype(before.dtype)
                for n, (name, before) in enumerate(model.tensors.items())
            }
        return Coded((folder / "stream.nnc").stat().st_size, tensors, encode_s, decode_s)
