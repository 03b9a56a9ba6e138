"""Where in an unpickled PyTorch file the weights are.

Training scripts wrap the weights (``{"model": {...}, "epoch": 3}``). The dict is searched from the
top: a wrapper of a customary name, or the only entry that holds tensors, is entered; what lies
beside it is reported. Where several entries hold tensors, all of them are taken, nested names
joined by dots. Optimizer states are never taken. Nothing is dropped without being reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

#: customary names of the entry that holds the weights, the most telling first.
_WRAPPERS: Final = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
)


@dataclass(frozen=True, slots=True)
class Found:
    """Named tensors in file order, and every other entry as ``"name (what it is)"``."""

    tensors: dict[str, Any]
    skipped: list[str]


def find_tensors(root: object, tensor_class: type) -> Found:
    """Find the weights in what a PyTorch file holds.

    Parameters
    ----------
    root : object
        The unpickled file. A bare tensor is taken under the name ``tensor``.
    tensor_class : type
        What counts as a tensor (``torch.Tensor``).

    Returns
    -------
    Found
        Names are keys of the wrapped dict, as ``load_state_dict`` knows them.

    Raises
    ------
    RecursionError
        Dicts nested too deep.

    Examples
    --------
    >>> find_tensors({"model": {"w": 1.5}, "epoch": 3}, float)
    Found(tensors={'w': 1.5}, skipped=['epoch (int)'])
    """
    finder = _Finder(tensor_class)
    finder.find(root)
    return Found(finder.tensors, finder.skipped)


class _Finder:
    def __init__(self, tensor_class: type) -> None:
        self.tensors: dict[str, Any] = {}
        self.skipped: list[str] = []
        self._counts: dict[int, int] = {}
        self._entered: set[int] = set()
        self._tensor_class = tensor_class

    def find(self, root: object) -> None:
        if isinstance(root, self._tensor_class):
            self.tensors["tensor"] = root
            return
        if not isinstance(root, dict):
            self.skipped.append(f"the whole file ({_type_name(root)})")
            return
        node, prefix = root, ""
        while (key := self._wrapper(node)) is not None and id(node) not in self._entered:
            self._entered.add(id(node))
            for other, value in node.items():
                if other != key:
                    self._skip(f"{prefix}{other}", value)
            node, prefix = node[key], f"{prefix}{key}."
        self._take(node, "")

    def _wrapper(self, node: dict[Any, Any]) -> Any | None:
        """Key of the entry that wraps the weights, if the node itself is not what we want."""
        inner = [key for key, value in node.items() if self._worth_entering(value)]
        for name in _WRAPPERS:
            if name in inner:
                return name
        direct = any(isinstance(value, self._tensor_class) for value in node.values())
        return inner[0] if len(inner) == 1 and not direct else None

    def _take(self, node: dict[Any, Any], prefix: str) -> None:
        self._entered.add(id(node))
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, self._tensor_class):
                if name in self.tensors:
                    self.skipped.append(f"{name} (tensor; the name is taken)")
                else:
                    self.tensors[name] = value
            elif self._worth_entering(value) and id(value) not in self._entered:
                self._take(value, f"{name}.")
            else:
                self._skip(name, value)

    def _worth_entering(self, value: object) -> bool:
        if not isinstance(value, dict) or {"state", "param_groups"} <= value.keys():
            return False
        return self._count(value) > 0

    def _count(self, value: object) -> int:
        """Tensors at or below ``value``; each container is counted once, so loops end."""
        if isinstance(value, self._tensor_class):
            return 1
        if not isinstance(value, (dict, list, tuple)):
            return 0
        if id(value) not in self._counts:
            self._counts[id(value)] = 0
            inner = value.values() if isinstance(value, dict) else value
            # Lists are not entered for weights, so what they hold does not make a dict worth it.
            self._counts[id(value)] = sum(
                self._count(item) for item in inner if not isinstance(item, (list, tuple))
            )
        return self._counts[id(value)]

    def _skip(self, name: str, value: object) -> None:
        if isinstance(value, self._tensor_class):
            what = "tensor outside the weights"
        elif (count := self._count(value)) > 0:
            what = f"{_type_name(value)} with {count} tensor{'s' if count > 1 else ''}"
        else:
            what = _type_name(value)
        self.skipped.append(f"{name} ({what})")


def _type_name(value: object) -> str:
    return type(value).__name__
