"""Bytes, SQNR and fidelity of real models: what a change of the packer must not lose unseen."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from weightvid.inspect import summarize_archive
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, PackReport, pack_checkpoint
from weightvid.repair import add_parity, repair_archive

DIGITS = Path(__file__).parent.parent / "data" / "digits" / "digits_cnn.safetensors"


def eval_folder(name: str) -> Path:
    root = os.environ.get("WEIGHTVID_EVAL")
    if not root or not (folder := Path(root, name)).is_dir():
        pytest.skip(f"needs WEIGHTVID_EVAL, a folder that holds {name}")
    return folder


def eval_module(folder: Path) -> ModuleType:
    pytest.importorskip("torch").set_num_threads(1)
    spec = importlib.util.spec_from_file_location(f"eval_{folder.name}", folder / "eval.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack(source: Path, folder: Path, **options: Any) -> tuple[Path, PackReport]:
    target = folder / "model.mp4"
    return target, pack_checkpoint(source, target, PackOptions(jobs=1, **options))


def test_digits(tmp_path: Path) -> None:
    """The bundled sample: within 1 % and 0.1 dB of what was measured."""
    _, report = pack(DIGITS, tmp_path)
    assert report.file_bytes == pytest.approx(88_700, rel=0.01)
    assert report.sqnr_db == pytest.approx(35.0, abs=0.2)
    assert report.worst_tensor is not None and report.worst_tensor.sqnr_db > 30


@pytest.mark.parametrize(
    ("name", "factor", "most_bits", "most_kl"),
    [
        ("cifar10_resnet20", 0.18, 4.25, 0.008),
        ("cifar10_resnet20", 0.40, 3.08, 0.035),
        ("cifar10_resnet44", 0.55, 2.62, 0.035),
    ],
)
def test_resnets(
    tmp_path: Path, name: str, factor: float, most_bits: float, most_kl: float
) -> None:
    folder = eval_folder(name)
    module = eval_module(folder)
    import torch

    archive, report = pack(folder / "model.safetensors", tmp_path, step_factor=factor)
    assert report.bits_per_weight < most_bits
    original = {n: torch.from_numpy(t.copy()) for n, t in _tensors(folder / "model.safetensors")}
    with open_archive(archive) as opened:
        decoded = {n: torch.from_numpy(t.copy()) for n, t in opened.items()}
    before, _ = module.logits(original, 250)
    after, _ = module.logits(decoded, 250)
    p, q = (torch.log_softmax(torch.as_tensor(x).double(), -1) for x in (before, after))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < most_kl


def _tensors(path: Path) -> Any:
    from weightvid.checkpoint import open_checkpoint

    with open_checkpoint(path) as reader:
        for spec in reader.contents.tensors:
            yield spec.name, reader.read(spec.name)


def test_packets_are_the_archive(tmp_path: Path) -> None:
    """Of a default archive of ResNet-44 the video is 92 % of the bytes or more."""
    archive, report = pack(eval_folder("cifar10_resnet44") / "model.safetensors", tmp_path)
    assert report.packet_bytes >= 0.92 * report.file_bytes
    assert summarize_archive(archive).packet_share >= 0.92


def test_minilm(tmp_path: Path, minilm_path: Path) -> None:
    archive, report = pack(minilm_path, tmp_path)
    assert report.bits_per_weight < 6.1
    assert report.packet_bytes >= 0.92 * report.file_bytes
    pytest.importorskip("zfec", reason="parity needs zfec")
    data = io.BytesIO(archive.read_bytes())
    add_parity(data, 0.02)
    guarded = data.getvalue()
    for seed in range(10):  # bursts of 4 KiB
        draw = Random(seed)
        at = draw.randrange(len(guarded) - 4096)
        burst = draw.randbytes(4096)
        archive.write_bytes(guarded[:at] + burst + guarded[at + 4096 :])
        repair_archive(archive)
        assert archive.read_bytes() == guarded
