"""Python and the native library agree, or the library is refused."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcomm import native
from jaxcomm.errors import TransportUnavailableError
from jaxcomm.native import constants, declarations, library
from jaxcomm.supervision import watchdog
from tests.jobs import ROOT

SOURCES = ROOT / "jaxcomm" / "native" / "src"


def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


LOADS = """
from jaxcomm import errors, native
from jaxcomm.native import constants, declarations
{change}
try:
    native.load()
except errors.TransportUnavailableError as error:
    print("refused:", error)
"""


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: "), done.stdout + done.stderr
    assert "make setup" in done.stdout
    assert "reinstall jaxcomm" in done.stdout
    return done.stdout


def test_what_is_installed_agrees() -> None:
    found = library.constants()
    assert constants.differences(found) == []
    assert found["exit.stalled"] == watchdog.STALLED
    assert library.names("counter")[:2] == ["calls", "nanoseconds"]
    assert library.names("dtype") == list(native.DTYPES)
    assert found["sizeof.NcclUniqueId"] == 128


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("constants.ABI += 1", "abi is 2 in the library and 3 in Python"),
        (
            "constants.OPS = ('sum', 'max', 'min', 'prod')",
            "op.max is 2 in the library and 1 in Python",
        ),
        (
            "constants.DTYPES = constants.DTYPES[:-1]",
            "dtype.complex128 is 14 in the library and unknown in Python",
        ),
        (
            "constants.MOVES += ('swap',)",
            "move.swap is unknown in the library and 4 in Python",
        ),
        ("constants.PLACE_BITS = 31", "place_bits is 32 in the library and 31"),
        ("constants.STALLED = 71", "exit.stalled is 70 in the library and 71"),
        ("constants.NCCL_OPS['avg'] = 5", "nccl_op.avg is 4 in the library and 5"),
        (
            "constants.Event *= 2",
            "sizeof.Event is 48 in the library and 96 in Python",
        ),
        (
            "declarations.FUNCTIONS['jaxcomm_of_tomorrow'] = (None, ())",
            "it has no jaxcomm_of_tomorrow",
        ),
    ],
)
def test_python_that_says_otherwise_is_told(change: str, said: str) -> None:
    assert said in refused(run(LOADS.format(change=change)))


TABLE = """
struct constant { const char* name; long long value; };
const struct constant* jaxcomm_constants(void) {
  static const struct constant table[] = {{"abi", 999}, {"place_bits", 32}, {0, 0}};
  return table;
}
"""
BEFORE_TABLES = "int jaxcomm_kernels(void) { return 0; }"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TABLE, "abi is 999 in the library and 2 in Python"),
        (BEFORE_TABLES, "it has no jaxcomm_constants"),
    ],
)
def test_another_library_is_refused(tmp_path: Path, text: str, said: str) -> None:
    other = tmp_path / "libother.so"
    (tmp_path / "other.cc").write_text(f'extern "C" {{\n{text}\n}}')
    line = ["c++", "-shared", "-fPIC", "-o", other, tmp_path / "other.cc"]
    subprocess.run(line, check=True)
    env = {library.LIBRARY_VARIABLE: str(other)}
    found = refused(run(LOADS.format(change=""), **env))
    assert said in found
    assert f"unset {library.LIBRARY_VARIABLE}" in found
    assert str(other) in found


def test_only_declared_functions_can_be_called() -> None:
    functions = vars(native.load())
    assert set(functions) == set(declarations.FUNCTIONS)
    for function in functions.values():
        assert function.argtypes is not None
    with pytest.raises(AttributeError):
        native.load().jaxcomm_undeclared  # noqa: B018
    with pytest.raises(ctypes.ArgumentError):
        native.load().jaxcomm_refuse("key", b"why")


def test_every_function_of_the_library_is_called_from_python() -> None:
    text = "".join(
        path.read_text()
        for folder in ("jaxcomm", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("declarations.py", Path(__file__).name)
    )
    called = set(re.findall(r"\.(jaxcomm_\w+)", text))
    called |= {"jaxcomm_constants", *declarations.HANDLERS}
    handlers = {n for n in declarations.FUNCTIONS if re.search(HANDLER_OF_NCCL, n)}
    assert called | handlers == set(declarations.FUNCTIONS)


HANDLER_OF_NCCL = r"jaxcomm_nccl_(graph_|host_)?(all_reduce|broadcast|move|rank)$"

# How a type of C++ is declared in Python; other pointers are POINTER(...) or c_void_p.
TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "double": ctypes.c_double,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "const char*": ctypes.c_char_p,
    "char*": ctypes.c_char_p,
    "AgreeFn": declarations.AGREE_FN,
    "DifferFn": declarations.DIFFER_FN,
    "PartitionFn": declarations.PARTITION_FN,
    "int64_t*": ctypes.POINTER(ctypes.c_int64),
    "char* const*": ctypes.POINTER(ctypes.c_void_p),
    "const int*": ctypes.POINTER(ctypes.c_int),
    "const MpiHandles*": ctypes.POINTER(constants.MpiHandles),
    "const Constant*": ctypes.POINTER(declarations.Constant),
    "Event*": ctypes.POINTER(constants.Event),
    # Bytes.
    "void*": ctypes.c_void_p,
    "NcclUniqueId*": ctypes.c_char_p,
    "const NcclUniqueId*": ctypes.c_char_p,
    # Handlers, whose address is all that Python needs.
    "XLA_FFI_Error*": ctypes.c_void_p,
    "XLA_FFI_CallFrame*": ctypes.c_void_p,
}


def signatures() -> dict[str, tuple[str, list[str]]]:
    """Return what the functions of the sources return, and their parameters' types."""
    found = {}
    for path in SOURCES.rglob("*.cc"):
        text = path.read_text()
        for match in re.finditer(
            r"JAXCOMM_API ([\w ]+\*?) ?(jaxcomm_\w+(?:##name)?)\(([^)]*)\)", text
        ):
            returned, name, parameters = match.groups()
            types = [
                re.sub(r"\s+", " ", re.sub(r"\w+$", "", part.strip())).strip()
                if not part.strip().endswith("*")
                else part.strip()
                for part in parameters.split(",")
                if part.strip()
            ]
            found[name] = (returned.strip(), types)
    return found


def test_declarations_are_those_of_the_sources() -> None:
    found = signatures()
    named = {n: s for n, s in found.items() if not n.endswith("##name")}
    declared = {
        name: declaration
        for name, declaration in declarations.FUNCTIONS.items()
        if name in named or not re.search(HANDLER_OF_NCCL, name)
    }
    assert set(named) == set(declared)
    for name, (returned, parameters) in named.items():
        wanted = TYPES[returned], tuple(TYPES[type_] for type_ in parameters)
        assert declared[name] == wanted, name


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY_NAME", "libnowhere.so")
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    with pytest.raises(TransportUnavailableError, match="has not been built"):
        library.library_path()


def test_a_library_that_is_not_there_is_named() -> None:
    code = "from jaxcomm import native; native.load()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAXCOMM_NATIVE_LIBRARY": "/nowhere/lib.so"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "TransportUnavailableError: the native library /nowhere/lib.so" in (
        done.stderr
    )
    assert "unset JAXCOMM_NATIVE_LIBRARY" in done.stderr
