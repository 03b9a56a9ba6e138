"""Functions of users: what they may return, and what is said where they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.compare.evaluate import Outcome, fingerprint, judge, load, outcome
from weightvid.errors import EvaluationError

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])


def test_numbers() -> None:
    verdict = judge(outcome(91.5), outcome(np.float32(90.5)))
    assert (verdict.metric, verdict.metric_change, verdict.kl) == (90.5, -1.0, None)


def test_logits_and_labels() -> None:
    before, after = outcome((LOGITS, [0, 1])), outcome((LOGITS[::-1], [0, 1]))
    verdict = judge(before, after)
    assert (verdict.metric, verdict.metric_change, verdict.agreement) == (0.0, -100.0, 0.0)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    expected = (p * np.log(p / p[::-1])).sum(1).mean()
    assert verdict.kl == pytest.approx(expected)
    same = judge(before, before)
    assert (same.kl, same.agreement) == (pytest.approx(0), 1.0)


def test_logits_without_labels_have_no_metric() -> None:
    verdict = judge(outcome(LOGITS), outcome(LOGITS + 1))
    assert verdict.metric is None
    assert verdict.kl == pytest.approx(0, abs=1e-12)


def test_sequences_of_logits() -> None:
    assert outcome(LOGITS.reshape(1, 2, 3)).logits is not None


def test_torch_tensors() -> None:
    import torch

    found = outcome((torch.from_numpy(LOGITS).bfloat16(), torch.tensor([0, 1])))
    assert found.metric == 100.0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (float("nan"), "NaN"),
        (np.array([[1.0, np.inf]]), "NaN or an infinity"),
        ("good", "must return a number"),
        (None, "NaN|must return"),
        ([1.0, 2.0], "logits of shape"),
        (np.empty((0, 3)), "logits of shape"),
        ((LOGITS, [0, 1, 2]), "3 labels for 2 rows"),
        ((LOGITS, "no"), "must return"),
    ],
)
def test_what_cannot_be_judged(result: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        outcome(result)


def test_other_shapes_and_kinds() -> None:
    with pytest.raises(EvaluationError, match=r"of shape \(1, 3\), and \(2, 3\)"):
        judge(outcome(LOGITS), outcome(LOGITS[:1]))
    with pytest.raises(EvaluationError, match="numbers for some"):
        judge(outcome(1.0), outcome(LOGITS))


def test_outcomes_are_kept(tmp_path: Path) -> None:
    for made in (outcome(3.5), outcome(LOGITS), outcome((LOGITS, [1, 0]))):
        made.save(tmp_path / "o.npz")
        again = Outcome.load(tmp_path / "o.npz")
        assert again.metric == made.metric
        assert judge(made, again).kl in (None, pytest.approx(0))


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return f"{path}:score"


def test_a_script_gets_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = script(tmp_path, "def score(s):\n    print('hello')\n    return float(s['w'].sum())\n")
    function = load(name)
    assert not function.torch
    frozen = np.ones((2, 2), np.float32)
    frozen.flags.writeable = False
    assert function({"w": frozen}).metric == 4.0
    assert capsys.readouterr().out == ""


def test_a_script_that_imports_torch_gets_tensors(tmp_path: Path) -> None:
    name = script(tmp_path, "import torch\ndef score(s):\n    return torch.sum(s['w'])\n")
    function = load(name)
    assert function.torch
    assert function({"w": np.ones(3, np.float32)}).metric == 3.0


def test_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "judging_module.py").write_text("def score(s):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("judging_module:score")({}).metric == 1.0
    first = fingerprint("judging_module:score")
    (tmp_path / "judging_module.py").write_text("def score(s):\n    return 2\n")
    assert fingerprint("judging_module:score") != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(s):\n    raise KeyError('conv.weight')\n", "raised KeyError: 'conv.weight'"),
        ("def score(s):\n    return float('nan')\n", "NaN"),
        ("def other(s):\n    return 1\n", "defines no function 'score'"),
        ("import nowhere_to_be_found\n", "cannot be imported: ModuleNotFoundError"),
        ("def score(s)\n", "cannot be imported: SyntaxError"),
    ],
)
def test_scripts_that_fail(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load(script(tmp_path, text))({})


@pytest.mark.parametrize("name", ["script.py", ":f", "a.py:", "absent.py:f", "no.such.module:f"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(EvaluationError):
        load(name)
