"""Pruning and global weight sharing: what training does with them, and what archives make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.errors import QuantizationError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="needs the extra: weightvid[torch]")


def step(torch: Any, net: Any, optimizer: Any, inputs: Any) -> None:
    net(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_masks_survive_training(torch: Any) -> None:
    from weightvid.torch import prune, pruned_state

    torch.manual_seed(0)
    nn = torch.nn
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 20), nn.Linear(20, 5))
    weight = net[2].weight.detach().clone()
    share = prune(net, 0.8, keep=("3",))
    small = weight.abs() < 0.8 * weight.abs().mean()
    assert torch.equal(net[2].weight == 0, small)
    assert 0.3 < share < 0.5
    # Momentum and weight decay would move what a mask on the gradient alone protects.
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=0.1)
    net.register_buffer("attn_mask", torch.ones(3))  # no mask of pruning
    for _ in range(3):
        step(torch, net, optimizer, torch.randn(4, 2, 6, 6))
    assert prune(net, 0.0, keep=("3",)) == share
    assert prune(net, 1.0, keep=("3",)) > share + 0.1
    step(torch, net, optimizer, torch.randn(4, 2, 6, 6))
    state = pruned_state(net)
    assert torch.equal(state.pop("attn_mask"), torch.ones(3))
    plain = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 20), nn.Linear(20, 5))
    plain.load_state_dict(state)
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(plain(x), net(x))
    assert (plain[2].weight[small] == 0).all()
    assert not torch.equal(plain[2].weight[~small], weight[~small])
    assert (plain[3].weight != 0).all()


def test_pruning_refuses(torch: Any) -> None:
    from weightvid.torch import prune

    with pytest.raises(QuantizationError, match="negative"):
        prune(torch.nn.Linear(2, 2), -1)
    with pytest.raises(QuantizationError, match="no linear"):
        prune(torch.nn.ReLU(), 1)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    with pytest.raises(QuantizationError, match="layer 'inner' computes its weight"):
        prune(torch.nn.ModuleDict({"inner": normed}))


def test_tied_weights_stay_tied(torch: Any) -> None:
    from weightvid.torch import prune, pruned_state

    net = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))
    net[2].weight = net[0].weight
    prune(net)
    state = pruned_state(net)
    assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()
    assert state["1.weight"].data_ptr() != state["0.weight"].data_ptr()
    assert torch.equal(state["2.weight"], net[2].weight)


def test_zeros_of_a_pruned_model_stay_zeros(torch: Any, tmp_path: Path) -> None:
    from weightvid.torch import load_file, prune, pruned_state, save_file

    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Linear(100, 200))
    dense = save_file(net, tmp_path / "dense.mp4")
    prune(net, 1.6)
    sparse = save_file(pruned_state(net), tmp_path / "sparse.mp4")
    assert sparse.file_bytes < 0.7 * dense.file_bytes
    assert sparse.sqnr_db is not None and sparse.sqnr_db > 20
    found = load_file(tmp_path / "sparse.mp4")
    for name, weight in pruned_state(net).items():
        assert (found[name][weight == 0] == 0).all()


def test_a_bank_is_stored_once(torch: Any, tmp_path: Path) -> None:
    from weightvid.torch import GlobalWeightBank, GlobalWeightConv2d, load_file, save_file

    def make() -> Any:
        torch.manual_seed(2)
        bank = GlobalWeightBank((12, 10, 3, 3))
        layers = [
            GlobalWeightConv2d(bank, i, o, s) for i, o, s in ((3, 8, 1), (8, 16, 2), (16, 4, 1))
        ]
        return torch.nn.Sequential(*layers)

    net = make()
    assert sum(p.numel() for p in net.parameters()) == 12 * 10 * 9 + 3 + 8 + 16
    kernels = net[0].kernels.detach().flatten(0, 1)
    assert torch.equal(net[1].weight[0, 1], kernels[25])
    # 24 + 128 kernels were taken before: the bank of 120 starts over.
    assert torch.equal(net[2].weight[0, 0], kernels[152 - 120])
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    before = net[0].kernels.detach().clone()
    x = torch.randn(2, 3, 8, 8)
    step(torch, net, optimizer, x)
    assert (net[0].kernels != before).all()
    again = make()
    step(torch, again, torch.optim.SGD(again.parameters(), 0.01), x)
    assert torch.equal(again[0].kernels, net[0].kernels)
    assert net(x).shape == (2, 4, 4, 4)
    made = save_file(net, tmp_path / "net.mp4", recipe="fine")
    assert made.weights == 12 * 10 * 9 + 3 + 8 + 16
    restored = make()
    restored.load_state_dict(load_file(tmp_path / "net.mp4"))
    assert torch.allclose(restored(x), net(x), atol=0.3)
    assert torch.equal(restored[0].kernels, restored[2].kernels)


def test_pack_prunes(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    arrays = {
        "conv.weight": chance.normal(0, 0.1, (32, 16, 3, 3)).astype(np.float32),
        "fc.weight": chance.laplace(0, 0.1, (100, 200)).astype(np.float32),
    }
    np.savez(tmp_path / "model.npz", **arrays)
    pack_checkpoint(tmp_path / "model.npz", tmp_path / "m.mp4", PackOptions(prune=1.5))
    with open_archive(tmp_path / "m.mp4") as archive:
        for name, weight in arrays.items():
            small = np.abs(weight) < 1.5 * np.abs(weight).mean()
            assert (archive[name][small] == 0).all()
            assert np.abs(archive[name] - weight)[~small].max() < 0.05
    with pytest.raises(QuantizationError, match="positive"):
        PackOptions(prune=-1.0).check()
