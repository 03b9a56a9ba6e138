"""Comparisons as a whole: rows, resumption, goals, the report."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid.calibrate.evaluation import Judge
from weightvid.checkpoint import from_mapping
from weightvid.compare import (
    CompareOptions,
    CompareResult,
    Row,
    compare,
    parse_goal,
    write_report,
)
from weightvid.compare.model import Coded, Method, Model, load_model
from weightvid.compare.rows import RowStore, measure
from weightvid.errors import CodecError, EvaluationError, OutputError, QuantizationError

FACTORS = (0.13, 0.25, 0.5)


INPUTS = np.random.default_rng(0).standard_normal((40, 80)).astype(np.float32)
#: three quarters are what the original says.
LABELS = (INPUTS @ small_models.small()["embed.weight"].T).argmax(1)
LABELS[:10] = (LABELS[:10] + 1) % 96


def logits(state: dict[str, Any]) -> Any:
    """Logits of a linear layer on fixed inputs, and labels."""
    return INPUTS @ np.asarray(state["embed.weight"]).T, LABELS


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> CompareOptions:
    return CompareOptions(
        factors=FACTORS,
        recipes=("small",),
        codecs=("x265", "png"),
        peers=False,
        evaluation=logits,
        numpy_evaluation=True,
        goals=(parse_goal("kl=0.001"), parse_goal("sqnr=20")),
        folder=tmp_path_factory.mktemp("compare"),
    )


@pytest.fixture(scope="module")
def result(options: CompareOptions) -> CompareResult:
    return compare(from_mapping(small_models.small()), options)


def test_every_method_has_rows_that_came_back(result: CompareResult) -> None:
    kinds = {row.kind for row in result.rows}
    assert kinds == {"weightvid", "codec", "plain"}
    assert [row.message for row in result.rows if row.status == "failed"] == []
    for name in ("weightvid", "weightvid weights", "ideal entropy coder", "x265 superfast", "png"):
        rates = [row.bits_per_weight for row in result.curves()[name]]
        assert len(rates) == len(FACTORS)
        assert rates == sorted(rates)
    one = next(row for row in result.rows if row.label == "weightvid, step factor 0.25")
    assert one.bits_per_weight == pytest.approx(8 * one.file_bytes / result.weights)
    assert one.details["packet_bytes"] < one.file_bytes


def test_codecs_code_the_frames_of_the_archives(result: CompareResult) -> None:
    """The same codec makes nearly the same file, and all have the very same quality."""
    rows = {row.label: row for row in result.rows}
    for factor in FACTORS:
        own = rows[f"weightvid, step factor {factor:g}"]
        again = rows[f"x265 superfast, step factor {factor:g}"]
        png = rows[f"png, step factor {factor:g}"]
        assert again.file_bytes == pytest.approx(own.file_bytes, rel=0.05)
        assert png.file_bytes > own.file_bytes
        assert own.kl == again.kl == png.kl
    lossy = result.curves()["x265 superfast lossy"]
    assert [row.sqnr_db for row in lossy] == sorted(row.sqnr_db or 0 for row in lossy)


def test_metric_is_what_the_function_returned(result: CompareResult) -> None:
    """A share stays a share, and a percentage a percentage."""
    assert result.original is not None
    assert result.original.metric == pytest.approx(0.75)
    fine = next(row for row in result.rows if row.label == "integers per channel + xz, bits 8")
    assert fine.metric == pytest.approx(0.75, abs=0.1)
    assert fine.kl is not None and 0 < fine.kl < 1e-4
    percent = CompareOptions(
        factors=(0.2,), fidelities=("outputs",), recipes=(), codecs=(), plain=False, peers=False,
        evaluation=lambda state: 100 * float((logits(state)[0].argmax(1) == LABELS).mean()),
        numpy_evaluation=True,
    )  # fmt: skip
    made = compare(from_mapping(small_models.small()), percent)
    assert made.rows[0].metric == pytest.approx(75, abs=10)
    assert made.rows[0].kl is None


def test_rates_at_a_quality_lie_between_points(result: CompareResult) -> None:
    for goal in result.options.goals:
        rates = result.rates_at(goal)
        assert rates["weightvid"] is not None
        inside = [row.bits_per_weight for row in result.curves()["weightvid"]]
        assert min(inside) < rates["weightvid"] < max(inside)
    kl = result.measures()[0]
    assert kl.name == "kl"
    bd = result.bd_rates(kl)
    assert "weightvid" not in bd
    assert bd["png"] is not None and bd["png"] > 5


def test_resumes_and_measures_anew_what_changed(
    result: CompareResult, options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(model: Model, method: Method, value: float, judge: Judge | None) -> Row:
        asked.append(method.label(value))
        return measure(model, method, value, judge)

    monkeypatch.setattr("weightvid.compare.rows.measure", counted)
    chosen = replace(options, only=("weightvid", "png"))
    source = from_mapping(small_models.small())
    rows = compare(source, chosen).rows
    assert asked == []
    assert all(row in result.rows for row in rows)

    def scaled(state: dict[str, Any]) -> Any:
        return logits(state)[0] * 2

    compare(source, replace(chosen, only=("png",), evaluation=scaled))
    assert asked == [f"png, step factor {factor:g}" for factor in FACTORS]


def test_a_row_that_was_cut_short_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('["key", {"label": "a", "curve"', encoding="utf-8")
    model = load_model(from_mapping({"a.weight": small_models.weights(1, 40, 40)}))
    method = Method("raw", "plain", lambda model, _: Coded(9, model.tensors, 0, 0))
    for _ in range(2):
        row = RowStore(tmp_path).measure(model, method, 0.0, None)
        assert (row.label, row.file_bytes, row.sqnr_db) == ("raw", 9, None)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (lambda model, _: Coded(1, {}, 0, 0), "was not restored"),
        (lambda model, _: Coded(1, model.tensors | {"n": np.array([8])}, 0, 0), "must be exact"),
    ],
)
def test_what_does_not_come_back_is_a_failed_row(code: Any, words: str) -> None:
    arrays = {"a.weight": small_models.weights(1, 40, 40), "n": np.array([7])}
    row = measure(load_model(from_mapping(arrays)), Method("broken", "plain", code), 0.0)
    assert row.status == "failed"
    assert words in row.message


def test_what_is_missing_is_one_row(tmp_path: Path) -> None:
    chosen = CompareOptions(codecs=(), plain=False, nncodec=tmp_path / "python", only=())
    chosen = replace(chosen, factors=(0.3,), fidelities=("outputs",), recipes=())
    rows = compare(from_mapping(small_models.small()), chosen).rows
    missing = [row for row in rows if row.status == "missing"]
    assert [row.curve for row in missing] == ["NNCodec DQ", "NNCodec opt_qp"]
    assert all("cannot be run" in row.message for row in missing)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"only": ("weightvidd",)}, QuantizationError, "did you mean 'weightvid'"),
        ({"factors": (-1.0,)}, QuantizationError, "step factor"),
        ({"fidelities": ("inputs",)}, QuantizationError, "unknown fidelity"),
        ({"recipes": ("huge",)}, QuantizationError, "unknown recipe"),
        ({"codecs": ("x256",)}, CodecError, "unknown codec"),
        ({"evaluation": lambda state: None}, EvaluationError, "returned"),
    ],
)
def test_wrong_options_are_refused(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        compare(from_mapping(small_models.small()), replace(CompareOptions(), **changes))


def test_nothing_to_compare() -> None:
    chosen = CompareOptions(fidelities=(), recipes=(), codecs=(), plain=False, peers=False)
    with pytest.raises(QuantizationError, match="nothing to compare"):
        compare(from_mapping(small_models.small()), chosen)


def test_report(result: CompareResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = replace(result.rows[0], label="<script>", curve="<b>", status="failed", message="a & b")
    made = replace(result, rows=(*result.rows, odd))
    written = write_report(tmp_path / "out", made)
    page = written["report"].read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "a &amp; b" in page
    assert page.count("<svg") == len(result.measures()) == 3
    assert "src=" not in page and 'href="http' not in page
    record = json.loads(written["results"].read_text(encoding="utf-8"))
    assert len(record["rows"]) == len(made.rows)
    assert (
        record["rates"]["kl=0.001"]["weightvid"]
        == result.rates_at(result.options.goals[0])["weightvid"]
    )
    with written["table"].open(encoding="utf-8", newline="") as file:
        labels = [line["label"] for line in csv.DictReader(file)]
    assert labels == [row.label for row in made.rows]
    assert write_report(tmp_path / "out", made) == written


def test_report_into_a_file_is_refused(result: CompareResult, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(OutputError, match="taken"):
        write_report(tmp_path / "taken", result)
