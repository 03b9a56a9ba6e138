"""``weightvid compare``: codecs, presets and quantizers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightvid.cli import output
from weightvid.cli.output import argument, check_function, option, usage_error

if TYPE_CHECKING:
    from weightvid.compare import CompareOptions, CompareResult, Row

_LIST = "NAME,..."


def compare(
    model: str = argument("MODEL", "A checkpoint, as for weightvid pack."),
    rates: str = option("", "Step factors, from fine to coarse.", metavar="K,..."),
    fidelities: str = option(
        "outputs,weights", "A curve each; integers is another.", "--for", metavar=_LIST
    ),
    codecs: str = option(
        "x265,x264,svt-av1", "Codecs on weightvid's frames; all or none.", metavar=_LIST
    ),
    presets: str = option("", "Presets of the codecs that have them.", metavar=_LIST),
    peers: bool = option(True, "Integers in xz and zstd, GGUF, NNCodec.", "--peers/--no-peers"),
    nncodec: str = option("", "A Python that has NNCodec.", metavar="PYTHON"),
    calibrate: str = option(
        "", "Adds a curve of calibrated archives, as for pack.", metavar="STATS"
    ),
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
    only: list[str] = option(
        [], "Only this point or curve. May be repeated.", metavar="LABEL"
    ),
    folder: Path = option(
        Path("compare"), "Results, plots, and finished points.", "--output", "-o", metavar="FOLDER"
    ),
    jobs: int = option(1, "Workers; speeds are honest with one.", "--jobs", "-j", min=1),
    json: bool = option(False, "Print one JSON object for each point as it finishes.", "--json"),
) -> None:  # fmt: skip
    """Compare codecs, presets and quantizers on a model, with the plain ways to store it.

    Every point is decoded and measured. Finished points are kept: run it again, and it goes on.

    [bold]weightvid compare model.safetensors[/bold]
    [bold]weightvid compare model.safetensors --eval script.py:logits --at kl=0.02[/bold]
    [bold]weightvid compare model.safetensors --codecs all --rates 0.18 --no-peers[/bold]
    """
    from weightvid.cli.pack import load_calibration
    from weightvid.compare import CompareOptions, parse_goal, write_report
    from weightvid.compare import compare as run
    from weightvid.errors import QuantizationError

    chosen: dict[str, Any] = {}
    if evaluate:
        from weightvid.calibrate.evaluation import load_function

        function, torch = load_function(check_function(evaluate, "--eval"))
        chosen = {"evaluation": function, "numpy_evaluation": not torch}
    try:
        if rates:
            chosen["factors"] = tuple(float(rate) for rate in _names(rates))
        goals = tuple(map(parse_goal, at))
    except (ValueError, QuantizationError) as error:
        usage_error(str(error), "--rates / --at")
    options = CompareOptions(
        **chosen,
        fidelities=_names(fidelities),
        calibration=load_calibration(calibrate) if calibrate else None,
        codecs=_names(codecs),
        presets=_names(presets),
        plain=peers,
        peers=peers,
        nncodec=nncodec or None,
        only=tuple(only),
        lower_is_better=lower,
        goals=goals,
        anchor=anchor,
        folder=folder,
        jobs=jobs,
    )

    def show(row: Row) -> None:
        if json:
            output.emit_json(row.record())

    with output.progress_bars() as report:
        result = run(model, options, report, show)
    written = write_report(folder, result)
    for row in result.rows:
        if row.status == "failed":
            output.warn(f"{row.label}: {row.message}")
    if not json:
        _show(result, options)
        output.facts([(what, str(path)) for what, path in written.items()])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip() and text != "none")


def _show(result: CompareResult, options: CompareOptions) -> None:
    measures = [measure for measure in result.measures() if measure.name != "sqnr"]
    titles = ["point", ">bytes", ">bpw", ">SQNR dB", *(f">{measure.name}" for measure in measures)]
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
    columns = {
        f">BD-rate over {measure.name}, %": result.bd_rates(measure)
        for measure in result.measures()[:1]
    }
    columns |= {f">bpw at {goal}": result.rates_at(goal) for goal in options.goals}
    names = [name for name, rows in result.curves().items() if len(rows) > 1]
    if columns and names:
        cells = [[n, *(output.number(each.get(n), 4) for each in columns.values())] for n in names]
        output.table(["curve", *columns], cells)
