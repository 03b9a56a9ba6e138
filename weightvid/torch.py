"""Archives for PyTorch: dicts of tensors, and modules that are filled tensor by tensor."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from weightvid.checkpoint import CheckpointReader, Contents
from weightvid.checkpoint.torch_file import from_stored, to_stored
from weightvid.dtypes import SUB_BYTE, stored_dtype
from weightvid.errors import CheckpointError
from weightvid.loader import Archive, open_archive
from weightvid.spec import TensorSpec

if TYPE_CHECKING:
    from weightvid.pack import PackOptions, PackReport

Array = npt.NDArray[np.generic]


def load_file(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, threads: int = 0
) -> dict[str, torch.Tensor]:
    """All tensors of an archive, each moved to ``device`` as it arrives.

    Parameters
    ----------
    path : path
    device : str or torch.device
    threads : int
        Frames decoded at the same time; 0: one per core.

    Returns
    -------
    dict of str to torch.Tensor
        In the order of the source, in the source's dtypes; tied tensors are one tensor.

    Raises
    ------
    FormatError
        The archive is damaged or cut short.
    """
    with open_archive(path, threads=threads, check_tensors=True) as archive:
        found = {
            spec.name: from_stored(array, spec.dtype).to(device)
            for spec, array in archive.iter_stored()
        }
        aliases = archive.header.aliases
        return {name: found[aliases.get(name, name)] for name in archive.names}


def save_file(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    recipe: str | None = None,
    options: PackOptions | None = None,
) -> PackReport:
    """Pack tensors into an archive; an existing file is replaced, as safetensors does.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        On any device; brought to the CPU one at a time. Tensors that show the same memory the
        same way are stored once and come back tied.
    path : path
        Appears whole, or not at all.
    metadata : mapping of str to str, optional
        Free text pairs.
    recipe : str, optional
        ``balanced`` (default), ``small`` or ``fine``.
    options : PackOptions, optional
        All other settings; its ``force`` counts, then.

    Raises
    ------
    CheckpointError, QuantizationError, OutputError
    """
    from weightvid.pack import PackOptions, pack_checkpoint

    chosen = options or PackOptions(force=True)
    if recipe is not None:
        chosen = replace(chosen, recipe=recipe)
    with TensorReader(tensors, metadata or {}) as reader:
        return pack_checkpoint(reader, path, chosen)


class TensorReader(CheckpointReader):
    """A mapping of tensors as a checkpoint; each is brought to the CPU when it is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        specs: list[TensorSpec] = []
        aliases: dict[str, str] = {}
        first_of: dict[Any, str] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{name!r} is no tensor but {type(tensor).__name__}")
            look = _look(name, tensor)
            if tensor.numel() and look in first_of:
                aliases[name] = first_of[look]
                continue
            first_of[look] = name
            self._tensors[name] = tensor
            specs.append(_spec(name, tensor))
        super().__init__(Contents(tuple(specs), aliases, dict(metadata)))

    def _read(self, spec: TensorSpec) -> Array:
        array = to_stored(self._tensors[spec.name])[1].view()
        array.flags.writeable = False
        return array

    def close(self) -> None:
        """Let go of the module's tensors."""
        super().close()
        self._tensors = {}


def _look(name: str, tensor: torch.Tensor) -> Any:
    """Equal for two tensors that show the same memory the same way."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{name!r} is a tensor without plain elements and cannot be packed")
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(),
            tensor.is_conj(), tensor.is_neg())  # fmt: skip


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    return to_stored(torch.empty((0, 2), dtype=dtype))[0]


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    try:
        dtype = _dtype_name(tensor.dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name!r}: {error}") from None
    shape = tuple(tensor.shape)
    if dtype in SUB_BYTE and shape:
        shape = (*shape[:-1], shape[-1] * 8 // SUB_BYTE[dtype])
    return TensorSpec(name, dtype, shape)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What :func:`load_into` did not fill.

    Attributes
    ----------
    missing_keys : tuple of str
        Names of the module's state dict that the archive lacks (``strict=False`` only).
    unexpected_keys : tuple of str
        Names of the archive that the module lacks (``strict=False`` only).
    meta_keys : tuple of str
        Parameters and buffers that are still on the meta device: missing ones, and buffers that
        are no part of a state dict (``persistent=False``), which the module must make itself.
    """

    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    meta_keys: tuple[str, ...]


@dataclass(slots=True)
class _Slot:
    """One parameter or buffer of a module, under all its names.

    Attributes
    ----------
    tensor : torch.Tensor
    names : list of str
        In the state dict.
    owners : list of (dict, str)
        Registries of submodules that hold it, with the key there.
    """

    tensor: torch.Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[dict[str, Any], str]] = field(default_factory=list)


def load_into(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    device: str | torch.device = "cpu",
    threads: int = 0,
) -> LoadReport:
    """Fill a module from an archive, tensor by tensor in file order.

    At no time is more in memory than the module, the tensor that is being filled, and a few
    frames. Names and shapes are checked before the first weight is read. Parameters and buffers
    that have memory keep it, their dtype, device, ``requires_grad`` and ties; those on the meta
    device get memory on ``device`` with the archive's dtype, and stay tied. Hooks of
    ``load_state_dict`` are not run.

    Parameters
    ----------
    module : torch.nn.Module
    path : path
    strict : bool
        Refuse missing and unexpected names. A tied tensor needs one of its names.
    device : str or torch.device
        Where parameters from the meta device go.
    threads : int
        Frames decoded at the same time; 0: one per core.

    Returns
    -------
    LoadReport

    Raises
    ------
    CheckpointError
        Names (with ``strict``) or shapes don't fit; nothing has been changed.
    FormatError
        The archive is damaged or cut short; tensors before the defect have been filled.
    """
    slots = _slots(module)
    by_name = {name: slot for slot in slots for name in slot.names}
    with open_archive(path, threads=threads, check_tensors=True) as archive:
        present = set(archive.names)
        missing = tuple(
            name for slot in slots if present.isdisjoint(slot.names) for name in slot.names
        )
        unexpected = tuple(name for name in archive.names if name not in by_name)
        _check_fit(module, archive, by_name, (missing, unexpected) if strict else ((), ()))
        for spec, slots_wanted, parts in _wanted(archive, by_name):
            with torch.no_grad():
                _fill(slots_wanted, spec, parts, torch.device(device))
    on_meta = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    return LoadReport(missing, unexpected, tuple(on_meta))


def _slots(module: torch.nn.Module) -> list[_Slot]:
    by_id: dict[int, _Slot] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            by_id.setdefault(id(tensor), _Slot(tensor)).names.append(name)
    for submodule in module.modules():
        for registry in (submodule._parameters, submodule._buffers):
            for key, tensor in registry.items():
                if tensor is not None and id(tensor) in by_id:
                    by_id[id(tensor)].owners.append((registry, key))
    return list(by_id.values())


def _check_fit(
    module: torch.nn.Module,
    archive: Archive,
    by_name: Mapping[str, _Slot],
    lists: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in zip(
            ("missing in the archive", "unexpected in the archive"), lists, strict=True
        )
        if names
    ]
    for name in archive.names:
        slot = by_name.get(name)
        if slot is None:
            continue
        spec = archive.spec(name)
        shape = spec.shape
        if spec.dtype in SUB_BYTE and shape:
            shape = (*shape[:-1], shape[-1] * SUB_BYTE[spec.dtype] // 8)
        if tuple(slot.tensor.shape) != shape:
            problems.append(
                f"{name} is {list(shape)} in the archive and {list(slot.tensor.shape)} in the "
                "module"
            )
    if problems:
        raise CheckpointError(
            f"the archive does not fit {type(module).__name__}: {'; '.join(problems)}"
        )


def _wanted(
    archive: Archive, by_name: Mapping[str, _Slot]
) -> Iterator[tuple[TensorSpec, list[_Slot], Iterator[Array]]]:
    """Tensors that the module has, in parts, with every slot that wants them."""
    names: dict[str, list[str]] = defaultdict(list)
    for alias, target in archive.header.aliases.items():
        names[target].append(alias)
    for spec, parts in archive.iter_parts():
        found = {
            id(slot): slot
            for name in (spec.name, *names[spec.name])
            if (slot := by_name.get(name)) is not None
        }
        if found:
            yield spec, list(found.values()), parts


def _fill(
    slots: list[_Slot], spec: TensorSpec, parts: Iterator[Array], device: torch.device
) -> None:
    """Put a tensor into slots, part by part; those on the meta device get memory first."""
    for slot in slots:
        if slot.tensor.is_meta:
            _materialize(slot, _empty_like(slot.tensor, spec, device))
    # Parts of a slot without gaps go where they belong at once; others wait for the whole.
    direct = [slot.tensor for slot in slots if slot.tensor.is_contiguous()]
    flats = [tensor.detach().view(-1) for tensor in direct]
    whole = len(direct) < len(slots) or spec.dtype in SUB_BYTE
    kept: list[Array] = []
    done = 0
    for part in parts:
        if whole:
            kept.append(part.reshape(-1))
            continue
        value = from_stored(part.reshape(-1), spec.dtype)
        for flat in flats:
            flat[done : done + value.numel()].copy_(value)
        done += part.size
    if whole:
        array = kept[0] if len(kept) == 1 else np.concatenate(kept)
        value = from_stored(array.reshape(spec.shape), spec.dtype)
        for slot in slots:
            slot.tensor.detach().copy_(value)


def _empty_like(old: torch.Tensor, spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """Memory for a tensor from the meta device, in the archive's dtype."""
    dtype = from_stored(np.empty((0, 2), stored_dtype(spec.dtype)), spec.dtype).dtype
    return torch.empty(tuple(old.shape), dtype=dtype, device=device)


def _materialize(slot: _Slot, new: torch.Tensor) -> None:
    if isinstance(slot.tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=slot.tensor.requires_grad)
    for registry, key in slot.owners:
        registry[key] = new
    slot.tensor = new
