"""PyTorch checkpoints (.pt .pth .th .bin): state dicts without code.

Also the one place where torch tensors become stored elements and back (:func:`to_stored`,
:func:`from_stored`). torch is imported when a function is called, never with the module.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from weightvid.checkpoint.base import Array, CheckpointReader, Contents, check_contents, shorten
from weightvid.checkpoint.state_dict import find_tensors
from weightvid.checkpoint.writer import CheckpointWriter, FileWriter
from weightvid.dtypes import SUB_BYTE, pack_bits, stored_dtype, unpack_bits
from weightvid.errors import CheckpointError, OutputError
from weightvid.spec import TensorSpec

if TYPE_CHECKING:
    import torch

#: dtype name -> attribute of torch; newer ones may be missing in an older torch.
_TORCH_NAMES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
    "C128": "complex128",
    "C64": "complex64",
    "C32": "complex32",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
#: bytes per element -> torch integer type whose numpy array can be viewed as the stored elements.
_BIT_TYPES: Final = {1: "uint8", 2: "int16", 4: "int32"}
#: a view may show its storage many times over (``expand``); a file that makes more of it than
#: this does so to exhaust memory.
_EXPANSION: Final = 16
_EXPANSION_FLOOR_BYTES: Final = 1 << 26


def open_reader(path: Path) -> CheckpointReader:
    """Open a PyTorch checkpoint with ``weights_only=True``, memory-mapped where possible.

    Tensors that are sparse, quantized, nested, on the meta device or of a type weightvid lacks
    are reported in ``contents.skipped``, as is everything that is no tensor.

    Raises
    ------
    CheckpointError
        torch is missing, refuses the file (it would run code), or finds it damaged; or the file
        holds no named tensors.
    """
    torch = import_torch()
    mmap = _can_map(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {_refusal(error)}") from None
    try:
        return _TorchReader(path, root)
    except RecursionError:
        raise CheckpointError(f"cannot read {path}: its dicts are nested too deep") from None


def open_writer(path: Path, contents: Contents, *, force: bool = False) -> CheckpointWriter:
    """Start a state dict; it is held in memory until ``commit``, for tensors to share storage."""
    return _TorchWriter(path, contents, force=force)


def import_torch() -> ModuleType:
    """Import torch, or say how to get it.

    Raises
    ------
    CheckpointError
        torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"PyTorch is needed for this ({error}): pip install 'weightvid[torch]'"
        ) from None
    module: ModuleType = torch
    return module


def to_stored(tensor: torch.Tensor) -> tuple[str, Array]:
    """Dtype name and stored elements of a torch tensor.

    Parameters
    ----------
    tensor : torch.Tensor
        Any device, strides and ``requires_grad``; strided layout. A float4_e2m1fn_x2 tensor
        becomes F4 with twice the last dimension, as in safetensors.

    Returns
    -------
    str, ndarray
        The array is C-contiguous and shares the tensor's memory where it is contiguous and on
        the CPU: don't write into it.

    Raises
    ------
    CheckpointError
        A tensor that has no plain elements, or elements of a type weightvid lacks.
    """
    problem = _unsupported(tensor)
    if problem is not None:
        raise CheckpointError(f"a {problem} cannot be stored")
    name = _name_of()[tensor.dtype]
    try:
        array = _elements(tensor, name)
    except (RuntimeError, TypeError, MemoryError) as error:
        # Tensor subclasses (distributed, fake, wrapped) may lack any of the steps.
        kind = type(tensor).__name__
        raise CheckpointError(f"cannot read a {kind}'s elements: {_first_line(error)}") from None
    if name in SUB_BYTE:
        size = array.size * 8 // SUB_BYTE[name]
        shape = _shape(tensor, name)
        array = unpack_bits(array.reshape(-1).view(np.uint8), name, size).reshape(shape)
    return name, array


def from_stored(array: Array, name: str) -> torch.Tensor:
    """Torch tensor of stored elements.

    Parameters
    ----------
    array : ndarray
        Stored elements of dtype ``name``.
    name : str
        Dtype name.

    Returns
    -------
    torch.Tensor
        On the CPU; shares the array's memory if that is contiguous and writable.

    Raises
    ------
    CheckpointError
        torch has no such element type.
    """
    torch = import_torch()
    dtype = torch_dtype(name)
    stored = stored_dtype(name)
    if array.dtype != stored:
        raise CheckpointError(f"an array of {array.dtype} is not {name}")
    if name in SUB_BYTE:
        if array.ndim == 0 or array.shape[-1] % 2:
            raise CheckpointError(f"torch holds {name} in pairs; {list(array.shape)} has none")
        pairs = (*array.shape[:-1], array.shape[-1] // 2)
        array = pack_bits(array.copy(order="C"), name).reshape(pairs)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy(order="C")
    raw = stored.kind == "u" and not name.startswith("U")
    if raw:
        # A view of a 0-d array may not change its kind of element in torch, but in numpy it may.
        array = array.view(
            f"u{stored.itemsize}" if stored.itemsize == 1 else f"<i{stored.itemsize}"
        )
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if raw else tensor


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of one of our names.

    Raises
    ------
    CheckpointError
        This torch has none.
    """
    found = getattr(import_torch(), _TORCH_NAMES.get(name, ""), None)
    if found is None:
        raise CheckpointError(
            f"this PyTorch has no element type {name}; write .npz or .safetensors instead"
        )
    return found


class _TorchReader(CheckpointReader):
    def __init__(self, path: Path, root: object) -> None:
        found = find_tensors(root, import_torch().Tensor)
        limit = _EXPANSION * path.stat().st_size + _EXPANSION_FLOOR_BYTES
        self._tensors: dict[str, Any] = {}
        specs: list[TensorSpec] = []
        aliases: dict[str, str] = {}
        first_of: dict[tuple[object, ...], str] = {}
        for name, tensor in found.tensors.items():
            problem = _unsupported(tensor)
            if problem is None and prod(tensor.shape) * tensor.element_size() > limit:
                problem = f"tensor of shape {list(tensor.shape)}, expanded from a few elements"
            if problem is not None:
                found.skipped.append(f"{name} ({problem})")
                continue
            look = _look(tensor)
            if tensor.numel() and look in first_of:
                aliases[name] = first_of[look]
                continue
            first_of[look] = name
            self._tensors[name] = tensor
            dtype = _name_of()[tensor.dtype]
            specs.append(TensorSpec(name, dtype, _shape(tensor, dtype)))
        if not specs:
            said = f": {shorten(found.skipped)}" if found.skipped else ""
            if found.skipped or not isinstance(root, dict):
                raise CheckpointError(f"{path} holds no named tensors{said}")
        contents = Contents(tuple(specs), aliases, skipped=tuple(found.skipped))
        check_contents(contents)
        super().__init__(contents)

    def _read(self, spec: TensorSpec) -> Array:
        try:
            array = to_stored(self._tensors[spec.name])[1]
        except (RuntimeError, TypeError, MemoryError) as error:
            raise CheckpointError(
                f"cannot read tensor {spec.name!r}: {_first_line(error)}"
            ) from None
        # Not the tensor's own array object, whose flag somebody else may see.
        array = array.view()
        array.flags.writeable = False
        return array

    def close(self) -> None:
        super().close()
        self._tensors = {}


class _TorchWriter(FileWriter):
    def __init__(self, path: Path, contents: Contents, *, force: bool) -> None:
        check_contents(contents)
        for spec in contents.tensors:
            self._check(spec)
        super().__init__(path, contents, force=force)
        self._state: dict[str, Any] = {}
        if contents.metadata:
            self.notes = (f"a state_dict has no metadata; dropped: {shorten(contents.metadata)}",)

    @staticmethod
    def _check(spec: TensorSpec) -> None:
        try:
            torch_dtype(spec.dtype)
            if spec.dtype in SUB_BYTE and (not spec.shape or spec.shape[-1] % 2):
                raise CheckpointError(f"torch holds {spec.dtype} in pairs")
        except CheckpointError as error:
            raise CheckpointError(f"tensor {spec.name!r}: {error}") from None

    def _write(self, spec: TensorSpec, array: Array) -> None:
        # A copy: the caller may fill the same buffer with the next tensor.
        self._state[spec.name] = from_stored(array.copy(), spec.dtype)

    def _finish(self) -> None:
        from collections import OrderedDict

        torch = import_torch()
        state = OrderedDict((spec.name, self._state[spec.name]) for spec in self.contents.tensors)
        for alias, name in self.contents.aliases.items():
            state[alias] = state[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.save(state, self._output.file)
        except RuntimeError as error:
            # torch's zip writer turns a failing write into an error of its own.
            cause = error.__cause__ or error.__context__
            if isinstance(cause, OutputError):
                raise cause from None
            raise OutputError(f"cannot write the PyTorch file: {_first_line(error)}") from None
        self._state = {}

    def abort(self) -> None:
        """Remove the temporary file and let the tensors go."""
        self._state = {}
        super().abort()


@cache
def _name_of() -> dict[Any, str]:
    torch = import_torch()
    return {
        getattr(torch, attribute): name
        for name, attribute in _TORCH_NAMES.items()
        if hasattr(torch, attribute)
    }


def _unsupported(tensor: Any) -> str | None:
    """What keeps a tensor from being stored, or None."""
    torch = import_torch()
    if tensor.is_nested:
        return "nested tensor"
    if tensor.layout != torch.strided:
        return f"sparse tensor ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantized tensor ({tensor.dtype})"
    if tensor.is_meta:
        return "meta tensor, which has no data"
    if tensor.dtype not in _name_of():
        return f"tensor of {tensor.dtype}"
    return None


def _elements(tensor: Any, name: str) -> Array:
    """Stored elements of a strided tensor; sub-byte types still packed."""
    torch = import_torch()
    stored = stored_dtype(name)
    with warnings.catch_warnings():
        # complex32 warns that it is experimental; nothing is computed with it here.
        warnings.simplefilter("ignore")
        plain = tensor.detach().cpu()
        plain = plain.resolve_conj().resolve_neg()
        if stored.kind == "u" and not name.startswith("U"):
            plain = plain.view(getattr(torch, _BIT_TYPES[stored.itemsize]))
        array: Array = plain.contiguous().numpy().view(stored)
    return array


def _look(tensor: Any) -> tuple[object, ...]:
    """Equal for two tensors that show the same memory the same way."""
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _shape(tensor: Any, name: str) -> tuple[int, ...]:
    shape = tuple(int(n) for n in tensor.shape)
    if name in SUB_BYTE and shape:
        return (*shape[:-1], shape[-1] * 8 // SUB_BYTE[name])
    return shape


def _can_map(path: Path) -> bool:
    """True for zip files whose members are stored as they are (some tools deflate them)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
    except Exception:
        return False


def _refusal(error: BaseException) -> str:
    """One line of torch's long messages about a file it does not load."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    objects = re.search(r"GLOBAL ([\w.]+)", text)
    if objects is not None:
        return (
            f"it holds Python objects ({objects[1]}), and loading them could run code; "
            "save the model's state_dict() instead"
        )
    if "Unsupported operand" in text:
        return (
            "it is a pickle of something else than tensors, and loading it could run code; save "
            "the model's state_dict() with torch.save instead"
        )
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return f"damaged, or no state_dict: {inner[1] if inner else _first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
