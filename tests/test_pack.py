"""Packing from end to end: what goes in comes out, or nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from weightvid import errors, tasks
from weightvid import pack as pack_module
from weightvid.checkpoint import from_mapping
from weightvid.levels import code
from weightvid.levels.frames import FrameSize
from weightvid.loader import DTYPES, PACKABLE, from_float32, open_archive, to_float32
from weightvid.pack import PackOptions, PackReport, Target, pack_checkpoint
from weightvid.progress import Progress
from weightvid.verify import verify_archive
from weightvid.video import Video

Arrays = dict[str, Any]
ROOT = Path(pack_module.__file__).parents[1]
normal = small_models.weights


def packed(
    arrays: Arrays, path: Path, dtypes: Any = None, **more: Any
) -> tuple[PackReport, Arrays]:
    """Report, and what the archive holds, its hashes checked."""
    options = PackOptions(jobs=1, force=True, **more)
    report = pack_checkpoint(from_mapping(arrays, dtypes=dtypes), path, options)
    with open_archive(path, check_tensors=True) as archive:
        return report, {spec.name: array for spec, array in archive.stored_items()}


def sqnr_db(before: Any, after: Any) -> float:
    wide = np.asarray(before, np.float64)
    noise = np.square(wide - after).sum()
    return float(10 * np.log10(np.square(wide).sum() / noise))


shapes = st.sampled_from(
    [(), (0,), (7,), (3, 0, 2), (5, 0, 7), (1, 1), (17, 20), (1, 40, 30), (20, 16, 3), (2,) * 9,
     (12, 10, 3, 3), (30, 1, 3, 3), (8, 6, 2, 3, 2), (2, 3000), (3000, 2)]
)  # fmt: skip
kinds = st.sampled_from(["normal", "zero", "constant", "outlier", "nan", "inf", "tiny", "rows"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(shapes, st.sampled_from(sorted(PACKABLE)), kinds), max_size=5),
    st.sampled_from(["outputs", "weights", "integers"]),
    st.sampled_from(["fine", "balanced", "small"]),
)
def test_anything_goes_in(tmp_path: Path, wanted: Any, fidelity: str, recipe: str) -> None:
    arrays, dtypes = {}, {}
    for number, (shape, dtype, kind) in enumerate(wanted):
        values = normal(number, *shape).reshape(shape)
        flat = values.reshape(-1)
        if kind in ("zero", "constant"):
            flat[...] = 0.0 if kind == "zero" else 0.37
        elif kind == "tiny":
            flat *= np.float32(1e-30)
        elif kind == "rows" and values.ndim > 1 and values.size:
            values *= np.exp2(np.arange(len(values)) % 20 - 10).reshape(
                -1, *[1] * (values.ndim - 1)
            )
        elif flat.size and kind in ("outlier", "nan", "inf"):
            flat[flat.size // 2] = {"outlier": 60.0, "nan": np.nan, "inf": -np.inf}[kind]
        arrays[f"t{number}"], dtypes[f"t{number}"] = from_float32(values, dtype), dtype
    path = tmp_path / "m.mp4"
    report, found = packed(arrays, path, dtypes, fidelity=fidelity, recipe=recipe)
    assert report.file_bytes == path.stat().st_size
    assert found.keys() == arrays.keys()
    broken = any(
        kind in ("nan", "inf") and sum(size > 1 for size in shape) > 1 and prod(shape) >= 256
        for shape, _, kind in wanted
    )
    assert any("for NaN, infinity or" in note for note in report.notes) == broken
    coded = {tensor.name for tensor in report.tensors}
    for name, (shape, dtype, kind) in zip(arrays, wanted, strict=True):
        assert (found[name].dtype, found[name].shape) == (arrays[name].dtype, shape)
        same = found[name].tobytes() == arrays[name].tobytes()
        if kind in ("zero", "constant", "nan", "inf") and sum(size > 1 for size in shape) > 1:
            assert same, "kept exactly"
        assert (
            same or name in coded or (dtype == "F32" and max(shape, default=1) == arrays[name].size)
        )
    for tensor in report.tensors:
        before, after = (to_float32(a[tensor.name], dtypes[tensor.name]) for a in (arrays, found))
        if not tensor.outliers and tensor.sqnr_db < 200:
            assert tensor.sqnr_db == pytest.approx(sqnr_db(before, after), abs=0.01)


def test_every_element_type_is_kept(tmp_path: Path) -> None:
    arrays = {f"{n}.{d}": np.arange(30).reshape(5, 6).astype(kind)[d:] for n, kind in DTYPES.items()
              for d in (0, 5)}  # fmt: skip
    dtypes = {name: name.partition(".")[0] for name in arrays}
    report, found = packed(arrays, tmp_path / "m.mp4", dtypes, keep=("*",))
    assert report.tensors == ()
    assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert all(found[name].dtype == array.dtype for name, array in arrays.items())


def test_report_and_options(tmp_path: Path) -> None:
    arrays = small_models.small()
    arrays["outlier"] = normal(3, 60, 60)
    arrays["outlier"][2, 3] = 90
    report, found = packed(arrays, tmp_path / "m.mp4", keep=("half.*", "nothing*"))
    assert report.unused_keeps == ("nothing*",)
    assert found["half.weight"].tobytes() == arrays["half.weight"].tobytes()
    assert [tensor.name for tensor in report.tensors] == ["conv.weight", "embed.weight", "outlier"]
    assert [tensor.outliers for tensor in report.tensors] == [0, 0, 1]
    assert report.weights == sum(
        a.size for n, a in arrays.items() if a.dtype.kind == "f" and n != "head.weight"
    )
    assert report.bits_per_weight == 8 * report.file_bytes / report.weights
    assert report.worst_tensor is not None
    assert report.worst_row is not None
    assert report.worst_tensor.sqnr_db == min(tensor.sqnr_db for tensor in report.tensors)
    assert report.worst_row.worst_row_db <= report.worst_tensor.sqnr_db
    assert (report.frames, report.encodings) == (1, 1)
    coarser = packed(arrays, tmp_path / "c.mp4", recipe="small")[0]
    assert coarser.sqnr_db is not None
    assert report.sqnr_db is not None
    assert report.sqnr_db > coarser.sqnr_db + 6
    assert report.file_bytes > coarser.file_bytes
    assert "int8 per channel" not in "".join(report.notes)
    assert "5.0 times as far off as with int8 per channel" in "".join(coarser.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "tasty"}, "balanced"), ({"fidelity": "beauty"}, "outputs"),
        ({"step_factor": 0.0}, "positive"), ({"step_factor": float("nan")}, "positive"),
        ({"step_factor": 1.0, "target": Target("size", 1)}, "exclude"),
        ({"target": Target("size", 1), "video": Video(qp=20)}, "exclude"), ({"jobs": -1}, "-1"),
        ({"keep": "fc.*"}, r"keep is a tuple, such as \('fc"), ({"base": Path("a")}, "base is a"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, options: Arrays, said: str) -> None:
    with pytest.raises(errors.QuantizationError, match=said):
        pack_checkpoint(from_mapping({}), tmp_path / "m.mp4", PackOptions(**options))
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    values = normal(1, 64, 64)
    values[3] *= 1e16
    with pytest.raises(errors.QuantizationError, match=r"tensor 'far': a weight lies"):
        packed({"near": normal(2, 64, 64), "far": values}, tmp_path / "m.mp4")


def test_names_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="longer than 4096 bytes"):
        packed({"x" * 4097: normal(1, 30, 30)}, tmp_path / "m.mp4")
    assert not list(tmp_path.iterdir())


def test_parts_and_frames_of_a_long_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "PART_WEIGHTS", 70_000)
    arrays = {"a": normal(1, 30, 30), "long": normal(2, 300, 700), "b": normal(3, 40, 20, 3, 3)}
    monkeypatch.setattr(pack_module, "choose_frame_size", lambda _: FrameSize(256, 192))
    report, found = packed(arrays, tmp_path / "m.mp4")
    with open_archive(tmp_path / "m.mp4") as archive:
        info = archive.info("long")
        assert [part.rows for part in info.parts] == [100, 100, 100]
        assert len(info.frames) >= 5
        assert archive["long"].tobytes() == found["long"].tobytes()
    assert sqnr_db(arrays["long"], found["long"]) > 20
    assert report.frames >= 5


@pytest.mark.parametrize(
    ("codec", "qp"), [("x265", 8), ("x265", 24), ("svt-av1", 20), ("x264", 20)]
)
def test_lossy_video_is_what_came_back(tmp_path: Path, codec: str, qp: int) -> None:
    arrays = small_models.small()
    arrays["outlier"] = normal(3, 60, 60)
    arrays["outlier"][2, 3] = 90
    report, found = packed(arrays, tmp_path / "m.mp4", video=Video(codec, qp=qp))
    assert verify_archive(tmp_path / "m.mp4").ok
    for tensor in report.tensors:
        assert found[tensor.name].dtype == arrays[tensor.name].dtype
        if tensor.name != "outlier":
            reached = sqnr_db(arrays[tensor.name], found[tensor.name])
            assert 5 < reached == pytest.approx(tensor.sqnr_db, abs=0.01)
    assert found["outlier"][2, 3] == pytest.approx(90, rel=1e-3)
    lossless = packed(arrays, tmp_path / "n.mp4", step_factor=0.055)[0]
    assert report.file_bytes < lossless.file_bytes


def test_a_coarser_qp_is_smaller_and_worse(tmp_path: Path) -> None:
    arrays = {"w": normal(1, 200, 200)}
    made = [packed(arrays, tmp_path / "m.mp4", video=Video(qp=qp))[0] for qp in (4, 16, 28)]
    sizes, quality = ([getattr(m, n) for m in made] for n in ("file_bytes", "sqnr_db"))
    assert sizes == sorted(sizes, reverse=True)
    assert quality == sorted(quality, reverse=True)


@pytest.mark.parametrize("field", ["sha256", "data"])
def test_verification_finds_what_was_tampered_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    made = tasks.encode_frame

    def tampered(*task: Any) -> Any:
        packet = made(*task)
        changed = bytearray(getattr(packet, field))
        changed[-len(changed) // 2] ^= 1
        return packet._replace(**{field: bytes(changed)})

    monkeypatch.setattr(tasks, "encode_frame", tampered)
    with pytest.raises(errors.WeightvidError, match=r"does not decode|discarded"):
        packed({"w": normal(1, 100, 100)}, tmp_path / "m.mp4")
    assert not list(tmp_path.iterdir())


def test_the_source_is_not_the_destination(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", w=normal(1, 30, 30))
    with pytest.raises(errors.CheckpointError, match="the source itself"):
        pack_checkpoint(tmp_path / "m.npz", tmp_path / "m.npz", PackOptions(force=True))
    (tmp_path / "m.mp4").write_bytes(b"old")
    with pytest.raises(errors.OutputError, match="exists already"):
        pack_checkpoint(tmp_path / "m.npz", tmp_path / "m.mp4")
    assert (tmp_path / "m.mp4").read_bytes() == b"old"


def test_a_file_of_a_source_folder_is_not_the_destination(tmp_path: Path) -> None:
    model, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({"w": normal(1, 30, 30)}, model)
    config.write_text("{}")
    with pytest.raises(errors.CheckpointError, match="or a part of it"):
        pack_checkpoint(tmp_path, config, PackOptions(force=True))
    assert config.read_text() == "{}"
    for _ in range(2):
        pack_checkpoint(tmp_path, tmp_path / "m.mp4", PackOptions(force=True, jobs=1))


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, w=normal(1, 300, 300))

    def rewrite(progress: Progress) -> None:
        if progress.stage == "encode":
            path.write_bytes(path.read_bytes())
            os.utime(path, ns=(1, 1))

    with pytest.raises(errors.CheckpointError, match="changed while it was packed"):
        pack_checkpoint(path, tmp_path / "m.mp4", PackOptions(jobs=1), rewrite)
    assert not (tmp_path / "m.mp4").exists()


#: packs what takes a while, and says so when it has begun to write.
_SLOW = """
    import sys, resource
    import numpy as np
    from weightvid.checkpoint import from_mapping
    from weightvid.errors import OutputError
    from weightvid.pack import PackOptions, pack_checkpoint
    random = np.random.default_rng(0)
    arrays = {f"w{i}": random.standard_normal((512, 1024)).astype("f4") for i in range(ROUNDS)}
    def report(progress):
        if progress.stage == "encode":
            print("begun", flush=True)
    LIMIT
    try:
        pack_checkpoint(from_mapping(arrays), "m.mp4", PackOptions(jobs=2), report)
    except OutputError as error:
        print(error)
"""


def start(folder: Path, rounds: int = 99, limit: str = "") -> subprocess.Popen[str]:
    script = textwrap.dedent(_SLOW).replace("ROUNDS", str(rounds)).replace("LIMIT", limit)
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interruption(tmp_path: Path, number: int) -> None:
    """Ctrl-C leaves nothing; after kill -9 there is no file of the real name."""
    packing = start(tmp_path)
    assert packing.stdout is not None
    assert packing.stdout.readline() == "begun\n"
    packing.send_signal(number)
    _, error = packing.communicate()
    assert packing.returncode != 0
    left = [path.name for path in tmp_path.iterdir()]
    assert "m.mp4" not in left
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in error
        assert left == []
    else:
        assert len(left) == 1
        # The next run is not in its way.
        again = start(tmp_path, 1)
        assert again.communicate()[1] == ""
        assert (tmp_path / "m.mp4").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit of the file's size stands in for it."""
    packing = start(tmp_path, 2, "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2)")
    output, error = packing.communicate()
    assert output.splitlines()[-1] == "cannot write m.mp4: File too large", error
    assert not list(tmp_path.iterdir())
