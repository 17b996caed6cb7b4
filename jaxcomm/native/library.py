"""Find and load the native library (C ABI, through ctypes)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import types
from pathlib import Path
from typing import Any

import jax

from jaxcomm.errors import TransportUnavailableError
from jaxcomm.native.constants import differences
from jaxcomm.native.declarations import FUNCTIONS, HANDLERS

LIBRARY_NAME = "libjaxcomm_native.so"
# Another build of the library, such as one with sanitizers.
LIBRARY_VARIABLE = "JAXCOMM_NATIVE_LIBRARY"

_TEXT_BYTES = 4096  # of what went wrong


def library_path() -> Path:
    """Return where the native library is.

    Raises:
      TransportUnavailableError: it was not built (a bare source tree).
    """
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        return Path(chosen)
    # An editable install keeps sources and build products in two folders, and
    # both stand in the package's path.
    spec = importlib.util.find_spec("jaxcomm.native")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / LIBRARY_NAME
        if path.exists():
            return path
    raise TransportUnavailableError(
        f"{LIBRARY_NAME} is not beside the package; the native library has not been "
        "built. Install the package (`pip install .`, or `make setup` in a checkout)."
    )


@functools.cache
def _opened() -> ctypes.CDLL:
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise TransportUnavailableError(
            f"the native library {path} cannot be loaded: {error}. Build it again "
            f"(`make setup` in a checkout, else reinstall jaxcomm), or unset "
            f"{LIBRARY_VARIABLE} if that names it."
        ) from error


@functools.cache
def constants() -> dict[str, int]:
    """Return the library's constants, by their names in core/constants.cc.

    Raises:
      TransportUnavailableError: they are not those that Python was written for.
    """
    table = _declared("jaxcomm_constants")()
    rows = map(table.__getitem__, itertools.count())
    rows = itertools.takewhile(lambda row: row.name is not None, rows)
    found = {row.name.decode(): row.value for row in rows}
    if wrong := differences(found):
        raise _refusal("; ".join(wrong))
    return found


def names(group: str) -> list[str]:
    """Return the names of a group of constants whose values are 0, 1, 2 and so on."""
    members = {
        value: name.partition(".")[2]
        for name, value in constants().items()
        if name.partition(".")[0] == group
    }
    return [members[k] for k in range(len(members))]


@functools.cache
def load() -> types.SimpleNamespace:
    """Load the library and register its handlers with XLA; once per process.

    Returns:
      Its functions, those that are declared.
    """
    constants()  # what differs is refused before anything else is called
    functions = {name: _declared(name) for name in FUNCTIONS}
    for name in HANDLERS:
        register(name, functions[name], "cpu")
    return types.SimpleNamespace(**functions)


def register(target: str, handler: Any, platform: str) -> None:
    """Let programs for a platform call a handler."""
    capsule = jax.ffi.pycapsule(handler)
    jax.ffi.register_ffi_target(target, capsule, platform=platform)


def told(function: Any, *arguments: Any) -> str:
    """Call a function that may say what went wrong; return that, or ""."""
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    failed = function(*arguments, text, len(text))
    return text.value.decode(errors="replace") if failed else ""


def call(function: Any, *arguments: Any, what: str = "") -> None:
    """Call a function that may say what went wrong.

    Raises:
      TransportUnavailableError: it did; `what` is then what failed.
    """
    if why := told(function, *arguments):
        raise TransportUnavailableError(f"{what}: {why}" if what else why)


def _declared(name: str) -> Any:
    try:
        function = getattr(_opened(), name)
    except AttributeError:
        raise _refusal(f"it has no {name}") from None
    function.restype, function.argtypes = FUNCTIONS[name]
    return function


def _refusal(why: str) -> TransportUnavailableError:
    return TransportUnavailableError(
        f"{library_path()} was built from other sources than this Python package: "
        f"{why}. Build it again (`make setup` in a checkout, else reinstall jaxcomm)"
        + (f", or unset {LIBRARY_VARIABLE}" if LIBRARY_VARIABLE in os.environ else "")
        + "."
    )
