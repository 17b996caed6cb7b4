"""`python -m jaxcomm`: the same as the `jaxcomm` command."""

from jaxcomm.launch.cli import main

main(prog_name="jaxcomm")
