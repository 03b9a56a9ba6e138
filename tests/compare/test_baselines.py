"""The usual small checkpoints: they round-trip, and take what a few plain lines take."""

from __future__ import annotations

import lzma
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weightvid.compare import nnc
from weightvid.compare.baselines import BASELINES
from weightvid.compare.model import Model, load_model
from weightvid.errors import CodecError

OWN = ("fp16+zstd", "int8", "int8+zstd", "int8+xz", "global+xz", "gguf-q8_0", "gguf-q4_0")


def test_the_table_is_complete() -> None:
    assert set(BASELINES) == {*OWN, "zipnn", "nncodec"}


@pytest.mark.parametrize("name", OWN)
def test_round_trip(name: str, model: Model) -> None:
    row = BASELINES[name]
    assert row.missing() is None
    for value in row.values:
        coded = row.encode(model, value)
        restored = row.decode(coded, model, value).tensors
        quality = model.judge(restored)
        assert quality.sqnr_db is not None
        assert quality.sqnr_db > 9
        assert all(restored[n].dtype == t.dtype for n, t in model.tensors.items())
        again = row.decode(coded, model, value).tensors
        assert model.judge(again).sha256 == quality.sha256
        if "raw" not in row.about:
            assert sum(coded.items.values()) < sum(t.nbytes for t in model.tensors.values())


def test_int8_xz_is_a_ten_line_script(model: Model) -> None:
    levels, scales, rest = [], [], []
    for tensor in model.tensors.values():
        if tensor.ndim < 2 or tensor.dtype.kind != "f":
            rest.append(tensor.tobytes())
            continue
        x = tensor.astype(np.float32).reshape(len(tensor), int(np.prod(tensor.shape[1:])))
        scale = np.abs(x).max(1, initial=0) / np.float32(127)
        safe = np.where(scale > 0, scale, np.float32(1))[:, None]
        levels.append(np.rint(x / safe).clip(-127, 127).astype(np.int8).tobytes())
        scales.append(scale.astype(np.float32).tobytes())
    data = lzma.compress(b"".join(levels + scales + rest), preset=9 | lzma.PRESET_EXTREME)
    coded = BASELINES["int8+xz"].encode(model, None)
    assert coded.parts["data"] == data


def test_finer_steps_take_more(model: Model) -> None:
    row = BASELINES["global+xz"]
    sizes = [sum(row.encode(model, value).items.values()) for value in row.values]
    assert sizes == sorted(sizes, reverse=True)


def test_global_step_of_levels_wider_than_a_byte(tmp_path: Path) -> None:
    path = tmp_path / "wide.npz"
    wide = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    wide[0, 0], wide[1, 1] = 40_000, 500
    np.savez(path, wide=wide, narrow=wide[2:] * 0)
    model = load_model(path)
    row = BASELINES["global+xz"]
    restored = row.decode(row.encode(model, 0.01), model, 0.01).tensors
    step = 0.01 * np.sqrt((wide.astype(float) ** 2).sum() / (2 * wide.size - 128))
    assert np.abs(restored["wide"] - wide).max() <= step * 0.51
    assert not restored["narrow"].any()


def test_a_baselines_file_that_is_cut_short(model: Model) -> None:
    coded = BASELINES["int8"].encode(model, None)
    short = replace(coded, parts={"data": coded.parts["data"][:-1]})
    with pytest.raises(CodecError, match="ends before"):
        BASELINES["int8"].decode(short, model, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what it imports is deprecated
def test_zipnn_is_exact_or_missing(model: Model) -> None:
    row = BASELINES["zipnn"]
    reason = row.missing()
    if reason is not None:
        assert "pip install zipnn" in reason
        return
    restored = row.decode(row.encode(model, None), model, None).tensors
    assert model.judge(restored).sha256 == model.judge(model.tensors).sha256


def test_nncodec_is_missing_without_a_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(nnc.VARIABLE, raising=False)
    if nnc.python() is None:
        assert "--nncodec" in str(BASELINES["nncodec"].missing())
    other = tmp_path / "python"
    monkeypatch.setenv(nnc.VARIABLE, str(other))
    assert "cannot be run" in str(BASELINES["nncodec"].missing())
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    nnc.version.cache_clear()
    assert "has no NNCodec" in str(BASELINES["nncodec"].missing())


#: stands in for NNCodec: the same entry points, "compressing" by pickle-free numpy.
_STAND_IN = """
import io, numpy as np
def compress(model, bitstream_path=None, qp=0, use_dq=True, return_bitstream=True):
    assert use_dq and return_bitstream and qp == -24
    assert all(x.dtype in (np.float32, np.int32) for x in model.values())
    data = io.BytesIO()
    arrays = {f"t{n}": x for n, x in enumerate(model.values())}
    np.savez(data, names=np.array(list(model)), **arrays)
    return bytearray(data.getvalue())
def decompress(data):
    with np.load(io.BytesIO(bytes(data))) as z:
        return {str(name): z[f"t{n}"] for n, name in enumerate(z["names"])}
"""


def test_nncodec_runs_by_another_python(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The way there and back; the real NNCodec needs an environment of its own."""
    package = tmp_path / "nncodec"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nnc.py").write_text(_STAND_IN)
    runner = tmp_path / "runner.py"
    text = nnc._RUNNER.read_text(encoding="utf-8")
    text = text.replace("    import torch\n\n    torch.set_num_threads(1)\n", "")
    runner.write_text(text.replace('importlib.import_module("torchvision")', "pass"))
    shell = tmp_path / "python"
    shell.write_text(
        f'#!/bin/sh\ncase "$1" in -c) echo 2.1.3; exit;; esac\nshift\n'
        f'PYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n'
    )
    shell.chmod(0o755)
    monkeypatch.setenv(nnc.VARIABLE, str(shell))
    monkeypatch.setattr(nnc, "_RUNNER", runner)
    nnc.version.cache_clear()
    row = BASELINES["nncodec"]
    assert row.missing() is None
    whole = load_small(tmp_path)
    coded = row.encode(whole, -24)
    assert coded.seconds is not None
    restored = row.decode(coded, whole, -24).tensors
    assert whole.judge(restored).sqnr_db is None
    monkeypatch.setattr(nnc, "_RUNNER", tmp_path / "absent.py")
    with pytest.raises(CodecError, match="NNCodec failed"):
        row.encode(whole, -24)


def load_small(folder: Path) -> Model:
    draw = np.random.default_rng(0)
    np.savez(
        folder / "small.npz",
        **{"a/b.weight": draw.standard_normal((32, 32)).astype(np.float32), "n": np.int64(3)},
    )
    return load_model(folder / "small.npz")
