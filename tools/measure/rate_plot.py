"""Rate-distortion plots of a rate benchmark (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from measure.report import Record

#: colour, marker and line of each curve (colours: Okabe and Ito's, safe for the colour-blind).
STYLES: Final[dict[str, tuple[str, str, str]]] = {
    "weightvid": ("#D55E00", "o", "-"),
    "weightvid for SQNR": ("#E69F00", ".", "-"),
    "NNCodec DQ": ("#0072B2", "s", "-"),
    "NNCodec opt_qp": ("#56B4E9", "D", "-"),
    "one global step + xz": ("#777777", "^", "--"),
    "one global step + xz, short 1-D floats": ("#AAAAAA", "^", ":"),
    "int per channel + xz": ("#009E73", "v", "--"),
    "int per channel + zstd": ("#009E73", "x", ":"),
}
OTHERS: Final = ("#CC79A7", "#000000", "#8B5A2B")
#: rates that are shown, in bits per weight.
WIDEST: Final = (1.0, 8.5)
LEGEND_COLUMNS: Final = 4


def plot(record: Record, out: Path) -> None:
    """Write ``out``.svg and ``out``.png: SQNR, loss and task metric over bits per weight."""
    settings = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.7,
        "svg.hashsalt": "weightvid",
        "svg.fonttype": "none",
    }
    with plt.rc_context(settings):
        figure, grid = plt.subplots(2, 2, figsize=(12.5, 9.6))
        axes = [grid[0, 0], grid[0, 1], grid[1, 0], grid[1, 1]]
        _sqnr(axes[0], record)
        _excess(axes[1], record)
        _loss(axes[2], record)
        _metric(axes[3], record)
        for axis in (axes[0], axes[2], axes[3]):
            axis.set_xlim(*_range(record))
            axis.set_xlabel("bits per weight (whole file)")
        handles: dict[str, Any] = {}
        for axis in axes:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            list(handles.values()), list(handles), loc="lower center", frameon=False,
            ncols=LEGEND_COLUMNS,
        )  # fmt: skip
        figure.suptitle(f"{record['model']}, {record['floats']:,} weights", fontsize=13)
        rows = -(-len(handles) // LEGEND_COLUMNS)
        figure.tight_layout(rect=(0, 0.01 + 0.024 * rows, 1, 0.99), h_pad=2, w_pad=2)
        figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(out.with_suffix(".png"), dpi=130)
        plt.close(figure)


def _range(record: Record) -> tuple[float, float]:
    rates = [p["bits_per_weight"] for p in record["curves"]["weightvid"]]
    return max(WIDEST[0], min(rates) - 0.3), min(WIDEST[1], max(rates) + 0.3)


def _style(name: str, record: Record) -> dict[str, Any]:
    others = [each for each in record["curves"] if each not in STYLES]
    if name in STYLES:
        colour, marker, line = STYLES[name]
    else:
        colour, marker, line = OTHERS[others.index(name) % len(OTHERS)], "P", "-"
    ours = name == "weightvid"
    return {
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "markersize": 5 if ours else 4,
        "linewidth": 2.2 if ours else 1.3,
        "zorder": 5 if ours else 3,
        "label": name,
    }


def _curves(axis: Any, record: Record, value: str) -> list[float]:
    """Draw every curve; returns the values within the range of rates shown."""
    low, high = _range(record)
    shown = []
    for name, curve in record["curves"].items():
        rates = [p["bits_per_weight"] for p in curve]
        values = [p[value] for p in curve]
        axis.plot(rates, values, **_style(name, record))
        shown += [v for r, v in zip(rates, values, strict=True) if low <= r <= high]
    return shown


def _sqnr(axis: Any, record: Record) -> None:
    shown = _curves(axis, record, "sqnr_db")
    ours = record["curves"]["weightvid"]
    for key, label, line in (
        ("entropy_bits_per_weight", "bound: H0 of weightvid's levels", (0, (1, 1))),
        ("gaussian_bits_per_weight", "bound: Gaussian R(D), per tensor", (0, (5, 2))),
    ):
        axis.plot(
            [p[key] for p in ours], [p["sqnr_db"] for p in ours], color="#222222", linestyle=line,
            linewidth=1.1, label=label, zorder=2,
        )  # fmt: skip
    axis.set_ylim(min(shown) - 1, max(shown) + 1)
    axis.set_ylabel("SQNR (dB)")
    axis.set_title("Weights")


def _excess(axis: Any, record: Record) -> None:
    """Bits above the Gaussian bound at each point's own SQNR: the first plot, magnified."""
    low, high = _range(record)
    ours = record["curves"]["weightvid"]
    widest = 0.0
    for name, curve in record["curves"].items():
        if name.startswith("int "):
            continue  # so far off that the others would fall together
        shown = [p for p in curve if low <= p["bits_per_weight"] <= high]
        excess = [p["bits_per_weight"] - p["gaussian_bits_per_weight"] for p in shown]
        axis.plot([p["sqnr_db"] for p in shown], excess, **_style(name, record))
        widest = max([widest, *excess])
    axis.plot(
        [p["sqnr_db"] for p in ours],
        [p["entropy_bits_per_weight"] - p["gaussian_bits_per_weight"] for p in ours],
        color="#222222", linestyle=(0, (1, 1)), linewidth=1.1, zorder=2,
    )  # fmt: skip
    axis.axhline(0, color="#222222", linestyle=(0, (5, 2)), linewidth=1.1, zorder=2)
    axis.set_ylim(-0.15 * widest, widest * 1.15)
    axis.set_xlim(min(p["sqnr_db"] for p in ours) - 1, max(p["sqnr_db"] for p in ours) + 1)
    axis.set_xlabel("SQNR (dB)")
    axis.set_ylabel("bits per weight above Gaussian R(D)")
    axis.set_title("Weights: rate above the bound")


def _loss(axis: Any, record: Record) -> None:
    shown = [v for v in _curves(axis, record, "loss") if v > 0]
    axis.set_yscale("log")
    axis.set_ylim(max(min(shown), 1e-5) / 1.3, min(max(shown) * 1.3, 1.0))
    axis.yaxis.set_minor_formatter(NullFormatter())
    for target in record["equal_fidelity"]:
        axis.axhline(float(target), color="#999999", linewidth=0.9, zorder=1)
        axis.annotate(
            f"{target}", (1, float(target)), xycoords=("axes fraction", "data"), ha="right",
            va="bottom", fontsize=9, color="#666666",
        )  # fmt: skip
    names = {"KL": "KL divergence of the logits (nats)", "1 - cosine": "1 - cosine of embeddings"}
    axis.set_ylabel(names[record["loss_name"]])
    axis.set_title("Outputs (lower is better)")


def _metric(axis: Any, record: Record) -> None:
    shown = _curves(axis, record, "metric")
    before = record["metric_before"]
    axis.axhline(before, color="#999999", linewidth=0.9, zorder=1)
    axis.annotate(
        "original", (0.01, before), xycoords=("axes fraction", "data"), ha="left", va="bottom",
        fontsize=9, color="#666666",
    )  # fmt: skip
    axis.set_ylim(max(min(shown), before - 12) - 0.5, max(*shown, before) + 0.7)
    axis.set_ylabel(record["metric_name"])
    axis.set_title("Task")
