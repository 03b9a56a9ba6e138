"""Inputs that networks make themselves, and packing with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from weightvid.calibrate import Calibration
from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.cli.app import app
from weightvid.errors import CheckpointError, EvaluationError
from weightvid.loader import open_archive, to_float32

torch = pytest.importorskip("torch", reason="needs the extra: weightvid[torch]")
from weightvid.calibrate import synthesis  # noqa: E402

nn, fn = torch.nn, torch.nn.functional


class Images(nn.Sequential):
    """A network whose BatchNorm layers know smooth images of their own mean."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24, momentum=None), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3), nn.BatchNorm2d(48, momentum=None), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
        )  # fmt: skip

    @staticmethod
    def inputs(count: int) -> Any:
        smooth = 5 * fn.avg_pool2d(torch.randn(count, 3, 24, 24), 5, 1)
        return torch.randn(count, 3, 1, 1) * smooth + torch.tensor([2.0, 0.0, -1.0])[:, None, None]


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    made = Images()
    with torch.no_grad():
        made(made.inputs(512))
    return made.eval()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "_IMAGES", 64)


def test_images_match_what_the_layers_remember(net: Any, few: None) -> None:
    batches = synthesis.own_inputs(net).batches
    images = torch.cat(batches)
    assert images.shape[:2] == (64, 3)
    for place in (1, 5):
        seen, norm = nn.Sequential(*list(net)[:place])(images).detach(), net[place]
        spread = norm.running_var.sqrt()
        assert float(((seen.mean((0, 2, 3)) - norm.running_mean) / spread).abs().mean()) < 0.25
        assert 0.8 < float((seen.std((0, 2, 3)) / spread).mean()) < 1.2
    again = synthesis.own_inputs(net).batches
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_a_network_alone_is_enough(
    net: Any, few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net.state_dict(), "net.pt")
    Path("nets.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_synthesis import Images\n"
    )
    outputs, losses = [], []
    for more in ([], ["--calibrate", "nets.py:Images"]):
        made = ["pack", "net.pt", "-o", "net.mp4", "--force", "--target", "3.5bpw", *more]
        result = CliRunner().invoke(app, made)
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
        with open_archive("net.mp4") as archive:
            state = {n: torch.from_numpy(a.copy()) for n, a in archive.items()}
        other = Images().eval()
        other.load_state_dict(state, strict=False)
        torch.manual_seed(3)
        inputs = net.inputs(128)
        with torch.no_grad():
            losses.append(float((net(inputs) - other(inputs)).square().mean()))
    assert "calibrated: " in outputs[1]
    assert losses[1] < 0.8 * losses[0]


def test_what_cannot_be_done_is_said(net: Any, tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    with pytest.raises(EvaluationError, match=r"no folder with a config\.json"):
        Calibration.from_checkpoint(from_mapping(arrays))
    lacking = {name: array for name, array in arrays.items() if name != "4.weight"}
    with pytest.raises(CheckpointError, match=r"lacks 4\.weight"):
        Calibration.from_checkpoint(from_mapping(lacking), Images())
    other = arrays | {"9.weight": np.zeros((7, 48), np.float32)}
    with pytest.raises(CheckpointError, match=r"size mismatch for 9\.weight"):
        Calibration.from_checkpoint(from_mapping(other), Images())
    with pytest.raises(EvaluationError, match="calibrate with example inputs"):
        synthesis.own_inputs(nn.Linear(3, 4))
    # The misfit comes first, as without it inputs might be made.
    more = {"weight": np.zeros((4, 3), np.float32), "bias": np.zeros(4, np.float32)} | arrays
    with pytest.raises(EvaluationError, match=r"no place for 0\.weight, .* And inputs can be made"):
        Calibration.from_checkpoint(from_mapping(more), nn.Linear(3, 4))
    odd = nn.Linear(3, 4)
    odd.config = SimpleNamespace(vocab_size=50)
    with pytest.raises(EvaluationError, match="does not run on tokens alone"):
        synthesis.own_inputs(odd)


def folder(path: Path, config: Any, model: Any, vocabulary: int = 50) -> Path:
    transformers = pytest.importorskip("transformers", reason="builds the networks of folders")
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=20,
    ))  # fmt: skip
    made.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("config", "model", "longest"),
    [
        ("LlamaConfig", "LlamaForCausalLM", 20),
        ("BertConfig", "BertModel", 20),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", 20),
    ],
)
def test_transformers_read_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, model: str, longest: int
) -> None:
    monkeypatch.setattr(synthesis, "_TEXTS", 32)
    monkeypatch.setattr(synthesis, "_SEQUENCES", 128)
    with open_checkpoint(folder(tmp_path / "model", config, model)) as reader:
        module = synthesis.build(reader.location)
        synthesis.fill(synthesis.with_names_of(reader, module), reader)
        batches = synthesis.own_inputs(module).batches
        ids = [batch["input_ids"] for batch in batches]
        assert max(each.shape[1] for each in ids) == longest
        assert all(set(each.flatten().tolist()) <= set(range(50)) for each in ids)
        known = Calibration.from_checkpoint(reader)
        known.stats.check(reader)
    seen = {name.rpartition(".")[0] for name in known.stats.tensors}
    layers = {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    assert {name for name in layers if "layer" in name} <= seen
    call = ["pack", str(tmp_path / "model"), "-o", str(tmp_path / "m.mp4"), "--calibrate", "auto"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "calibrat" in result.output


def test_names_in_files_are_not_those_at_work(tmp_path: Path) -> None:
    """Of some models in transformers; either will do."""
    path = folder(tmp_path / "model", "GPTNeoXConfig", "GPTNeoXForCausalLM")
    with open_checkpoint(path) as reader:
        module = synthesis.build(reader.location)
        filed = synthesis.with_names_of(reader, module)
        assert filed.state_dict().keys() == dict(reader.contents.rows()).keys()
        assert not synthesis.fill(filed, reader)
        for name, tensor in filed.state_dict().items():
            wanted = to_float32(reader.read(name), "BF16")
            np.testing.assert_array_equal(tensor.float().numpy(), wanted)
        atwork = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        if atwork.keys() <= dict(reader.contents.rows()).keys():
            pytest.skip("transformers before version 5 has the same names")
        lacking = {n: to_float32(reader.read(n), "BF16") for n in dict(reader.contents.rows())}
        del lacking["gpt_neox.embed_in.weight"]
        with pytest.raises(CheckpointError, match=r"lacks gpt_neox\.embed_in\.weight"):
            synthesis.fill(filed, from_mapping(lacking))
    assert synthesis.with_names_of(from_mapping(atwork), module) is module
    script = tmp_path / "net.py"
    script.write_text(
        "import torch, transformers\n"
        "def examples():\n"
        f"    net = transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})\n"
        "    return net.float(), torch.randint(0, 50, (40, 12)).split(8)\n"
    )
    call = ["pack", str(path), "-o", str(tmp_path / "m.mp4"), "--calibrate", f"{script}:examples"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "calibrated: " in result.output


def test_english_is_read_by_tokenizers_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others, and models of fewer tokens than the tokenizer, get random tokens."""
    monkeypatch.setattr(synthesis, "_SEQUENCES", 64)
    transformers = pytest.importorskip("transformers", reason="has the tokenizers of folders")
    tokenizers = pytest.importorskip("tokenizers", reason="makes a tokenizer")
    prose = synthesis._prose()
    assert len(set(prose)) == 64
    split = tokenizers.pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in prose for word, _ in split.pre_tokenize_str(text)})

    def own(words: list[str], vocabulary: int) -> synthesis.OwnInputs:
        path = folder(
            tmp_path / f"{len(words)}-{vocabulary}", "BertConfig", "BertModel", vocabulary
        )
        numbers = {word: number for number, word in enumerate(["?", *words])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="?"))
        made.pre_tokenizer = split
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
        fast.save_pretrained(path)
        with open_checkpoint(path) as reader:
            module = synthesis.build(reader.location)
            return synthesis.own_inputs(module, reader.location)

    batches, what, trusted = own(words, 1 + len(words))
    assert (what, trusted) == ("64 sentences of English", True)
    with open_checkpoint(tmp_path / f"{len(words)}-{1 + len(words)}") as reader:
        known = Calibration.from_checkpoint(reader)
    assert (known.inputs, known.examples, known.stats.confirmed) == (what, None, True)
    ids = [row for batch in batches for row in batch["input_ids"].tolist()]
    texts = {tuple(word for word, _ in split.pre_tokenize_str(text))[:20] for text in prose}
    assert {tuple(["?", *words][number] for number in row) for row in ids} == texts
    for other in (own(words[::2], 1 + len(words)), own(words, len(words) // 2)):
        assert (other.what, other.trusted) == ("64 sentences of random tokens", False)
