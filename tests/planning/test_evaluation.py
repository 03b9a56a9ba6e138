"""Packing by evaluation: sensitivities, targets, what is remembered, and functions that fail."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal

from weightvid.calibration import CalibrationStats, TensorMoments, model_hash
from weightvid.checkpoint import from_mapping
from weightvid.errors import EvaluationError, QuantizationError, TargetError
from weightvid.loader import open_archive
from weightvid.pack import Evaluation, PackOptions, PackReport, Target, pack_checkpoint
from weightvid.planning.function import load_function
from weightvid.planning.memory import Memory, steps_key
from weightvid.planning.options import PackOptions as Options
from weightvid.planning.sensitivity import groups_of
from weightvid.planning.survey import survey
from weightvid.planning.verdict import Original, Outputs, Verdict, divergence, read_outputs

State = dict[str, np.ndarray[Any, Any]]

INPUTS = np.abs(normal(9, 200, 48, scale=1.0))


def model() -> State:
    """Two layers in a row: errors of the first count a hundred times as much as the second's."""
    return {
        "first.weight": normal(1, 64, 48, scale=0.1),
        "second.weight": normal(2, 64, 64, scale=0.1),
        "unused.weight": normal(3, 40, 40, scale=0.1),
        "head.weight": normal(4, 10, 64, scale=0.3),
        "head.bias": normal(5, 10),
    }


def logits(state: State) -> np.ndarray[Any, Any]:
    hidden = INPUTS @ state["first.weight"].T
    hidden = hidden + 0.1 * np.tanh(hidden) @ state["second.weight"].T
    return 2 * np.maximum(hidden, 0) @ state["head.weight"].T + state["head.bias"]


LABELS = logits(model()).argmax(1)


def labelled(state: State) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return logits(state), LABELS


def unit_vectors(state: State) -> np.ndarray[Any, Any]:
    outputs = logits(state)
    return outputs / np.linalg.norm(outputs, axis=1, keepdims=True)


def loss(state: State) -> float:
    return 1 + float(np.square(logits(state) - logits(model())).mean())


def pack(path: Path, function: Any, **more: Any) -> PackReport:
    settings = {"budget": more.pop("budget", 60), "cache": path.parent / "cache"}
    evaluation = Evaluation(function, more.pop("lower_is_better", False), **settings)
    options = PackOptions(evaluation=evaluation, jobs=1, force=True, **more)
    return pack_checkpoint(from_mapping(model()), path, options)


def archived(path: Path) -> State:
    with open_archive(path) as archive:
        return dict(archive)


def loss_of(path: Path) -> float:
    return divergence(logits(model()).astype(np.float32), logits(archived(path)))


def steps(path: Path) -> dict[str, float]:
    from weightvid.summary import summarize_archive

    return {t.name: t.step for t in summarize_archive(path).tensors if t.step is not None}


def test_sensitive_tensors_get_finer_steps(tmp_path: Path) -> None:
    pack(tmp_path / "m.mp4", logits)
    pack_checkpoint(from_mapping(model()), tmp_path / "free.mp4")
    with_, without = steps(tmp_path / "m.mp4"), steps(tmp_path / "free.mp4")
    relative = {name: with_[name] / without[name] for name in with_}
    assert relative["unused.weight"] > relative["second.weight"]
    assert relative["second.weight"] > 1.5 * relative["first.weight"]


def test_without_a_target_it_is_as_faithful_as_the_recipe_and_smaller(tmp_path: Path) -> None:
    report = pack(tmp_path / "m.mp4", logits, recipe="small")
    free = PackOptions(recipe="small", jobs=1)
    plain = pack_checkpoint(from_mapping(model()), tmp_path / "free.mp4", free)
    assert report.file_bytes < plain.file_bytes
    assert loss_of(tmp_path / "m.mp4") <= 1.2 * loss_of(tmp_path / "free.mp4")
    assert report.loss == pytest.approx(loss_of(tmp_path / "m.mp4"), rel=1e-3)


@pytest.mark.parametrize("value", [0.02, 0.2])
def test_bounded_divergence(tmp_path: Path, value: float) -> None:
    report = pack(tmp_path / "m.mp4", logits, target=Target("kl", value))
    assert report.loss is not None
    assert 0.1 * value < loss_of(tmp_path / "m.mp4") <= value
    assert report.evaluations <= 60 + 30
    assert report.metric is None


def test_bounded_cosine(tmp_path: Path) -> None:
    report = pack(tmp_path / "m.mp4", unit_vectors, target=Target("kl", 0.02))
    mine, other = unit_vectors(model()), unit_vectors(archived(tmp_path / "m.mp4"))
    assert report.loss == pytest.approx(1 - (mine * other).sum(1).mean(), abs=1e-5)
    assert report.loss <= 0.02


@pytest.mark.parametrize("function", [labelled, "accuracy"])
def test_bounded_drop(tmp_path: Path, function: Any) -> None:
    def accuracy(state: State) -> float:
        return 100 * float((logits(state).argmax(1) == LABELS).mean())

    chosen = accuracy if function == "accuracy" else function
    report = pack(tmp_path / "m.mp4", chosen, target=Target("drop", 0.05))
    right = (logits(archived(tmp_path / "m.mp4")).argmax(1) == LABELS).mean()
    assert 0.95 <= right < 1
    assert report.metric_before in (1.0, 100.0)
    assert report.metric == pytest.approx(right * report.metric_before)


def test_bounded_rise_of_a_loss(tmp_path: Path) -> None:
    target = Target("drop", 0.3)
    report = pack(tmp_path / "m.mp4", loss, target=target, lower_is_better=True)
    assert report.metric_before == 1.0
    assert 1.1 < loss(archived(tmp_path / "m.mp4")) <= 1.3


@pytest.mark.parametrize("kind", ["size", "bpw"])
def test_a_size_is_met_and_used_better(tmp_path: Path, kind: str) -> None:
    weights = sum(array.size for array in model().values())
    target = Target(kind, 5_000 if kind == "size" else 8 * 5_000 / weights)
    report = pack(tmp_path / "m.mp4", logits, target=target)
    assert 4950 <= report.file_bytes <= 5000
    free = PackOptions(target=target, jobs=1)
    pack_checkpoint(from_mapping(model()), tmp_path / "free.mp4", free)
    assert loss_of(tmp_path / "m.mp4") < 0.7 * loss_of(tmp_path / "free.mp4")


def test_sqnr_with_an_evaluation(tmp_path: Path) -> None:
    report = pack(tmp_path / "m.mp4", logits, target=Target("sqnr", 15.0))
    assert report.sqnr_db is not None
    assert abs(report.sqnr_db - 15) <= 0.1


@pytest.mark.parametrize("target", [Target("kl", 1e-9), Target("drop", 1e-9)])
def test_a_loss_out_of_reach(tmp_path: Path, target: Target) -> None:
    def picky(state: State) -> tuple[Any, float]:
        return logits(state), -1 - float(np.abs(logits(state) - logits(model())).mean())

    with pytest.raises(TargetError, match="at most cannot be reached; the nearest is"):
        pack(tmp_path / "m.mp4", picky, target=target)
    assert not list(tmp_path.glob("*.mp4"))


SCRIPT = """
    import numpy as np
    from pathlib import Path

    CALLS = Path(__file__).with_name("calls.txt")

    def judge(state):
        with CALLS.open("a") as file:
            file.write("x")
        if CALLS.stat().st_size == STOP:
            raise KeyboardInterrupt
        print("judging")
        return np.ones((4, 5)) + sum(np.asarray(a).sum() for a in state.values()) * np.eye(4, 5)

    STOP = 9
"""


def test_a_search_that_was_broken_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    calls = tmp_path / "calls.txt"
    call = f"{script}:judge"
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "a.mp4", call, budget=20)
    assert not list(tmp_path.glob("*.mp4"))
    first = calls.stat().st_size
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_text(cache.read_text() + '{"steps": "cut off')
    report = pack(tmp_path / "a.mp4", call, budget=20)
    # The original is judged again, and those calls that were never finished; none twice.
    assert calls.stat().st_size == first + report.evaluations
    assert report.evaluations <= 20 - (first - 2) + 6
    again = pack(tmp_path / "b.mp4", call, budget=20)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert again.evaluations <= 3
    # Another function is another matter.
    script.write_text(textwrap.dedent(SCRIPT) + "\n# changed\n")
    changed = pack(tmp_path / "c.mp4", call, budget=20)
    assert changed.evaluations > 10
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # And so is a quantizer that makes other levels of a step.
    monkeypatch.setattr("weightvid.planning.evaluate.code_sha256", lambda _: "of another version")
    assert pack(tmp_path / "d.mp4", call, budget=20).evaluations > 10
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    memory = Memory(Path("/dev/null/cache"), {})
    memory.put("key", Verdict(1.0, 2.0, None))
    assert memory.get("key") == Verdict(1.0, 2.0, None)


def test_what_is_remembered(tmp_path: Path) -> None:
    first = Memory(tmp_path, {"model": "a"})
    first.put("x", Verdict(0.1, 0.25, 91.5))
    first.put("y", Verdict(0.5, 0.5, None))
    assert first.path is not None
    broken = ["{", "[]", '{"steps": "z", "loss": NaN, "drive": 1, "metric": 0}', '{"steps": "w"}']
    first.path.write_text(first.path.read_text() + "\n".join(broken))
    again = Memory(tmp_path, {"model": "a"})
    assert len(again) == 2
    assert again.get("x") == Verdict(0.1, 0.25, 91.5)
    assert again.get("y") == Verdict(0.5, 0.5, None)
    assert not len(Memory(tmp_path, {"model": "b"}))
    assert all(json.loads(t) for t in first.path.read_text().splitlines()[:4] if t)


def test_keys_tell_steps_apart() -> None:
    assert steps_key({"a": 0.5, "b": 0.25}) == steps_key({"b": 0.25, "a": 0.5})
    keys = [{}, {"a": 0.5}, {"a": 0.5000001}, {"b": 0.5}, {"a": 0.5, "b": 0.5}]
    assert len({steps_key(k) for k in keys}) == len(keys)


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


def test_groups() -> None:
    names = [f"layer.{i}.{kind}" for i in range(6) for kind in ("q", "k")] + ["head"]
    arrays = {name: normal(i, 20, 20) for i, name in enumerate(names)}
    surveyed = survey(from_mapping(arrays), Options(target=Target("size", 1.0)))
    assert len(groups_of(surveyed, 13)) == 13
    assert [len(group) for group in groups_of(surveyed, 5)] == [6, 6, 1]
    for most in (1, 2):
        joined = groups_of(surveyed, most)
        assert len(joined) == most
        assert sorted(n for group in joined for n in group) == sorted(surveyed.stats)


def statistics() -> CalibrationStats:
    """Of the two layers whose inputs are known."""
    hidden = INPUTS @ model()["first.weight"].T
    inputs = {"first.weight": INPUTS, "second.weight": np.tanh(hidden)}
    hidden = np.maximum(hidden + 0.1 * np.tanh(hidden) @ model()["second.weight"].T, 0)
    inputs["head.weight"] = 2 * hidden
    tensors = {
        name: TensorMoments(
            (x.T @ x / len(x))[None].astype(np.float32), x.mean(0)[None].astype(np.float32),
            rows=len(x), bias="head.bias" if name == "head.weight" else None,
        )
        for name, x in inputs.items()
    }  # fmt: skip
    return CalibrationStats(model_hash(from_mapping(model()), tensors), len(INPUTS), tensors)


@pytest.mark.parametrize("target", [Target("kl", 0.002), Target("drop", 0.03), Target("bpw", 5.0)])
def test_statistics_and_an_evaluation_together(target: Target, tmp_path: Path) -> None:
    from weightvid.summary import summarize_archive

    found = {}
    for stats in (None, statistics()):
        path = tmp_path / "model.mp4"
        # One cache: what was judged without statistics must not be taken for the other.
        report = pack(path, labelled, target=target, calibration=stats, budget=40)
        if target.kind == "kl":
            assert loss_of(path) <= target.value
            assert report.loss == pytest.approx(loss_of(path), rel=1e-3)
        elif target.kind == "drop":
            assert report.metric is not None
            assert report.metric >= 0.97 * float((logits(model()).argmax(1) == LABELS).mean())
        else:
            assert 0.985 * 5.0 <= report.bits_per_weight <= 5.0
        about = summarize_archive(path).about
        assert "evaluation" in about
        assert ("calibration" in about) == (stats is not None)
        found[stats is not None] = report
    if target.kind == "kl":
        assert found[True].file_bytes < found[False].file_bytes
    elif target.kind == "bpw":
        assert (found[True].loss or 0) < (found[False].loss or 0)


def test_verdicts_know_the_corrected_biases(tmp_path: Path) -> None:
    """What the search believes of a model is what its archive comes to."""
    from weightvid.planning.evaluate import Evaluator

    evaluation = Evaluation(logits, cache=tmp_path / "cache")
    # All mantissa bits of the bias, as verdicts have them.
    options = PackOptions(
        calibration=statistics(), step_factor=0.5, mantissa_bits=23, evaluation=evaluation
    )
    surveyed = survey(from_mapping(model()), options)
    verdict = Evaluator(surveyed, evaluation, lambda _: None).verdict(surveyed.steps(0.5))
    plain = PackOptions(calibration=statistics(), step_factor=0.5, mantissa_bits=23)
    pack_checkpoint(from_mapping(model()), tmp_path / "model.mp4", plain)
    assert verdict.loss == pytest.approx(loss_of(tmp_path / "model.mp4"), rel=1e-3)
    assert not np.array_equal(archived(tmp_path / "model.mp4")["head.bias"], model()["head.bias"])
