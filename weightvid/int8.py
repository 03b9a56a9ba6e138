"""An integer ONNX graph from an archive: its levels are the weights, activations are uint8.

Convolutions (with a BatchNorm and a ReLU behind them) become ``QLinearConv``, linear layers
``MatMulInteger``; all else stays in float32 between ``DequantizeLinear`` and ``QuantizeLinear``.
The zero point z of a layer's inputs goes into its bias, b - z * sum(w), so that the kernel
multiplies plain integers; borders must then be padded with z, which stands for 0.

Source: Jeong, "Bias embedding of quantization offsets", 2020; the arithmetic: Jacob et al.,
"Quantization and training of neural networks for efficient integer-arithmetic-only inference",
2018.
"""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from weightvid.archives import Location, open_anywhere
from weightvid.atomic import atomic_output, is_source
from weightvid.checkpoint.base import explained, first_line, need
from weightvid.errors import CheckpointError, TensorNotFoundError
from weightvid.loader import Array, Levels

#: opset from which Pad takes uint8.
_OPSET: Final = 13
#: examples that the float graph runs at a time to find ranges.
_BATCH: Final = 50
#: of activations: behind a ReLU 0 is the zero point. And the largest weight.
_LOW, _HIGH, _WEIGHT = 0, 255, 127


@dataclass(frozen=True, slots=True)
class Int8Report:
    """What became of a graph.

    Attributes
    ----------
    own : tuple of str
        Weights whose int8 values are the archive's own integers.
    requantized : tuple of str
        Weights that were quantized anew, a scale for each output: the archive has no levels of
        them, or larger ones.
    file_bytes : int
    """

    own: tuple[str, ...]
    requantized: tuple[str, ...]
    file_bytes: int


def export_int8(
    archive: Location,
    graph: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | Mapping[str, Array],
    destination: str | os.PathLike[str],
    *,
    fold: bool = True,
    force: bool = False,
) -> Int8Report:
    """Write an integer ONNX graph with the weights of an archive.

    Parameters
    ----------
    archive : path, address or binary file object
        Best of one that was packed with ``--integer``.
    graph : path
        The model as float ONNX; its initializers are named as the archive's tensors.
    calibration : path of a .npz file, or mapping of str to ndarray
        Example inputs by the names of the graph's inputs, examples along the first axis.
    destination : path
    fold : bool
        Zero points in the biases; else left to the runtime, which gives the same bits.
    force : bool
        Replace an existing file.

    Raises
    ------
    CheckpointError
        A package is missing, the graph is not valid ONNX or holds no layer to convert, or the
        examples do not fit it or are not finite; the destination is one of the sources.
    OSError
        A source is not there.
    """
    if is_source(destination, archive, graph, calibration):
        raise CheckpointError(f"{destination} is the archive, the graph or the examples itself")
    onnx = need("onnx", "onnxruntime")
    need("onnxruntime", "onnxruntime")
    model = _load(onnx, graph)
    if max((o.version for o in model.opset_import if o.domain == ""), default=0) < _OPSET:
        with explained(f"{graph} cannot be converted to opset {_OPSET}"):
            model = onnx.version_converter.convert_version(model, _OPSET)
    # Some exporters write weights as nodes.
    for node in [n for n in model.graph.node if n.op_type == "Constant" and n.attribute[0].t.dims]:
        model.graph.initializer.add().CopyFrom(node.attribute[0].t)
        model.graph.initializer[-1].name = node.output[0]
        model.graph.node.remove(node)
    levels: dict[str, Levels] = {}
    with open_anywhere(archive) as opened:
        slots = [slot for slot in model.graph.initializer if slot.name in opened]
        if model.graph.initializer and not slots:
            raise CheckpointError("the archive has none of the graph's initializers")
        for slot in slots:
            values = np.ascontiguousarray(opened[slot.name])
            slot.CopyFrom(onnx.numpy_helper.from_array(values, slot.name))
            with suppress(TensorNotFoundError):
                levels[slot.name] = opened.levels(slot.name)
    made = _Conversion(onnx, model, levels, fold)
    made.convert(_examples(model, calibration))
    data = made.model.SerializeToString(deterministic=True)
    with atomic_output(Path(destination), force=force) as file:
        file.write(data)
    return Int8Report(tuple(made.own), tuple(made.requantized), len(data))


def _load(onnx: Any, graph: str | os.PathLike[str]) -> Any:
    """A float graph with its weights; its nodes are sorted."""
    try:
        model = onnx.load(os.fspath(graph))
        onnx.checker.check_model(model)
    except OSError:  # it is not there
        raise
    except Exception as error:  # protobuf's and onnx's errors share no class
        raise CheckpointError(f"{graph} is no valid ONNX model: {first_line(error)}") from None
    return model


def _examples(
    model: Any, calibration: str | os.PathLike[str] | Mapping[str, Array]
) -> dict[str, Array]:
    """Arrays by the inputs of the graph; a lone array is that of a lone input."""
    constant = {slot.name for slot in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in constant]
    if isinstance(calibration, Mapping):
        found = dict(calibration)
    else:
        try:
            file = np.load(calibration, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it is one array without a name; write it with numpy.savez")
            with file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{calibration} holds no example inputs: {error}") from None
    if len(names) == len(found) == 1:
        found = dict(zip(names, found.values(), strict=True))
    if missing := sorted(set(names) - set(found)):
        raise CheckpointError(
            f"the examples lack the input {missing[0]!r}; they have: {', '.join(sorted(found))}"
        )
    for name in names:
        examples, what = found[name], f"the examples of the input {name!r}"
        if examples.ndim == 0 or not examples.size:
            raise CheckpointError(
                f"{what} have the shape {list(examples.shape)}; the first axis of each input must "
                "count the examples"
            )
        if examples.dtype.kind in "fc" and not np.isfinite(examples).all():
            raise CheckpointError(f"{what} hold NaN or infinity")
        if examples.dtype.kind in "fc" and not examples.any():
            raise CheckpointError(f"{what} are all 0, which tells no range; give real inputs")
    return {name: found[name] for name in names}


class _Layer(NamedTuple):
    """A node of weights with what is merged into it."""

    node: Any
    norm: Any | None
    output: str
    merged: tuple[str, ...]


class _Conversion:
    def __init__(self, onnx: Any, model: Any, levels: Mapping[str, Levels], fold: bool) -> None:
        self.model, self.own, self.requantized = model, list[str](), list[str]()
        self._onnx, self._levels, self._fold = onnx, levels, fold
        graph = model.graph
        self._constants = {s.name: onnx.numpy_helper.to_array(s) for s in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Identity" and node.input[0] in self._constants:
                self._constants[node.output[0]] = self._constants[node.input[0]]
        self._users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._results = {value.name for value in graph.output}
        self._nodes: list[Any] = []
        self._added: dict[str, Any] = {}
        self._ranges: dict[str, tuple[np.float32, np.uint8]] = {}
        #: uint8 twins of tensors, by name.
        self._twins: dict[str, str] = {}

    def convert(self, examples: Mapping[str, Array]) -> None:
        """Replace layers, then drop what nothing uses."""
        graph = self.model.graph
        layers = {layer.node.output[0]: layer for layer in map(self._layer, graph.node) if layer}
        if not layers:
            raise CheckpointError(
                "the graph has no convolution or linear layer of constant float32 weights"
            )
        convolutions = [x for x in layers.values() if x.node.op_type == "Conv"]
        wanted = {x.node.input[0] for x in layers.values()} | {x.output for x in convolutions}
        self._find_ranges(sorted(wanted), examples)
        merged = {name for layer in layers.values() for name in layer.merged}
        for node in graph.node:
            if node.output[0] in layers:
                self._replace(layers[node.output[0]])
            elif node.output[0] not in merged:
                self._nodes.append(node)
        kept = self._used()
        del graph.node[:]
        graph.node.extend(kept)
        needed = {name for node in kept for name in node.input}
        slots = [slot for slot in graph.initializer if slot.name in needed]
        tensor = self._onnx.numpy_helper.from_array
        slots += [tensor(array, name) for name, array in self._added.items() if name in needed]
        del graph.initializer[:]
        graph.initializer.extend(slots)
        inputs = [value for value in graph.input if value.name in needed]
        del graph.input[:], graph.value_info[:]
        graph.input.extend(inputs)
        self._onnx.checker.check_model(self.model)

    def _layer(self, node: Any) -> _Layer | None:
        """The layer that begins at a node; None if it stays in float."""
        if len(node.input) < 2 or node.input[1] not in self._constants:
            return None
        weight, settings = self._constants[node.input[1]], self._settings(node)
        if weight.dtype != np.float32:  # QuantizeLinear of this opset takes no other floats
            return None
        if node.op_type == "Conv" and weight.ndim == 4 and "auto_pad" not in settings:
            norm, output, merged = None, node.output[0], []
            after = self._only_user(output)
            if after is not None and after.op_type == "BatchNormalization":
                norm, output = after, after.output[0]
                merged.append(output)
                after = self._only_user(output)
            if after is not None and after.op_type == "Relu":
                output = after.output[0]
                merged.append(output)
            return _Layer(node, norm, output, tuple(merged))
        gemm = node.op_type == "Gemm" and not settings.get("transA", 0)
        gemm = gemm and settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0
        if (gemm or node.op_type == "MatMul") and weight.ndim == 2:
            return _Layer(node, None, node.output[0], ())
        return None

    def _only_user(self, name: str) -> Any | None:
        users = self._users.get(name, [])
        return users[0] if len(users) == 1 and name not in self._results else None

    def _settings(self, node: Any) -> dict[str, Any]:
        found = {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}
        if found.get("auto_pad", b"NOTSET") == b"NOTSET":
            found.pop("auto_pad", None)
        return found

    def _find_ranges(self, names: list[str], examples: Mapping[str, Array]) -> None:
        """Scale and zero point of tensors from what they are in the float graph."""
        runtime = need("onnxruntime", "onnxruntime")
        probe = type(self.model).FromString(self.model.SerializeToString())
        inner = [name for name in names if name not in examples]
        known = {value.name for value in probe.graph.output}
        value_info = self._onnx.helper.make_empty_tensor_value_info
        probe.graph.output.extend(value_info(name) for name in inner if name not in known)
        with explained("the graph does not run with the weights of the archive"):
            session = runtime.InferenceSession(
                probe.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        lows, highs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for first in range(0, min(map(len, examples.values())), _BATCH):
            part = {name: array[first : first + _BATCH] for name, array in examples.items()}
            try:
                values = dict(zip(inner, session.run(inner, part), strict=bool(inner))) | part
            except Exception as error:  # onnxruntime's errors share no class
                raise CheckpointError(f"the graph does not run on the examples: {error}") from None
            for name in names:
                low, high = float(values[name].min()), float(values[name].max())
                if not (isfinite(low) and isfinite(high)):
                    raise CheckpointError(
                        f"the examples make {name!r} NaN or infinite in the float graph"
                    )
                lows[name], highs[name] = min(lows[name], low), max(highs[name], high)
        for name in names:
            scale = np.float32((highs[name] - lows[name]) / (_HIGH - _LOW) or 1.0)
            zero = round(_LOW - lows[name] / float(scale))
            self._ranges[name] = scale, np.uint8(min(max(zero, _LOW), _HIGH))

    def _replace(self, layer: _Layer) -> None:
        node, name, settings = layer.node, layer.node.output[0], self._settings(layer.node)
        weight, scales = self._integers(node.input[1], node.op_type, settings)
        bias = self._constants[node.input[2]] if len(node.input) > 2 and node.input[2] else 0.0
        bias = np.broadcast_to(np.asarray(bias, np.float64), len(weight))
        if layer.norm is not None:
            gamma, beta, mean, variance = (self._constants[x] for x in layer.norm.input[1:5])
            epsilon = self._settings(layer.norm).get("epsilon", 1e-5)
            gain = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
            bias = (bias - mean) * gain + beta
            # A scale is positive: signs move to the integers.
            weight = weight * np.sign(gain).astype(np.int8).reshape(-1, *(1,) * (weight.ndim - 1))
            scales = scales * np.where(gain == 0, 1, np.abs(gain))
        scale, zero = self._ranges[node.input[0]]
        shift = weight.reshape(len(weight), -1).sum(axis=1, dtype=np.int64) * int(zero)
        whole = np.rint(bias / (float(scale) * scales)) - (shift if self._fold else 0)
        bias = whole.clip(-(2**31), 2**31 - 1).astype(np.int32)
        given = self._quantized(node.input[0])
        used = self._add(f"{name}_input_zero", np.uint8(0 if self._fold else zero))
        if node.op_type != "Conv":
            integers = self._add(f"{name}_weight", np.ascontiguousarray(weight.T))
            self._emit("MatMulInteger", [given, integers, used], f"{name}_products")
            self._emit("Add", [f"{name}_products", self._add(f"{name}_bias", bias)], f"{name}_sum")
            self._emit("Cast", [f"{name}_sum"], f"{name}_float", to=1)
            step = self._add(f"{name}_scale", (float(scale) * scales).astype(np.float32))
            self._emit("Mul", [f"{name}_float", step], name)
            return
        pads = settings.get("pads", [])
        if self._fold and any(pads) and zero:
            # The border's 0 is the zero point, which the kernel no longer knows.
            edges = [0, 0, *pads[: len(pads) // 2], 0, 0, *pads[len(pads) // 2 :]]
            places = self._add(f"{name}_pads", np.array(edges, np.int64))
            self._emit("Pad", [given, places, self._add(f"{name}_border", zero)], f"{name}_padded")
            given, settings = f"{name}_padded", settings | {"pads": [0] * len(pads)}
        out_scale, out_zero = self._ranges[layer.output]
        names = [
            given, self._add(f"{name}_input_scale", scale), used,
            self._add(f"{name}_weight", weight),
            self._add(f"{name}_weight_scale", scales.astype(np.float32)),
            self._add(f"{name}_weight_zero", np.zeros(len(weight), np.int8)),
            self._add(f"{layer.output}_scale", out_scale),
            self._add(f"{layer.output}_zero", out_zero), self._add(f"{name}_bias", bias),
        ]  # fmt: skip
        twin = self._twins[layer.output] = f"{layer.output}_uint8"
        self._emit("QLinearConv", names, twin, **settings)
        self._emit("DequantizeLinear", [twin, *names[6:8]], layer.output)

    def _integers(self, name: str, kind: str, settings: Mapping[str, Any]) -> tuple[Array, Array]:
        """Weights as int8, outputs along the first axis, and the scale of each output."""
        turned = kind == "MatMul" or (kind == "Gemm" and not settings.get("transB", 0))
        found = self._levels.get(name)
        if found is not None and np.abs(found.values).max() <= _WEIGHT:
            self.own.append(name)
            values = found.values.T if turned else found.values
            return values.astype(np.int8), np.full(len(values), float(found.step))
        self.requantized.append(name)
        weight = self._constants[name].astype(np.float64)
        weight = weight.T if turned else weight
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        scales = np.where(largest > 0, largest, 1) / _WEIGHT
        shape = -1, *(1,) * (weight.ndim - 1)
        return np.rint(weight / scales.reshape(shape)).astype(np.int8), scales

    def _quantized(self, name: str) -> str:
        """The uint8 twin of a tensor, which is made if nothing has made it."""
        if name not in self._twins:
            scale, zero = self._ranges[name]
            inputs = [name, self._add(f"{name}_scale", scale), self._add(f"{name}_zero", zero)]
            self._emit("QuantizeLinear", inputs, f"{name}_uint8")
            self._twins[name] = f"{name}_uint8"
        return self._twins[name]

    def _add(self, name: str, value: Any) -> str:
        self._added[name] = np.asarray(value)
        return name

    def _emit(self, kind: str, inputs: list[str], output: str, **settings: Any) -> None:
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], **settings))

    def _used(self) -> list[Any]:
        """Nodes whose outputs lead to a result."""
        count = Counter(name for node in self._nodes for name in node.input)
        kept = []
        for node in reversed(self._nodes):
            if any(count[name] or name in self._results for name in node.output):
                kept.append(node)
            else:
                count.subtract(node.input)
        return kept[::-1]
