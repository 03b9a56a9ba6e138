"""Packing by evaluation: sensitivities, targets, and what is remembered."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal
from judged import (
    INPUTS,
    LABELS,
    State,
    archived,
    labelled,
    logits,
    loss,
    loss_of,
    model,
    pack,
    steps,
    unit_vectors,
)

from weightvid.calibration import CalibrationStats, TensorMoments, model_hash
from weightvid.checkpoint import from_mapping
from weightvid.errors import TargetError
from weightvid.pack import Evaluation, PackOptions, Target, pack_checkpoint
from weightvid.planning.memory import Memory, steps_key
from weightvid.planning.options import PackOptions as Options
from weightvid.planning.sensitivity import groups_of
from weightvid.planning.survey import survey
from weightvid.planning.verdict import Verdict


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
