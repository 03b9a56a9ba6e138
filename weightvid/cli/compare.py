"""``weightvid compare``: codecs, presets and quantizers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightvid.cli import output
from weightvid.cli.output import argument, check_function, option, output_option, usage_error

if TYPE_CHECKING:
    from weightvid.compare import CompareOptions, CompareResult, Row
    from weightvid.progress import Progress

_LIST = "NAME,..."


def compare(
    model: str = argument("MODEL", "A checkpoint, as for weightvid pack."),
    steps: str = option("", "Step factors, from fine to coarse.", metavar="K,..."),
    fidelities: str = option(
        "outputs,weights", "A curve each; integers is another.", "--for", metavar=_LIST
    ),
    codecs: str = option(
        "x265,x264,svt-av1", "Codecs on weightvid's frames; all or none.", metavar=_LIST
    ),
    presets: str = option("", "Presets of the codecs that have them.", metavar=_LIST),
    codec_option: list[str] = option(
        [], "Another curve of a codec, with options of its own: x265:rd=6. May be repeated.",
        metavar="CODEC:KEY=VALUE",
    ),
    plain: bool = option(True, "Integers in xz and zstd, float16, GGUF.", "--plain/--no-plain"),
    peers: bool = option(True, "NNCodec, and LLM.265's recipe.", "--peers/--no-peers"),
    research: bool = option(
        False, "Quantizers of the literature: LNQ, prediction, codebooks, pyramids.", "--research"
    ),
    nncodec: str = option("", "A Python that has NNCodec.", metavar="PYTHON"),
    calibrate: str = option("", "Adds a curve of calibrated archives.", metavar="STATS"),
    evaluate: str = option(
        "", "Judges a dict of tensors, as for pack: call only what you trust.",
        "--eval", metavar="SCRIPT:FUNCTION",
    ),
    lower: bool = option(False, "The function's number is a loss.", "--lower-is-better"),
    at: list[str] = option(
        [], "Rate of each curve at kl=0.02, cosine=0.98, metric=91.0 or sqnr=22. May be repeated.",
        metavar="GOAL",
    ),
    anchor: str = option("weightvid", "BD-rates are taken against it.", metavar="CURVE"),
    only: list[str] = option([], "Only this point or curve. May be repeated.", metavar="LABEL"),
    folder: str = output_option("compare", "Results, plots, and finished points.", "FOLDER"),
    jobs: int = option(1, "Workers; speeds are honest with one.", "--jobs", "-j", min=1),
    json: bool = option(False, "Print one JSON object for each point as it finishes.", "--json"),
) -> None:  # fmt: skip
    """Compare codecs, presets and quantizers on a model, with the plain ways to store it.

    Every point is decoded and measured. Finished points are kept: run it again, and it goes on.

    [bold]weightvid compare model.safetensors[/bold]
    [bold]weightvid compare model.safetensors --eval script.py:logits --at kl=0.02[/bold]
    [bold]weightvid compare model.safetensors --codecs all --steps 0.18 --no-peers[/bold]
    """
    from weightvid.cli.pack import load_calibration
    from weightvid.compare import CompareOptions, missing, parse_goal, write_report
    from weightvid.compare import compare as run
    from weightvid.errors import QuantizationError

    chosen: dict[str, Any] = {}
    if evaluate:
        from weightvid.calibrate.evaluation import load_function

        function, torch = load_function(check_function(evaluate, "--eval"))
        chosen = {"evaluation": function, "numpy_evaluation": not torch}
    try:
        if steps:
            chosen["factors"] = tuple(float(step) for step in _names(steps))
        goals = tuple(map(parse_goal, at))
    except (ValueError, QuantizationError) as error:
        usage_error(str(error), "--steps / --at")
    options = CompareOptions(
        **chosen,
        fidelities=_names(fidelities),
        calibration=load_calibration(calibrate, model) if calibrate else None,
        calibration_name=calibrate,
        codecs=_names(codecs),
        presets=_names(presets),
        codec_options=tuple(codec_option),
        plain=plain,
        peers=peers,
        research=research,
        nncodec=nncodec or None,
        only=tuple(only),
        lower_is_better=lower,
        goals=goals,
        anchor=anchor,
        folder=Path(folder),
        jobs=jobs,
    )
    for lack in missing(options):
        output.warn(lack)
    rows: list[Row] = []
    counted = [0]

    def show(row: Row) -> None:
        rows.append(row)
        if json:
            output.emit_json(row.record(), ok=row.status == "ok")
        if not output.on_terminal():
            output.note(f"[{len(rows)} of {counted[0]}] {_in_words(row)}")

    with output.progress_bars() as report:

        def count(progress: Progress) -> None:
            counted[0] = progress.total if progress.stage == "compare" else counted[0]
            report(progress)

        try:
            result = run(model, options, count, show)
        except KeyboardInterrupt:
            kept = sum(row.status == "ok" for row in rows)
            output.warn(f"{kept} points are kept in {folder}: run the same command to go on")
            raise
    written = write_report(folder, result)
    for row in result.rows:
        if row.status == "failed":
            output.warn(f"{row.label}: {row.message}")
    if not json:
        _show(result, options)
        output.facts([(what, str(path)) for what, path in written.items()])


def _in_words(row: Row) -> str:
    if row.status != "ok":
        return f"{row.label}: {row.message}"
    told = {"KL": row.kl, "cosine": row.cosine, "metric": row.metric, "SQNR": row.sqnr_db}
    facts = [f"{name} {value:.4g}" for name, value in told.items() if value is not None]
    return f"{row.label}: {row.bits_per_weight:.3f} bits per weight, {', '.join(facts)}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip() and text != "none")


def _show(result: CompareResult, options: CompareOptions) -> None:
    measures = [measure for measure in result.measures() if measure.name != "sqnr"]
    names = [result.metric_name if m.name == "metric" else m.name for m in measures]
    titles = ["point", ">bytes", ">bpw", ">SQNR dB", *(f">{name}" for name in names)]
    rows = [
        [
            row.label, f"{row.file_bytes:,}", f"{row.bits_per_weight:.3f}",
            "exact" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
            *(output.number(measure.value(row), 4) for measure in measures),
            f"{row.encode_s:.2f}", f"{row.decode_s:.2f}",
        ]
        for rows in result.curves().values()
        for row in rows
    ]  # fmt: skip
    output.table([*titles, ">enc s", ">dec s"], rows)
    if not result.alone:
        output.warn("other programs ran meanwhile: the seconds say little")
    curves = [name for name, rows in result.curves().items() if len(rows) > 1]
    columns: dict[str, dict[str, str]] = {}
    for m in result.measures()[:1]:
        rates = {name: output.number(rate, 4) for name, rate in result.bd_rates(m).items()}
        columns[f">BD-rate over {m.name}, %"] = rates
    columns |= {f">bpw at {goal}": result.words_at(goal) for goal in options.goals}
    columns = {title: cells for title, cells in columns.items() if any(cells.values())}
    if columns and curves:
        rows = [[name, *(cells.get(name, "") for cells in columns.values())] for name in curves]
        output.table(["curve", *columns], rows)
