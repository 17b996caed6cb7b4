"""The commands of the example: `python -m stemdl COMMAND`."""

from __future__ import annotations

import importlib

import click

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
    "config": "stemdl.config",
    "microscope": "stemdl.microscope",
}
"""The module of each; `main` is the command."""


class Commands(click.Group):
    """Imports a command's module when it is asked for, and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        return importlib.import_module(module).main if module else None


@click.group(cls=Commands)
def main() -> None:
    """Simulate electron diffraction, train networks on it, and evaluate them.

    `jaxcomm run -n 2 -m stemdl COMMAND` runs simulate, train and classify on two ranks.
    """


if __name__ == "__main__":
    main(prog_name="python -m stemdl")
