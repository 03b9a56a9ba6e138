"""Functions for ``pack --eval`` on the evaluation models: what each says on its training data.

    WEIGHTVID_EVAL=EVAL weightvid pack EVAL/cifar10_resnet20/model.safetensors \
        --eval tools/eval_functions.py:cifar10_resnet20

Sensitivities are measured on data that no judgement is made with: CIFAR-10's training images, and
sentences that are no pairs of STS-B.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

State = dict[str, Any]

IMAGES: Final = 500
SENTENCES: Final = 300


def cifar10_resnet20(state: State) -> Any:
    """Logits and labels of training images."""
    return _logits("cifar10_resnet20", state)


def cifar10_resnet44(state: State) -> Any:
    """Logits and labels of training images."""
    return _logits("cifar10_resnet44", state)


def minilm_l6(state: State) -> Any:
    """Embeddings of sentences of a play."""
    script = _script("minilm_l6")
    weights = {name: t.float() for name, t in state.items() if t.is_floating_point()}
    ids = _tokens()
    found = torch.empty(len(ids), 384)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with torch.inference_mode():
        for begin in range(0, len(order), 50):
            batch = order[begin : begin + 50]
            padded = torch.zeros(len(batch), max(len(ids[i]) for i in batch), dtype=torch.long)
            mask = torch.zeros_like(padded)
            for row, i in enumerate(batch):
                padded[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            found[batch] = script.forward(weights, padded, mask)
    return found


@cache
def _tokens() -> list[list[int]]:
    text = (_folder() / "_data" / "calibration_sentences.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    found: list[list[int]] = _script("minilm_l6").tokens(lines[:: len(lines) // SENTENCES])
    return found


def _logits(name: str, state: State) -> Any:
    data = _folder() / "_data" / "cifar10_train1000_lossless.npz"
    return _script(name).logits(state, IMAGES, data)


def _folder() -> Path:
    return Path(os.environ["WEIGHTVID_EVAL"])


@cache
def _script(name: str) -> Any:
    path = _folder() / name / "eval.py"
    spec = importlib.util.spec_from_file_location(f"eval_{name}", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module
