"""Calling a model on a batch, and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


def call(module: torch.nn.Module, batch: Any) -> Any:
    """Output of a module on a tensor, a tuple of arguments or a dict of keyword arguments."""
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    moved = _to(batch, device)
    if isinstance(moved, Mapping):
        return module(**moved)
    return module(*moved) if isinstance(moved, tuple) else module(moved)


def first_output(result: Any) -> torch.Tensor | None:
    """First floating-point tensor of what a model returns."""
    if isinstance(result, torch.Tensor):
        return result if result.is_floating_point() else None
    items = result.values() if isinstance(result, Mapping) else result
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        return None
    return next((t for t in map(first_output, items) if t is not None), None)


def samples_of(batch: Any) -> int:
    """Samples of a batch: the first axis of its first tensor."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 1
    items: Sequence[Any] = ()
    if isinstance(batch, Mapping):
        items = list(batch.values())
    elif isinstance(batch, tuple):
        items = batch
    return next((samples_of(item) for item in items if isinstance(item, torch.Tensor)), 1)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value
