"""A module that runs, with its own weights or for a while with those of an archive; and what on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from math import inf
from typing import Any, Final

import torch

from weightvid.calibrate.evaluation import divergence, is_unit, one_line
from weightvid.checkpoint.base import ArrayReader
from weightvid.checkpoint.torch_file import from_stored, stored_arrays
from weightvid.errors import EvaluationError, QuantizationError, WeightvidError
from weightvid.loader import Array, TensorSpec

#: text whose tokens surprise a language model by so many nats more than its own would is foreign;
#: the training text of lm_books has 0.01.
_SURPRISE: Final = 0.5
#: of BatchNorm, as it is by default.
_EPSILON: Final = 1e-5
#: a batch, and whether it is held back.
Batches = Sequence[tuple[Any, bool]]
Outputs = Sequence[torch.Tensor | None]


class State:
    """A module, and other weights for it."""

    def __init__(self, module: torch.nn.Module) -> None:
        state = module.state_dict(keep_vars=True)
        self.module = module
        self.tensors = {
            n: t.detach()
            for n, t in state.items()
            if isinstance(t, torch.Tensor) and t.layout == torch.strided
        }
        #: the module's own weights, as it holds them outside of `quantized`; tied ones are aliases.
        #: A table that its forward scales down (``max_norm``) is what it was before.
        parts = module.named_modules()
        scaled = {f"{path}.weight" for path, part in parts if getattr(part, "max_norm", None)}
        given = {n: t.clone() if n in scaled else t for n, t in self.tensors.items()}
        self.reader = ArrayReader(*stored_arrays(given))
        self._quantized: dict[str, torch.Tensor] = {}

    def put(self, spec: TensorSpec, stored: Array) -> None:
        """Give a tensor the elements of an archive, in the quantized model; others are ignored."""
        known = self.reader.contents.aliases.get(spec.name, spec.name)
        tensor = self.tensors.get(known)
        if tensor is not None and tuple(tensor.shape) == stored.shape:
            self._quantized[known] = from_stored(stored.copy(), spec.dtype).to(tensor)

    def forget(self) -> None:
        """Let the quantized model be the original one again."""
        self._quantized.clear()

    @contextmanager
    def quantized(self) -> Iterator[None]:
        """Be the quantized model; in place, so that whatever shares the weights' memory follows."""
        original = {name: self.tensors[name].clone() for name in self._quantized}
        try:
            for name, value in self._quantized.items():
                self.tensors[name].copy_(value)
            yield
        finally:
            for name, value in original.items():
                self.tensors[name].copy_(value)

    def run(self, batch: Any) -> Any:
        """Output on a tensor, a tuple of arguments or a dict of keyword arguments."""
        device = next((t.device for t in self.module.parameters()), torch.device("cpu"))
        moved = _to(batch, device)
        given: tuple[Any, ...] = moved if isinstance(moved, tuple) else (moved,)
        # What is drawn in forward is the same in all runs that are compared.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            try:
                return self.module(**moved) if isinstance(moved, Mapping) else self.module(*given)
            except WeightvidError:
                raise
            except Exception as error:
                said = f"the module fails on example inputs: {one_line(error)}"
                raise EvaluationError(said) from error

    def outputs(self, batches: Sequence[Any]) -> list[torch.Tensor | None]:
        """First output of each batch, as float64 on the CPU."""
        found = (first_output(self.run(batch)) for batch in batches)
        return [None if output is None else output.detach().double().cpu() for output in found]


@contextmanager
def running(module: torch.nn.Module) -> Iterator[State]:
    """A module in eval mode, without gradients and without the fast paths that hide its layers."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        why = _unusable(tensor)
        if why:
            raise QuantizationError(f"tensor {name!r} of the module {why}")
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack, torch.no_grad():
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        for part in module.modules():
            stack.callback(setattr, part, "training", part.training)
            if getattr(part, "max_norm", None):
                stack.callback(part.weight.detach().copy_, part.weight.detach().clone())
        for parameter in module.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for buffer in module.buffers():  # which forward may change
            if buffer.layout == torch.strided and not buffer.is_inference():
                stack.callback(buffer.copy_, buffer.clone())
        module.eval()
        yield State(module)


def _unusable(tensor: Any) -> str:
    """Why the quantized model cannot have another tensor in place of one; empty if it can."""
    if torch.nn.parameter.is_lazy(tensor):
        return "has no shape yet: run the module once before"
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return ""
    if tensor.is_inference():
        return "was made in inference mode: make the module outside of torch.inference_mode()"
    shared = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return "has elements that share memory: make it contiguous" if shared else ""


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):  # which the module may change in place
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    return tuple(_to(item, device) for item in value) if isinstance(value, tuple | list) else value


def batches_of(inputs: Iterable[Any]) -> list[Any]:
    """The batches of example inputs; an error if they are none, or cannot be had."""
    if isinstance(inputs, torch.Tensor | Mapping) or not isinstance(inputs, Iterable):
        what = f"the example inputs are of type {type(inputs).__name__}, not a list of batches"
        raise QuantizationError(f"{what}; of one tensor, give inputs.split(50)")
    # One by one: in `list` an endless iterable could not be interrupted.
    try:
        batches = [batch for batch in inputs]  # noqa: C416
    except Exception as error:
        raise EvaluationError(f"the example inputs fail: {one_line(error)}") from error
    for number, batch in enumerate(batches):
        kind = isinstance(batch, torch.Tensor | Mapping | tuple | list)
        if not kind or first_tensor(batch) is None:
            raise QuantizationError(
                f"batch {number} is of type {type(batch).__name__}; a batch is a tensor, or a "
                "tuple of arguments or a dict of keyword arguments with a tensor among them"
            )
    return batches


def first_output(result: Any) -> torch.Tensor | None:
    """First floating-point tensor of what a model returns."""
    if isinstance(result, torch.Tensor):
        result = torch.view_as_real(result) if result.is_complex() else result
        return result if result.is_floating_point() else None
    if is_dataclass(result) and not isinstance(result, Mapping):
        result = vars(result)
    items = result.values() if isinstance(result, Mapping) else result
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        return None
    return next((t for t in map(first_output, items) if t is not None), None)


def change_of(before: Outputs, after: Outputs, reads: bool = False) -> float:
    """Squared change of outputs, over all samples; of a language model's, their KL divergence."""
    if reads:
        return _divergence(_logits(before, after))
    return sum(float((b - a).square().sum()) for b, a in _pairs(before, after))


def _pairs(before: Outputs, after: Outputs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Those that can be compared: how many objects a detector finds depends on its weights."""
    for b, a in zip(before, after, strict=True):
        if b is not None and a is not None and a.shape == b.shape:
            yield b, a


def _logits(before: Outputs, after: Outputs) -> list[tuple[Any, Any]]:
    """Matrices of what can be compared and is not empty."""
    pairs = [(b, a) for b, a in _pairs(before, after) if b.numel()]
    return [tuple(each.flatten(0, -2).numpy() for each in pair) for pair in pairs]


def _divergence(logits: list[tuple[Any, Any]]) -> float:
    return sum(divergence(b, a) * len(b) for b, a in logits)


def describe_change(before: Outputs, after: Outputs, samples: int, reads: bool = False) -> str:
    """Change of outputs in words: of logits the KL divergence, of all the mean squared change."""
    said = f"mean squared change {change_of(before, after) / max(1, samples):.3g}"
    shapes = {b.ndim for b, _ in _pairs(before, after) if b.numel()}
    known = _logits(before, after) if reads or shapes == {2} else []
    if known and all(b.shape[1] > 1 and not is_unit(b) for b, _ in known):
        said = f"KL divergence {_divergence(known) / sum(len(b) for b, _ in known):.3g}, {said}"
    return said


def first_tensor(batch: Any) -> torch.Tensor | None:
    """First tensor of a batch."""
    items = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, torch.Tensor):
        return batch
    return next((item for item in items if isinstance(item, torch.Tensor)), None)


def samples_of(batch: Any) -> int:
    """Samples of a batch: the first axis of its first tensor."""
    first = first_tensor(batch)
    return 1 if first is None or not first.ndim else len(first)


def held_back(inputs: Iterable[Any], part: float) -> Batches:
    """Batches, each with whether it is held back: evenly spaced; none where all would be.

    Examples
    --------
    >>> held_back("abcd", 0.5), held_back("a", 0.5)
    ([('a', False), ('b', True), ('c', False), ('d', True)], [('a', False)])
    """
    batches = list(inputs)
    span = min(len(batches), max(2, round(1 / part))) if part > 0.0 else 0
    return [(b, span > 1 and place % span == span - 1) for place, b in enumerate(batches)]


def count_samples(batches: Batches) -> int:
    """Samples of all batches."""
    return sum(samples_of(batch) for batch, _ in batches)


def are_read(batches: Sequence[Any], outputs: Sequence[torch.Tensor | None]) -> bool:
    """Whether a language model put out something of texts of the kind that it would write."""
    return all(surprise(*each) < _SURPRISE for each in zip(batches, outputs, strict=True))


def surprise(batch: Any, output: torch.Tensor | None) -> float:
    """By how many nats a batch's tokens are less likely than a model's own; infinity without any.

    The mean negative log likelihood of the next tokens, less the entropy of the outputs.
    """
    tokens = first_tensor(batch)
    if output is None or output.ndim != 3 or tokens is None or tokens.is_floating_point():
        return inf
    known = (tokens >= 0) & (tokens.long() < output.shape[2])
    if tokens.shape != output.shape[:2] or not bool(known.all()):
        return inf
    spread = output[:, :-1].float().log_softmax(-1)
    found = spread.gather(2, tokens[:, 1:, None].to(spread.device).long())[..., 0]
    return float(((spread.exp() * spread).sum(-1) - found).mean()) if found.numel() else inf


def nats_apart(
    mean: torch.Tensor, variance: torch.Tensor, known: torch.Tensor, known_variance: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence of normal distributions from known ones, by channel."""
    ratio = (variance + _EPSILON) / (known_variance + _EPSILON)
    apart = (mean - known).square() / (known_variance + _EPSILON)
    return 0.5 * (ratio + apart - 1.0 - ratio.log())
