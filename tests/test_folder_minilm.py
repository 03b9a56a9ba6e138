"""The real folder of a sentence model, there and back, loaded by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weightvid.pack import pack_checkpoint
from weightvid.unpack import unpack_archive


def test_a_folder_loads_in_transformers(minilm_path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source = minilm_path.parent
    packed = pack_checkpoint(source, tmp_path / "minilm.mp4")
    assert {"config.json", "tokenizer.json", "1_Pooling/config.json"} <= set(packed.side_files)
    restored = tmp_path / "minilm"
    report = unpack_archive(tmp_path / "minilm.mp4", restored)
    for name in report.side_files:
        assert (restored / name).read_bytes() == (source / name).read_bytes()

    texts = ["A man eats food.", "Someone is having a meal.", "The sky is clear today."]
    vectors = []
    for folder in (source, restored):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder).eval()
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        vectors.append(torch.nn.functional.normalize(pooled, dim=1).double().numpy())
    before, after = vectors
    assert np.sum(before * after, axis=1).min() > 0.98
    assert np.abs(before @ before.T - after @ after.T).max() < 0.05
