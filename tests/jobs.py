"""Start jobs of several ranks, each with a time limit."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]

Launch = Callable[..., "subprocess.CompletedProcess[str]"]

# The ranks of all jobs compile the same small programs over and over: most of the time
# of a test. JAX has been imported, so this holds for other processes than this one.
assert jax.__version__
_compiled = tempfile.mkdtemp(prefix="jaxcomm-compiled-")
atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# LLVM's optimiser takes half of what is left. XLA's own passes, which decide what the
# tests are about (fusion, aliasing, order of calls), all run.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", QUICKLY)


def launch_ranks(
    ranks: int | None,
    command: Sequence[str | Path],
    *,
    timeout: float = 120,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `jaxcomm run`; after `timeout` it dumps all stacks and exits with 124."""
    line = [sys.executable, "-m", "jaxcomm", "run"]
    line += ["-n", str(ranks)] if ranks else []
    line += ["--timeout", str(timeout), *options, *map(str, command)]
    return subprocess.run(
        line,
        cwd=ROOT,
        # Plans must not depend on what was tuned on this machine.
        env={**os.environ, "JAXCOMM_PROFILE": "off", **(env or {})},
        capture_output=True,
        text=True,
        # The launcher's own limit comes first; this one only guards the guard.
        timeout=timeout + 30,
        check=False,
    )


def settle(processes: Sequence[subprocess.Popen[str]], timeout: float) -> list[int]:
    """Wait until processes have ended, one has failed or time is up; kill the others.

    Returns:
      Which had to be killed.
    """
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        if any(p.returncode for p in processes):
            time.sleep(0.3)  # the others' messages
            break
        time.sleep(0.01)
    late = [number for number, p in enumerate(processes) if p.poll() is None]
    for process in processes:
        process.kill()
    return late


@functools.cache
def fake_nccl() -> Path:
    """Compile the stand-in for NCCL and CUDA's driver (native/fake_*.cc), once."""
    folder = tempfile.mkdtemp(prefix="jaxcomm-fake-nccl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder) / "libfake_nccl.so"
    source = sorted((ROOT / "tests" / "native").glob("fake_*.cc"))
    flags = "-std=c++17 -O2 -shared -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
    line = ["c++", *flags.split(), "-o", library, *source, "-lrt", "-pthread"]
    subprocess.run(line, check=True)
    return library


def on_fake_nccl(**more: str) -> dict[str, str]:
    """Return the environment in which transport "nccl" runs on the stand-in."""
    return {
        "JAXCOMM_NCCL_LIBRARY": str(fake_nccl()),
        "JAXCOMM_NCCL_HOST_MEMORY": "1",
        "FAKE_NCCL_WANTS_DEVICE": "0",
        **more,
    }


def documented(heading: str) -> str:
    """Return the first piece of Python under a heading of docs/reliability.md."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    section = text[text.index(f"\n## {heading}\n") :]
    return section.split("```python\n", 1)[1].split("```", 1)[0]
