import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as fn  # noqa: E402

import weightvid.torch  # noqa: E402
from weightvid.calibrate import CalibrationConfig, ModuleExamples, calibrate, refit  # noqa: E402
from weightvid.calibrate.order import look, stages  # noqa: E402
from weightvid.calibrate.pairs import PairCollector, PairSums  # noqa: E402
from weightvid.calibrate.run import ready  # noqa: E402
from weightvid.calibrate.state import State  # noqa: E402
from weightvid.calibrate.watch import Seen  # noqa: E402
from weightvid.errors import QuantizationError  # noqa: E402
from weightvid.pack import Evaluation, PackOptions, Target, pack_checkpoint  # noqa: E402
from weightvid.planning.sequential import Refiner  # noqa: E402
from weightvid.summary import summarize_archive  # noqa: E402


class Net(nn.Module):
    """Every kind of weight, one after another."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 24)
        self.conv = nn.Conv1d(24, 32, 3, padding=1)
        self.depthwise = nn.Conv1d(32, 128, 3, groups=32)
        self.up = nn.ConvTranspose1d(128, 32, 2, groups=2)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.randn(16, 24))

    def forward(self, ids):
        x = self.table(ids).mT
        x = fn.relu(self.depthwise(fn.relu(self.conv(x))))
        x = fn.relu(self.up(x)).mT
        x = x + self.attention(x, x, x)[0]
        return fn.relu(self.head(x)).mean(1) @ self.scale


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def tokens(count, seed):
    draw = torch.Generator().manual_seed(seed)
    # Neighbours are alike, as in text.
    return (torch.randint(0, 40, (count, 1), generator=draw)
            + torch.randint(0, 6, (count, 20), generator=draw)) % 40  # fmt: skip


@pytest.fixture(scope="module")
def model(net, tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("sequential") / "model.safetensors"
    save_file(net.state_dict(), path)
    return path


def examples(net, batches=None, **config):
    chosen = CalibrationConfig(**{"trust_inputs": True, **config})
    return ModuleExamples(net, batches or tokens(160, 1).split(16), chosen)


def pack(net, model, folder, **more):
    options = {"calibration": examples(net), "step_factor": 0.6, "force": True, **more}
    report = pack_checkpoint(model, folder / "model.mp4", PackOptions(**options))
    return folder / "model.mp4", report


def loss(net, archive):
    other = Net().eval()
    other.load_state_dict(weightvid.torch.load_file(archive))
    with torch.no_grad():
        ids = tokens(200, 2)
        return float((net(ids) - other(ids)).square().mean())


def test_outputs_are_nearer_than_with_statistics_alone(net, model, tmp_path):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    archive, report = pack(net, model, tmp_path)
    assert report.calibration.startswith("sequential, ")
    assert report.encodings == 2
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    about = summarize_archive(archive).about
    assert "fitted anew" in about["sequential"]
    after = loss(net, archive)
    archive, plain = pack(
        net, model, tmp_path, calibration=examples(net).statistics(lambda _: None)
    )
    assert plain.calibration == ""
    assert abs(plain.file_bytes - report.file_bytes) < 0.02 * plain.file_bytes
    assert after < 0.9 * loss(net, archive)


def test_same_inputs_same_bytes_whoever_works(net, model, tmp_path):
    first = pack(net, model, tmp_path, jobs=1)[0].read_bytes()
    assert pack(net, model, tmp_path, jobs=3)[0].read_bytes() == first


def test_memory_bounds_the_stages(net, model, tmp_path):
    few = examples(net, tokens(64, 1).split(16), memory_bytes=1 << 17)
    _, report = pack(net, model, tmp_path, calibration=few)
    # The depthwise layer is beyond the limit of one stage, and goes without.
    assert report.calibration.startswith(("sequential, ", "plain: "))
    nothing = examples(net, tokens(64, 1).split(16), memory_bytes=9_000)
    _, report = pack(net, model, tmp_path, calibration=nothing)
    assert report.calibration == "plain: no layer could be followed at work"


@pytest.mark.parametrize(
    ("batches", "more", "message"),
    [
        ([tokens(64, 1)], {}, "plain: a single batch leaves nothing to check on"),
        (None, {"trust_inputs": False}, "plain: without BatchNorm nothing confirms"),
    ],
)
def test_where_nobody_can_tell_it_is_not_done(net, model, tmp_path, batches, more, message):
    archive, report = pack(net, model, tmp_path, calibration=examples(net, batches, **more))
    assert report.calibration.startswith(message)
    assert "sequential" not in summarize_archive(archive).about
    assert report.encodings == 1


def test_what_is_no_better_is_not_kept(net, model, tmp_path, monkeypatch):
    monkeypatch.setattr("weightvid.planning.sequential._PER_BIT", 1e9)
    monkeypatch.setattr(Refiner, "_rate", lambda _, made: made.file_bytes % 7 + made.factor)
    told = set()
    for factor in (0.5, 0.6, 0.7, 0.8):
        archive, report = pack(net, model, tmp_path, step_factor=factor)
        about = summarize_archive(archive).about["sequential"]
        kept = report.calibration.startswith("sequential, ")
        assert kept == about.endswith("fitted anew")
        if not kept:
            assert about == "no: the sequential one was no better"
            plain = examples(net).statistics(lambda _: None)
            restored = weightvid.torch.load_file(archive)
            other, _ = pack(net, model, tmp_path, step_factor=factor, calibration=plain)
            for name, tensor in weightvid.torch.load_file(other).items():
                assert torch.equal(tensor, restored[name])
        told.add(kept)
    assert False in told


def test_a_size_is_met(net, model, tmp_path):
    _, plain = pack(net, model, tmp_path)
    bound = 0.9 * plain.file_bytes
    _, report = pack(net, model, tmp_path, step_factor=None, target=Target("size", bound))
    assert 0.99 * bound <= report.file_bytes <= bound
    _, report = pack(net, model, tmp_path, step_factor=None, target=Target("sqnr", 15.0))
    assert report.calibration == "plain: a target of SQNR is about the weights alone"


def test_an_evaluation_wants_statistics(net, model, tmp_path):
    with pytest.raises(QuantizationError, match="an evaluation takes calibration statistics"):
        pack(net, model, tmp_path, evaluation=Evaluation(lambda state: 1.0))


def test_another_model_is_refused(model, tmp_path):
    torch.manual_seed(5)
    from weightvid.errors import CheckpointError

    with pytest.raises(CheckpointError, match="calibrate again"):
        pack(Net().eval(), model, tmp_path)
    assert not (tmp_path / "model.mp4").exists()


def pairs_of(x, y, groups=1):
    sums = PairSums(Seen("w", y.unflatten(0, (groups, -1)), 1))
    sums.add(Seen("w", x.unflatten(0, (groups, -1)), 1), Seen("w", y.unflatten(0, (groups, -1)), 1))
    return sums.means()


def test_refitted_weights_are_those_of_least_squares():
    torch.manual_seed(0)
    x = torch.randn(500, 12)
    y = x @ torch.randn(12, 12) + 0.1 * torch.randn(500, 12) + 0.3
    weights = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    found = refit.refit(weights, pairs_of(x, y), 1e-9)
    wanted = np.linalg.lstsq(y.numpy(), x.numpy() @ weights.T, rcond=None)[0].T
    assert found == pytest.approx(wanted, abs=1e-3)
    same = refit.refit(weights, pairs_of(x, x), 0.1)
    assert same == pytest.approx(weights, abs=1e-5)
    stiff = refit.refit(weights, pairs_of(x, y), 1e9)
    assert stiff == pytest.approx(weights, abs=1e-4)
    nothing = refit.refit(weights, pairs_of(x, 0 * y), 0.1)
    assert nothing == pytest.approx(weights)


def test_groups_are_refitted_apart_and_shifts_make_up_for_the_mean():
    torch.manual_seed(0)
    x, y = torch.randn(600, 6), torch.rand(600, 6)
    weights = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    both = pairs_of(x, y, 2)
    found = refit.refit(weights, both, 0.05)
    for group, rows in enumerate((slice(0, 4), slice(4, 8))):
        part = slice(300 * group, 300 * group + 300)
        alone = refit.refit(weights[rows], pairs_of(x[part], y[part]), 0.05)
        assert found[rows] == pytest.approx(alone, abs=1e-5)
        shift = refit.shift(weights, found, both)[rows]
        wanted = (x[part].numpy() @ weights[rows].T - y[part].numpy() @ found[rows].T).mean(0)
        assert shift == pytest.approx(wanted, abs=1e-5)


def test_the_weights_of_transposed_layers_turn_and_turn_back():
    array = np.arange(6 * 4 * 3, dtype=np.float32).reshape(6, 4, 3)
    for groups in (1, 2, 3):
        turned = refit.turned(array, groups, 0)
        assert turned.shape == (12 * groups, 6 // groups)
        assert np.array_equal(refit.turned_back(turned, groups, 0, array.shape), array)
    assert np.array_equal(refit.turned_back(refit.turned(array, 1, 1), 1, 1, array.shape), array)


def test_runs_that_do_not_match_are_left_out():
    collector = PairCollector(["w", "v"])
    kept: list[dict[str, list[Seen]]] = [{}, {}]
    for number, rows in enumerate((5, 4)):
        collector.record(Seen("w", torch.ones(1, rows, 3), 1), kept[number])
        collector.record(Seen("v", torch.ones(1, 5, 3), 1), kept[number])
        collector.record(Seen("other", torch.ones(1, 5, 3), 1), kept[number])
    collector.add(kept[0], kept[1], False)
    assert collector.lost == {"w"}
    assert set(collector.fitted) == {"v"}
    assert collector.fitted["v"].means().mean == pytest.approx(np.ones((1, 3)))


def test_layers_of_one_input_share_a_stage(net):
    with ready(net):
        order = look(net, tokens(32, 1).split(16), dict(net.state_dict(keep_vars=True)))
    assert order.tables == {"table.weight"}
    assert list(order.layers) == [
        "conv.weight", "depthwise.weight", "up.weight", "attention.in_proj_weight",
        "attention.out_proj.weight", "head.weight", "scale",
    ]  # fmt: skip
    assert order.first_after({"conv.weight"}) == "depthwise.weight"
    assert order.first_after({"scale"}) is None
    assert len(stages(order, set(order.layers), 1 << 30, 64)) == 7
    assert len(stages(order, set(order.layers), 1 << 30, 3)) == 3

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.q(x) * self.k(x))

    shared = Shared()
    with ready(shared):
        order = look(shared, [torch.rand(4, 8)], dict(shared.state_dict(keep_vars=True)))
    assert stages(order, set(order.layers), 1 << 30, 64) == [
        ("q.weight", "k.weight"), ("out.weight",),
    ]  # fmt: skip


def test_memory_that_is_used_again_is_no_common_input():
    chain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    with ready(chain):
        order = look(chain, [torch.rand(64, 8)], dict(chain.state_dict(keep_vars=True)))
    assert len(stages(order, set(order.layers), 1 << 30, 64)) == 8


def test_a_state_goes_back_and_forth():
    layer = nn.Linear(4, 4)
    layer.other = layer.weight
    before = layer.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), State(layer) as state:
        state.put("other", np.ones((4, 4), np.float32))
        state.put("absent", np.ones((4, 4), np.float32))
        state.quantized()
        assert float(layer.weight.detach().sum()) == 16
        state.original()
        assert torch.equal(layer.weight, before)
        state.quantized()
        raise ZeroDivisionError
    assert torch.equal(layer.weight, before)


def test_statistics_that_fit_only_their_own_samples_are_refused(monkeypatch):
    """Few samples of white noise: feedback through their moment does harm elsewhere."""
    monkeypatch.setattr("weightvid.calibrate.trial._LEAST_GAIN_DB", -100.0)
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    stats = calibrate(layer, list(torch.randn(8, 64).split(1)),
                      config=CalibrationConfig(dampings=(0.001,)))  # fmt: skip
    assert "the model as a whole is no better" in stats.refused
    assert not any(moments.useful for moments in stats.tensors.values())


def test_refused_statistics_say_so_in_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr("weightvid.calibrate.run.whole_gain_db", lambda *_: -1.5)
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    stats = calibrate(layer, list(torch.rand(40, 64).split(8)))
    stats.save(tmp_path / "stats")
    path = tmp_path / "m.mp4"
    options = PackOptions(calibration=tmp_path / "stats")
    weightvid.torch.save_file(layer.state_dict(), path, options=options)
    about = summarize_archive(path).about["calibration"]
    assert about.startswith("not used: on held-back inputs the model as a whole is no better")
    assert "1.5 dB worse" in about
