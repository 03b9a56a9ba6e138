"""Comparisons as a whole: rows, resumption, goals, the report."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from typer.testing import CliRunner

from weightvid.checkpoint import from_mapping
from weightvid.cli.app import app
from weightvid.compare import (
    CompareOptions,
    CompareResult,
    Row,
    compare,
    missing,
    parse_goal,
    write_report,
)
from weightvid.compare.model import Coded, Method, Model, load_model
from weightvid.compare.report import merged, recommended
from weightvid.compare.rows import RowStore, measure
from weightvid.errors import CodecError, EvaluationError, OutputError, QuantizationError
from weightvid.pack import PackOptions, pack_checkpoint

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
    assert all(row.load >= 0 and row.cpu_s >= 0 for row in result.rows)
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

    def counted(model: Model, method: Method, value: float, *more: Any) -> Row:
        asked.append(method.label(value))
        return measure(model, method, value, *more)

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


def test_an_evaluation_that_comes_later_stores_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = CompareOptions(
        factors=FACTORS, fidelities=("outputs",), recipes=("small",), codecs=("png",),
        plain=False, peers=False, folder=tmp_path,
    )  # fmt: skip
    rows = compare(from_mapping(small_models.small()), first).rows
    for name in ("pack_checkpoint", "through"):
        monkeypatch.setattr(f"weightvid.compare.video.{name}", lambda *_: pytest.fail("again"))
    later = replace(first, evaluation=logits, numpy_evaluation=True)
    again = compare(from_mapping(small_models.small()), later).rows
    assert [row.label for row in again] == [row.label for row in rows]
    for before, after in zip(rows, again, strict=True):
        assert after.kl is not None and before.kl is None
        assert after == replace(before, kl=after.kl, metric=after.metric, agreement=after.agreement)


def test_commands_give_the_same_point(result: CompareResult, tmp_path: Path) -> None:
    """Each row's command, run as it is printed, on the model in a file."""
    source = tmp_path / "a model.npz"
    np.savez(source, **small_models.small())
    chosen = CompareOptions(
        factors=(0.3,), fidelities=("weights",), recipes=("small",), codecs=("png",),
        codec_options=("x265:rd=6",), peers=False, only=(
            "weightvid weights", "weightvid --recipe small", "png, step factor 0.3",
            "x265 superfast rd=6, step factor 0.3", "integers per channel + xz, bits 5",
        ),
    )  # fmt: skip
    rows = compare(source, chosen).rows
    assert [row.status for row in rows] == ["ok"] * 5
    for number, row in enumerate(rows):
        name, verb, *more = shlex.split(row.command)
        assert name == "weightvid"
        out = tmp_path / f"{number}{'.mp4' if verb == 'pack' else ''}"
        done = CliRunner().invoke(app, [verb, *more, "-o", str(out)])
        assert done.exit_code == 0, done.output
        found = (
            out.stat().st_size
            if verb == "pack"
            else json.loads((out / "results.json").read_text())["rows"][0]["file_bytes"]
        )
        assert found == row.file_bytes, row.command


def test_sqnr_is_what_pack_says(result: CompareResult, tmp_path: Path) -> None:
    options = PackOptions(step_factor=FACTORS[0])
    made = pack_checkpoint(from_mapping(small_models.small()), tmp_path / "m.mp4", options)
    row = next(row for row in result.rows if row.label == f"weightvid, step factor {FACTORS[0]}")
    assert row.sqnr_db == pytest.approx(made.sqnr_db, abs=1e-6)


def test_a_curve_that_ends_before_the_goal_says_so(result: CompareResult) -> None:
    rows = result.curves()["weightvid"]
    words = result.words_at(parse_goal("sqnr=90"))["weightvid"]
    assert words == f"above {rows[-1].bits_per_weight:.2f} (ends at {rows[-1].sqnr_db:.4g})"
    words = result.words_at(parse_goal("sqnr=1"))["weightvid"]
    assert words == f"below {rows[0].bits_per_weight:.2f} (ends at {rows[0].sqnr_db:.4g})"
    goal = result.options.goals[1]
    assert float(result.words_at(goal)["weightvid"]) == pytest.approx(
        result.rates_at(goal)["weightvid"], abs=1e-3
    )


def test_what_is_missing_is_said_before(tmp_path: Path) -> None:
    lacks = missing(CompareOptions(codecs=(), plain=False, nncodec=tmp_path / "python"))
    assert [lack.split(":")[0] for lack in lacks] == ["NNCodec DQ", "NNCodec opt_qp"]
    assert missing(CompareOptions(nncodec=tmp_path / "python", only=("weightvid",))) == []


def test_alone_only_when_true(result: CompareResult) -> None:
    busy = replace(result.rows[0], load=7.0)
    quiet = tuple(replace(row, load=1.0) for row in result.rows)
    assert replace(result, rows=quiet).alone
    assert not replace(result, rows=(*quiet, busy)).alone


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
        ({"codecs": ("all", "x256")}, CodecError, "unknown codec"),
        ({"presets": ("sluggish",)}, CodecError, "preset 'sluggish'"),
        ({"codec_options": ("x265:bogus=1",)}, CodecError, "Unknown option: bogus"),
        ({"anchor": "x256"}, QuantizationError, "no curve 'x256'"),
        ({"codec_options": ("x256:rd=6",)}, CodecError, "unknown codec"),
        ({"codec_options": ("x265:rd",)}, CodecError, "no option of a codec"),
        ({"evaluation": lambda state: None}, EvaluationError, "returned"),
    ],
)
def test_wrong_options_are_refused(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        compare(from_mapping(small_models.small()), replace(CompareOptions(), **changes))


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(OutputError, match="other files"):
        compare(from_mapping(small_models.small()), CompareOptions(folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_nothing_to_compare() -> None:
    chosen = CompareOptions(fidelities=(), recipes=(), codecs=(), plain=False, peers=False)
    with pytest.raises(QuantizationError, match="no point or curve 'all'"):
        compare(from_mapping(small_models.small()), replace(chosen, only=("all",)))


def test_report(result: CompareResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = replace(result.rows[0], label="<script>", curve="<b>", status="failed", message="a & b")
    far = replace(result.rows[0], label="far", curve="far", bits_per_weight=99.0)
    exact = replace(result.rows[0], label="same", curve="same", kl=0.0)
    made = replace(result, rows=(*result.rows, odd, far, exact))
    written = write_report(tmp_path / "out", made)
    page = written["report"].read_text(encoding="utf-8")
    assert "<script>" not in page
    for text in ("accuracy", "0.75 → ", "weightvid pack", made.date, "reaches kl=0.001", "1/"):
        assert text in page, text
    assert "<th>metric</th>" not in page and "<th>cosine</th>" not in page
    assert "a &amp; b" in page
    assert page.count("far (99.00 bits per weight") == 3
    assert f"same ({exact.bits_per_weight:.2f} bits per weight, exact)" in page
    assert len(result.measures()) == 3
    assert page.count("<svg") == 6  # for wide and for narrow windows
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


def test_curves_on_each_other_are_drawn_once(result: CompareResult) -> None:
    rows = tuple(
        replace(row, curve="twin", label=f"twin {row.value}")
        for row in result.rows if row.curve == "weightvid"
    )  # fmt: skip
    names = merged(replace(result, rows=(*result.rows, *rows)), result.measures()[0])
    assert any("twin" in name and name.startswith("weightvid = ") for name in names)
    assert "twin" not in names


def test_recommended_is_the_smallest_that_is_good_enough(result: CompareResult) -> None:
    kept = replace(result, options=replace(result.options, goals=(parse_goal("kl=0.001"),)))
    row, why = recommended(kept) or (None, "")
    assert row is not None and row.kl is not None and row.kl <= 0.001
    own = [r for r in result.rows if r.kind == "weightvid" and r.file_bytes < row.file_bytes]
    assert all(r.kl is not None and r.kl > 0.001 for r in own)
    assert "kl=0.001" in why and "next smaller" in why
    # Without a function, the usual recipe.
    plain = tuple(replace(r, kl=None, metric=None, agreement=None) for r in (row, *own))
    usual = replace(row, label="weightvid --recipe balanced", kl=None, metric=None)
    bare = replace(kept, rows=(*plain, usual), options=replace(kept.options, goals=()))
    assert (recommended(bare) or (None,))[0] == usual
    # By the number that a function returns, where that is all there is.
    rows = tuple(replace(r, kl=None, metric=0.7 if r.sqnr_db == row.sqnr_db else 0.749)
                 for r in (*own, row))  # fmt: skip
    alone = replace(result, rows=rows, options=replace(result.options, goals=()))
    found, why = recommended(alone) or (None, "")
    assert found is not None and found.file_bytes == min(r.file_bytes for r in own)
    assert "within 0.5 %" in why


def test_report_into_a_file_is_refused(result: CompareResult, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(OutputError, match="taken"):
        write_report(tmp_path / "taken", result)
