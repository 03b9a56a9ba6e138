"""ONNX files as protobuf lays them out, so that weights need not pass through memory together.

Encoding: https://protobuf.dev/programming-guides/encoding/. A model is a message whose field 7 is
the graph, whose fields 5 are initializers, whose field 9 holds the bytes of their elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from weightvid.errors import CheckpointError

GRAPH: Final = 7
INITIALIZER: Final = 5
RAW_DATA: Final = 9
#: wire type of messages, strings and bytes, and sizes of the others that are fixed.
_LENGTH: Final = 2
_FIXED: Final = {1: 8, 5: 4}
_VARINT: Final = 0
_VARINT_BYTES: Final = 10
#: smaller data stay in the model.
_LEAST_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its number, and where it, its value and what follows begin in the file."""

    number: int
    wire: int
    begin: int
    value: int
    end: int


@dataclass(frozen=True, slots=True)
class Scan:
    """A model without the bytes of its initializers.

    Attributes
    ----------
    model : bytes
    places : mapping of int to (int, int)
        Number of an initializer -> offset and size of its elements in the file.
    """

    model: bytes
    places: dict[int, tuple[int, int]]


def scan(file: BinaryIO) -> Scan:
    """Take the initializers' elements out of a model; reads everything else.

    Raises
    ------
    CheckpointError
        It is no such message, or it is cut short.
    """
    size = file.seek(0, 2)
    places: dict[int, tuple[int, int]] = {}
    count = 0
    model = bytearray()
    for field in _fields(file, 0, size):
        if (field.number, field.wire) != (GRAPH, _LENGTH):
            model += _bytes(file, field.begin, field.end)
            continue
        graph = bytearray()
        for part in _fields(file, field.value, field.end):
            if (part.number, part.wire) != (INITIALIZER, _LENGTH):
                graph += _bytes(file, part.begin, part.end)
                continue
            tensor = bytearray()
            for item in _fields(file, part.value, part.end):
                length = item.end - item.value
                if (item.number, item.wire) == (RAW_DATA, _LENGTH) and length >= _LEAST_BYTES:
                    places[count] = (item.value, length)
                else:
                    tensor += _bytes(file, item.begin, item.end)
            graph += lead(INITIALIZER, len(tensor)) + tensor
            count += 1
        model += lead(GRAPH, len(graph)) + graph
    return Scan(bytes(model), places)


def lead(number: int, length: int) -> bytes:
    """What stands before the value of a message, a string or bytes.

    Examples
    --------
    >>> lead(GRAPH, 300).hex()
    '3aac02'
    """
    return varint(number << 3 | _LENGTH) + varint(length)


def varint(value: int) -> bytes:
    """A number in as few bytes as it takes, seven bits each, lowest first."""
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _fields(file: BinaryIO, begin: int, end: int) -> Iterator[Field]:
    at = begin
    while at < end:
        file.seek(at)
        head = file.read(min(2 * _VARINT_BYTES, end - at))
        key, used = _take(head, 0)
        number, wire = key >> 3, key & 7
        value = at + used
        if wire == _LENGTH:
            length, used = _take(head, used)
            value = at + used
            stop = value + length
        elif wire == _VARINT:
            stop = at + _take(head, used)[1]
        elif wire in _FIXED:
            stop = value + _FIXED[wire]
        else:
            raise CheckpointError(f"a field of unknown wire type {wire} at byte {at}")
        if stop > end or number == 0:
            raise CheckpointError(f"it is damaged or cut short at byte {at}")
        yield Field(number, wire, at, value, stop)
        at = stop


def _take(data: bytes, at: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : at + _VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise CheckpointError("it is damaged or cut short inside a number")


def _bytes(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)
