"""One rank: run the examples of public docstrings, or those of a file.

doctest_ranks.py            the public API of jaxcomm
doctest_ranks.py page.md    its blocks of Python, each after the first, which imports
doctest_ranks.py module.py  the docstrings of a module

A rank whose example fails ends the job, with the example's name. Else the ranks would
wait for each other in different examples.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import signal
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm

# Beside the first four, which the package's docstring promises, modules whose names say
# what they are.
NAMES = {
    "jax": jax,
    "jaxcomm": jaxcomm,
    "jnp": jnp,
    "np": np,
    "functools": functools,
    "signal": signal,
    "sys": sys,
    "Path": Path,
}
ADAPTERS = ("checkpoint", "data", "flax", "optax")


def public() -> dict[str, Any]:
    """Return every public function and class, which must have an example.

    `jaxcomm.errors` has one for all its classes.
    """
    found = {k: getattr(jaxcomm, k) for k in dir(jaxcomm) if k not in ADAPTERS}
    for name in ADAPTERS:
        module = importlib.import_module(f"jaxcomm.{name}")
        again = re.findall(r"import (\w+) as \1$", inspect.getsource(module), re.M)
        for key, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__
            named = callable(value) and not key.startswith("_")
            if key in again or (own and named):
                found[f"{name}.{key}"] = value
    return found


def of_object(name: str, value: Any) -> list[doctest.DocTest]:
    """Return the docstrings with examples of a function, or a class and its methods."""
    module = inspect.getmodule(inspect.unwrap(value))
    if inspect.ismodule(value):
        # Its functions and classes come by their own names.
        value = types.SimpleNamespace(__doc__=value.__doc__, __name__=name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = finder.find(value, name, module, globs=dict(NAMES))
    return [test for test in tests if test.examples]


def of_package() -> list[doctest.DocTest]:
    """Return the docstrings with examples of all that is public."""
    whole = {**{name: getattr(jaxcomm, name) for name in ADAPTERS}, **public()}
    return [test for name in sorted(whole) for test in of_object(name, whole[name])]


def of_module(path: Path) -> list[doctest.DocTest]:
    """Return the docstrings with examples of a Python file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = doctest.DocTestFinder().find(module, globs=dict(NAMES))
    return [test for test in tests if test.examples]


def blocks(path: Path) -> list[tuple[int, str]]:
    """Return the blocks of Python of a page, with the numbers of their first lines."""
    text = path.read_text()
    return [
        (text.count("\n", 0, match.start(1)) + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


@contextlib.contextmanager
def shared_folder() -> Iterator[None]:
    """Go to a new folder, the same on all ranks; they come here and leave together."""
    comm, before = jaxcomm.world(), Path.cwd()
    folder = comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else "")
    os.chdir(folder)
    yield
    os.chdir(before)
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


def run_docstring(test: doctest.DocTest) -> None:
    """Run the examples of one docstring; an AssertionError names it and the line."""
    said: list[str] = []
    # After a failure this rank may not be where the others are.
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.FAIL_FAST)
    with shared_folder():
        runner.run(test, out=said.append)
        if runner.failures:
            text = "".join(said)
            raise AssertionError(
                f"rank {jaxcomm.rank()}: the example of {test.name}:\n{text}"
            )


def run_page(path: Path) -> int:
    """Run the blocks of a page; an error's traceback has the page and the line."""
    found = blocks(path)
    head: dict[str, Any] = {}
    for number, (line, text) in enumerate(found):
        # Their first line is where it is in the page.
        code = compile("\n" * (line - 1) + text, str(path), "exec")
        with shared_folder():
            exec(code, names := dict(head))
        if number == 0:
            head = names
    return len(found)


def main(arguments: list[str]) -> None:
    warnings.simplefilter("error")
    jaxcomm.init()
    path = Path(arguments[0]) if arguments else None
    if path is not None and path.suffix == ".md":
        done = run_page(path)
    else:
        tests = of_package() if path is None else of_module(path)
        for test in tests:
            run_docstring(test)
        done = len(tests)
    print(f"rank {jaxcomm.rank()} ran {done} examples")


if __name__ == "__main__":
    main(sys.argv[1:])
