"""``weightvid pack``: checkpoint to archive."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from weightvid.cli import output
from weightvid.cli.output import FORCE, JSON, argument, check_function, option, usage_error

if TYPE_CHECKING:
    from weightvid.calibrate import Calibration, Evaluation
    from weightvid.checkpoint import CheckpointReader
    from weightvid.pack import PackOptions, PackReport
    from weightvid.targets import Target

_quality = partial(option, rich_help_panel="Quality")
_delivery = partial(option, rich_help_panel="Delivery")
_data = partial(option, rich_help_panel="With the model's own data")
_video = partial(option, rich_help_panel="Video")
_work = partial(option, rich_help_panel="Work")


def pack(
    model: str = argument(
        "MODEL",
        "A .safetensors, .pt/.pth, .npz, .gguf, .onnx or .tflite file, a Hugging Face folder, "
        "a .mlpackage, or an address: hf://org/model, https://, s3://.",
    ),
    archive: str = output.output_option(
        "", "A file, an address in an object store, or -: a pipe. Default: MODEL's name, .mp4.",
        "ARCHIVE",
    ),
    recipe: str = _quality(
        "", "balanced (default): no visible loss of accuracy; small; fine.", metavar="NAME"
    ),
    step: float | None = _quality(
        None, "Quantizer step of an average tensor, in sigmas, instead of a recipe's.", metavar="K"
    ),
    target: str = _quality(
        "", "Search the step: 12MB or 2.5bpw (whole file, at most and nearly), or 35dB.",
        metavar="SIZE|RATE|SQNR",
    ),
    fidelity: str = _quality(
        "", "outputs (default): keep what the network computes; weights: keep the weights; "
        "integers: levels that an integer kernel can use.",
        "--for", metavar="WHAT",
    ),
    integer: bool = _quality(False, "Short for --for integers.", "--integer"),
    prune: float | None = _quality(
        None, "Set weights to zero below the mean magnitude of their tensor times this.",
        metavar="FACTOR",
    ),
    base: list[str] = _delivery(
        [], "Write an update to this archive; of a chain of updates the oldest first.",
        "--base", "-b", metavar="ARCHIVE",
    ),
    layers: int = _delivery(
        1, "First a coarse model, then refinements: so many layers in all.", min=1, max=16,
        metavar="N",
    ),
    keep: list[str] = _quality([], "Keep these bit for bit. May be repeated.", metavar="GLOB"),
    lossless: bool = _quality(False, "Keep all bit for bit, coded as floats.", "--lossless"),
    first: list[str] = _delivery(
        [], "Send these tensors first. May be repeated: in this order.", metavar="GLOB"
    ),
    parity: str = _delivery(
        "", "Add so much of the file, 1%, to repair it by: see [bold]verify --repair[/bold].",
        metavar="SHARE",
    ),
    calibrate: str = _data(
        "", "Statistics that [bold]weightvid calibrate[/bold] wrote for this very model; "
        "SCRIPT:FUNCTION, as there, to quantize layer by layer, too; or, without any data, a "
        "function that returns the network alone, or auto: as transformers builds a folder's.",
        metavar="STATS|auto",
    ),
    evaluate: str = _data(
        "", "Judges a dict of tensors: returns a number, logits, (logits, labels) or unit "
        "vectors. It is run as Python code: call only what you trust.",
        "--eval", metavar="SCRIPT:FUNCTION",
    ),
    max_drop: str = _data(
        "", "Relative loss of the number that --eval returns, at most: 0.5% or 0.005.",
        metavar="SHARE",
    ),
    max_kl: float | None = _data(
        None, "Mean KL divergence of logits, or 1 - mean cosine of unit vectors, at most.",
        metavar="NATS",
    ),
    lower: bool = _data(False, "The number that --eval returns is a loss.", "--lower-is-better"),
    codec: str = _video("x265", "x265 (HEVC), svt-av1 (AV1) or x264 (H.264).", metavar="NAME"),
    preset: str = _video("", "The codec's preset; default: by the model's size.", metavar="NAME"),
    qp: int | None = _video(None, "Code pictures with loss, instead of levels.", metavar="N"),
    workers: str = _work(
        "threads", "threads, processes, dask, ray, or a scheduler: tcp://HOST:8786.",
        metavar="WHERE",
    ),
    jobs: int = _work(0, "How many; 0: one per core.", "--jobs", "-j", min=0),
    no_side_files: bool = _work(
        False, "Leave a folder's configuration, tokenizer out.", "--no-side-files"
    ),
    no_verify: bool = _work(False, "Don't decode the archive to check it.", "--no-verify"),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Pack a checkpoint into an archive.

    The archive is decoded and checked before it appears under its name.

    [bold]weightvid pack model.safetensors -o model.mp4[/bold]
    [bold]weightvid pack model.pt --recipe small --keep "head.*"[/bold]
    [bold]weightvid pack model.pt --target 12MB[/bold]
    [bold]weightvid pack model.pt --calibrate stats.safetensors[/bold]
    [bold]weightvid pack folder --calibrate auto[/bold]
    [bold]weightvid pack resnet18.pt --calibrate torchvision.models:resnet18[/bold]
    [bold]weightvid pack model.pt --eval script.py:logits --max-drop 0.5%[/bold]
    [bold]weightvid pack v2.safetensors --base v1.mp4 -o v1-v2.mp4[/bold]
    [bold]weightvid pack model.safetensors --layers 2[/bold]
    [bold]weightvid pack hf://sentence-transformers/all-MiniLM-L6-v2 -o minilm.mp4[/bold]
    """
    from weightvid.atomic import real_destination
    from weightvid.checkpoint import is_url
    from weightvid.errors import ClusterError, CodecError, QuantizationError
    from weightvid.pack import PackOptions
    from weightvid.video import Video
    from weightvid.workers import check_workers

    if integer and fidelity not in ("", "integers"):
        usage_error(f"--integer contradicts --for {fidelity}", "--integer")
    if recipe and step is not None:
        usage_error("--step replaces a recipe's step; give one of both", "--step")
    destination = archive or str(output.named_after(model, ".mp4"))
    piped = destination in output.STDOUT
    if piped and (json or sys.stdout.isatty()):
        usage_error("the archive goes to a file or a pipe, without other output", "--output")
    output.check_archive_name(destination)
    own = {"the model": model, "the calibration": calibrate.rpartition(":")[0] or calibrate}
    own |= {"the evaluation": evaluate.rpartition(":")[0]}
    output.check_output(destination, own | {f"the base {each}": each for each in base})
    if calibrate and not piped and not is_url(destination):
        real_destination(destination, force)  # before the model runs for minutes
    began = perf_counter()
    try:
        options = PackOptions(
            recipe=recipe or "balanced",
            step_factor=step,
            fidelity="integers" if integer else fidelity or "outputs",
            target=parse_target(target) if target else None,
            evaluation=_evaluation(evaluate, max_drop, max_kl, lower),
            prune=prune,
            keep=tuple(keep),
            lossless=lossless,
            first=tuple(first),
            layers=layers,
            base=tuple(base),
            parity=_share(parity, "--parity") if parity else 0.0,
            side_files=not no_side_files,
            video=Video(codec, preset, qp),
            workers=workers,
            jobs=jobs,
            force=force,
            verify=not no_verify,
        )
        options.check(calibrated=bool(calibrate))
        check_workers(workers)
    except QuantizationError as error:
        usage_error(str(error))
    except ClusterError as error:
        usage_error(str(error), "--workers")
    except CodecError as error:
        usage_error(str(error), "--codec / --preset / --qp")
    if calibrate:
        options = replace(options, calibration=load_calibration(calibrate, model))
    made = _pack(model, destination, options)
    for entry in made.skipped:
        output.warn(f"not packed: {entry}")
    if json:
        output.emit_json(
            made, archive=destination, source=model, bits_per_weight=made.bits_per_weight
        )
    elif not piped:
        _show(made, destination, options, perf_counter() - began)


def parse_target(text: str) -> Target:
    """A target as the command line spells it, or a QuantizationError.

    Examples
    --------
    >>> parse_target("12MB"), parse_target("2.5bpw")
    (Target(kind='size', value=12000000.0), Target(kind='bpw', value=2.5))
    """
    from weightvid.errors import QuantizationError
    from weightvid.targets import Target, parse_size

    for unit, kind in (("bpw", "bpw"), ("db", "sqnr")):
        if text.lower().endswith(unit):
            try:
                return Target(kind, float(text[: -len(unit)]))
            except ValueError:
                raise QuantizationError(f"{text!r} is no number and {unit}") from None
    return Target("size", parse_size(text))


def load_calibration(text: str, model: str) -> Calibration:
    """Statistics in a file, or of the network that a function or the model's folder gives.

    If the function gives no example inputs, the network makes them.
    """
    from weightvid.calibrate import Calibration
    from weightvid.checkpoint import open_checkpoint
    from weightvid.checkpoint.torch_file import import_torch
    from weightvid.cli.calibrate import load_examples

    if text != "auto" and (Path(text).exists() or ":" not in text):
        return Calibration.from_file(text)
    import_torch()
    from weightvid.calibrate.synthesis import with_names_of

    with output.others_on_stderr():
        module, inputs = load_examples(text, "--calibrate") if text != "auto" else (None, None)
    with output.progress_bars() as report, output.others_on_stderr():
        if inputs is not None and not Path(model).exists():
            return Calibration.from_examples(module, inputs, progress=report)
        with open_checkpoint(model, report) as reader:
            if inputs is None:
                return Calibration.from_checkpoint(reader, module, progress=report)
            return Calibration.from_examples(with_names_of(reader, module), inputs, progress=report)


def _share(text: str, option: str) -> float:
    """A share as the command line spells it."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        usage_error(f"{text!r} is no share such as 0.5% or 0.005", option)


def _evaluation(script: str, max_drop: str, max_kl: float | None, lower: bool) -> Evaluation | None:
    """How the function judges, and what it allows; a share may be given in percent."""
    if not script:
        if max_drop or max_kl is not None or lower:
            usage_error("only a function can judge that: --eval", "--max-drop / --max-kl")
        return None
    from weightvid.calibrate import Evaluation

    drop = _share(max_drop, "--max-drop") if max_drop else None
    return Evaluation(check_function(script, "--eval"), drop, max_kl, lower)


def _pack(model: str, destination: str, options: PackOptions) -> PackReport:
    """Pack into a file, or into one that is then uploaded."""
    from weightvid import checkpoint
    from weightvid.atomic import ScratchFolder
    from weightvid.errors import OutputError
    from weightvid.pack import pack_checkpoint

    # What stands in for a closed stream has a number for a name.
    if destination in output.STDOUT and isinstance(getattr(sys.stdout, "name", ""), int):
        raise OutputError("cannot write to the standard output: it is closed")

    def pack_into(path: Path | str) -> PackReport:
        with output.others_on_stderr():
            return pack_checkpoint(reader, path, options, report)

    remote = checkpoint.is_url(destination)
    if remote:
        from weightvid.remote import check_upload, upload

        check_upload(destination, force=options.force)
    with output.progress_bars() as report, checkpoint.open_checkpoint(model, report) as reader:
        _check_keeps(reader, options)
        if not remote and destination not in output.STDOUT:
            return pack_into(destination)
        with ScratchFolder() as folder:
            made = pack_into(Path(folder) / "archive.mp4")
            if remote:
                upload(Path(folder) / "archive.mp4", destination)
            else:
                with (Path(folder) / "archive.mp4").open("rb") as file:
                    shutil.copyfileobj(file, sys.stdout.buffer)
            return made


def _check_keeps(reader: CheckpointReader, options: PackOptions) -> None:
    for pattern in (*options.keep, *options.first):
        if not any(fnmatchcase(spec.name, pattern) for spec in reader.contents.tensors):
            tied = [a for a in reader.contents.aliases if fnmatchcase(a, pattern)]
            hint = f"; {tied[0]} is stored as {reader.contents.aliases[tied[0]]}" if tied else ""
            option = "--keep" if pattern in options.keep else "--first"
            usage_error(f"no tensor matches {pattern!r}{hint}", option)


def _show(made: PackReport, destination: str, options: PackOptions, seconds: float) -> None:
    share = 100 * made.packet_bytes / made.file_bytes
    ratio = made.source_bytes / made.file_bytes
    rows = [
        ("archive", destination),
        ("size", f"{output.size(made.file_bytes)} of {output.size(made.source_bytes)}"
                 f" (1/{ratio:.1f}), {share:.1f} % of it video"),
        ("weights", f"{made.weights:,}, of which {made.coded_weights:,} as video"),
        ("bits per weight", f"{made.bits_per_weight:.3f} (whole file)"),
        ("SQNR", output.db(made.sqnr_db) if made.coded_weights else ""),
    ]  # fmt: skip
    tensor, row = made.worst_tensor, made.worst_row
    if tensor is not None and row is not None:
        rows += [
            ("worst tensor", f"{output.db(tensor.sqnr_db)}: {tensor.name}"),
            ("worst row", f"{output.db(row.worst_row_db)}: row {row.worst_row} of {row.name}"),
        ]
    escapes = sum(tensor.escapes for tensor in made.tensors)
    outliers = sum(tensor.outliers for tensor in made.tensors)
    rows += [
        ("listed", f"{escapes:,} levels beyond a sample, {outliers:,} outliers"),
        ("side files", f"{len(made.side_files)}" if made.side_files else ""),
        ("encodings", f"{made.encodings}, step factor {made.step_factor:.4g}"
                      if made.encodings > 1 else ""),
        ("frames", f"{made.frames} of {made.width} x {made.height}"),
        *(("", note) for note in made.notes),
        ("verified", "every hash" if options.verify else "no"),
        ("time", f"{seconds:.1f} s"),
    ]  # fmt: skip
    output.facts(rows)
