#!/usr/bin/env python3
"""Rate curves of weightvid beside NNCodec and plain integers in xz or zstd, on models with evals.

    python tools/bench_rate.py --eval-dir EVAL --minilm MINILM.safetensors \
        --nncodec .venv-nncodec/bin/python --cache CACHE

A curve of its own for steps from an evaluation, on data that no judgement is made with (it keeps
its evaluations in CACHE/evaluations)::

    WEIGHTVID_EVAL=EVAL python tools/bench_rate.py --eval-dir EVAL --cache CACHE \
        --variant "weightvid --eval" eval=tools/eval_functions.py:{model}

Whole files count, 8 x bytes over all floats of the model; everything is judged by the same code on
what each codec gives back. Per model: rate_NAME.json, .md, .svg and .png in the output folder.
Steps of all quantizers are spaced a quarter octave apart (NNCodec's own spacing), above
10 M weights half an octave.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import measure.models
from measure import archives, nncodec, plain
from measure.curves import GaussianBound, bd_rate, crossing
from measure.evaluation import Model, State
from measure.rate_report import FOR_SQNR, markdown, overview
from measure.report import Cache, Record, machine, versions, write

from weightvid.pack import MIN_MANTISSA_BITS, Evaluation, PackOptions, pack_checkpoint
from weightvid.quantize.mantissa import FULL_BITS
from weightvid.version import code_sha256

#: octaves (log2) of the step factors, from 0.055 to 0.88 sigma of a tensor of average size.
STEP_FACTORS: Final = tuple(round(0.22 * 2 ** (i / 4), 4) for i in range(-8, 9))
DQ_QPS: Final = tuple(range(-36, -17))
OPT_QPS: Final = tuple(range(-38, -19))
GLOBAL_FACTORS: Final = tuple(round(0.35 * 2 ** (i / 4), 4) for i in range(-8, 7))
CHANNEL_BITS: Final = (3, 4, 5, 6, 7, 8)
LARGE_FLOATS: Final = 10_000_000
#: of restored checkpoints that NNCodec may leave on the disk at a time.
SCRATCH_BYTES: Final = 400_000_000
SCHEMA: Final = 1

Job = Callable[[], list[Record]]


def point(model: Model, curve: str, setting: str, file_bytes: int, restored: State) -> Record:
    """One point of a curve, judged."""
    judged = model.judge(restored)
    return {
        "curve": curve,
        "setting": setting,
        "bytes": file_bytes,
        "bits_per_weight": 8 * file_bytes / model.floats,
        "sqnr_db": model.sqnr_db(restored),
        "metric": judged.metric,
        "metric_change": judged.change,
        "metric_change_se": judged.change_se,
        "loss": judged.loss,
        "loss_se": judged.loss_se,
        "agreement": judged.agreement,
    }


def key_of(model: Model, what: str, settings: Record) -> Record:
    """What a point depends on."""
    return {
        "schema": SCHEMA,
        "model": model.sha256,
        "samples": model.samples,
        "what": what,
        **settings,
    }


class Bench:
    """All jobs on one model."""

    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        self.model = model
        self.cache = Cache(options.cache)
        self.options = options
        self.stride = options.stride or (2 if model.floats > LARGE_FLOATS else 1)
        self.code = code_sha256()

    def jobs(self) -> Iterator[Job]:
        """NNCodec first: its jobs are the longest."""
        if self.options.nncodec is not None:
            yield from self.nncodec_jobs("NNCodec DQ", DQ_QPS, opt_qp=False)
            yield from self.nncodec_jobs("NNCodec opt_qp", OPT_QPS, opt_qp=True)
        for name, changes in self.variants():
            for factor in STEP_FACTORS[:: self.stride]:
                yield self.weightvid_job(name, {**changes, "step_factor": factor})
        if self.options.plain == "none":
            return
        for factor in GLOBAL_FACTORS[:: self.stride]:
            yield self.global_job(factor, FULL_BITS)
            if self.model.floats <= LARGE_FLOATS:  # above, the 1-D floats weigh next to nothing
                yield self.global_job(factor, MIN_MANTISSA_BITS)
        if self.options.plain == "global":
            return
        for bits in CHANNEL_BITS:
            yield self.channel_job(bits)

    def variants(self) -> list[tuple[str, Record]]:
        """weightvid as it is; set for SQNR; and each variant of the command line.

        Steps and shaping by default give away SQNR for the outputs' sake, so rates at equal SQNR
        need settings of their own.
        """
        main = _settings(self.options.pack)
        found = [("weightvid", main)]
        if self.options.sqnr_pack:
            found.append((FOR_SQNR, {**main, **_settings(self.options.sqnr_pack)}))
        for name, text in self.options.variant:
            changes = {**main, **_settings(text.format(model=self.model.name))}
            if "eval" in changes:
                script, _, function = changes["eval"].rpartition(":")
                source = Path(script).read_bytes()
                if f"def {function}(".encode() not in source:
                    continue  # not every model has an evaluation
                changes["eval_sha256"] = hashlib.sha256(source).hexdigest()
            found.append((name, changes))
        return found

    def weightvid_job(self, curve: str, changes: Record) -> Job:
        key = key_of(self.model, "weightvid", {"code": self.code, "options": changes})

        def make() -> Record:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.mp4"
                chosen = PackOptions(
                    **{"jobs": 1, "verify": False, **_options(changes, self.options.cache)}
                )
                pack_checkpoint(self.model.checkpoint, path, chosen)
                restored = archives.restored_state(path)
                setting = f"step factor {changes['step_factor']:g}"
                made = point(self.model, curve, setting, path.stat().st_size, restored)
                levels = archives.quantized_levels(path)
                bits = sum(archives.entropy_bits(each) for each in levels)
            made["entropy_bits_per_weight"] = bits / self.model.floats
            return made

        return lambda: [{**self.cache.made(key, make), "curve": curve}]

    def global_job(self, factor: float, mantissa_bits: int) -> Job:
        """With the 1-D floats exact, or shortened as weightvid's recipes do."""
        curve = "one global step + xz"
        if mantissa_bits < FULL_BITS:
            curve += ", short 1-D floats"

        def make() -> Record:
            stored = plain.global_step(self.model.state, factor, mantissa_bits)
            setting = f"step {factor:g} rms"
            return point(self.model, curve, setting, stored.xz(), stored.restored)

        key = key_of(self.model, "global step", {"factor": factor, "mantissa": mantissa_bits})
        return lambda: [self.cache.made(key, make)]

    def channel_job(self, bits: int) -> Job:
        def make() -> Record:
            stored = plain.per_channel(self.model.state, bits)
            found = point(
                self.model, "int per channel + xz", f"int{bits}", stored.xz(), stored.restored
            )
            return {**found, "zstd_bytes": stored.zstd()}

        def both() -> list[Record]:
            found = self.cache.made(key, make)
            xz = {name: value for name, value in found.items() if name != "zstd_bytes"}
            size = found["zstd_bytes"]
            rate = {"bytes": size, "bits_per_weight": 8 * size / self.model.floats}
            return [xz, {**xz, "curve": "int per channel + zstd", **rate}]

        key = key_of(self.model, "per channel", {"bits": bits})
        return both

    def nncodec_jobs(self, curve: str, qps: Sequence[int], opt_qp: bool) -> Iterator[Job]:
        """Points in the cache as they are; the others in groups, one process each."""
        keys = {
            qp: key_of(self.model, "nncodec", {"qp": qp, "opt_qp": opt_qp})
            for qp in qps[:: self.stride]
        }
        found = {qp: self.cache.get(key) for qp, key in keys.items()}
        yield lambda: [record for record in found.values() if record is not None]
        missing = [qp for qp, record in found.items() if record is None]
        count = max(1, min(10, SCRATCH_BYTES // self.model.tensor_bytes))
        for begin in range(0, len(missing), count):
            yield self._nncodec_group(curve, missing[begin : begin + count], opt_qp, keys)

    def _nncodec_group(
        self, curve: str, qps: list[int], opt_qp: bool, keys: dict[int, Record]
    ) -> Job:
        def run() -> list[Record]:
            made = []
            runs = nncodec.run(
                self.options.nncodec, self.model.checkpoint, qps, opt_qp, restore=True
            )
            for peer, restored in runs:
                setting = f"qp {peer['qp']}"
                judged = point(self.model, curve, setting, peer["bytes"], restored)
                made.append({**judged, "nncodec": peer["version"]})
                self.cache.put(keys[peer["qp"]], made[-1])
            return made

        return run


def _settings(text: str) -> Record:
    """``key=value,key=value`` for PackOptions; values are JSON, or text."""
    found: Record = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _options(changes: Record, cache: Path | None) -> Record:
    """Settings as PackOptions has them; ``eval`` names a function, ``eval_budget`` its calls."""
    found: Record = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    function, budget = found.pop("eval", None), found.pop("eval_budget", None)
    found.pop("eval_sha256", None)
    if function is not None:
        folder = None if cache is None else cache / "evaluations"
        found["evaluation"] = Evaluation(function, cache=folder, budget=budget)
    return found


def measured(model: Model, options: argparse.Namespace) -> list[Record]:
    """Every point, in the order of the jobs; progress on the way."""
    points: list[Record] = []
    with ThreadPoolExecutor(options.jobs) as executor:
        for records in executor.map(lambda job: job(), Bench(model, options).jobs()):
            for p in records:
                print(
                    f"{model.name:18s} {p['curve']:24s} {p['setting']:20s} {p['bytes']:>11,d} B "
                    f"{p['bits_per_weight']:6.3f} bpw {p['sqnr_db']:6.2f} dB "
                    f"loss {p['loss']:.5f} metric {p['metric']:6.2f}",
                    flush=True,
                )
            points += records
    return points


def analysed(model: Model, points: list[Record]) -> Record:
    """Curves, equal fidelity and BD-rates of a model's points."""
    bound = GaussianBound(model.matrices().values())
    for p in points:
        p["gaussian_bits_per_weight"] = bound.bits(p["sqnr_db"]) / model.floats
    names = list(dict.fromkeys(p["curve"] for p in points))
    names.sort(key=lambda name: (name.startswith(("int ", "one ")), name.startswith("NNCodec")))
    ours = [name for name in names if not name.startswith(("int ", "one ", "NNCodec"))]
    curves = {
        name: sorted(
            (p for p in points if p["curve"] == name), key=lambda p: float(p["bits_per_weight"])
        )
        for name in names
    }
    return {
        "model": model.name,
        "floats": model.floats,
        "samples": model.samples,
        "metric_name": model.metric_name,
        "loss_name": model.loss_name,
        "metric_before": model.metric,
        "equal_fidelity": {
            f"{target:g}": {name: _crossed(curve, target) for name, curve in curves.items()}
            for target in model.targets
        },
        "bd_rate": {
            mine: {
                name: {
                    quality: bd_rate(_pairs(curve, quality), _pairs(curves[mine], quality))
                    for quality in ("sqnr_db", "loss", "metric")
                }
                for name, curve in curves.items()
                if name not in ours
            }
            for mine in ours
        },
        "curves": curves,
    }


def _crossed(curve: list[Record], target: float) -> Record:
    found = crossing([(p["bits_per_weight"], p["loss"]) for p in curve], target)
    record: Record = {
        "interpolated": found.interpolated,
        "fitted": found.fitted,
        "fitted_se": found.fitted_se,
        "fitted_points": found.points,
    }
    at = found.fitted or found.interpolated
    if at is not None:
        near = min(curve, key=lambda p: abs(p["bits_per_weight"] - at))
        record["nearest"] = {
            name: near[name]
            for name in ("setting", "bits_per_weight", "metric_change", "metric_change_se")
        }
    return record


def _pairs(curve: list[Record], quality: str) -> list[tuple[float, float]]:
    """Rates with a quality that rises: SQNR, metric, or minus the logarithm of the loss."""

    def rising(p: Record) -> float:
        return -10 * math.log10(p["loss"]) if quality == "loss" else float(p[quality])

    return [(p["bits_per_weight"], rising(p)) for p in curve if p["loss"] > 0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.models.add_arguments(parser)
    add = parser.add_argument
    add("--nncodec", type=Path, metavar="PYTHON", help="interpreter that has it (NNCODEC.md)")
    add("--pack", default="", metavar="KEY=VALUE,...", help="further PackOptions")
    add("--sqnr-pack", default="rule=sqnr", help="PackOptions of the curve set for SQNR")
    add("--variant", nargs=2, action="append", default=[], metavar=("NAME", "KEY=VALUE,..."))
    add(
        "--plain",
        choices=("all", "global", "none"),
        default="all",
        help="which plain codings (xz is slow): all, one global step, or none",
    )
    add("--stride", type=int, help="measure every N-th point alone")
    add("--samples", type=int, help="evaluate on so many samples")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="points measured side by side")
    return parser.parse_args()


def main() -> None:
    import torch

    options = parse()
    torch.set_num_threads(1)
    for source in measure.models.sources(options):
        few = measure.models.CURVE_PAIRS if source.name == measure.models.MINILM else None
        model = source.load(options.samples or few)
        result = analysed(model, measured(model, options))
        extra = "--nncodec PYTHON" if options.nncodec else ""
        extra += f" --pack {options.pack}" if options.pack else ""
        extra += f" --plain {options.plain}" if options.plain != "all" else ""
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "command": measure.models.shown_command("bench_rate.py", options, extra),
            "versions": versions()
            | {
                "nncodec": next(
                    (p["nncodec"] for c in result["curves"].values() for p in c if "nncodec" in p),
                    None,
                )
            },
            "machine": machine(),
            "settings": {
                "pack": options.pack,
                "sqnr_pack": options.sqnr_pack,
                "variants": dict(options.variant),
            },
            **result,
        }
        out = options.out / f"rate_{model.name}"
        text = markdown(record)
        write(out, record, text)
        print(text)
        try:
            from measure.rate_plot import plot
        except ImportError:
            print("no matplotlib: no plot")
        else:
            plot(record, out)
    known = [json.loads(path.read_text()) for path in sorted(options.out.glob("rate_*.json"))]
    known = [record for record in known if record.get("schema") == SCHEMA]
    (options.out / "rate.md").write_text(overview(known), encoding="utf-8")


if __name__ == "__main__":
    main()
