"""Functions that judge a model: where they come from, what they get and return, how they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal
from judged import (
    State,
    logits,
    loss,
    model,
    pack,
)

from weightvid.checkpoint import from_mapping
from weightvid.errors import EvaluationError, QuantizationError
from weightvid.pack import Evaluation, PackOptions, Target, pack_checkpoint
from weightvid.planning.function import load_function
from weightvid.planning.verdict import Original, Outputs, read_outputs


def raises(_: State) -> Any:
    raise ValueError("no\nsuch data")


def leaves(_: State) -> Any:
    raise SystemExit(3)


def changes_shape(state: State) -> Any:
    same = np.array_equal(state["first.weight"], model()["first.weight"])
    return logits(state)[: None if same else 50]


def nan_later(state: State) -> Any:
    same = np.array_equal(state["first.weight"], model()["first.weight"])
    return 1.0 if same else float("nan")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "raises failed: ValueError: no such data"),
        (leaves, "leaves failed: SystemExit: 3"),
        (lambda _: None, "returned None"),
        (lambda _: "good", "returned a str"),
        (lambda _: {"loss": 1.0}, "returned a dict"),
        (lambda _: float("nan"), "returned nan"),
        (lambda _: np.full((3, 4), np.nan), "with NaN or infinity"),
        (lambda _: np.zeros(7), r"outputs of shape \[7\]"),
        (lambda _: np.zeros((7, 1)), r"outputs of shape \[7, 1\]"),
        (lambda _: np.zeros((0, 4)), r"outputs of shape \[0, 4\]"),
        (lambda _: (np.zeros((7, 3)), np.zeros(5)), "5 labels for 7 outputs"),
        (changes_shape, "50 x 10, not 200 x 10"),
        (nan_later, "returned nan"),
    ],
)
def test_functions_that_cannot_judge(tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        pack(tmp_path / "m.mp4", function)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    ("function", "target", "message"),
    [(logits, "drop", "no metric that could drop"), (loss, "kl", "a number alone")],
)
def test_targets_that_a_function_cannot_judge(
    tmp_path: Path, function: Any, target: str, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        pack(tmp_path / "m.mp4", function, target=Target(target, 0.1))


def test_the_rule_sqnr_excludes_it(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError):
        pack(tmp_path / "m.mp4", logits, rule="sqnr")


@pytest.mark.parametrize(
    "text",
    ["", "judge", ":judge", "numpy:", "numpy:no_such", "numpy:pi", "no.such.module:f", "no.py:f"],
)
def test_functions_that_are_not_there(text: str) -> None:
    with pytest.raises(EvaluationError):
        load_function(text)


def test_functions_of_modules_and_scripts(tmp_path: Path) -> None:
    assert load_function("numpy.linalg:norm").call is np.linalg.norm
    script = tmp_path / "script.py"
    script.write_text("import helper\n\ndef f(state):\n    return helper.one()\n")
    (tmp_path / "helper.py").write_text("def one():\n    return 1.0\n")
    found = load_function(f"{script}:f")
    assert found({}) == 1.0
    assert found.digest is not None
    assert found.digest == load_function(f"{script}:f").digest
    script.write_text("raise SystemExit('bad')\n")
    with pytest.raises(EvaluationError, match="SystemExit: bad"):
        load_function(f"{script}:f")


def test_torch_functions_get_torch_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n\ndef f(state):\n"
        "    assert state['w'].dtype == torch.bfloat16 and state['tied'] is state['w']\n"
        "    state['w'].mul_(2)\n"  # a function may do with its tensors as it likes
        "    return torch.linspace(-1, 1, 40).to(torch.bfloat16) @ state['w'] * torch.eye(9, 60)\n"
    )
    weights = torch.randn(40, 60).to(torch.bfloat16)
    evaluation = Evaluation(f"{script}:f", cache=tmp_path, budget=8)
    from weightvid.torch import TensorReader

    source = TensorReader({"w": weights, "tied": weights}, {})
    report = pack_checkpoint(source, tmp_path / "m.mp4", PackOptions(evaluation=evaluation))
    assert report.loss is not None
    assert torch.equal(source.tensors["w"] if hasattr(source, "tensors") else weights, weights)


def test_numpy_functions_get_plain_arrays(tmp_path: Path) -> None:
    def judge(state: State) -> float:
        assert type(state["half"]) is np.ndarray
        assert state["half"].dtype == np.float16
        assert state["brain"].dtype == np.float32
        state["half"][:] = 0
        return 1.0

    arrays = {
        "half": normal(1, 30, 30).astype(np.float16),
        "brain": (normal(2, 30, 30).view(np.uint32) >> 16).astype(np.uint16),
    }
    before = arrays["half"].copy()
    options = PackOptions(evaluation=Evaluation(judge, budget=6))
    source = from_mapping(arrays, dtypes={"brain": "BF16"})
    pack_checkpoint(source, tmp_path / "m.mp4", options)
    assert np.array_equal(arrays["half"], before)


def test_what_functions_return() -> None:
    logits_ = np.float32([[1, 2, 3], [3, 2, 1]])
    assert read_outputs(3, "f").metric == 3.0
    assert read_outputs(np.float32(3), "f").vectors is None
    assert read_outputs((logits_, np.array([2, 1])), "f").metric == 0.5
    assert read_outputs((logits_, 91.5), "f").metric == 91.5
    sequence = read_outputs(np.zeros((2, 7, 5)), "f").vectors
    assert sequence is not None
    assert sequence.shape == (14, 5)
    torch = pytest.importorskip("torch")
    returned = (torch.tensor(logits_, requires_grad=True), torch.tensor([2, 0]))
    assert read_outputs(returned, "f").metric == 1.0
    half = read_outputs(torch.tensor(logits_).to(torch.bfloat16), "f").vectors
    assert np.array_equal(half, logits_)


def test_drops_have_a_direction() -> None:
    higher = Original(Outputs(None, 80.0), False, "f")
    assert higher.drop(72.0) == pytest.approx(0.1)
    lower = Original(Outputs(None, 4.0), True, "f")
    assert lower.judge(Outputs(None, 5.0)).loss == pytest.approx(0.25)
    assert Original(Outputs(None, 0.0), False, "f").drop(-0.5) == 0.5
