"""Example inputs for a network that nobody has data of: most make their own.

- BatchNorm layers remember the means and variances of what they saw in training. Images begin as
  noise with the spectrum of photographs, and descend until the layers see what they remember.
- A causal language model writes text, one token after another from its own distribution.
- Any other transformer reads English that comes with Python, if its tokenizer is at home in that;
  else random tokens, in sentences of usual lengths.

Sources: Cai et al., "ZeroQ", 2020, and Jeon et al., "Genie", 2023, for the images; Liu et al.,
"LLM-QAT", 2023, for the text.
"""

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from weightvid.calibrate.evaluation import one_line
from weightvid.calibrate.state import State, nats_apart, running
from weightvid.calibrate.watch import Watch
from weightvid.checkpoint import CheckpointReader
from weightvid.checkpoint.base import shorten
from weightvid.checkpoint.torch_file import from_stored
from weightvid.errors import CheckpointError, EvaluationError
from weightvid.progress import Progress, Report, quiet

_BATCH: Final = 16
#: images; those of a descent, which match the statistics together; its steps.
_IMAGES: Final = 384
_TOGETHER: Final = 32
_STEPS: Final = 25
_RATE: Final = 0.25
#: sizes of images that are tried, and what the last feature map should come near to.
_SIZES: Final = (*range(8, 64, 4), *range(64, 257, 32), 299, 384)
_LAST_MAP: Final = 8
#: sequences, and their lengths in turn; written text has the longest.
_SEQUENCES: Final = 384
_LENGTHS: Final = (8, 12, 16, 24, 32, 48, 64, 128)
_TEXTS: Final = 96
_TEXT_TOKENS: Final = 256
#: of sentences of English, words; tokens for each word, at most, and words for each unknown one.
_SENTENCE_WORDS: Final = range(4, 41)
_TOKENS_A_WORD: Final = 2
_WORDS_AN_UNKNOWN: Final = 100
_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def build(folder: str | None) -> nn.Module:
    """The network that a Hugging Face folder describes, without its weights.

    An EvaluationError says that there is no such folder, or transformers cannot build the network.
    """
    if folder is None or not (Path(folder) / "config.json").is_file():
        raise EvaluationError(
            f"{folder or 'the checkpoint'} is no folder with a config.json that says how the "
            "network is built: give the folder, or MODULE:FUNCTION, which returns the network"
        )
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        kind = (config.architectures or ["AutoModel"])[0]
        if kind == "AutoModel":
            return transformers.AutoModel.from_config(config).eval()
        return getattr(transformers, kind)(config).eval()
    except Exception as error:
        raise EvaluationError(f"transformers cannot build {folder}: {one_line(error)}") from error


def with_names_of(reader: CheckpointReader, module: nn.Module) -> nn.Module:
    """A module whose state dict has the names of a checkpoint.

    Some models of transformers have other names at work than in their files.
    """
    held, own = dict(reader.contents.rows()), module.state_dict()
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    if own.keys() <= held.keys() or not isinstance(module, kind):
        return module
    try:
        from transformers.core_model_loading import revert_weight_conversion as as_filed
    except ImportError:  # before version 5
        return module
    names = {}
    for name, tensor in own.items():
        found: dict[str, Any] = {}
        with suppress(Exception):  # what files hold in pieces keeps its name
            found = as_filed(module, {name: tensor})
        if len(found) == 1 and tensor is next(iter(found.values())):
            names[name] = next(iter(found))
    better = sum(name in held for name in names.values()) > sum(name in held for name in names)
    return _Filed(module, names) if better else module


class _Filed(nn.Module):  # type: ignore[misc]
    """A module whose state dict has names other than its own."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self.module, self._names = module, names

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.module(*args, **more)

    def state_dict(self, *args: Any, **more: Any) -> dict[str, Any]:
        state = self.module.state_dict(*args, **more)
        return {self._names.get(name, name): tensor for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Any], *args: Any, **more: Any) -> Any:
        own = {filed: name for name, filed in self._names.items()}
        state = {own.get(name, name): tensor for name, tensor in state.items()}
        found = self.module.load_state_dict(state, *args, **more)
        found.missing_keys[:] = [self._names.get(name, name) for name in found.missing_keys]
        return found


def fill(module: nn.Module, reader: CheckpointReader) -> list[str]:
    """Give a module the weights of a checkpoint, by name; those that it has no place for.

    A CheckpointError says that the checkpoint lacks weights, or has them in another shape, or under
    other names.
    """
    wanted, aliases = module.state_dict(), State(module).reader.contents.aliases
    specs = dict(reader.contents.rows())
    state = {n: from_stored(reader.read(n), spec.dtype) for n, spec in specs.items() if n in wanted}
    try:
        missing = module.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise CheckpointError(f"the network is not that of this checkpoint: {error}") from None
    given = {aliases.get(name, name) for name in state}
    lost = [name for name in missing if aliases.get(name, name) not in given]
    lost = [name for name in lost if not name.endswith("num_batches_tracked")]
    if lost:
        raise CheckpointError(
            "the network is not that of this checkpoint, or its weights have other names there: "
            f"it lacks {shorten(lost)}"
        )
    return [name for name in specs if name not in wanted]


class OwnInputs(NamedTuple):
    """Batches; what they are; whether they are known to be of the kind that the module reads."""

    batches: list[Any]
    what: str
    trusted: bool = False


def own_inputs(module: nn.Module, folder: str | None = None, progress: Report = quiet) -> OwnInputs:
    """Inputs for a module that nobody gives any; the same for the same weights.

    ``folder`` may hold the tokenizer of a transformer. An EvaluationError says that the module
    has neither BatchNorm nor a vocabulary, or takes no usual size of image.
    """
    vocabulary = getattr(getattr(module, "config", None), "vocab_size", None)
    with running(module) as state, torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(vocabulary, int):
            longest = getattr(module.config, "max_position_embeddings", None) or _TEXT_TOKENS
            both = getattr(module.config, "is_encoder_decoder", False)
            if both or not getattr(module, "can_generate", bool)():
                return _texts(state, vocabulary, longest, both, folder)
            texts = _written(module, vocabulary, min(_TEXT_TOKENS, longest), progress)
            return OwnInputs(texts, f"{_TEXTS} texts that it wrote")
        return OwnInputs(_images(state, progress), f"{_IMAGES} images that it made")


def _texts(state: State, size: int, longest: int, both: bool, folder: str | None) -> OwnInputs:
    """English, or random tokens of a vocabulary of a size; a decoder reads the same."""
    sentences = _sentences(size, longest, folder)
    by_length: dict[int, list[list[int]]] = {}
    for ids in sorted(sentences, key=len):
        by_length.setdefault(len(ids), []).append(ids)
    tokens = [part for ids in by_length.values() for part in torch.tensor(ids).split(_BATCH)]
    shares = 1 / (torch.arange(size) + size / 100)
    for place in range(0 if tokens else _SEQUENCES // _BATCH):
        length = min(_LENGTHS[place % len(_LENGTHS)], longest)
        # As frequent as they are in text, as vocabularies are mostly in that order.
        tokens.append(torch.multinomial(shares, _BATCH * length, True).reshape(_BATCH, length))
    batches = [{"input_ids": t} | ({"decoder_input_ids": t} if both else {}) for t in tokens]
    try:
        state.run(batches[0])
    except Exception as error:
        raise EvaluationError(
            f"the network does not run on tokens alone ({one_line(error)}): calibrate with "
            "example inputs"
        ) from error
    what = "English" if sentences else "random tokens"
    return OwnInputs(batches, f"{sum(map(len, tokens))} sentences of {what}", what == "English")


def _sentences(vocabulary: int, longest: int, folder: str | None) -> list[list[int]]:
    """English as the tokenizer of a folder splits it; nothing, if it is not made for English."""
    prose = _prose()
    words = sum(len(sentence.split()) for sentence in prose)
    try:
        import transformers

        here = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here)
        found = [ids[:longest] for ids in tokenizer(prose)["input_ids"]]
        unknown = sum(ids.count(tokenizer.unk_token_id) for ids in found)
        fits = sum(map(len, found)) <= _TOKENS_A_WORD * words and max(map(max, found)) < vocabulary
    except Exception:  # there is no tokenizer, or it needs more than there is
        return []
    return found if fits and unknown * _WORDS_AN_UNKNOWN <= words else []


def _prose() -> list[str]:
    """Sentences of the documentation that `help` shows."""
    with suppress(ImportError):
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        parts = [part for key in sorted(topics) for part in re.split(r"\n\s*\n", topics[key])]
        every = [s for part in parts for s in re.split(r"(?<=[.!?]) ", " ".join(part.split()))]
        plain = [s for s in dict.fromkeys(every) if re.fullmatch(r"[A-Z][^|]*[.!?]", s)]
        plain = [s for s in plain if sum(c.isalpha() or c == " " for c in s) > 0.9 * len(s)]
        plain = [s for s in plain if len(s.split()) in _SENTENCE_WORDS]
        return plain[:: max(1, len(plain) // _SEQUENCES)][:_SEQUENCES]
    return []


def _written(module: Any, vocabulary: int, length: int, progress: Report) -> list[Any]:
    """Text that a language model writes."""
    batches: list[Any] = []
    for place in range(_TEXTS // _BATCH):
        start = torch.randint(vocabulary, (_BATCH, 1)).to(module.device)
        text = module.generate(
            start, attention_mask=torch.ones_like(start), pad_token_id=0, do_sample=True,
            top_k=0, top_p=1.0, temperature=1.0, min_length=length, max_length=length,
        )  # fmt: skip
        batches += [{"input_ids": part} for part in text.split(_BATCH // 2)]
        progress(Progress("inputs", place + 1, _TEXTS // _BATCH, unit="batches"))
    return batches


def _images(state: State, progress: Report) -> list[Any]:
    """Images whose statistics match those that BatchNorm layers remember."""
    shape = _shape(state)
    apart: list[torch.Tensor] = []

    def look(inputs: torch.Tensor, *known: torch.Tensor) -> None:
        variance, mean = torch.var_mean(inputs.transpose(0, 1).flatten(1), 1, correction=0)
        apart.append(nats_apart(mean, variance, *known).mean())

    found: list[torch.Tensor] = []
    for _ in range(_IMAGES // _TOGETHER):
        images = _pink((_TOGETHER, *shape)).requires_grad_()
        descent = torch.optim.Adam([images], lr=_RATE)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(descent, _STEPS)
        with torch.enable_grad(), Watch({}, lambda _: None, norms=look):
            for _ in range(_STEPS):
                apart.clear()
                state.run(images)
                if not apart:
                    raise EvaluationError(
                        "inputs can be made for networks that remember their own, with BatchNorm, "
                        "and for transformers that read tokens; this is neither: calibrate with "
                        "example inputs"
                    )
                (images.grad,) = torch.autograd.grad(torch.stack(apart).sum(), [images])
                descent.step()
                slower.step()
        found += images.detach().split(_BATCH)
        progress(Progress("inputs", len(found) * _BATCH, _IMAGES, unit="images"))
    return found


def _shape(state: State) -> tuple[int, ...]:
    """Shape of an image that a network takes, as usual ones do.

    The first convolution tells channels and axes. Of the sizes that work, that is taken whose last
    feature map comes nearest to 8 x 8, as with CIFAR and ImageNet networks alike.
    """
    layers = [m for m in state.module.modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear))]
    if not layers or isinstance(layers[0], nn.Linear):
        return (layers[0].in_features if layers else 1,)
    first, last = layers[0], [layer for layer in layers if isinstance(layer, _CONVOLUTIONS)][-1]
    maps: list[int] = []
    hook = last.register_forward_hook(lambda *call: maps.append(call[2].shape[-1]))
    fitting = {}
    for size in _SIZES:
        shape = first.in_channels, *(size for _ in first.kernel_size)
        with suppress(Exception):
            maps.clear()
            state.run(torch.zeros(1, *shape))
            fitting[shape] = abs(maps[-1] - _LAST_MAP)
    hook.remove()
    if not fitting:
        raise EvaluationError("no usual size of image works with this network; give inputs")
    return min(fitting, key=lambda shape: fitting[shape])


def _pink(shape: tuple[int, ...]) -> torch.Tensor:
    """Noise whose amplitude falls as 1 / frequency, of variance 1."""
    sizes = shape[2:]
    if not sizes:
        return torch.randn(shape)
    axes = [torch.fft.fftfreq(size) for size in sizes]
    frequency = sum(a.square() for a in torch.meshgrid(*axes, indexing="ij")).sqrt()
    scale = 1 / frequency.clamp(min=1 / max(sizes))
    noise = torch.fft.ifftn(torch.fft.fftn(torch.randn(shape), s=sizes) * scale, s=sizes).real
    return noise / noise.std()
