"""What commands print where there is no terminal: whole words, and no codes."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm import terminal
from jaxcomm.launch import cli, doctor
from jaxcomm.launch.finding import Finding
from stemdl.__main__ import main as stemdl
from tests.jobs import ROOT, Launch

BENCHMARKS = sorted(p.parent.name for p in ROOT.glob("benchmarks/*/__main__.py"))
SHAPES = '{"a layer of a very long name": {"shape": [300, 300], "dtype": "float32"}}'


def printed(*arguments: str) -> str:
    """What `python -m` prints to a pipe; the same at all widths of a terminal."""
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color"}
    found = set()
    for width in ({}, {"COLUMNS": "40"}):
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=env | width,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        found.add(done.stdout)
    assert len(found) == 1, found
    text = found.pop()
    assert "\x1b" not in text
    return text


@contextlib.contextmanager
def pseudo_terminal(columns: int) -> Iterator[io.TextIOBase]:
    """The side of a pseudo-terminal that a program prints to."""
    control, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        with os.fdopen(slave, "w") as stream:
            yield stream
    finally:
        os.close(control)


def commands() -> list[tuple[str, click.Command]]:
    named = [(f"jaxcomm {name}", one) for name, one in cli.main.commands.items()]
    handed_over = ("jaxcomm demo", "jaxcomm bench")
    found = [("jaxcomm", cli.main), *(x for x in named if x[0] not in handed_over)]
    found.append(("python -m stemdl", stemdl))
    context = click.Context(stemdl)
    for name in stemdl.list_commands(context):
        command = stemdl.get_command(context, name)
        assert command is not None
        found.append((f"python -m stemdl {name}", command))
    for name in BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}.__main__")
        if isinstance(module.main, click.Command):
            found.append((f"python -m benchmarks.{name}", module.main))
    return found


COMMANDS = commands()


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_help(name: str) -> None:
    command = dict(COMMANDS)[name]
    assert len(COMMANDS) > 20
    # With pytest -s there is a terminal.
    settings: dict[str, Any] = terminal.HELP | {"terminal_width": 78}
    done = CliRunner().invoke(command, ["-h"], prog_name=name, **settings)
    assert done.exit_code == 0, done.output
    first, *lines = done.output.splitlines()
    assert first.startswith(f"Usage: {name} ")
    assert max(map(len, lines)) < 80, done.output
    # What does not fit is cut with dots.
    assert not any(line.endswith("...") for line in lines), done.output
    shown = set(done.output.split())
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert set((option.help or "").split()) <= shown, option.help


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_take_h_by_themselves(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}.__main__")
    if isinstance(module.main, click.Command):
        assert CliRunner().invoke(module.main, ["-h"]).exit_code == 0


def test_help_in_a_pipe() -> None:
    assert "CUDA_VISIBLE_DEVICES" in printed("jaxcomm", "run", "-h")
    assert printed("jaxcomm", "--help").startswith("Usage: jaxcomm [OPTIONS]")
    assert printed("stemdl", "-h").startswith("Usage: python -m stemdl [OPTIONS]")
    gpu = printed("benchmarks.gpu", "-h")
    assert gpu.startswith("usage: python -m benchmarks.gpu [-h]")
    assert "benchmarks/gpu/gpu.sh" in gpu


def test_plan_and_simulate_in_a_pipe(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text(SHAPES)
    plan = printed("jaxcomm", "plan", "--shapes", str(shapes))
    assert plan.splitlines()[2].endswith("['a layer of a very long name']")
    options = ("--ranks", "6", "--steps", "1", "--samples", "0")
    simulation = printed("jaxcomm", "simulate", *options)
    assert "cache+groups" in simulation
    assert "step time over DDP's [resnet50]" in simulation


TEXTS = st.lists(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=1
).map(" ".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_the_doctor_prints_what_it_found(texts: list[tuple[str, str]]) -> None:
    rows = [Finding("part", "warn", found, remedy) for found, remedy in texts]
    rows.append(Finding("MPI", "missing", "x" * 300, "pip install 'jaxcomm[mpi]'"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        doctor._print(rows)
    lines = out.getvalue().splitlines()
    assert lines[0] == "jaxcomm doctor"
    shown = [[cell.strip() for cell in line.split("│")] for line in lines]
    cells = [row[3:5] for row in shown if len(row) == 6]
    assert cells == [[row.found, row.remedy] for row in rows]


def test_a_terminal_is_asked_for_its_width() -> None:
    with pseudo_terminal(80) as stream, contextlib.redirect_stdout(stream):
        assert terminal.is_terminal(sys.stdout)
        assert terminal.console().is_terminal


def test_a_terminal_without_a_size_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with pseudo_terminal(0) as stream, contextlib.redirect_stdout(stream):
        assert not terminal.is_terminal(sys.stdout)
        assert not terminal.console().is_terminal


PRINTS = """
import rich.console
from jaxcomm import terminal
console = terminal.console()
terminal.heading(console, "a title")
console.print("word " * 100, style="bold red")
terminal.markdown(console, "| a | b |")
rich.console.Console().print("red", style="bold red")
"""


def test_ranks_print_no_codes(job: Launch) -> None:
    done = job(2, PRINTS, env={"TERM": "xterm-256color", "COLUMNS": "40"})
    assert done.returncode == 0, done.stderr
    for line in ("a title", "word " * 100, "| a | b |", "red"):
        assert done.stdout.splitlines().count(line) == 2, done.stdout
    assert "\x1b" not in done.stdout
