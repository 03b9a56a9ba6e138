"""NNCodec (MPEG NNC), the peer that rates are compared with.

Its pins clash with ours, so a Python of its own runs it: its path is an option, or the value
of the environment variable WEIGHTVID_NNCODEC.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Final

from weightvid.checkpoint.nnc import VARIABLE, run_nncodec
from weightvid.compare.model import Coded, Method, Model
from weightvid.errors import CodecError

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
    python = os.fspath(nncodec or os.environ.get(VARIABLE, ""))
    version, missing = _nncodec_version(python)
    for name, opt_qp, qps in (("NNCodec DQ", False, dq_qps), ("NNCodec opt_qp", True, opt_qps)):
        yield Method(
            name, "peer", partial(_nncodec, python, opt_qp), "QP", tuple(map(float, qps)), missing,
            {"version": version}, ("compare/peers", "compare/nncodec", "checkpoint/nnc"),
            command=("compare", "--nncodec", python) if nncodec else ("compare",),
        )  # fmt: skip


@lru_cache
def _nncodec_version(python: str) -> tuple[str, str]:
    """Version of NNCodec, or why it cannot run."""
    if not python:
        return "", f"NNCodec is missing: name a Python that has it by --nncodec or {VARIABLE}"
    script = "from importlib.metadata import version; print(version('nncodec'))"
    try:
        done = subprocess.run(
            [python, "-c", script], capture_output=True, text=True, check=False,
            timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{python} cannot be run: {error}"
    if done.returncode:
        return "", f"{python} has no NNCodec: pip install nncodec==2.1.3 into it"
    return done.stdout.strip(), ""


def _nncodec(python: str, opt_qp: bool, model: Model, qp: float) -> Coded:
    settings = str(round(qp)), str(int(opt_qp))
    try:
        told, stream, restored = run_nncodec(model.tensors, *settings, python=python)
    except RuntimeError as error:
        raise CodecError(f"NNCodec failed: {error}") from None
    tensors = {n: restored[n].reshape(x.shape).astype(x.dtype) for n, x in model.tensors.items()}
    encode_s, decode_s = map(float, told.split()[-2:])
    return Coded(len(stream), tensors, encode_s, decode_s)
