"""Archives as dicts of PyTorch tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.prune import custom_from_mask

from weightvid import numpy
from weightvid.archives import Location, open_anywhere
from weightvid.checkpoint.torch_file import from_stored, stored_arrays
from weightvid.errors import CodecError, QuantizationError
from weightvid.loader import Array

if TYPE_CHECKING:
    from weightvid.pack import PackOptions, PackReport

#: layers that are pruned.
_PRUNED = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
#: how torch.nn.utils.prune names the mask of a parameter, and its values.
_MASK, _ORIGINAL = "_mask", "_orig"


def load_file(location: Location, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of an archive, each moved to ``device`` as it arrives.

    ``module.load_state_dict(load_file(path), assign=True)`` fills a module without a second copy.
    On a CUDA device the pictures are decoded by NVDEC where PyNvVideoCodec is installed (the
    extra ``nvdec``); each picture's hash is checked, and software takes over where it differs.

    Returns
    -------
    dict of str to torch.Tensor
        In the order of the source, in the source's dtypes; tied tensors are one tensor.

    Raises
    ------
    FormatError
        The archive is damaged or cut short.
    """
    with open_anywhere(location, _decoder(torch.device(device))) as archive:
        found = {
            spec.name: from_stored(array, spec.dtype).to(device)
            for spec, array in archive.stored_items()
        }
        return {name: found[archive.spec(name).name] for name in archive}


def save_file(
    tensors: Mapping[str, torch.Tensor] | torch.nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    recipe: str | None = None,
    options: PackOptions | None = None,
) -> PackReport:
    """Pack tensors, or a module, as :func:`weightvid.numpy.save_file` does arrays.

    Tensors that show the same memory the same way are stored once and come back tied.

    Raises
    ------
    CheckpointError, QuantizationError, OutputError
    """
    state = tensors.state_dict() if isinstance(tensors, torch.nn.Module) else tensors
    arrays, dtypes = stored_arrays(state)
    return numpy.save_file(arrays, path, metadata, dtypes=dtypes, recipe=recipe, options=options)


def _decoder(device: torch.device) -> Any:
    if device.type != "cuda":
        return "software"
    try:
        return _nvdec(import_module("PyNvVideoCodec"), device.index or 0)
    except ImportError:
        return "software"


def _nvdec(codecs: Any, gpu: int) -> Callable[[bytes], Array]:
    """Decoder of one GPU for HEVC: packet to luma.

    Written from PyNvVideoCodec's guide, and tested with a stand-in for it: there was no GPU.
    """
    decoder = codecs.CreateDecoder(
        gpuid=gpu,
        codec=codecs.cudaVideoCodec.HEVC,
        usedevicememory=True,
        # Every frame is intra: it comes out with its own packet.
        latency=codecs.DisplayDecodeLatencyType.ZERO,
    )

    def decode(packet: bytes) -> Array:
        data = np.frombuffer(packet, np.uint8)
        given = codecs.PacketData()
        given.bsl_data, given.bsl = data.ctypes.data, data.size
        given.decode_flag = codecs.VideoPacketFlag.ENDOFPICTURE
        frames = decoder.Decode(given)
        if not frames:
            raise CodecError("NVDEC gave no frame for a packet")
        # NV12: the luma, and below it half as many rows of chroma.
        picture = torch.from_dlpack(frames[0])
        return np.asarray(picture[: len(picture) * 2 // 3].cpu().numpy())

    return decode


def prune(module: torch.nn.Module, factor: float = 1.0, keep: Collection[str] = ()) -> float:
    """Set the small weights of each linear and convolutional layer to zero, for good.

    A layer's threshold is the mean magnitude of its weights that are not zero, times ``factor``.
    What is zero stays zero in any training that follows; pruning again adds to it. When training
    is over, `pruned_state` gives the weights under their usual names.

    Parameters
    ----------
    module : Module
    factor : float
        >= 0.
    keep : collection of str
        Names of layers that are left alone.

    Returns
    -------
    float
        Share of zeros in the weights of all pruned layers, 0..1.

    Raises
    ------
    QuantizationError
        The factor is negative, the module has no such layer, or one computes its weight.

    Notes
    -----
    H. Lim and H. Kim, pruning by the mean of a layer's magnitudes with retraining, 2018.
    """
    if not factor >= 0:
        raise QuantizationError(f"the factor of pruning must not be negative, as {factor} is")
    zeros = total = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, _PRUNED) or name in keep:
            continue
        if not {"weight", f"weight{_ORIGINAL}"} & {*layer._parameters}:
            raise QuantizationError(
                f"layer {name!r} computes its weight, as with weight_norm: undo that, or keep it"
            )
        size = layer.weight.detach().abs()
        mask = size >= factor * size[size > 0].mean()
        custom_from_mask(layer, "weight", mask & (size > 0))
        zeros += int((layer.weight == 0).sum())
        total += mask.numel()
    if not total:
        raise QuantizationError("the module has no linear or convolutional layer to prune")
    return zeros / total


def pruned_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State of a pruned module as the module had it before: weights with their zeros, no masks."""
    state: dict[str, torch.Tensor] = module.state_dict()
    made: dict[int, torch.Tensor] = {}
    for weight in [n.removesuffix(_MASK) for n in state if n.endswith(_MASK)]:
        if weight + _ORIGINAL in state:  # else a mask of the module's own
            original = state.pop(weight + _ORIGINAL)
            pruned = original * state.pop(weight + _MASK)
            tied = made.setdefault(original.data_ptr(), pruned)
            state[weight] = tied if torch.equal(tied, pruned) else pruned
    return state


class GlobalWeightBank(torch.nn.Module):
    """One bank of kernels for the convolutions of a whole network.

    The layers take their kernels from it one after another, from the start again at its end.

    Parameters
    ----------
    shape : tuple of int
        Of the parameter ``kernels``: two axes of kernels, then the kernel's height and width.

    Notes
    -----
    E. Shin and S.-H. Bae, "Global Weight: Network Level Weight Sharing for Compression of Deep
    Neural Networks", 2020. Where the paper slides over a block of channels, runs of kernels are
    taken here, so that any bank serves any layer.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.kernels = torch.nn.Parameter(torch.empty(shape))
        torch.nn.init.kaiming_normal_(self.kernels)
        self._taken = 0

    def take(self, count: int) -> torch.Tensor:
        """Numbers of the next ``count`` kernels."""
        found = (self._taken + torch.arange(count)) % self.kernels[:, :, 0, 0].numel()
        self._taken += count
        return found


class GlobalWeightConv2d(torch.nn.Module):
    """A convolution whose kernels lie in a bank; its own is a gain for each input channel.

    Parameters
    ----------
    bank : GlobalWeightBank
        Its kernels are a parameter of each layer, tied: archives store them once.
    in_channels, out_channels, stride : int
        The padding keeps the size at stride 1.
    """

    def __init__(
        self, bank: GlobalWeightBank, in_channels: int, out_channels: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.kernels = bank.kernels
        self.gains = torch.nn.Parameter(torch.ones(in_channels))
        chosen = bank.take(out_channels * in_channels).reshape(out_channels, in_channels)
        self.register_buffer("chosen", chosen, persistent=False)
        self.stride, self.padding = stride, bank.kernels.shape[-1] // 2

    @property
    def weight(self) -> torch.Tensor:
        """The layer's kernels, as an ordinary convolution has them."""
        return self.kernels.flatten(0, 1)[self.chosen] * self.gains[:, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve."""
        return torch.nn.functional.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
