import json
import textwrap

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import weightvid.torch  # noqa: E402
from weightvid.calibrate import CalibrationStats, calibrate  # noqa: E402
from weightvid.cli.app import app  # noqa: E402
from weightvid.errors import CheckpointError  # noqa: E402
from weightvid.pack import PackOptions, pack_checkpoint  # noqa: E402
from weightvid.packing import quantizer  # noqa: E402
from weightvid.summary import summarize_archive  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 64, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(64, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, 40)
        self.spare = nn.Parameter(torch.randn(20, 20))

    def forward(self, x):
        x = self.up(self.depthwise(self.conv(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    torch.manual_seed(0)
    net = Net().eval()
    images = nn.functional.avg_pool2d(torch.randn(60, 3, 20, 20), 5, 1).abs()
    folder = tmp_path_factory.mktemp("calibrated")
    from safetensors.torch import save_file

    save_file(net.state_dict(), folder / "model.safetensors")
    return net, images, calibrate(net, list(images[:40].split(8))), folder


def packed(calibrated, name, **options):
    _, _, stats, folder = calibrated
    options = {"calibration": stats, "step_factor": 0.8, "jobs": 1, "force": True, **options}
    report = pack_checkpoint(folder / "model.safetensors", folder / name, PackOptions(**options))
    return folder / name, report


def output_loss(calibrated, archive):
    net, images, _, _ = calibrated
    other = Net().eval()
    other.load_state_dict(weightvid.torch.load_file(archive))
    with torch.no_grad():
        return float((net(images[40:]) - other(images[40:])).square().mean())


@pytest.mark.parametrize("states", [0, 8])
def test_outputs_are_nearer_at_the_same_size(calibrated, states):
    with_, report = packed(calibrated, "with.mp4", states=states)
    without, plain = packed(calibrated, "without.mp4", states=states, calibration=None)
    assert report.file_bytes < plain.file_bytes + 200
    assert output_loss(calibrated, with_) < 0.8 * output_loss(calibrated, without)


def test_the_archive_says_what_was_calibrated(calibrated):
    archive, _ = packed(calibrated, "about.mp4")
    about = summarize_archive(archive).about
    useful = [name for name, moments in calibrated[2].tensors.items() if moments.useful]
    assert about["calibration"] == f"{len(useful)} tensors, 40 samples"
    assert "spare" in about["uncalibrated"].split(", ")
    assert not set(useful) & set(about["uncalibrated"].split(", "))
    archive, _ = packed(calibrated, "plain.mp4", calibration=None)
    assert "calibration" not in summarize_archive(archive).about


def test_same_statistics_same_bytes(calibrated, monkeypatch):
    _, _, stats, folder = calibrated
    first, _ = packed(calibrated, "first.mp4")
    stats.save(folder / "stats.safetensors", force=True)
    again, _ = packed(calibrated, "again.mp4", calibration=folder / "stats.safetensors", jobs=3)
    assert again.read_bytes() == first.read_bytes()
    others, _ = packed(calibrated, "others.mp4", cluster="processes", jobs=2)
    assert others.read_bytes() == first.read_bytes()
    monkeypatch.setattr(quantizer, "BATCH_WEIGHTS", 100)
    blocks, _ = packed(calibrated, "blocks.mp4")
    restored = weightvid.torch.load_file(blocks)
    for name, tensor in weightvid.torch.load_file(first).items():
        # Sums in another order round otherwise, now and then.
        assert name == "spare" or (restored[name] != tensor).float().mean() < 0.02


def test_tensors_that_gain_nothing_are_packed_as_ever(calibrated):
    _, _, stats, _ = calibrated
    from dataclasses import replace

    tensors = {name: replace(m, damping=0.0) for name, m in stats.tensors.items()}
    useless = CalibrationStats(stats.model_sha256, stats.samples, tensors)
    plain, _ = packed(calibrated, "as_ever.mp4", calibration=None)
    archive, _ = packed(calibrated, "useless.mp4", calibration=useless)
    for name, array in weightvid.torch.load_file(plain).items():
        assert torch.equal(array, weightvid.torch.load_file(archive)[name])


def test_statistics_of_another_model_are_refused(calibrated, tmp_path):
    _, _, stats, folder = calibrated
    other = CalibrationStats("0" * 64, stats.samples, stats.tensors)
    with pytest.raises(CheckpointError, match="calibrate again"):
        packed(calibrated, "refused.mp4", calibration=other)
    assert not (folder / "refused.mp4").exists()


def test_halves_are_calibrated_too(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False).to(torch.bfloat16)
    inputs = [torch.rand(32, 64).to(torch.bfloat16) for _ in range(5)]
    stats = calibrate(layer, inputs)
    weightvid.torch.save_file(
        layer.state_dict(), tmp_path / "half.mp4", options=PackOptions(calibration=stats)
    )
    restored = weightvid.torch.load_file(tmp_path / "half.mp4")["weight"]
    assert restored.dtype == torch.bfloat16
    assert "calibration" in summarize_archive(tmp_path / "half.mp4").about


SCRIPT = """
    import torch
    from torch import nn

    def examples():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
        return module, [torch.rand(8, 32) for _ in range(10)]

    def wrong():
        return 1

    def raises():
        print("not for stdout")
        raise RuntimeError("no images")

    number = 3
"""


def test_the_command_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    stats, runner = tmp_path / "stats.safetensors", CliRunner()
    call = ["calibrate", f"{script}:examples", "-o", str(stats)]
    made = runner.invoke(app, [*call, "--json"])
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["samples"] == 80
    assert {row["name"] for row in record["tensors"]} == {"0.weight", "2.weight"}
    assert runner.invoke(app, call).exit_code == 2
    shown = runner.invoke(app, [*call, "--force"])
    assert shown.exit_code == 0
    assert "2 of 2 profit" in shown.stdout
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    torch.save(module.state_dict(), tmp_path / "model.pt")
    archive = tmp_path / "model.mp4"
    pack = ["pack", str(tmp_path / "model.pt"), "--calibration", str(stats), "--json"]
    done = runner.invoke(app, pack)
    assert done.exit_code == 0, done.output
    assert summarize_archive(archive).about["calibration"] == "2 tensors, 80 samples"
    for wrong in (
        "script.py",
        f"{script}:absent",
        f"{script}:number",
        f"{script}:wrong",
        "no.py:f",
    ):
        failed = runner.invoke(app, ["calibrate", wrong, "-o", str(tmp_path / "other.safetensors")])
        assert failed.exit_code == 2, wrong
    failed = runner.invoke(app, ["calibrate", f"{script}:raises", "-o", str(tmp_path / "o.stats")])
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].endswith("raises failed: RuntimeError: no images")
    missing = runner.invoke(app, [*pack[:3], str(tmp_path / "none.safetensors"), "--force"])
    assert missing.exit_code == 1


def test_a_script_calibrates_while_packing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    runner, model, archive = CliRunner(), tmp_path / "model.pt", tmp_path / "model.mp4"
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    torch.save(module.state_dict(), model)
    call = ["pack", str(model), "--calibrate", f"{script}:examples", "--step", "0.5", "--force"]
    done = runner.invoke(app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["calibration"].startswith("plain: without BatchNorm nothing confirms")
    about = summarize_archive(archive).about
    assert about["calibration"] == "2 tensors, 80 samples"
    assert "sequential" not in about
    done = runner.invoke(app, [*call, "--trust-inputs"])
    assert done.exit_code == 0, done.output
    assert "on held-back inputs" in " ".join(done.stdout.split())
    assert "sequential" in summarize_archive(archive).about
    shown = runner.invoke(app, ["inspect", str(archive)])
    assert "sequential" in shown.stdout
    for wrong in (
        ["--calibrate", "script.py"],
        ["--calibrate", f"{script}:wrong"],
        ["--calibrate", f"{script}:absent"],
        ["--calibrate", f"{script}:examples", "--calibration", str(script)],
        ["--calibrate", f"{script}:examples", "--eval", f"{script}:examples"],
        ["--trust-inputs"],
    ):
        other = tmp_path / "other.mp4"
        failed = runner.invoke(app, ["pack", str(model), "-o", str(other), *wrong])
        assert failed.exit_code == 2, wrong
        assert not other.exists()
    torch.save(nn.Linear(32, 48).state_dict(), model)
    failed = runner.invoke(app, call)
    assert failed.exit_code == 1
    assert "of another model" in failed.stderr


def test_numbers_of_a_matrix_are_all_there(calibrated):
    """Feedback must not lose or move a column: restored weights are near the originals."""
    net, _, _, _ = calibrated
    archive, _ = packed(calibrated, "near.mp4", step_factor=0.1)
    restored = weightvid.torch.load_file(archive)
    for name, tensor in net.state_dict().items():
        error = (restored[name] - tensor).numpy()
        assert np.abs(error).std() <= 0.3 * np.asarray(tensor).std() + 1e-3, name
