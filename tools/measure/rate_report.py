"""The text of a rate benchmark."""

from __future__ import annotations

from typing import Final

from measure.report import Record, number, table

FOR_SQNR: Final = "weightvid for SQNR"
GLOBAL: Final = "one global step + xz"
SHORT: Final = "one global step + xz, short 1-D floats"
CHANNEL: Final = "int per channel + xz"

NOTES = """\
Whole files; bpw = 8 x bytes / all floats of the model. SQNR over all float tensors of two or more
dimensions. Changes of the metric with their standard error, paired with the original. The plain
files (xz, zstd) hold no names, shapes or index; weightvid's and NNCodec's do.

*interpolated*: between neighbouring points in log loss (points out of order are pooled). *fitted*:
straight line through log loss over bpw within 1 bpw around, with its standard error: a single
quantized model's loss scatters, and the line averages it. BD-rate: PCHIP (`bjontegaard`), percent
of weightvid's rate against the row's at equal quality, over the range both curves have; negative
means that weightvid is smaller. The one over the task metric is mostly noise, as the metric
saturates. *weightvid for SQNR*: set for the least error of the weights (`--sqnr-pack`), where
the default settings aim at the outputs."""


def markdown(record: Record) -> str:
    """The Markdown file of one model."""
    samples = f", {record['samples']} samples" if record["samples"] else ""
    parts = [
        f"# Rate: {record['model']}",
        f"`{record['command']}`",
        f"{record['floats']:,} floats; {record['metric_name']} before: "
        f"{record['metric_before']:.2f}{samples}. weightvid {record['versions']['weightvid']}, "
        f"NNCodec {record['versions']['nncodec'] or 'not measured'}.",
        NOTES,
        *(_equal_fidelity(record, target) for target in record["equal_fidelity"]),
        *(_bd_rate(record, mine) for mine in record["bd_rate"]),
        *(_points(record, name) for name in record["curves"]),
    ]
    return "\n\n".join(parts)


def _equal_fidelity(record: Record, target: str) -> str:
    found = record["equal_fidelity"][target]
    ours = found["weightvid"]
    rows = []
    for name, at in found.items():
        near = at.get("nearest")
        change = (
            f"{near['metric_change']:+.2f} ± {near['metric_change_se']:.2f} ({near['setting']})"
            if near
            else "–"
        )
        fitted = number(at["fitted"], 3)
        if at["fitted"] is not None:
            fitted += f" ± {at['fitted_se']:.3f}"
        rows.append(
            [
                name,
                number(at["interpolated"], 3),
                fitted,
                _against(ours["interpolated"], at["interpolated"]),
                _against(ours["fitted"], at["fitted"]),
                change,
            ]
        )
    head = ["codec", "bpw interpolated", "bpw fitted", "weightvid against it", "the same, fitted"]
    head.append(f"{record['metric_name']} at the nearest point")
    title = f"## At equal fidelity: {record['loss_name']} {target}"
    gains = [
        f"{_against(ours[kind], best_peer(found, kind))} ({kind})"
        for kind in ("interpolated", "fitted")
    ]
    verdict = f"Against the better of NNCodec's two settings: {', '.join(gains)}."
    return f"{title}\n\n{table(head, rows)}\n\n{verdict}"


def best_peer(found: Record, kind: str) -> float | None:
    """Least bits per weight of NNCodec's settings at a target; None without any."""
    rates = [at[kind] for name, at in found.items() if name.startswith("NNCodec")]
    return min((rate for rate in rates if rate is not None), default=None)


def overview(records: list[Record]) -> str:
    """All models on one page: bits per weight at equal fidelity, BD-rate at equal SQNR."""
    rows = []
    for record in records:
        for target, found in record["equal_fidelity"].items():
            ours = found["weightvid"]
            names = ("weightvid", "NNCodec DQ", "NNCodec opt_qp", GLOBAL, CHANNEL)
            cells = [record["model"], f"{record['loss_name']} {target}"]
            for name in names:
                at = found.get(name, {})
                value = at.get("fitted") or at.get("interpolated")
                cells.append(number(value) + ("" if at.get("fitted") else "*" if value else ""))
            cells += [
                _against(ours[kind], best_peer(found, kind)) for kind in ("fitted", "interpolated")
            ]
            cells.append(_against(ours["fitted"], found.get(GLOBAL, {}).get("fitted")))
            rows.append(cells)
    head = ["model", "at", "weightvid", "NNCodec DQ", "NNCodec opt_qp", GLOBAL, CHANNEL]
    head += ["against NNCodec's best", "the same, interpolated", "against global step + xz"]
    bd_rows = []
    for record in records:
        # Steps and shaping for the outputs' sake give away SQNR: here, the curve set for it.
        mine = FOR_SQNR if FOR_SQNR in record["bd_rate"] else "weightvid"
        cells = [record["model"], mine]
        for name in ("NNCodec DQ", "NNCodec opt_qp", GLOBAL, SHORT, CHANNEL):
            value = record["bd_rate"][mine].get(name, {}).get("sqnr_db")
            cells.append(f"{value['percent']:+.1f} %" if value else "–")
        bd_rows.append(cells)
    bd_head = ["model", "curve", "NNCodec DQ", "NNCodec opt_qp", GLOBAL, SHORT, CHANNEL]
    return "\n\n".join(
        [
            "# Rate: overview",
            "Made by `tools/bench_rate.py`; one file per model has the points, the notes and the "
            "commands.",
            "## Bits per weight at equal fidelity (fitted; * interpolated)",
            table(head, rows),
            "## BD-rate over SQNR, percent of the other's rate",
            table(bd_head, bd_rows) + "\n",
        ]
    )


def _against(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None or ours == theirs:
        return "–"
    return f"{100 * (ours / theirs - 1):+.1f} %"


def _bd_rate(record: Record, mine: str) -> str:
    rows = []
    for name, found in record["bd_rate"][mine].items():
        cells = [name]
        for quality in ("sqnr_db", "loss", "metric"):
            value = found[quality]
            cells.append(
                f"{value['percent']:+.1f} % ({value['from']:.1f} to {value['to']:.1f})"
                if value
                else "–"
            )
        rows.append(cells)
    head = ["against", "over SQNR (dB)", f"over -10 log10({record['loss_name']})"]
    head.append(f"over {record['metric_name']}")
    return f"## BD-rate of {mine}\n\n{table(head, rows)}"


def _points(record: Record, name: str) -> str:
    curve = record["curves"][name]
    bounded = "entropy_bits_per_weight" in curve[0]
    head = ["setting", "bytes", "bpw", "SQNR dB"]
    head += ["H0 of the levels, bpw"] if bounded else []
    head += ["Gaussian R(D), bpw", record["loss_name"], record["metric_name"], "change"]
    head += ["agreement %"] if curve[0]["agreement"] is not None else []
    rows = []
    for p in curve:
        row = [p["setting"], f"{p['bytes']:,}", number(p["bits_per_weight"], 3)]
        row.append(number(p["sqnr_db"]))
        if bounded:
            row.append(number(p["entropy_bits_per_weight"], 3))
        row.append(number(p["gaussian_bits_per_weight"], 3))
        row.append(f"{p['loss']:.4f} ± {p['loss_se']:.4f}")
        row.append(number(p["metric"]))
        row.append(f"{p['metric_change']:+.2f} ± {p['metric_change_se']:.2f}")
        if p["agreement"] is not None:
            row.append(number(100 * p["agreement"], 1))
        rows.append(row)
    return f"## {name}\n\n{table(head, rows)}"
