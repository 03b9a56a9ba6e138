"""A user's own measure decides: its bounds, where it comes from, how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid.calibrate import Evaluation
from weightvid.calibrate.evaluation import Judge, divergence
from weightvid.checkpoint import from_mapping
from weightvid.errors import EvaluationError, QuantizationError, TargetError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, PackReport, pack_checkpoint

State = dict[str, Any]
INPUTS = np.abs(small_models.weights(9, 200, 48, scale=1.0))
MODEL = {
    "first.weight": small_models.weights(1, 64, 48, scale=0.1),
    "head.weight": small_models.weights(4, 10, 64, scale=0.3),
    "head.bias": small_models.weights(5, 10),
}


def logits(state: State) -> Any:
    hidden = np.maximum(INPUTS @ state["first.weight"].T, 0)
    return 2 * hidden @ state["head.weight"].T + state["head.bias"]


LABELS = logits(MODEL).argmax(1)


def labelled(state: State) -> Any:
    found = logits(state)
    state["first.weight"][:] = 0  # a function may do with its tensors as it likes
    return found, LABELS


def percent(state: State) -> float:
    return 100 * float((logits(state).argmax(1) == LABELS).mean())


def vectors(state: State) -> Any:
    return logits(state) / np.linalg.norm(logits(state), axis=1, keepdims=True)


def loss(state: State) -> float:
    return 4 + float(np.square(logits(state) - logits(MODEL)).mean())


def pack(path: Path, function: Any, **bounds: Any) -> tuple[PackReport, State]:
    options = PackOptions(evaluation=Evaluation(function, **bounds), jobs=1, force=True)
    report = pack_checkpoint(from_mapping(MODEL), path, options)
    with open_archive(path) as archive:
        return report, {name: array.copy() for name, array in archive.items()}


@pytest.mark.parametrize(("function", "bound"), [(logits, 0.002), (logits, 0.05), (vectors, 0.01)])
def test_a_divergence_is_met_and_used(tmp_path: Path, function: Any, bound: float) -> None:
    report, found = pack(tmp_path / "m.mp4", function, max_kl=bound)
    lost, said = divergence(logits(MODEL), logits(found)), "KL divergence {0:.4g}, same answer"
    if function is vectors:
        lost, said = 1 - (vectors(MODEL) * vectors(found)).sum(1).mean(), "mean cosine {1:.5f}"
    assert 0.3 * bound < lost <= bound
    assert said.format(lost, 1 - lost) in report.notes[0]


@pytest.mark.parametrize(
    ("function", "before", "bounds"),
    [(labelled, 1, (0.95, 1)), (percent, 100, (95, 100)), (loss, 4, (4, 4.4))],
)
def test_a_drop_is_met_and_no_metric_rescaled(
    tmp_path: Path, function: Any, before: float, bounds: tuple[float, float]
) -> None:
    more = {"max_drop": 0.1 if function is loss else 0.05, "lower_is_better": function is loss}
    report, found = pack(tmp_path / "m.mp4", function, **more)
    after = Judge(function, found).original.metric or 0.0
    assert f"metric {before} -> {after:.6g}" in report.notes[0]
    assert bounds[0] <= after <= bounds[1]
    assert after != before


def test_other_data_other_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same function is asked anew each time, whatever it reads; nothing is remembered."""
    data, sizes = tmp_path / "inputs.npy", []
    (tmp_path / "script.py").write_text(
        f"import numpy as np\ndef judge(state):\n    print('not for stdout')\n"
        f"    return np.load({str(data)!r}) @ state['first.weight'].T\n"
    )
    for scale in (0.1, 1.0, 0.1):
        np.save(data, scale * INPUTS)
        made = pack(tmp_path / "m.mp4", f"{tmp_path}/script.py:judge", max_kl=1e-3)
        sizes.append(made[0].file_bytes)
    assert not capsys.readouterr().out
    assert sizes[0] == sizes[2] < sizes[1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _: {}["no\nsuch data"], "failed: KeyError: "),
        (lambda _: exit(3), "failed: SystemExit: 3"),
        (lambda _: None, "returned a NoneType"),
        (lambda _: 10**400, "returned a int"),
        (lambda _: np.ones((4, 3), complex), r"returned a ndarray of shape \[4, 3\]"),
        (lambda _: {"loss": 1.0}, "returned a dict"),
        (lambda _: float("nan"), "NaN or infinity"),
        (lambda _: np.zeros((0, 4)), r"of shape \[0, 4\]"),
        (lambda _: (np.zeros((7, 3)), np.zeros(5)), "a tuple of a ndarray"),
        (lambda _: ("good", 1.0), "a tuple of a str"),
        (lambda s: logits(s)[: 5 + int((s["head.weight"] == MODEL["head.weight"]).all())],
         "the same samples each time"),
        (lambda _: 1.0, "a number alone"),
        ("numpy:pi", "defines no function"),
        ("no.py:f", "no such file"),
        ("judge", "is not of the form"),
    ],
)  # fmt: skip
def test_functions_that_cannot_judge(tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        pack(tmp_path / "m.mp4", function, max_kl=0.1)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bounds_that_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be reached; the nearest that was found is"):
        pack(tmp_path / "m.mp4", logits, max_kl=1e-13)
    with pytest.raises(EvaluationError, match="no metric that could drop"):
        pack(tmp_path / "m.mp4", logits, max_drop=0.1)
    for bounds in ({}, {"max_kl": 1.0, "max_drop": 1.0}, {"max_kl": 0.0}, {"max_drop": -1.0}):
        with pytest.raises(QuantizationError):
            Evaluation(logits, **bounds)
