"""What is said of restored models; how functions are found is tested with planning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.compare import evaluate
from weightvid.errors import EvaluationError
from weightvid.planning.function import load_function
from weightvid.planning.verdict import Outputs

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])


def said(result: Any) -> Outputs:
    return evaluate.run(load_function(lambda state: result), {})


def test_numbers() -> None:
    verdict = evaluate.judge(said(91.5), said(np.float32(90.5)), "f")
    assert (verdict.metric, verdict.metric_change, verdict.kl) == (90.5, -1.0, None)


def test_logits_and_labels() -> None:
    before, after = said((LOGITS, [0, 1])), said((LOGITS[::-1], [0, 1]))
    verdict = evaluate.judge(before, after, "f")
    assert (verdict.metric, verdict.metric_change, verdict.agreement) == (0.0, -100.0, 0.0)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    assert verdict.kl == pytest.approx((p * np.log(p / p[::-1])).sum(1).mean(), rel=1e-6)
    same = evaluate.judge(before, before, "f")
    assert (same.kl, same.agreement, same.cosine_loss) == (pytest.approx(0), 1.0, None)


def test_logits_and_a_number() -> None:
    assert said((LOGITS, 91.5)).metric == 91.5


def test_logits_without_labels_have_no_metric() -> None:
    verdict = evaluate.judge(said(LOGITS), said(LOGITS + 1), "f")
    assert verdict.metric is None
    assert verdict.kl == pytest.approx(0, abs=1e-12)


def test_unit_vectors() -> None:
    first, second = np.eye(3), np.roll(np.eye(3), 1, axis=0)
    verdict = evaluate.judge(said(first), said(second), "f")
    assert (verdict.cosine_loss, verdict.kl, verdict.agreement) == (1.0, None, None)
    assert evaluate.judge(said(first), said(first), "f").cosine_loss == 0.0


def test_other_shapes_and_kinds() -> None:
    for after in (LOGITS[:1], 1.0):
        with pytest.raises(EvaluationError, match="another shape"):
            evaluate.judge(said(LOGITS), said(after), "f")


@pytest.mark.parametrize("result", [float("nan"), np.array([[1.0, np.inf]]), "good", None, [1, 2]])
def test_what_cannot_be_judged(result: Any) -> None:
    with pytest.raises(EvaluationError):
        said(result)


def test_outputs_are_kept(tmp_path: Path) -> None:
    for made in (said(3.5), said(LOGITS), said((LOGITS, [1, 0]))):
        evaluate.save(tmp_path / "o.npz", made)
        again = evaluate.load(tmp_path / "o.npz")
        assert again.metric == made.metric
        assert evaluate.judge(made, again, "f").kl in (None, pytest.approx(0))


def test_tensors_come_as_the_script_wants_them(tmp_path: Path) -> None:
    frozen = np.ones((2, 2), np.float32)
    frozen.flags.writeable = False
    for text in ("", "import torch\n"):
        path = tmp_path / "script.py"
        path.write_text(f"{text}def score(s):\n    s['w'] += 1\n    return float(s['w'].sum())\n")
        function = load_function(f"{path}:score")
        assert function.torch == bool(text)
        assert evaluate.run(function, {"w": frozen}).metric == 8.0


def test_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "judging_module.py"
    found = set()
    for text in ("a = 1", "a = 2"):
        path.write_text(text)
        found |= {evaluate.fingerprint(name) for name in ("judging_module:f", f"{path}:f")}
    assert len(found) == 4
    assert evaluate.fingerprint("no.such.module:f")
