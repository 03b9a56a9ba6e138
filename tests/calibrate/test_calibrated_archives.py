"""Packing with statistics: outputs are nearer at the same bytes, or the archive is as without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.calibrate import Calibration, CalibrationConfig
from weightvid.checkpoint import from_mapping
from weightvid.errors import CheckpointError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, PackReport, Target, pack_checkpoint
from weightvid.survey import survey_checkpoint
from weightvid.verify import verify_archive
from weightvid.workers import Workers

torch = pytest.importorskip("torch", reason="needs the extra: weightvid[torch]")
from weightvid.calibrate import layers  # noqa: E402
from weightvid.calibrate.order import look  # noqa: E402
from weightvid.calibrate.state import held_back, running  # noqa: E402
from weightvid.calibrate.watch import Watch  # noqa: E402

nn, fn = torch.nn, torch.nn.functional


class Images(nn.Sequential):
    """Convolutions of all kinds, and a BatchNorm that knows its inputs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24, momentum=None), nn.ReLU(),
            nn.Conv2d(24, 48, 3, groups=24), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=4), nn.ReLU(),
            nn.ConvTranspose2d(48, 16, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 20),
        )  # fmt: skip

    @staticmethod
    def inputs(count: int) -> Any:
        smooth = 5 * fn.avg_pool2d(torch.randn(count, 3, 14, 14), 5, 1)
        return torch.randn(count, 3, 1, 1) * smooth + torch.randn(count, 3, 1, 1)


class Words(nn.Sequential):
    """Without BatchNorm: a table, attention, linear layers."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        super().__init__(nn.Embedding(40, 32), layer, nn.Flatten(), nn.Linear(384, 20))

    @staticmethod
    def inputs(count: int) -> Any:
        return (torch.randint(0, 40, (count, 1)) + torch.randint(0, 6, (count, 12))) % 40


class Across(nn.Module):
    """Layers ``x @ W``, as GPT-2 has them."""

    inputs = staticmethod(Words.inputs)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 32), nn.Linear(384, 20)
        for name, sizes in (("up", (32, 96)), ("down", (96, 32))):
            self.register_parameter(name, nn.Parameter(torch.randn(sizes) / sizes[0] ** 0.5))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(sizes[1])))

    def forward(self, ids: Any) -> Any:
        x = self.table(ids)
        for _ in range(2):
            inner = torch.addmm(self.up_bias, x.view(-1, 32), self.up).relu()
            x = x + torch.addmm(self.down_bias, inner, self.down).view(x.shape)
        return self.head(x.flatten(1))


def draw(kind: Any, seed: int = 0) -> Any:
    """A network of random weights, its BatchNorm used to its inputs."""
    torch.manual_seed(seed)
    made = kind()
    with torch.no_grad():
        made(made.inputs(512))
    return made.eval()


@pytest.fixture(scope="module", params=[Images, Words])
def net(request: pytest.FixtureRequest) -> Any:
    return draw(request.param)


images = pytest.mark.parametrize("net", [Images], indirect=True)


def examples(net: Any, count: int = 192, trust: bool = True) -> Calibration:
    torch.manual_seed(1)
    config = CalibrationConfig(trust_inputs=trust)
    return Calibration.from_examples(net, net.inputs(count).split(12), config)


@pytest.fixture(scope="module")
def example(net: Any) -> Calibration:
    return examples(net, trust=isinstance(net, Words))


def arrays(net: Any) -> dict[str, Any]:
    return {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}


def pack(
    net: Any, path: Path, calibration: Calibration | None, **more: Any
) -> tuple[PackReport, dict[str, Any]]:
    step = None if "target" in more else 0.4
    options = PackOptions(step_factor=step, calibration=calibration, jobs=1, force=True, **more)
    report = pack_checkpoint(from_mapping(arrays(net)), path, options)
    with open_archive(path, check_tensors=True) as archive:
        return report, {name: array.copy() for name, array in archive.items()}


def loss(net: Any, restored: dict[str, Any]) -> tuple[float, float]:
    """Squared error of the outputs on further inputs, and that around its mean."""
    torch.manual_seed(2)
    other, inputs = type(net)().eval(), net.inputs(200)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in restored.items()})
    with torch.no_grad():
        error = net(inputs) - other(inputs)
    return float(error.square().mean()), float(error.var(0).mean())


def test_outputs_are_nearer_at_the_same_bytes(net: Any, example: Any, tmp_path: Path) -> None:
    before, path = arrays(net), tmp_path / "m.mp4"
    plain, free = pack(net, path, None)
    same = Target("size", plain.file_bytes)
    known, better = pack(net, path, Calibration(example.stats), target=same)
    assert known.file_bytes <= plain.file_bytes
    losses = [loss(net, restored) for restored in (free, better)]
    assert losses[1][0] < 0.6 * losses[0][0]
    assert losses[1][1] < 0.7 * losses[0][1]
    assert all(np.array_equal(array, before[name]) for name, array in arrays(net).items())


@pytest.mark.parametrize("kind", [Images, Words, Across])
def test_outputs_are_nearer_layer_by_layer(kind: Any, tmp_path: Path) -> None:
    gains = []
    for seed in range(3):  # One network's gain is anything from none to a half.
        drawn, path = draw(kind, seed), tmp_path / "m.mp4"
        example = examples(drawn, trust=kind is not Images)
        known, better = pack(drawn, path, Calibration(example.stats))
        layered, best = pack(drawn, path, example)
        assert layered.file_bytes < 1.02 * known.file_bytes
        assert known.notes == layered.notes[:-1]
        assert "layer by layer" in layered.notes[-1]
        assert layered.notes[-1].count("KL divergence") == 2
        gains.append(np.log(loss(drawn, best)[0] / loss(drawn, better)[0]))
    assert np.mean(gains) < np.log(0.9)


def test_layers_of_a_file_are_calibrated_too(net: Any, example: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "m.mp4", tmp_path / "m.npz"
    np.savez(model, **arrays(net))
    options = PackOptions(
        step_factor=0.4, calibration=example, jobs=1, keep=("nothing*",), layers=2
    )
    report = pack_checkpoint(from_mapping(arrays(net)), path, options)
    notes = report.notes
    assert report.unused_keeps == options.keep
    assert notes[0].startswith("calibrated: ")
    assert notes[1] == "not layer by layer: layers are added to each other"
    # The biases have moved.
    assert verify_archive(path, model).ok


@images
def test_other_weights_make_up_for_pruned_ones(net: Any, example: Any, tmp_path: Path) -> None:
    before, path = arrays(net), tmp_path / "m.mp4"
    ways = (None, Calibration(example.stats), example)
    made = [pack(net, path, way, prune=0.6)[1] for way in ways]
    losses = [loss(net, restored)[0] for restored in made]
    assert losses[1] < 0.5 * losses[0]
    assert losses[2] < losses[1]
    for name in ("0.weight", "5.weight", "11.weight"):
        small = np.abs(before[name]) < 0.6 * np.abs(before[name]).mean()
        assert all((restored[name][small] == 0).all() for restored in made[:2])
        # Layer by layer, weights that are fitted anew are pruned.
        assert (made[2][name] == 0).mean() > 0.2


@images
def test_zeros_of_a_pruned_network_stay_zeros(net: Any, tmp_path: Path) -> None:
    pruned, path = Images().eval(), tmp_path / "m.mp4"
    state, names = arrays(net), ("0.weight", "5.weight", "11.weight")
    for name in names:
        state[name][np.abs(state[name]) < 1.2 * np.abs(state[name]).mean()] = 0
    pruned.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    plain, known = (
        pack(pruned, path, way)[1] for way in (None, Calibration(examples(pruned).stats))
    )
    assert all((known[name][state[name] == 0] == 0).all() for name in names)
    assert loss(pruned, known)[0] < 0.6 * loss(pruned, plain)[0]


@images
def test_steps_follow_the_data(net: Any, example: Any) -> None:
    found = []
    for calibration in (Calibration(example.stats), None):
        reader, options = from_mapping(arrays(net)), PackOptions(calibration=calibration)
        plans = survey_checkpoint(reader, options, Workers(None, 1)).plans(0.4).values()
        found.append({plan.spec.name: plan for plan in plans})
    for name in ("0.weight", "5.weight"):
        steps, rule = (plans[name].frequency_steps for plans in found)
        assert not np.array_equal(steps, rule)
        # Smooth inputs: the mean of a kernel counts most, its finest frequency least.
        assert steps[0] == min(steps) < steps[-1]


@images
def test_biases_take_the_mean_error(net: Any, example: Any, tmp_path: Path) -> None:
    before = arrays(net)
    made = pack(net, tmp_path / "m.mp4", Calibration(example.stats))[1]
    biases = {name: known.bias for name, known in example.stats.tensors.items() if known.bias}
    plain = {f"{place}.weight": f"{place}.bias" for place in (3, 5, 11, 13)}
    assert biases == plain | {"0.weight": "1.running_mean"}

    def taken(state: Mapping[str, Any], name: str) -> Any:
        owner, _, kind = name.rpartition(".")
        if kind == "bias":
            return state[name]
        # What a BatchNorm takes from its inputs in all: its bias makes up for a rounded mean.
        deviation = np.sqrt(state[f"{owner}.running_var"] + 1e-5)
        return state[name] - state[f"{owner}.bias"] * deviation / state[f"{owner}.weight"]

    for name, bias in biases.items():
        known = example.stats.tensors[name]
        error = (made[name] - before[name]).reshape(len(known.mean), -1, known.mean.shape[1])
        lost = np.einsum("goc,gc->go", error, known.mean).reshape(-1)
        gained = known.bias_sign * (taken(made, bias) - taken(before, bias))
        # But for the mantissa bits that the recipe keeps.
        assert np.linalg.norm(lost + gained) < 0.4 * np.linalg.norm(lost)
    kept = ("13.bias", "5.weight")
    made = pack(net, tmp_path / "m.mp4", example, keep=kept)[1]
    assert all(np.array_equal(made[name], before[name]) for name in kept)


class Shared(nn.Module):
    """Two layers that share a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 24), nn.Linear(32, 24)
        self.b.bias = self.a.bias

    def forward(self, x: Any) -> Any:
        return torch.cat([self.a(x), self.b(x.square())], 1)


def test_a_bias_of_two_layers_takes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Shared().eval()
    known = Calibration.from_examples(net, (torch.randn(400, 32) + 3).split(40))
    before = arrays(net)["a.bias"]
    for keep in (), ("b.weight",):
        made = pack(net, tmp_path / "m.mp4", Calibration(known.stats), keep=keep)[1]
        assert np.abs(made["a.bias"] - before).max() <= 2**-5 * np.abs(before).max()


def test_statistics_belong_to_all_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 20)).eval()
    known = Calibration.from_examples(net, torch.randn(400, 32).split(40))
    known.stats.save(tmp_path / "net.stats")
    known = Calibration.from_file(tmp_path / "net.stats")
    pack(net, tmp_path / "m.mp4", known)
    with torch.no_grad():
        net[1].weight[3] += 0.5
    with pytest.raises(CheckpointError, match="other weights"):
        pack(net, tmp_path / "other.mp4", known)


@images
@pytest.mark.parametrize("after", [0.01, 2.0])
def test_layer_by_layer_only_if_better(
    net: Any, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    losses = iter([(1.0, "one"), (after, "another")])
    monkeypatch.setattr(type(example.examples), "loss", lambda *_: next(losses))
    monkeypatch.setattr(example.examples, "_change", 1.0)
    note = pack(net, tmp_path / "a.mp4", example)[0].notes[-1]
    pack(net, tmp_path / "b.mp4", Calibration(example.stats))
    assert note.startswith("layer by" if after < 1 else "not layer by layer, which is no better")
    assert "one -> another" in note
    same = (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert same == (after > 1)


class Attention(nn.Module):
    """Layers that have their inputs in common, and others that follow them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "up", "gate", "down"):
            setattr(self, name, nn.Linear(24, 24, bias))

    def forward(self, x: Any) -> Any:
        x = x + self.o(fn.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.down(fn.gelu(self.gate(x)) * self.up(x))


def sequence(reads: bool, seed: int = 0) -> Any:
    """Errors of six blocks, quantized layer by layer, on inputs fitted to and on those held back.

    ``reads``: as if they were a language model.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(*(Attention(bias=not reads) for _ in range(6)))
    inputs = torch.randn(200, 8, 24) + 1
    batches, factor = held_back(inputs.split(20), 0.2), 0.6
    known = Calibration.from_examples(net, inputs.split(20), CalibrationConfig(trust_inputs=True))
    with running(net) as state:
        options = PackOptions(calibration=known)
        survey = known.apply(survey_checkpoint(state.reader, options, Workers(None, 1)))
        order = look(state, batches)
        names = [name.split(".")[1] for name in order.shapes if name.startswith("3.")]
        sources = {order.sources[f"3.{name}.weight"] for name in names}
        assert (len(names), len(sources)) == (7, 4)
        order.reads = reads  # whose layers have no bias, as in usual language models
        layers._Sequence(state, survey, factor).run(order, batches, 1 << 30, lambda _: None)
        for held in (False, True):
            shown = torch.cat([batch for batch, back in batches if back is held])
            expected = net(shown)
            with state.quantized():
                yield net(shown) - expected


def test_a_layer_that_follows_another_waits_for_it() -> None:
    """Else both make up for the same error: the mean of what comes out would be off."""
    error = next(sequence(reads=False))
    assert float(error.mean((0, 1)).square().mean()) < 0.01 * float(error.square().mean())


def test_what_outputs_are_added_to_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm() -> float:
        held = [list(sequence(reads=True, seed=seed))[1] for seed in range(1, 5)]
        return float(torch.stack(held).square().mean())

    made_up = harm()
    monkeypatch.setattr(Watch, "_add", lambda *_: None)
    assert made_up < 0.9 * harm()  # 0.85; of one draw 0.81 to 0.96


@pytest.mark.parametrize("net", [Words], indirect=True)
def test_where_nobody_can_tell_it_is_not_done(net: Any, example: Any, tmp_path: Path) -> None:
    for found, more, why in ((examples(net, 12), {}, "a single batch"),
                             (examples(net, trust=False), {}, "neither BatchNorm"),
                             (example, {"target": Target("sqnr", 15)}, "a target")):  # fmt: skip
        report = pack(net, tmp_path / "m.mp4", found, **more)[0]
        assert report.notes[-1].startswith(f"not layer by layer: {why}")


@images
def test_foreign_inputs_make_nothing_worse(net: Any, tmp_path: Path) -> None:
    found = Calibration.from_examples(net, (0.3 * torch.randn(64, 3, 10, 10)).split(8))
    assert "unlike those the model was trained on" in found.stats.refused
    note = pack(net, tmp_path / "a.mp4", found)[0].notes[0]
    assert note.startswith("calibration was not used: the example inputs are unlike")
    pack(net, tmp_path / "b.mp4", None)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
