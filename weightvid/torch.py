"""Archives as dicts of PyTorch tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weightvid import numpy
from weightvid.archives import Location, open_anywhere
from weightvid.checkpoint.torch_file import from_stored, to_stored
from weightvid.errors import CheckpointError, CodecError
from weightvid.loader import Array

if TYPE_CHECKING:
    from weightvid.pack import PackOptions, PackReport


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
    arrays: dict[str, Array] = {}
    dtypes: dict[str, str] = {}
    known: dict[Any, tuple[str, Array]] = {}
    for name, tensor in state.items():
        try:
            stored = to_stored(tensor)
            # Not by what is stored: that of a GPU, or of odd strides, is a copy each time.
            look = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        except (CheckpointError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{name!r} cannot be packed: {error}") from None
        plain = tensor.numel() and not (tensor.is_conj() or tensor.is_neg())
        dtypes[name], arrays[name] = known.setdefault(look, stored) if plain else stored
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
        luma: Array = picture[: len(picture) * 2 // 3].cpu().numpy()
        return luma

    return decode
