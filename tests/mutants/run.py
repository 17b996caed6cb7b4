"""Plant known mistakes, one at a time, and see that the tests notice: `make mutants`.

Every `*.patch` here is a small mistake with, above the diff, what it is and which tests
should see it:

    mistake: the last segment of a mean is left undivided
    tests: tests/transports/test_segments.py::test_means_over_many_segments[apart-2]

Tests are separated by blanks outside of brackets, or stand on more such lines. They
are run on an unchanged copy of the source tree first, where they must pass, and then on
a copy with the mistake, where one must fail. A patch that does not apply is an error:
write it anew. Add one whenever a defect is repaired.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = (
    "CMakeLists.txt",
    "Makefile",
    "README.md",
    "benchmarks",
    "docs",
    "examples",
    "jaxcomm",
    "pyproject.toml",
    "tests",
)
# What some tests of two seconds take when two jobs share the machine; a mistake that
# makes ranks wait for each other is ended by the watchdog.
LIMIT = 900
ABORT_AFTER = 40

# Read by every Python that starts under PYTHONPATH, ranks too. The finder of an
# editable installation comes before all paths; without it, the copy is imported.
GUARD = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
"""
WHERE = "import jaxcomm; print('jaxcomm is', jaxcomm.__file__, flush=True)"


class Unusable(Exception):
    """A mutant that says nothing about the tests; the text says why."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
      name: of its file, without the suffix.
      mistake: what it is, in words.
      tests: pytest's names of those that should see it.
      text: the patch.
      native: whether it changes the native library.
    """

    name: str
    mistake: str
    tests: tuple[str, ...]
    text: str
    native: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of some tests."""

    failed: tuple[str, ...]
    passed: int
    output: str


def read(path: Path) -> Mutant:
    """Read a patch and what stands above it."""
    text = path.read_text()
    head = text.split("\ndiff ", 1)[0].splitlines()
    said = [line.split(": ", 1) for line in head if ": " in line]
    mistake = " ".join(value for key, value in said if key == "mistake")
    # A blank within a name stands between brackets.
    tests = [
        test
        for key, value in said
        if key == "tests"
        for test in re.findall(r"[^\s\[]+(?:\[[^\]]*\])?", value)
    ]
    changed = re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE)
    if not mistake or not tests or not changed:
        raise Unusable(f"{path.name} lacks 'mistake:', 'tests:' or a diff")
    native = any(name.endswith((".cc", ".h", ".txt")) for name in changed)
    return Mutant(path.stem, mistake, tuple(tests), text, native)


class Copy:
    """A copy of the source tree, in which tests run as in a checkout."""

    def __init__(self, folder: Path, stop: threading.Event):
        self._stop = stop
        self.folder = folder / "jaxcomm"
        self._build = folder / "build"
        self._guard = folder / "guard"
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "mutants")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.folder / name, ignore=ignored)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, self.folder)
        self._guard.mkdir()
        (self._guard / "sitecustomize.py").write_text(GUARD)
        compiled = folder.parent / "compiled"
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self._guard), str(self.folder)]),
            "PYTHONDONTWRITEBYTECODE": "1",  # a patch may come within a second
            "JAXCOMM_NATIVE_LIBRARY": str(installed_library()),
            "JAXCOMM_ABORT_AFTER": str(ABORT_AFTER),
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "GIT_CEILING_DIRECTORIES": str(self.folder.parent),
        }
        self._check_import()

    def _run(
        self, line: Sequence[str | Path], **more: str
    ) -> subprocess.CompletedProcess[str]:
        if self._stop.is_set():
            raise concurrent.futures.CancelledError
        return subprocess.run(
            list(map(str, line)),
            cwd=self.folder,
            env={**self._env, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def _check_import(self) -> None:
        """Insist that this process's children, and ranks, import the copy."""
        script = self.folder.parent / "where.py"
        script.write_text(WHERE)
        ranks = ["-m", "jaxcomm", "run", "-n", "2", "--timeout", "120", script]
        wanted = f"jaxcomm is {self.folder / 'jaxcomm' / '__init__.py'}\n"
        for line, times in (([script], 1), (ranks, 2)):
            done = self._run([sys.executable, *line])
            if done.stdout.count(wanted) != times:
                raise Unusable(f"another jaxcomm than the copy is run:\n{done.stdout}")

    def apply(self, mutant: Mutant, *options: str) -> None:
        """Apply a patch; with "--check" or "-R", see whether it would, or undo it."""
        done = subprocess.run(
            ["git", "apply", *options],
            cwd=self.folder,
            env=self._env,
            input=mutant.text,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Unusable(f"the patch does not apply: {done.stderr.strip()}")

    def build(self) -> Path:
        """Build the native library, all of it once and then what has changed."""
        cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
        if not (self._build / "CMakeCache.txt").exists():
            line = [cmake, "-S", self.folder, "-B", self._build]
            line += ["-DCMAKE_BUILD_TYPE=Release"]
            line += [f"-DPython3_EXECUTABLE={sys.executable}"]
            self._must(line)
        self._must([cmake, "--build", self._build, "--parallel", "2"])
        return self._build / "libjaxcomm_native.so"

    def _must(self, line: Sequence[str | Path]) -> None:
        done = self._run(line)
        if done.returncode != 0:
            raise Unusable(f"{line[0]} failed:\n{done.stdout[-3000:]}")

    def test(self, tests: tuple[str, ...], library: Path | None = None) -> Outcome:
        """Run some tests."""
        report = self.folder.parent / "report.xml"
        report.unlink(missing_ok=True)
        more = {"JAXCOMM_NATIVE_LIBRARY": str(library)} if library else {}
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        line += ["-p", "no:xdist", "-m", "", f"--junitxml={report}", *tests]
        try:
            done = self._run(line, **more)
        except subprocess.TimeoutExpired:
            return Outcome(("(time is up)",), 0, "")
        # 0: all passed; 1: some failed. Else pytest did not come to run them.
        if done.returncode not in (0, 1):
            raise Unusable(f"pytest ended with {done.returncode}:\n{done.stdout}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        kinds = {case: {child.tag for child in case} for case in cases}
        failed = tuple(
            str(case.get("name"))
            for case, tags in kinds.items()
            if tags & {"failure", "error"}
        )
        ran = sum("skipped" not in tags for tags in kinds.values())
        return Outcome(failed, ran - len(failed), done.stdout)


def installed_library() -> Path:
    """Return the native library of the installation, which is that of the sources."""
    from jaxcomm import native

    return native.library_path()


def try_one(copy: Copy, mutant: Mutant) -> Outcome:
    """Run a mutant's tests with its mistake in place, and take it out again."""
    copy.apply(mutant)
    try:
        return copy.test(mutant.tests, copy.build() if mutant.native else None)
    finally:
        copy.apply(mutant, "-R")


def say(name: str, word: str, seconds: float, more: str) -> None:
    """Print a line of the table."""
    print(f"{name:34} {word:9} {seconds:5.0f} s  {more}", flush=True)


def work(
    copy: Copy, waiting: queue.Queue[Mutant], passes: dict[str, bool], show: bool
) -> list[str]:
    """Try mutants until there are no more; return the names of the bad ones."""
    bad = []
    while True:
        try:
            mutant = waiting.get_nowait()
        except queue.Empty:
            return bad
        start, outcome = time.monotonic(), Outcome((), 0, "")
        try:
            broken = [test for test in mutant.tests if not passes[test]]
            if broken:
                raise Unusable(f"without the mistake, fails or is skipped: {broken}")
            outcome = try_one(copy, mutant)
            word = "noticed" if outcome.failed else "SURVIVED"
            more = outcome.failed[0] if outcome.failed else mutant.mistake
        except Unusable as error:
            word, more = "UNUSABLE", str(error)
        if word != "noticed":
            bad.append(mutant.name)
        say(mutant.name, word, time.monotonic() - start, more)
        if show and word == "noticed":
            print(outcome.output, flush=True)


def unchanged(copy: Copy, tests: list[str], passes: dict[str, bool]) -> None:
    """Note which tests pass without any mistake."""
    for test in tests:
        start = time.monotonic()
        outcome = copy.test((test,))
        passes[test] = outcome.passed > 0 and not outcome.failed
        word = "passes" if passes[test] else "FAILS"
        say("(no mistake)", word, time.monotonic() - start, test)
        if not passes[test]:
            print(outcome.output[-6000:], flush=True)


@contextlib.contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """On Ctrl-C and SIGTERM, let the tests that run be the last."""
    try:
        yield
    except BaseException:
        stop.set()
        raise


def main() -> int:
    """Try all mutants, or those that are named; 1 where a mistake went unnoticed."""
    parser = argparse.ArgumentParser(
        description="Plant known mistakes, one at a time; the tests must notice each."
    )
    parser.add_argument("names", nargs="*", help="of patches; all by default")
    parser.add_argument(
        "--check", action="store_true", help="only see whether the patches apply"
    )
    parser.add_argument(
        "--show", action="store_true", help="print what the tests say of a mistake"
    )
    arguments = parser.parse_args()
    known = {path.stem: path for path in sorted(HERE.glob("*.patch"))}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"no such mutant: {', '.join(unknown)}; there are {[*known]}")
    mutants = [read(known[name]) for name in arguments.names or known]

    stop = threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="jaxcomm-mutants-") as folder:
        copies = [Copy(Path(folder, name), stop) for name in ("first", "second")]
        stale = []
        for mutant in mutants:
            try:
                copies[0].apply(mutant, "--check")
            except Unusable as error:
                stale.append(mutant.name)
                say(mutant.name, "UNUSABLE", 0, str(error))
        if arguments.check or stale:
            return bool(stale)

        # One copy takes all that change the native library: it is built in one place.
        native, others = queue.Queue[Mutant](), queue.Queue[Mutant]()
        for mutant in mutants:
            (native if mutant.native else others).put(mutant)
        tests = list(dict.fromkeys(test for m in mutants for test in m.tests))
        passes: dict[str, bool] = {}
        start = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(2) as pool, stopping(stop):
            first = [
                pool.submit(unchanged, copy, tests[k::2], passes)
                for k, copy in enumerate(copies)
            ]
            for each in first:
                each.result()
            runs = [
                pool.submit(
                    lambda: [
                        *work(copies[0], native, passes, arguments.show),
                        *work(copies[0], others, passes, arguments.show),
                    ]
                ),
                pool.submit(work, copies[1], others, passes, arguments.show),
            ]
            bad = [name for run in runs for name in run.result()]
        minutes = (time.monotonic() - start) / 60
        print(
            f"{len(mutants) - len(bad)} of {len(mutants)} mistakes were noticed, in "
            f"{minutes:.0f} minutes" + (f"; not: {', '.join(bad)}" if bad else "")
        )
        return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
