"""The weights of a module: now the original ones, now those of an archive."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from weightvid.checkpoint.torch_file import from_stored
from weightvid.torch import TensorReader


class State:
    """Takes a module's weights, and restores them in the end.

    They are copied in place, so that whatever shares their memory goes with them.

    Parameters
    ----------
    module : torch.nn.Module

    Attributes
    ----------
    tensors : dict of str to torch.Tensor
        The module's own, by name.
    reader : TensorReader
        Of the original weights.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.tensors: dict[str, torch.Tensor] = {
            name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()
        }
        self.reader = TensorReader(self.tensors, {})
        self._original: dict[str, torch.Tensor] = {}
        self._quantized: dict[str, torch.Tensor] = {}
        self._now_quantized = False

    def __enter__(self) -> State:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.original()
        self.reader.close()

    def put(self, name: str, stored: npt.NDArray[np.generic]) -> None:
        """Give a tensor the elements of an archive, in the quantized model; others are ignored."""
        contents = self.reader.contents
        known = contents.aliases.get(name, name)
        tensor = self.tensors.get(known)
        if tensor is None or tensor.shape != stored.shape:
            return
        self.original()
        if known not in self._original:
            self._original[known] = tensor.clone()
        value = from_stored(np.array(stored), self.reader.spec(known).dtype)
        self._quantized[known] = value.to(tensor.device)

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
