"""What a command line asks for: names, values, labels, commands."""

from __future__ import annotations

from typing import Any

import pytest

from weightvid.codec.registry import CODECS
from weightvid.compare.baselines import BASELINES
from weightvid.compare.settings import Setting
from weightvid.compare.sweep import Sweep, select
from weightvid.errors import WeightvidError


def test_the_default_has_what_is_promised() -> None:
    settings = Sweep().settings()
    packs = [s for s in settings if s.kind == "pack" and s.method == "x265"]
    assert {s.preset for s in packs if s.quantizer == "pack"} == {"ultrafast", "medium", "slow"}
    assert len({s.rate for s in packs if s.value is None}) == 5
    assert len({s.value for s in packs if s.mode == "qp"}) == 5
    assert {s.quantizer for s in packs if s.value is None} == {
        "pack",
        "sqnr",
        "uniform",
        "trellis8",
    }
    for name in ("x265", "x264", "svtav1"):
        assert len([s for s in settings if s.kind == "lossless" and s.method == name]) == 5
        assert len([s for s in settings if s.kind == "lossy" and s.method == name]) == 5
        archives = [s for s in settings if s.kind == "pack" and s.method == name]
        assert len([s for s in archives if s.value is None]) == (30 if name == "x265" else 5)
        assert len([s for s in archives if s.value is not None]) == 5
    assert {s.method for s in settings if s.kind == "baseline"} == set(BASELINES)


def test_every_label_is_unique() -> None:
    everything = Sweep(
        codecs=("all",), quantizers=("all",), crf=(20,), inter=True,
        formats=("yuv420p", "yuv420p10le", "yuv420p12le", "gray", "gray10le", "gray12le"),
    ).settings()  # fmt: skip
    labels = [setting.label for setting in everything]
    assert len(set(labels)) == len(labels)
    assert {s.method for s in everything if s.kind in ("lossless", "lossy")} == set(CODECS)


def test_archives_come_of_the_codecs_that_fit() -> None:
    settings = Sweep(
        codecs=("x265", "vp9", "png", "jpegls", "rav1e"), rates=(0.2,), qp=(20,), crf=(24,),
        formats=("yuv420p", "yuv420p10le"),
    ).settings()  # fmt: skip
    found = {s.label for s in settings if s.kind == "pack" and s.quantizer in ("", "pack")}
    assert found == {
        "weightvid k=0.2", "weightvid medium k=0.2", "weightvid slow k=0.2", "weightvid qp 20",
        "weightvid qp yuv420p10le 20", "weightvid crf 24", "weightvid crf yuv420p10le 24",
        "weightvid vp9 lossless k=0.2", "weightvid vp9 qp 20", "weightvid png lossless k=0.2",
        "weightvid rav1e qp 20", "weightvid rav1e qp yuv420p10le 20",
    }  # fmt: skip
    assert not [s for s in Sweep(quantizers=("none",)).settings() if s.kind == "pack"]


def test_inter_comes_with_the_same_frames_without() -> None:
    settings = Sweep(codecs=("x264", "png"), inter=True, rates=(0.2,)).settings()
    kinds = [(s.method, s.kind, s.frames, s.inter) for s in settings if s.frames == "like"]
    assert ("x264", "lossless", "like", False) in kinds
    assert ("x264", "lossless", "like", True) in kinds
    assert ("x264", "lossy", "like", True) in kinds
    assert all(method != "png" for method, *_ in kinds)


def test_values_go_to_the_codecs_that_take_them() -> None:
    settings = Sweep(codecs=("x265", "svtav1"), qp=(60,), quantizers=("none",)).settings()
    lossy = [(s.method, s.value) for s in settings if s.kind == "lossy"]
    assert ("svtav1", 60) in lossy
    assert ("x265", 60) not in lossy


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"codecs": ("x256",)}, "unknown codec 'x256'; did you mean x265"),
        ({"presets": ("ultrafats",)}, "unknown preset 'ultrafats'; did you mean ultrafast"),
        ({"quantizers": ("trelis8",)}, "did you mean trellis8"),
        ({"baselines": ("int8+x",)}, "did you mean int8"),
        ({"formats": ("yuv420",)}, "did you mean yuv420p"),
        ({"qp": (99.0,)}, "takes qp 99"),
        ({"crf": (-1.0,)}, "takes crf -1"),
        ({"rates": (0.0,)}, "positive step factor"),
        ({"rates": (float("inf"),)}, "positive step factor"),
        ({"codecs": ("none",), "quantizers": ("none",), "baselines": ("none",)}, "nothing"),
    ],
)
def test_wrong_names_and_values(more: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightvidError, match=message):
        Sweep(**more).settings()


def test_select_by_label_and_by_curve() -> None:
    settings = Sweep().settings()
    assert [s.label for s in select(settings, ["int8+xz"])] == ["int8+xz"]
    assert len(select(settings, ["x264 medium qp"])) == 5
    with pytest.raises(WeightvidError, match="did you mean 'x264 medium qp 20'"):
        select(settings, ["x264 medim qp 20"])


def test_commands_say_what_to_run() -> None:
    pack = Setting("pack", "x265", "medium", "lossless", "yuv420p", None, "pack", 0.18)
    assert pack.command("a b.npz") == "weightvid pack 'a b.npz' --step 0.18 --preset medium"
    other = Setting("pack", "svtav1", "8", "lossless", "yuv420p", None, "pack", 0.18)
    assert other.label == "weightvid svtav1 lossless k=0.18"
    assert other.command("m") == "weightvid pack m --codec svtav1 --step 0.18"
    deep = Setting("pack", "x264", "slow", "qp", "yuv420p10le", 20.0)
    assert deep.label == "weightvid x264 qp slow yuv420p10le 20"
    assert deep.command("m") == "weightvid pack m --codec x264 --qp 20 --bit-depth 10 --preset slow"


@pytest.mark.parametrize("more", [{}, {"codecs": ("all",), "inter": True, "crf": (12.0,)}])
def test_commands_of_a_comparison_select_their_point(more: dict[str, Any]) -> None:
    from weightvid.cli.compare import sweep_of

    for setting in Sweep(**more).settings():
        words = setting.command("m.npz").split(" --")
        if not words[0].startswith("weightvid compare"):
            continue
        given: dict[str, str] = dict(word.partition(" ")[::2] for word in words[1:])
        label = given.pop("only").strip("'")
        inter = given.pop("inter", None) is not None
        again = sweep_of(given, inter).settings()
        assert select(again, [label]) == [setting]
