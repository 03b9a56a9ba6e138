"""PyTorch checkpoints (.pt .pth .th .bin): state dicts without code.

Also the one place where torch tensors become stored elements and back (:func:`to_stored`,
:func:`from_stored`). torch is imported when a function is called, never with the module.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from weightvid.checkpoint import base
from weightvid.errors import CheckpointError, OutputError
from weightvid.loader import Array, TensorSpec
from weightvid.spec import SUB_BYTE, pack_bits, stored_dtype, unpack_bits

if TYPE_CHECKING:
    import torch

#: dtype name -> attribute of torch; newer ones may be missing in an older torch.
_TORCH_NAMES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
    "C128": "complex128", "C64": "complex64", "C32": "complex32",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
#: customary names of the entry that holds the weights, the most telling first.
_WRAPPERS: Final = (
    # Averages of the weights are what inference takes where there are both.
    *("state_dict_ema", "model_ema", "params_ema", "ema_state_dict", "ema_model", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module"),
    *("net", "network", "weights", "params"),
)
_PICKLED_TEXT: Final = "utf-8", "surrogatepass"
#: a view may show its storage many times over (``expand``); a file that makes more of it than
#: this does so to exhaust memory.
_EXPANSION: Final = 16
_EXPANSION_FLOOR_BYTES: Final = 1 << 26


def import_torch() -> Any:
    """Import torch, or say in a CheckpointError how to get it."""
    return base.need("torch", "torch")


def to_stored(tensor: torch.Tensor) -> tuple[str, Array]:
    """Dtype name and stored elements of a torch tensor (any device and strides).

    The array is C-contiguous and shares the tensor's memory where it can: don't write into it.
    A float4_e2m1fn_x2 tensor becomes F4 with twice the last dimension, as in safetensors.
    A CheckpointError says that its elements are not plain, or of a type that weightvid lacks.
    """
    problem = _unsupported(tensor)
    if problem is not None:
        raise CheckpointError(f"a {problem} cannot be stored")
    name = _name_of()[tensor.dtype]
    try:
        # complex32 warns that it is experimental; nothing is computed with it here.
        with warnings.catch_warnings(action="ignore"):
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            flat: Array = _row(plain).view(import_torch().uint8).numpy()
    except (RuntimeError, TypeError, MemoryError) as error:
        # Tensor subclasses (distributed, fake, wrapped) may lack any of the steps.
        kind = type(tensor).__name__
        raise CheckpointError(
            f"cannot read a {kind}'s elements: {base.first_line(error)}"
        ) from None
    shape = tuple(int(n) for n in tensor.shape)
    if name in SUB_BYTE:
        shape = (*shape[:-1], shape[-1] * 8 // SUB_BYTE[name])
        flat = unpack_bits(flat.view(np.uint8), name, prod(shape))
    return name, flat.view(stored_dtype(name)).reshape(shape)


def stored_arrays(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Array], dict[str, str]]:
    """Stored elements and dtype names; what shows the same memory the same way is one array.

    A CheckpointError as by `to_stored` names the tensor.
    """
    known: dict[Any, tuple[str, Array]] = {}
    arrays, dtypes = {}, {}
    for name, tensor in tensors.items():
        try:
            if not isinstance(tensor, import_torch().Tensor):
                raise CheckpointError(f"it is no tensor but {type(tensor).__name__}")
            stored = to_stored(tensor)
            # Not by what is stored: that of a GPU, or of odd strides, is a copy each time.
            seen = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        except (CheckpointError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{name!r} cannot be packed: {error}") from None
        look = (*seen, tensor.is_conj(), tensor.is_neg()) if tensor.numel() else name
        dtypes[name], arrays[name] = known.setdefault(look, stored)
    return arrays, dtypes


def from_stored(array: Array, name: str) -> torch.Tensor:
    """Tensor of stored elements of dtype ``name``, on the CPU.

    It shares the array's memory if that is contiguous and writable. A CheckpointError says that
    torch has no such element type, or the array is of another.
    """
    dtype = torch_dtype(name)
    if array.dtype != stored_dtype(name):
        raise CheckpointError(f"an array of {array.dtype} is not {name}")
    shape = array.shape
    if name in SUB_BYTE:
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"torch holds {name} in pairs; {list(shape)} has none")
        shape = (*shape[:-1], shape[-1] // 2)
        array = pack_bits(array.copy(order="C"), name)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy(order="C")
    data: torch.Tensor = import_torch().from_numpy(base.raw_bytes(array))
    return _row(data).view(dtype).reshape(shape)


def _row(tensor: torch.Tensor) -> torch.Tensor:
    """Flatten; unlike reshape, leaves no odd strides to what is empty or has one element."""
    return tensor.as_strided((tensor.numel(),), (1,))


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of one of our names; a CheckpointError where it has none."""
    found = getattr(import_torch(), _TORCH_NAMES.get(name, ""), None)
    if found is None:
        said = f"this PyTorch has no element type {name}; write .npz or .safetensors instead"
        raise CheckpointError(said)
    return found


class Reader(base.ArrayReader):
    """A PyTorch checkpoint, loaded with ``weights_only=True``, memory-mapped where possible.

    Tensors that are sparse, quantized, nested, on the meta device or of a type weightvid lacks
    are reported in ``contents.skipped``, as is everything that is no tensor.
    """

    def __init__(self, path: Path) -> None:
        torch = import_torch()
        try:
            with warnings.catch_warnings(action="ignore"):
                root = _load(path)
        except Exception as error:
            said = str(error) if isinstance(error, CheckpointError) else _refusal(error)
            raise CheckpointError(f"cannot read {path}: {said}") from None
        with base.explained(f"cannot read {path}: dicts in dicts without end"):
            found = StateDict(root, torch.Tensor)
        limit = _EXPANSION * path.stat().st_size + _EXPANSION_FLOOR_BYTES
        tensors = {}
        for name, tensor in found.tensors.items():
            problem = _unsupported(tensor)
            if problem is None and prod(tensor.shape) * tensor.element_size() > limit:
                problem = f"tensor of shape {list(tensor.shape)}, expanded from a few elements"
            if problem is None:
                tensors[name] = tensor
            else:
                found.skipped.append(f"{name} ({problem})")
        if not tensors and (found.skipped or not isinstance(root, dict)):
            raise CheckpointError(f"{path} holds no named tensors: {base.shorten(found.skipped)}")
        super().__init__(*stored_arrays(tensors), skipped=found.skipped)


class Writer(base.FileWriter):
    """A state dict; it is held in memory until ``commit``, for tensors to share storage."""

    def _plan(self) -> bytes:
        for spec in self.contents.tensors:
            try:
                torch_dtype(spec.dtype)
                if spec.dtype in SUB_BYTE and (not spec.shape or spec.shape[-1] % 2):
                    raise CheckpointError(f"torch holds {spec.dtype} in pairs")
            except CheckpointError as error:
                raise CheckpointError(f"tensor {spec.name!r}: {error}") from None
        if dropped := self.contents.metadata:
            self.notes = (f"a state_dict has no metadata; dropped: {base.shorten(dropped)}",)
        self._state: dict[str, Any] = {}
        return b""

    def _write(self, spec: TensorSpec, array: Array) -> None:
        # A copy: the caller may fill the same buffer with the next tensor.
        self._state[spec.name] = from_stored(array.copy(), spec.dtype)

    def _finish(self) -> None:
        state = OrderedDict((spec.name, self._state[spec.name]) for spec in self.contents.tensors)
        for alias, name in self.contents.aliases.items():
            state[alias] = state[name]
        try:
            with warnings.catch_warnings(action="ignore"):
                import_torch().save(state, self._output.file)
        except RuntimeError as error:
            # torch's zip writer turns a failing write into an error of its own.
            cause = error.__cause__ or error.__context__
            if isinstance(cause, OutputError):
                raise cause from None
            raise OutputError(f"cannot write the PyTorch file: {base.first_line(error)}") from None

    def abort(self) -> None:
        """Remove the temporary file and let the tensors go."""
        self._state = {}
        super().abort()


def _load(path: Path) -> Any:
    """What torch reads of a file, without running any code of it."""
    torch = import_torch()
    # torch takes this suffix for what the file is.
    misnamed = path.suffix.lower() == ".safetensors"

    def source() -> Any:
        return io.BytesIO(path.read_bytes()) if misnamed else os.fspath(path)

    settings = {"map_location": "cpu", "mmap": _can_map(path) and not misnamed}
    try:
        return torch.load(source(), weights_only=True, **settings)
    except Exception as error:
        if "Unsupported operand 149" not in str(error):
            raise
    # torch's restricted unpickler knows protocol 2 alone, in which all of it can be said.
    restricted: Any = import_module("torch._weights_only_unpickler")

    class Unpickler(restricted.Unpickler):  # type: ignore[misc]
        def __init__(self, file: BinaryIO, **options: Any) -> None:
            super().__init__(io.BytesIO(protocol_2(file)), **options)

    def load(file: BinaryIO, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = SimpleNamespace(Unpickler=Unpickler, load=load, __name__=restricted.__name__)
    return torch.load(source(), weights_only=False, pickle_module=module, **settings)


def protocol_2(file: BinaryIO) -> bytes:
    """One pickle, of whatever protocol, in the words of protocol 2, or a `pickle.UnpicklingError`.

    Examples
    --------
    >>> pickle.loads(protocol_2(io.BytesIO(pickle.dumps({"w": (1, 2.5)}, 4))))
    {'w': (1, 2.5)}
    """
    start = file.tell()
    read: Any = pickletools.genops(file)
    codes = [(code.name, argument, at) for code, argument, at in read]
    end = file.tell()
    file.seek(start)
    data, ends = file.read(end - start), [at for _, _, at in codes[1:]] + [end]
    made, strings, memo, repeated = bytearray(), dict[int, bytes](), set[int](), 0
    # Strings that the stack ends with. They are written out again wherever they are referred to.
    top: list[bytes] = []
    for (name, argument, at), stop in zip(codes, ends, strict=True):
        if "PUT" in name or name == "MEMOIZE":
            place = len(memo) if name == "MEMOIZE" else int(argument)
            memo.add(place)
            if top:
                strings[place] = top[-1]
            else:
                made += b"r" + struct.pack("<I", place)
        elif "UNICODE" in name or ("GET" in name and int(argument) in strings):
            text = strings[int(argument)] if "GET" in name else argument.encode(*_PICKLED_TEXT)
            repeated += len(text) if "GET" in name else 0
            if repeated > 1 << 26:
                raise pickle.UnpicklingError("its strings are repeated too often")
            made += b"X" + struct.pack("<I", len(text)) + text
            top.append(text)
        elif name == "STACK_GLOBAL":
            if len(top) < 2:
                raise pickle.UnpicklingError("a global without a name")
            del made[-sum(len(text) + 5 for text in top[-2:]) :]
            made += b"c" + b"\n".join((*top[-2:], b""))
            top = []
        elif name != "FRAME":
            made += b"\x80\x02" if name == "PROTO" else data[at - start : stop - start]
            top = []
    return bytes(made)


@cache
def _name_of() -> dict[Any, str]:
    torch = import_torch()
    found = {getattr(torch, attribute, None): name for name, attribute in _TORCH_NAMES.items()}
    return {dtype: name for dtype, name in found.items() if dtype is not None}


def _unsupported(tensor: Any) -> str | None:
    """What keeps a tensor from being stored, or None."""
    problems = (
        (tensor.is_nested, "nested tensor"),
        (tensor.layout != import_torch().strided, f"sparse tensor ({tensor.layout})"),
        (tensor.is_quantized, f"quantized tensor ({tensor.dtype})"),
        (tensor.is_meta, "meta tensor, which has no data"),
        (tensor.dtype not in _name_of(), f"tensor of {tensor.dtype}"),
    )
    return next((what for is_so, what in problems if is_so), None)


def _can_map(path: Path) -> bool:
    """True for zip files whose members are stored as they are (some tools deflate them).

    Deflated members that are many times as large as the file are a CheckpointError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:
        return False
    size = sum(member.file_size for member in members)
    if all(member.compress_type == zipfile.ZIP_STORED for member in members):
        return True
    if size > _EXPANSION * path.stat().st_size + _EXPANSION_FLOOR_BYTES:
        raise CheckpointError(f"its members would take {size} bytes, deflated to a few")
    return False


def _refusal(error: BaseException) -> str:
    """One line of torch's long messages about a file it does not load."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if "DTensor" in text:
        return (
            "it holds DTensors, parts of a model that is distributed; save the whole of it: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        )
    objects = re.search(r"GLOBAL ([\w.]+)", text)
    if objects is not None or "Unsupported operand" in text:
        what = f"Python objects ({objects[1]})" if objects else "something else than tensors"
        return (
            f"it holds {what}, and loading it could run code; save the model's state_dict() with "
            "torch.save instead"
        )
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return f"damaged, or no state_dict: {inner[1] if inner else base.first_line(error)}"


class StateDict:
    """Where in an unpickled file the weights are, and what is skipped.

    Training scripts wrap the weights (``{"model": {...}, "epoch": 3}``). The dict is searched from
    the top: a wrapper of a customary name, or the only entry that holds tensors, is entered. Where
    several entries hold tensors, all of them are taken, nested names joined by dots. Optimizer
    states are never taken. Nothing is dropped without being reported.

    Examples
    --------
    >>> found = StateDict({"model": {"w": 1.5}, "epoch": 3}, float)
    >>> found.tensors, found.skipped
    ({'w': 1.5}, ['epoch (int)'])
    """

    def __init__(self, root: object, tensor_class: type) -> None:
        self.tensors: dict[str, Any] = {}
        self.skipped: list[str] = []
        self._tensor_class = tensor_class
        self._counts: dict[int, int] = {}
        self._entered: set[int] = set()
        node = {"tensor": root} if isinstance(root, tensor_class) else root
        if not isinstance(node, dict):
            self._skip("the whole file", node)
            return
        prefix = ""
        while (key := self._wrapper(node)) is not None and id(node) not in self._entered:
            self._entered.add(id(node))
            for other, value in node.items():
                if other != key:
                    self._skip(f"{prefix}{other}", value)
            node, prefix = node[key], f"{prefix}{key}."
        self._take(node, "")

    def _wrapper(self, node: dict[Any, Any]) -> Any | None:
        """Key of the entry that wraps the weights, if the node itself is not what we want."""
        inner = [key for key, value in node.items() if self._is_worth_entering(value)]
        for name in _WRAPPERS:
            if name in inner:
                return name
        direct = any(isinstance(value, self._tensor_class) for value in node.values())
        return inner[0] if len(inner) == 1 and not direct else None

    def _take(self, node: dict[Any, Any], prefix: str) -> None:
        self._entered.add(id(node))
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, self._tensor_class) and name not in self.tensors:
                self.tensors[name] = value
            elif isinstance(value, self._tensor_class):
                self.skipped.append(f"{name} (tensor; the name is taken)")
            elif self._is_worth_entering(value) and id(value) not in self._entered:
                self._take(value, f"{name}.")
            else:
                self._skip(name, value)

    def _is_worth_entering(self, value: object) -> bool:
        optimizer = isinstance(value, dict) and {"state", "param_groups"} <= value.keys()
        return isinstance(value, dict) and not optimizer and self._count(value) > 0

    def _count(self, value: object) -> int:
        """Tensors at or below ``value``; each container is counted once, so loops end."""
        if not isinstance(value, (dict, list, tuple)):
            return int(isinstance(value, self._tensor_class))
        if id(value) not in self._counts:
            self._counts[id(value)] = 0
            inner = value.values() if isinstance(value, dict) else value
            # Lists are not entered for weights, so what they hold does not make a dict worth it.
            entered = (item for item in inner if not isinstance(item, (list, tuple)))
            self._counts[id(value)] = sum(map(self._count, entered))
        return self._counts[id(value)]

    def _skip(self, name: str, value: object) -> None:
        count, what = self._count(value), type(value).__name__
        if isinstance(value, self._tensor_class):
            what = "tensor outside the weights"
        elif count:
            what += f" with {count} tensor{'s' if count > 1 else ''}"
        self.skipped.append(f"{name} ({what})")
