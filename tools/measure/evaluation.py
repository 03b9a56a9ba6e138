"""A checkpoint with its evaluation script: how far a restored state dict is from the original.

The script (``eval.py``) offers ``logits(state_dict[, n]) -> (logits, labels)`` or
``embeddings(state_dict[, n]) -> unit vectors`` with ``score(embeddings[, n])`` and ``pairs(n)``.
All that is reported beside the metric is paired with the original, sample by sample.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

State = dict[str, Any]
Floats = npt.NDArray[np.float64]

#: resamplings behind the standard error of a rank correlation.
BOOTSTRAPS: Final = 200


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a restored model behaves beside the original.

    Attributes
    ----------
    metric : float
        Of the restored model: top-1 in percent, or 100 x Spearman's rank correlation.
    change, change_se : float
        Metric after minus before, and its standard error over the paired samples.
    loss, loss_se : float
        Mean KL divergence of the logits in nats, or one minus the mean cosine of the embeddings;
        and its standard error.
    agreement : float or None
        Share (0..1) of samples of which the predicted class is the original's.
    """

    metric: float
    change: float
    change_se: float
    loss: float
    loss_se: float
    agreement: float | None


class Model:
    """A checkpoint, its evaluation and the original's outputs.

    Attributes
    ----------
    name : str
    checkpoint : Path
        A safetensors file.
    state : dict of str to Tensor
        The original.
    samples : int or None
        Samples (pairs of sentences) evaluated; None: all.
    sha256 : str
        Of the checkpoint's and the script's bytes.
    """

    def __init__(self, name: str, checkpoint: Path, script: Path, samples: int | None) -> None:
        from safetensors.torch import load_file

        self.name = name
        self.checkpoint = checkpoint
        self.samples = samples
        self.state: State = load_file(checkpoint)
        digest = hashlib.sha256(checkpoint.read_bytes() + script.read_bytes())
        self.sha256 = digest.hexdigest()
        self._script = _import(script)
        self.embeds = hasattr(self._script, "embeddings")
        self._before, self._labels = self._outputs(self.state)
        self.metric = self._metric(self._before)

    @property
    def floats(self) -> int:
        """Floating-point elements: what bits per weight are counted over."""
        return sum(t.numel() for t in self.state.values() if t.is_floating_point())

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(t.numel() * t.element_size() for t in self.state.values())

    @property
    def metric_name(self) -> str:
        return "Spearman x 100" if self.embeds else "top-1 %"

    @property
    def loss_name(self) -> str:
        return "1 - cosine" if self.embeds else "KL"

    @property
    def targets(self) -> tuple[float, ...]:
        """Losses at which codecs are compared: KL 0.02; cosine 0.98 and 0.99."""
        return (0.02, 0.01) if self.embeds else (0.02,)

    def matrices(self) -> dict[str, npt.NDArray[np.float32]]:
        """Float tensors of two or more dimensions, as float32: what the SQNR is taken over."""
        return matrices(self.state)

    def sqnr_db(self, restored: State) -> float:
        """10 log10(sum x^2 / sum (x - x')^2) over all float tensors of two or more dimensions."""
        return sqnr_db(self.state, restored)

    def judge(self, restored: State) -> Fidelity:
        """Evaluate a restored model beside the original."""
        after = self._outputs(restored)[0]
        metric = self._metric(after)
        if self.embeds:
            losses = 1 - (self._before * after).sum(1)
            agreement, change_se = None, self._spearman_se(after)
        else:
            p, q = _log_softmax(self._before), _log_softmax(after)
            losses = (np.exp(p) * (p - q)).sum(1)
            agreement = float((self._before.argmax(1) == after.argmax(1)).mean())
            change_se = 100 * _standard_error(self._correct(after) - self._correct(self._before))
        return Fidelity(
            metric=metric,
            change=metric - self.metric,
            change_se=change_se,
            loss=float(losses.mean()),
            loss_se=_standard_error(losses),
            agreement=agreement,
        )

    def _outputs(self, state: State) -> tuple[Floats, Any]:
        count = () if self.samples is None else (self.samples,)
        if self.embeds:
            return self._script.embeddings(state, *count).double().numpy(), None
        logits, labels = self._script.logits(state, *count)
        return logits.double().numpy(), labels.numpy()

    def _correct(self, logits: Floats) -> Floats:
        return np.asarray(logits.argmax(1) == self._labels, np.float64)

    def _metric(self, outputs: Floats) -> float:
        if not self.embeds:
            return 100 * float(self._correct(outputs).mean())
        truth, similarity = self._similarities(outputs)
        return 100 * float(self._script.spearman(truth, similarity))

    def _similarities(self, outputs: Floats) -> tuple[Floats, Floats]:
        half = len(outputs) // 2
        similarity: Floats = (outputs[:half] * outputs[half:]).sum(1)
        return self._script.pairs(self.samples)[0], similarity

    def _spearman_se(self, after: Floats) -> float:
        """Bootstrap over sentence pairs of the difference of two rank correlations, x 100."""
        truth, new = self._similarities(after)
        old = self._similarities(self._before)[1]
        draw = np.random.default_rng(0)
        changes = []
        for _ in range(BOOTSTRAPS):
            i = draw.integers(0, len(truth), len(truth))
            changes.append(
                self._script.spearman(truth[i], new[i]) - self._script.spearman(truth[i], old[i])
            )
        return 100 * float(np.std(changes, ddof=1))


def matrices(state: State) -> dict[str, npt.NDArray[np.float32]]:
    """Float tensors of two or more dimensions, as float32."""
    return {
        name: tensor.float().numpy()
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.dim() >= 2
    }


def sqnr_db(state: State, restored: State) -> float:
    """10 log10(sum x^2 / sum (x - x')^2) over all float tensors of two or more dimensions."""
    signal = noise = 0.0
    for name, x in matrices(state).items():
        error = x - restored[name].float().numpy().reshape(x.shape)
        signal += float(np.square(x, dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
    return 10 * math.log10(signal / noise) if noise else math.inf


def _import(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location("evaluation", script)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{script} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (hasattr(module, "logits") or hasattr(module, "embeddings")):
        raise SystemExit(f"{script} offers neither logits() nor embeddings()")
    return module


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), np.float64)


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))
