"""A decorated function ahead of its first call: traced, lowered, compiled.

JAX's own objects stand behind these. They are of a program that also returns the token
which orders its collectives; here nobody sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = Callable[[Any, Any, Any], Any]


class _Stage:
    """One of JAX's stages; what is not said here is as there."""

    def __init__(self, stage: Any, run: Run):
        """Wrap a stage.

        Args:
          stage: JAX's.
          run: calls a program with arguments and keyword arguments, and returns its
            result without the token.
        """
        self._stage = stage
        self._run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    @property
    def out_info(self) -> Any:
        """Shapes and dtypes of the function's result."""
        return self._stage.out_info[0]

    @property
    def out_tree(self) -> Any:
        """Structure of the function's result."""
        return self._stage.out_tree.children()[0]


class Traced(_Stage):
    """As `jax.stages.Traced`; its jaxpr is the program's, with the token."""

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """Lower to XLA's input."""
        return Lowered(self._stage.lower(*args, **kwargs), self._run)


class Lowered(_Stage):
    """As `jax.stages.Lowered`."""

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """Compile to a program that can be called."""
        return Compiled(self._stage.compile(*args, **kwargs), self._run)


class Compiled(_Stage):
    """As `jax.stages.Compiled`."""

    @property
    def output_shardings(self) -> Any:
        """Where the function's result lies."""
        return self._stage.output_shardings[0]

    @property
    def output_formats(self) -> Any:
        """How the function's result lies there."""
        return self._stage.output_formats[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on this rank's arguments."""
        return self._run(self._stage, args, kwargs)
