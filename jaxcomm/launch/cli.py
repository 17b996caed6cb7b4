"""The `jaxcomm` command."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from pathlib import Path

import click

from jaxcomm import terminal

# Everything after the script's name belongs to the script.
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.group(context_settings=terminal.HELP)
@click.version_option(package_name="jaxcomm")
def main() -> None:
    """Collective communication for JAX on a static schedule."""


@main.command(context_settings=_PASS_THROUGH)
@click.option(
    "-n",
    "--ranks",
    type=click.IntRange(1),
    help="Processes. Unless given, what Slurm, PBS or LSF says in their jobs; else one "
    "for each GPU of this host, or for each core.",
)
@click.option("-m", "module", is_flag=True, help="Run a module, as `python -m` does.")
@click.option("--threads", type=click.IntRange(1), help="Cores (XLA threads) per rank.")
@click.option(
    "--output",
    type=click.Choice(["merge", "prefix"]),
    default="merge",
    show_default=True,
    help="Merge the ranks' output, or start each line with its rank.",
)
@click.option(
    "--oversubscribe/--no-oversubscribe",
    default=True,
    show_default=True,
    help="Accept more ranks than cores.",
)
@click.option(
    "--pin/--no-pin",
    default=True,
    show_default=True,
    help="Keep each rank to its share of this host's cores.",
)
@click.option(
    "--gpu-binding/--no-gpu-binding",
    "bind_gpu",
    default=True,
    show_default=True,
    help="Show each rank one GPU of its host: of CUDA_VISIBLE_DEVICES, or of all, the "
    "one at its local rank. More ranks than GPUs take turns and share their memory. "
    "Nothing is done without a GPU or with JAX_PLATFORMS=cpu.",
)
@click.option("--host", "hosts", help="Hosts, separated by commas, for mpiexec.")
@click.option("--hostfile", type=click.Path(exists=True), help="Host file for mpiexec.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    help="End the job after so many seconds, with a stack dump of every rank and exit "
    "code 124; attempts count together.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Start a failed job again up to so often; the script goes on from its last "
    "checkpoint. Not after Ctrl-C, SIGTERM, --timeout or exit code 2 (wrong usage). "
    "JAXCOMM_RESTART holds the number of restarts so far.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that ranks have to save and end after Ctrl-C or SIGTERM, which they "
    "get too; a second Ctrl-C ends them at once.",
)
@click.option(
    "--verbose",
    is_flag=True,
    help="Print what is run, with what, and what mpiexec says of a failure.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    ranks: int | None,
    module: bool,
    threads: int | None,
    output: str,
    oversubscribe: bool,
    pin: bool,
    bind_gpu: bool,
    hosts: str | None,
    hostfile: str | None,
    timeout: float | None,
    max_restarts: int,
    grace: float,
    verbose: bool,
    command: tuple[str, ...],
) -> None:
    """Run a script on several ranks.

    COMMAND is the script, or with -m a module, and its arguments.

    Under srun or plain mpiexec the same script works without this command.
    """
    from jaxcomm.launch import run as launcher
    from jaxcomm.launch import supervise

    if module:
        command = ("-m", *command)
    elif re.fullmatch(r"python[\d.]*", Path(command[0]).name):
        rest = " ".join(command[1:]) or "SCRIPT"
        raise click.UsageError(
            f"leave out {command[0]!r}, which is started for each rank: "
            f"jaxcomm run -n {ranks or 'RANKS'} {rest}"
        )
    elif not Path(command[0]).is_file():
        raise click.ClickException(
            f"no script {command[0]!r} in {os.getcwd()!r}; give a path, or -m MODULE"
        )
    job = launcher.Job(
        ranks=ranks or 1,
        command=command,
        threads=threads,
        output=output,
        oversubscribe=oversubscribe,
        pin=pin,
        bind_gpu=bind_gpu,
        hosts=hosts,
        hostfile=hostfile,
        timeout=timeout,
        max_restarts=max_restarts,
        grace=grace,
        verbose=verbose,
    )
    try:
        if ranks is None:
            ranks, why = launcher.default_ranks(job)
            job = dataclasses.replace(job, ranks=ranks)
            click.echo(f"jaxcomm: {ranks} ranks, {why} (-n)", err=True)
        if verbose:
            for name, value in launcher.environment(job).items():
                click.echo(f"jaxcomm: {name}={value}", err=True)
            click.echo(f"jaxcomm: {' '.join(launcher.command_line(job))}", err=True)
        places, what = launcher.capacity(job)
        if ranks > places and not (hosts or hostfile) and oversubscribe:
            click.echo(
                f"jaxcomm: {ranks} ranks share {places} {what}; expect them to be slow",
                err=True,
            )
        sys.exit(supervise.run(job))
    except launcher.LaunchError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(as_json: bool) -> None:
    """Say what this machine has, and what is missing.

    With a remedy for each thing that is missing.
    """
    from jaxcomm.launch import doctor as examination

    sys.exit(examination.main(as_json))


@main.command()
@click.option("-n", "--ranks", type=click.IntRange(2), help="Start so many ranks here.")
@click.option(
    "--transport", type=click.Choice(["mpi", "mpi4jax"]), default="mpi", hidden=True
)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a plot (PNG).")
@click.option("--repeats", type=click.IntRange(1), default=9, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def tune(
    ranks: int | None,
    transport: str,
    out: Path | None,
    plot: Path | None,
    repeats: int,
    as_json: bool,
) -> None:
    """Measure how fast a job communicates.

    Later jobs of its kind plan by the profile that it writes.

    Start it with -n, or under mpiexec or srun as the job itself would be.
    """
    from jaxcomm.errors import JaxcommError
    from jaxcomm.launch import run as launcher
    from jaxcomm.launch import supervise
    from jaxcomm.launch import tune as tuner
    from jaxcomm.startup import launched_ranks

    if ranks is not None and launched_ranks() == 1:
        command = ("-m", "jaxcomm", "tune", *sys.argv[2:])
        sys.exit(supervise.run(launcher.Job(ranks=ranks, command=command)))
    try:
        tuner.main(transport, out, plot, repeats, as_json)
    except JaxcommError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("target", required=False, metavar="[MODULE:FUNCTION]")
@click.option(
    "--shapes",
    type=click.Path(path_type=Path),
    help='JSON: a tree of {"shape": [..], "dtype": ".."}.',
)
@click.option("-n", "--ranks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--op", default="mean", show_default=True)
@click.option("--groups", type=int, help="Number of buckets per dtype.")
@click.option("--bucket-bytes", type=int, help="Fill buckets up to this size.")
@click.option("--wire-dtype", help="bfloat16 or float16.")
@click.option("--profile", type=click.Path(path_type=Path), help="Of `jaxcomm tune`.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a plot (PNG).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plan(
    target: str | None,
    shapes: Path | None,
    ranks: int,
    op: str,
    groups: int | None,
    bucket_bytes: int | None,
    wire_dtype: str | None,
    profile: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print the schedule of a tree.

    With its predicted times; nothing is run.
    """
    from jaxcomm.errors import JaxcommError
    from jaxcomm.launch import plan as planning

    if (target is None) == (shapes is None):
        raise click.UsageError("give either MODULE:FUNCTION or --shapes FILE")
    try:
        tree = (
            planning.load_shapes(shapes)
            if shapes is not None
            else planning.load_target(target or "")
        )
        schedule, costs = planning.make(
            tree,
            ranks=ranks,
            profile=profile,
            op=op,
            groups=groups,
            bucket_bytes=bucket_bytes,
            wire_dtype=wire_dtype,
        )
        if plot is not None:
            planning.draw(schedule, costs, plot)
        if as_json:
            click.echo(planning.as_json(schedule, costs))
        else:
            click.echo(schedule.explain(costs))
    except JaxcommError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option(
    "--machine",
    default="summit",
    show_default=True,
    help="dgx-h100, ethernet, frontier, here, summit, or the path of a TOML file.",
)
@click.option(
    "--workload", default="stemdl", show_default=True, help="gpt2, resnet50 or stemdl."
)
@click.option(
    "--ranks", default="1536,6000,27600", show_default=True, help="Sizes, by commas."
)
@click.option(
    "--steps", type=click.IntRange(1), default=100, show_default=True, help="Per size."
)
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Points of the parameters' ranges, for ranges of efficiency; 0: none.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Write a plot (PNG).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def simulate(
    machine: str,
    workload: str,
    ranks: str,
    steps: int,
    samples: int,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predict how six designs scale.

    From measured and cited parameters:
    Horovod's coordinator, its response cache, and that with groups; PyTorch's DDP;
    XLA's psum; jaxcomm's static schedule. See docs/scaling.md.
    """
    from jaxcomm.errors import JaxcommError
    from jaxcomm.launch import simulate as simulation

    try:
        simulation.main(machine, workload, ranks, steps, samples, seed, plot, as_json)
    except JaxcommError as error:
        raise click.ClickException(str(error)) from error


@main.command(context_settings=_PASS_THROUGH | {"help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Train a small STEMDL network on two ranks.

    Run it in a checkout.
    """
    try:
        module = importlib.import_module("stemdl.demo")
    except ModuleNotFoundError as error:
        raise click.ClickException(
            "the STEMDL example is part of the repository, not of the wheel: clone it, "
            "and say `make setup` or `pip install --editable examples/stemdl` there "
            f"({error})"
        ) from error
    _hand_over(module.main, "demo", arguments)


@main.command(context_settings=_PASS_THROUGH | {"help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure gradient reductions beside their peers.

    Run it in a checkout.
    """
    here = [Path.cwd(), Path(__file__).resolve().parents[2]]
    root = next((x for x in here if (x / "benchmarks/reduction").is_dir()), None)
    if root is None:
        raise click.ClickException(
            "benchmarks/reduction is part of the repository, not of the wheel: clone "
            "it and run this there"
        )
    sys.path.insert(0, str(root))
    module = importlib.import_module("benchmarks.reduction.__main__")
    _hand_over(module.main, "bench", arguments)


def _hand_over(command: click.Command, name: str, arguments: tuple[str, ...]) -> None:
    """Run another package's command as one of this."""
    command.main(arguments, f"jaxcomm {name}", **terminal.HELP)
