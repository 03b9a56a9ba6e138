"""A module that runs: on a batch, in eval mode, with its own weights or those of an archive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from weightvid.checkpoint import CheckpointReader, from_mapping
from weightvid.checkpoint.torch_file import from_stored, to_stored
from weightvid.loader import Array

Outputs = Sequence[torch.Tensor | None]


def call(module: torch.nn.Module, batch: Any) -> Any:
    """Output of a module on a tensor, a tuple of arguments or a dict of keyword arguments."""
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    moved = _to(batch, device)
    if isinstance(moved, Mapping):
        return module(**moved)
    return module(*moved) if isinstance(moved, tuple) else module(moved)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    return tuple(_to(item, device) for item in value) if isinstance(value, tuple) else value


def first_output(result: Any) -> torch.Tensor | None:
    """First floating-point tensor of what a model returns."""
    if isinstance(result, torch.Tensor):
        return result if result.is_floating_point() else None
    items = result.values() if isinstance(result, Mapping) else result
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        return None
    return next((t for t in map(first_output, items) if t is not None), None)


def outputs(module: torch.nn.Module, batches: Sequence[Any]) -> list[torch.Tensor | None]:
    """First output of each batch, as float64 on the CPU."""
    found = (first_output(call(module, batch)) for batch in batches)
    return [None if output is None else output.detach().double().cpu() for output in found]


def change_of(before: Outputs, after: Outputs) -> float:
    """Squared change of outputs, over all samples."""
    pairs = zip(before, after, strict=True)
    return sum(float((b - a).square().sum()) for b, a in pairs if b is not None and a is not None)


def samples_of(batch: Any) -> int:
    """Samples of a batch: the first axis of its first tensor."""
    items = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 1
    return next((samples_of(item) for item in items if isinstance(item, torch.Tensor)), 1)


@contextmanager
def ready(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and none of the fast paths that hide the layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for part in module.modules():
            stack.callback(setattr, part, "training", part.training)
        for parameter in module.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        module.eval()
        with torch.no_grad():
            yield


class State:
    """Takes a module's weights, and restores them in the end; used as a context manager.

    They are copied in place, so that whatever shares their memory goes with them.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        state = module.state_dict(keep_vars=True)
        self.module = module
        self.tensors = {n: t.detach() for n, t in state.items() if isinstance(t, torch.Tensor)}
        self._reader = _reader(self.tensors)
        self._original: dict[str, torch.Tensor] = {}
        self._quantized: dict[str, torch.Tensor] = {}
        self._now_quantized = False

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.original()

    @property
    def reader(self) -> CheckpointReader:
        """The original weights; the module gets them back, as memory may be shared."""
        self.original()
        return self._reader

    def put(self, name: str, stored: Array) -> None:
        """Give a tensor the elements of an archive, in the quantized model; others are ignored."""
        known = self._reader.contents.aliases.get(name, name)
        tensor = self.tensors.get(known)
        if tensor is None or tuple(tensor.shape) != stored.shape:
            return
        self.original()
        self._original.setdefault(known, tensor.clone())
        value = from_stored(stored.copy(), self._reader.spec(known).dtype)
        self._quantized[known] = value.to(tensor.device)

    def forget(self) -> None:
        """Let the quantized model be the original one again."""
        self.original()
        self._quantized.clear()
        self._original.clear()

    def original(self) -> None:
        """Run as the original model from now on."""
        if self._now_quantized:
            self._now_quantized = False
            for name, value in self._original.items():
                self.tensors[name].copy_(value)

    def quantized(self) -> None:
        """Run as the quantized model from now on."""
        if not self._now_quantized:
            self._now_quantized = True
            for name, value in self._quantized.items():
                self.tensors[name].copy_(value)


def _reader(tensors: Mapping[str, torch.Tensor]) -> CheckpointReader:
    """The tensors of a module as a checkpoint; tied ones are aliases."""
    stored: dict[Any, tuple[str, Array]] = {}
    keys = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        keys[name] = place if tensor.numel() else object()
        if keys[name] not in stored:
            stored[keys[name]] = to_stored(tensor)
    dtypes = {name: stored[key][0] for name, key in keys.items()}
    return from_mapping({name: stored[key][1] for name, key in keys.items()}, dtypes=dtypes)
