"""Python objects as bytes that are safe to read from anywhere.

For places where others may write: reading a pickle there would run their code. What is
read here can only become one of the types below. The form is JSON, with the bytes and
arrays behind it in the order in which the JSON names them.
"""

from __future__ import annotations

import json
import math
from typing import Any, cast

import numpy as np

from jaxcomm.errors import InvalidTreeError, JaxcommError
from jaxcomm.planning.costs import CostModel

_SCALARS = (bool, int, float, str, type(None))
_LENGTH = 8


def encode(obj: Any) -> bytes:
    """Return an object as bytes.

    Exactly these types come back as they were: None, bool, int, float, str, bytes,
    list, tuple, dict, NumPy arrays and scalars that hold no Python objects, CostModel.

    Raises:
      InvalidTreeError: something in the object is of another type.
    """
    blobs: list[bytes] = []
    text = json.dumps(_plain(obj, "obj", blobs), separators=(",", ":")).encode()
    return b"".join([len(text).to_bytes(_LENGTH, "big"), text, *blobs])


def decode(data: bytes) -> Any:
    """Return what `encode` was given.

    Raises:
      JaxcommError: `encode` did not write this.
    """
    try:
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
        if end > len(data):
            raise ValueError("it is too short")
        reader = _Reader(data, end)
        obj = reader.object(json.loads(data[_LENGTH:end]))
        if not reader.at_end():
            raise ValueError("it is too long")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise JaxcommError(
            f"a message between ranks cannot be read ({error}); another program writes "
            "to the same place, or the ranks run different versions of jaxcomm"
        ) from error
    return obj


def _plain(obj: Any, path: str, blobs: list[bytes]) -> Any:
    # By exact type: of a subclass, as a named tuple or an enum, only the base would
    # come back.
    kind = cast("type[Any]", type(obj))
    if kind in _SCALARS:
        return obj
    if kind is bytes:
        blobs.append(obj)
        return ["bytes", len(obj)]
    if kind is list or kind is tuple:
        items = (_plain(x, f"{path}[{k}]", blobs) for k, x in enumerate(obj))
        return [kind.__name__, *items]
    if kind is dict:
        tree: list[Any] = ["dict"]
        for key, value in obj.items():
            tree.append(_plain(key, f"{path}, key {key!r}", blobs))
            tree.append(_plain(value, f"{path}[{key!r}]", blobs))
        return tree
    if kind is CostModel:
        return ["CostModel", obj.to_json()]
    if kind is np.ndarray or isinstance(obj, np.generic):
        array = cast("Any", obj)
        name = _dtype_name(array.dtype)
        if name is not None:
            blobs.append(array.tobytes())
            form = "array" if kind is np.ndarray else "scalar"
            return [form, name, list(array.shape)]
    raise InvalidTreeError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which cannot be sent: "
        "without MPI, objects travel over a network port that is open to others and "
        "are not pickled. Send None, bool, int, float, str, bytes, NumPy arrays of "
        "numbers, and lists, tuples and dicts of these: numpy.asarray(x) for a JAX "
        "array, dataclasses.asdict(x) for a dataclass."
    )


def _dtype_name(dtype: np.dtype) -> str | None:
    """Return what np.dtype makes this dtype of, if it holds plain values."""
    # JAX's own, as bfloat16, have no letter: their `str` says only how wide they are.
    name = dtype.str if dtype.kind in "biufcSUmM" else dtype.name
    try:
        return name if np.dtype(name) == dtype and not dtype.hasobject else None
    except TypeError:
        return None


class _Reader:
    def __init__(self, data: bytes, at: int):
        self._data, self._at = data, at

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def object(self, tree: Any) -> Any:
        if type(tree) in _SCALARS:
            return tree
        match tree:
            case ["list", *items]:
                return [self.object(x) for x in items]
            case ["tuple", *items]:
                return tuple([self.object(x) for x in items])
            case ["dict", *items]:
                every = [self.object(x) for x in items]
                return dict(zip(every[::2], every[1::2], strict=True))
            case ["bytes", int(length)]:
                return self._take(length)
            case ["array", str(name), list()]:
                return self._array(name, tree[2])
            case ["scalar", str(name), []]:
                return self._array(name, [])[()]
            case ["CostModel", str(text)]:
                return CostModel.from_json(text)
            case _:
                pass
        raise ValueError(f"unknown form {str(tree[:1])[:40]}")

    def _array(self, name: str, shape: list[int]) -> np.ndarray:
        dtype = np.dtype(name)
        data = self._take(math.prod(shape) * dtype.itemsize)
        if not data:
            return np.zeros(shape, dtype)
        return np.frombuffer(data, dtype).reshape(shape).copy()

    def _take(self, length: int) -> bytes:
        start, self._at = self._at, self._at + length
        if length < 0 or self._at > len(self._data):
            raise ValueError("it is too short")
        return self._data[start : self._at]
