"""The commands of the example: `python -m stemdl COMMAND`."""

from __future__ import annotations

import importlib

import click

from jaxcomm import terminal

COMMANDS = {
    "pipeline": "stemdl.pipeline",
    "demo": "stemdl.demo",
    "simulate": "stemdl.data.simulation",
    "cache": "stemdl.data.cache",
    "train": "stemdl.training.train",
    "equality": "stemdl.training.equality",
    "evaluate": "stemdl.evaluation.evaluate",
    "compare": "stemdl.evaluation.comparison",
    "classify": "stemdl.classification.classify",
    "config": "stemdl.config:print_settings",
    "microscope": "stemdl.config:print_microscope",
}
"""The module of each, and the command in it where that is not `main`."""


class Commands(click.Group):
    """Imports a command's module when it is asked for, and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        return getattr(importlib.import_module(module), name or "main")


@click.group(cls=Commands, context_settings=terminal.HELP)
def main() -> None:
    """Simulate electron diffraction, train networks on it, and evaluate them.

    `jaxcomm run -n 2 -m stemdl COMMAND` runs simulate, train and classify on two ranks.
    """


if __name__ == "__main__":
    main(prog_name="python -m stemdl")
