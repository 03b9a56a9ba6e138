"""``weightvid pack``: checkpoint to archive."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightvid.cli import output, targets, video
from weightvid.cli.examples import load_examples
from weightvid.cli.options import Force, Json, TrustInputs, named_after, usage_error

if TYPE_CHECKING:
    from weightvid.checkpoint import CheckpointReader
    from weightvid.pack import PackOptions, PackReport
    from weightvid.planning.examples import Examples
    from weightvid.planning.named import Quantizer

ARCHIVE_SUFFIX = ".mp4"


def pack(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A .safetensors, .pt/.pth, .npz, .gguf or .onnx file, a Hugging Face folder, or "
            "an address: hf://org/model, https://, s3://, gs://.",
        ),
    ],
    archive: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="ARCHIVE",
            help="A file, or an address in an object store. Default: MODEL's name with .mp4, "
            "beside it.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="balanced (default): no visible loss of accuracy; small; fine.",
        ),
    ] = None,
    step: Annotated[
        float | None,
        typer.Option(
            metavar="K",
            help="Quantizer step of a tensor of average size, in sigmas, instead of a recipe's.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="fidelity (default): keep what the network computes; sqnr: keep the weights.",
        ),
    ] = None,
    target_size: targets.Size = None,
    target_bpw: targets.Rate = None,
    target_sqnr: targets.Sqnr = None,
    evaluate: targets.Eval = None,
    lower_is_better: targets.LowerIsBetter = False,
    max_drop: targets.MaxDrop = None,
    max_kl: targets.MaxKl = None,
    eval_budget: targets.Budget = None,
    eval_cache: targets.EvalCache = None,
    quantizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="pack (default), sqnr, uniform, shaped, trellis4 to trellis64: what "
            "[bold]weightvid compare[/bold] measures.",
        ),
    ] = None,
    codec: video.Codec = None,
    qp: video.Qp = None,
    crf: video.Crf = None,
    bit_depth: video.BitDepth = None,
    whole_video: video.WholeVideo = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="STATS",
            help="Statistics that [bold]weightvid calibrate[/bold] wrote for this very model.",
        ),
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="SCRIPT:FUNCTION",
            help="Calibrate on a torch module and example inputs, which this function of a Python "
            "file returns, and quantize layer by layer if that is better.",
        ),
    ] = None,
    trust_inputs: TrustInputs = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Keep these tensors bit for bit. May be repeated."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The codec's preset; x265's: ultrafast to placebo."),
    ] = None,
    ffmpeg: video.Ffmpeg = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Workers side by side; 0: one per core.")
    ] = 0,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Who does the work: threads or processes of this machine (default: processes for "
            "large models in safetensors files), or a cluster: dask or ray (started on this "
            "machine), ray:auto, or a scheduler's address such as tcp://host:8786.",
        ),
    ] = None,
    force: Force = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Don't decode the archive before it gets its name.")
    ] = False,
    no_side_files: Annotated[
        bool,
        typer.Option(
            "--no-side-files",
            help="Leave a folder's small other files (configuration, tokenizer) out.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Pack a checkpoint into an archive.

    The archive is decoded and checked before it appears under its name.

    [bold]weightvid pack model.safetensors -o model.mp4[/bold]
    [bold]weightvid pack model.pt --recipe small --keep "head.*"[/bold]
    [bold]weightvid pack model.pt --target-size 12MB[/bold]
    [bold]weightvid pack model.pt --eval script.py:logits --max-drop 0.5%[/bold]
    [bold]weightvid pack model.pt --calibration stats.safetensors[/bold]
    [bold]weightvid pack model.pt --calibrate script.py:examples[/bold]
    [bold]weightvid pack all-MiniLM-L6-v2/ -o minilm.mp4[/bold]
    [bold]weightvid pack hf://sentence-transformers/all-MiniLM-L6-v2 -o minilm.mp4[/bold]
    """
    from weightvid.allocate import DEFAULT_RECIPE, RECIPES, RULES
    from weightvid.checkpoint import open_checkpoint
    from weightvid.errors import ClusterError
    from weightvid.pack import PackOptions, pack_checkpoint
    from weightvid.packing.engines import check_cluster

    if recipe is not None and recipe not in RECIPES:
        usage_error(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}", "--recipe")
    if recipe is not None and step is not None:
        usage_error("--step replaces a recipe's step; give one of both", "--step")
    if step is not None and not 0 < step < float("inf"):
        usage_error(f"{step} is not a positive number", "--step")
    if cluster is not None:
        try:
            check_cluster(cluster)
        except ClusterError as error:
            usage_error(str(error), "--cluster")
    if rule is not None and rule not in RULES:
        usage_error(f"unknown rule {rule!r}; known: {', '.join(RULES)}", "--rule")
    target = targets.chosen(
        {
            "--target-size": target_size,
            "--target-bpw": target_bpw,
            "--target-sqnr": target_sqnr,
            "--max-drop": max_drop,
            "--max-kl": max_kl,
        }
    )
    if target is not None and (recipe is not None or step is not None):
        usage_error("a target takes the place of a recipe or step", "--recipe / --step")
    more = targets.Measuring(lower_is_better, eval_budget, eval_cache)
    evaluation = targets.evaluation(evaluate, more, target, rule)
    named = _quantizer(quantizer)
    wish = video.Wish(video.known_codec(codec), qp, crf, bit_depth)
    options = PackOptions(
        codec=wish.codec,
        lossy=wish.lossy(levels=(recipe, step, quantizer) != (None, None, None)),
        bit_depth=wish.bit_depth,
        whole_video=whole_video,
        states=named.states,
        shaping=named.shaping,
        recipe=recipe or DEFAULT_RECIPE,
        rule=rule or named.rule,
        step_factor=step,
        target=target,
        evaluation=evaluation,
        calibration=_calibration(calibration, examples, evaluate, trust_inputs),
        keep=tuple(keep or ()),
        preset=preset or "",
        ffmpeg=ffmpeg,
        jobs=jobs,
        cluster=cluster,
        force=force,
        verify=not no_verify,
        side_files=not no_side_files,
    )
    destination = archive or str(named_after(model, ARCHIVE_SUFFIX))
    if Path(destination).exists() and Path(destination).resolve() == Path(model).resolve():
        usage_error(f"{destination} is the model itself", "--output")
    with output.progress_bars() as report, open_checkpoint(model, report) as reader:
        _check_keeps(reader, options)
        made = pack_checkpoint(reader, destination, _with_workers(options, reader), report)
    for entry in made.skipped:
        output.warn(f"not packed: {entry}")
    for text in made.warnings:
        output.warn(text)
    if json:
        output.emit_json(
            made,
            archive=destination,
            source=model,
            bits_per_weight=made.bits_per_weight,
            stream_bits_per_weight=made.stream_bits_per_weight,
        )
    else:
        _show(made, destination, options)


def _calibration(
    stats: Path | None, examples: str | None, evaluate: str | None, trust_inputs: bool
) -> Path | Examples | None:
    """Statistics in a file, or a model with example inputs."""
    if examples is None:
        if trust_inputs:
            usage_error("there are no inputs to trust without --calibrate", "--trust-inputs")
        return stats
    if stats is not None:
        usage_error("--calibration takes finished statistics; give one of both", "--calibrate")
    if evaluate is not None:
        usage_error(
            "an evaluation takes statistics: weightvid calibrate, then --calibration", "--calibrate"
        )
    module, inputs = load_examples(examples, "--calibrate")
    from weightvid.calibrate import CalibrationConfig, ModuleExamples

    return ModuleExamples(module, inputs, CalibrationConfig(trust_inputs=trust_inputs))


def _quantizer(name: str | None) -> Quantizer:
    from weightvid.codec.registry import suggestion
    from weightvid.planning.named import DEFAULT_QUANTIZER, QUANTIZERS

    chosen = name or DEFAULT_QUANTIZER
    if chosen not in QUANTIZERS:
        known = suggestion(chosen, tuple(QUANTIZERS))
        usage_error(f"unknown quantizer {chosen!r}{known}", "--quantizer")
    return QUANTIZERS[chosen]


def _with_workers(options: PackOptions, reader: CheckpointReader) -> PackOptions:
    """The options, with the faster way to use this machine where no other was asked for."""
    from weightvid.packing.engines import local_engine

    if options.cluster is not None:
        return options
    return replace(options, cluster=local_engine(reader, options.jobs))


def _check_keeps(reader: CheckpointReader, options: PackOptions) -> None:
    for pattern in options.keep:
        if not any(fnmatchcase(spec.name, pattern) for spec in reader.contents.tensors):
            tied = [a for a in reader.contents.aliases if fnmatchcase(a, pattern)]
            hint = f"; {tied[0]} is stored as {reader.contents.aliases[tied[0]]}" if tied else ""
            usage_error(f"no tensor matches {pattern!r}{hint}", "--keep")


def _judgement(made: PackReport) -> list[tuple[str, str]]:
    rows = []
    if made.encodings > 1:
        rows.append(("encodings", str(made.encodings)))
    if made.evaluations:
        rows.append(("evaluations", str(made.evaluations)))
    if made.loss is not None:
        rows.append(("loss", f"{made.loss:.4g} (of the decoded archive)"))
    if made.metric is not None and made.metric_before is not None:
        rows.append(("metric", f"{made.metric_before:.6g} -> {made.metric:.6g}"))
    if made.calibration:
        rows.append(("calibration", made.calibration))
    return rows


def _show(made: PackReport, destination: str, options: PackOptions) -> None:
    ratio = made.source_bytes / made.file_bytes
    rows = [
        ("archive", destination),
        ("size", f"{output.size(made.file_bytes)} of {output.size(made.source_bytes)}"
                 f" (1/{ratio:.1f})"),
        ("weights", f"{output.count(made.weights)}, of which {output.count(made.coded_weights)}"
                    " as video"),
        ("bits per weight", f"{made.bits_per_weight:.3f} (whole file)"),
        ("", f"{made.stream_bits_per_weight:.3f} (the video's weights in its stream)"),
        ("SQNR", output.db(made.sqnr_db)),
        *_judgement(made),
        ("side files", str(len(made.side_files))),
        ("frames", f"{made.frames} of {made.width} x {made.height}"),
        ("verified", "every hash" if options.verify else "no"),
        ("time", f"{made.seconds:.1f} s"),
    ]  # fmt: skip
    output.facts(rows)
