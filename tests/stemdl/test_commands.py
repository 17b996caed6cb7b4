"""What `python -m stemdl` offers."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from stemdl.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_asked(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--help"])
    assert done.exit_code == 0, done.output
    assert f" {command} [OPTIONS]" in done.output


def test_another_command_is_refused() -> None:
    done = CliRunner().invoke(main, ["tarin"])
    assert done.exit_code == 2 and "No such command 'tarin'" in done.output
