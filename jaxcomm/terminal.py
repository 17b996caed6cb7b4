"""What commands print for people: to a terminal, or as plain text to a file or pipe.

Rich and click ask the environment how wide a line may be and whether codes are
understood, wherever the text goes. Here it depends on where it goes: what is no
terminal gets no codes and whole lines, at any setting of COLUMNS.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Longer than any line: tables get all the columns that they want.
_UNLIMITED = 100_000

# With any of these the user says what understands codes.
_FORCED = ("FORCE_COLOR", "TTY_COMPATIBLE")


def is_terminal(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal whose width is known.

    Open MPI gives every rank a pseudo-terminal for its standard output, which has a
    width only where mpiexec's own is a terminal.
    """
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


HELP_WIDTH = None if is_terminal(sys.stdout) else 78
"""Of lines of help; None for the terminal's. A narrow column would cut long words."""

HELP: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "terminal_width": HELP_WIDTH,
}
"""Settings of a click command's context, for its help."""


def console(*, stderr: bool = False) -> Console:
    """Return a console of Rich. It prints texts as they are: no markup, no emoji."""
    from rich.console import Console  # takes as long as all else of `jaxcomm --help`

    shown = is_terminal(sys.stderr if stderr else sys.stdout)
    forced = any(name in os.environ for name in _FORCED)
    return Console(
        stderr=stderr,
        markup=False,
        emoji=False,
        force_terminal=None if shown or forced else False,
        width=None if shown else _UNLIMITED,
    )


def heading(console: Console, title: str) -> None:
    """Print a title: within a rule as wide as the terminal, or by itself."""
    if console.width < _UNLIMITED:
        console.rule(title)
    else:
        console.print(title, highlight=False)


def markdown(console: Console, text: str) -> None:
    """Print Markdown: rendered on a terminal, else as it is."""
    if console.width < _UNLIMITED:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        console.print(text, highlight=False)
