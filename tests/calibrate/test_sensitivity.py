import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from weightvid.allocate import LARGEST_CORRECTION, measured_units  # noqa: E402
from weightvid.calibrate import CalibrationConfig, calibrate, load_stats  # noqa: E402
from weightvid.calibrate.outputs import samples_of  # noqa: E402
from weightvid.calibrate.sensitivity import choose_batches  # noqa: E402
from weightvid.calibration import KEY  # noqa: E402
from weightvid.checkpoint import open_checkpoint  # noqa: E402
from weightvid.errors import CheckpointError  # noqa: E402
from weightvid.pack import PackOptions, pack_checkpoint  # noqa: E402
from weightvid.quantize.stats import TensorStats  # noqa: E402
from weightvid.spec import TensorSpec  # noqa: E402
from weightvid.summary import summarize_archive  # noqa: E402


class TwoBranches(nn.Module):
    """Two equal layers; the output cares ten times as much for one of them."""

    def __init__(self):
        super().__init__()
        self.loud = nn.Linear(32, 32, bias=False)
        self.quiet = nn.Linear(32, 32, bias=False)
        self.unused = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        return self.loud(x) + 0.1 * self.quiet(x)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    module = TwoBranches()
    with torch.no_grad():
        module.quiet.weight.copy_(module.loud.weight)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    config = CalibrationConfig(trust_inputs=True)
    stats = calibrate(module, list(torch.rand(80, 32).split(8)), config=config)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    return module, stats


def test_what_the_output_cares_for(measured):
    _, stats = measured
    assert set(stats.sensitivity) == {"loud.weight", "quiet.weight"}
    ratio = stats.sensitivity["loud.weight"] / stats.sensitivity["quiet.weight"]
    assert ratio == pytest.approx(100, rel=0.01)


def test_the_loss_is_that_of_the_error(measured):
    """Against the output error itself, of a layer that is the whole network."""
    torch.manual_seed(1)
    layer = nn.Linear(64, 48, bias=False)
    inputs = torch.randn(2000, 64)
    config = CalibrationConfig(sensitivity_samples=2000, trust_inputs=True)
    stats = calibrate(layer, list(inputs.split(10)), config=config)
    # White inputs: each of the 48 x 64 errors counts with a twelfth of a squared step.
    assert stats.sensitivity["weight"] == pytest.approx(48 * 64 / 12, rel=0.25)


def test_steps_follow(measured, tmp_path):
    module, stats = measured
    from safetensors.torch import save_file

    save_file(module.state_dict(), tmp_path / "model.safetensors")

    def steps(**options):
        archive = tmp_path / "model.mp4"
        chosen = PackOptions(step_factor=0.2, force=True, **options)
        pack_checkpoint(tmp_path / "model.safetensors", archive, chosen)
        return {t.name: t.step for t in summarize_archive(archive).tensors}

    found, plain = steps(calibration=stats), steps()
    assert plain["loud.weight"] == plain["quiet.weight"]
    assert found["quiet.weight"] / found["loud.weight"] == pytest.approx(10, rel=0.05)
    assert found["unused"] == plain["unused"]


def test_corrections_are_bounded_and_keep_the_rate():
    three = [TensorStats(TensorSpec(n, "F32", (64, 64)), 1.0, 1.0, 4.0, True) for n in "abc"]
    found = measured_units([1.0, 1.0, 1.0], three, {"a": 4.0, "b": 1.0, "c": 0.25})
    assert np.prod(found) == pytest.approx(1)
    assert found[2] / found[0] == pytest.approx(4)
    extreme = measured_units([1.0, 1.0, 1.0], three, {"a": 1e30, "b": 1e-30, "c": 1.0})
    assert extreme == pytest.approx([1 / LARGEST_CORRECTION, LARGEST_CORRECTION, 1])
    assert measured_units([1.0, 2.0, 3.0], three, {}) == [1.0, 2.0, 3.0]


def test_it_can_be_left_out(measured):
    module, _ = measured
    config = CalibrationConfig(sensitivity_samples=0, trust_inputs=True)
    assert calibrate(module, [torch.rand(8, 32)], config=config).sensitivity == {}


class Normed(nn.Module):
    """BatchNorm remembers the inputs that it was trained on: 1 to 2 in every channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, bias=False)
        self.norm = nn.BatchNorm2d(32)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))


def test_only_inputs_that_the_model_knows_move_the_steps():
    torch.manual_seed(0)
    net, images = Normed(), 1 + torch.rand(64, 3, 12, 12)
    net.train()
    net.norm.momentum = None
    for batch in images.split(16):
        net(batch)
    net.eval()
    known = calibrate(net, list(images.split(8)))
    assert set(known.sensitivity) == {"conv.weight"}
    assert not known.refused
    foreign = calibrate(net, list(torch.randn(64, 3, 12, 12).split(8)))
    assert foreign.sensitivity == {}
    assert "unlike those the model was trained on" in foreign.refused
    assert foreign.refused in foreign.notes[-1]
    # Without such a layer nobody can tell.
    assert calibrate(TwoBranches(), list(torch.rand(80, 32).split(8))).sensitivity == {}


def test_batches_are_evenly_spaced():
    batches = [torch.full((10, 1), float(n)) for n in range(20)]
    some = choose_batches(batches, 50)
    assert [int(b[0, 0]) for b in some] == [0, 4, 8, 12, 16]
    assert choose_batches(batches, 1000) == batches
    assert sum(map(samples_of, choose_batches(batches, 1))) == 10


def test_the_file_keeps_it(measured, tmp_path):
    _, stats = measured
    stats.save(tmp_path / "stats.safetensors")
    assert load_stats(tmp_path / "stats.safetensors").sensitivity == stats.sensitivity


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), "much", None])
def test_damaged_values_are_refused(measured, tmp_path, value):
    from safetensors import safe_open
    from safetensors.torch import save_file

    _, stats = measured
    stats.save(tmp_path / "stats.safetensors")
    with safe_open(tmp_path / "stats.safetensors", "pt") as file:
        record = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record["sensitivity"]["loud.weight"] = value
    save_file(tensors, tmp_path / "bad.safetensors", {KEY: json.dumps(record)})
    with pytest.raises(CheckpointError, match="damaged"):
        load_stats(tmp_path / "bad.safetensors")
    with open_checkpoint(tmp_path / "bad.safetensors") as reader:
        assert KEY in reader.contents.metadata
