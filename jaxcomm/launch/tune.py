"""`jaxcomm tune`: measure this job's communicator and write a profile for later."""

from __future__ import annotations

import json
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from jaxcomm import startup, terminal
from jaxcomm.errors import InvalidOptionError
from jaxcomm.launch import measure as tuning
from jaxcomm.planning import costs as costmodel
from jaxcomm.plots import pyplot


def main(
    transport: str, out: Path | None, plot: Path | None, repeats: int, as_json: bool
) -> None:
    """Measure on all ranks; rank 0 writes and shows.

    Raises:
      TransportUnavailableError: there is only one rank.
      InvalidOptionError: there is nowhere to write the profile.
    """
    comm = startup.init(transport)
    path = out or costmodel.profile_path(comm.topology)
    if path is None:
        raise InvalidOptionError(
            f"{costmodel.PROFILE_VARIABLE}=off; unset it, or say where with --out"
        )
    console = terminal.console(stderr=True)
    with Progress(console=console, disable=comm.rank != 0) as progress:
        task = progress.add_task("measuring", total=1.0)
        measured = tuning.measure(
            comm,
            repeats=repeats,
            progress=lambda phrase, done: progress.update(
                task, description=phrase, completed=done
            ),
        )
    if comm.rank != 0:
        return
    costmodel.save_profile(measured.model, path)
    if plot is not None:
        draw(measured, plot)
    if as_json:
        found = {
            **costmodel.summary(measured.model),
            "curve": measured.model.curve,
            "segment_seconds": measured.segment_seconds,
            "profile": str(path),
        }
        print(json.dumps(found, indent=1))
        return
    show(measured)
    terminal.console().print(f"profile: {path}", soft_wrap=True)


def show(measured: tuning.Measured) -> None:
    """Print the curve, the segments and what the planner takes from them."""
    model, console = measured.model, terminal.console()
    console.print(f"One all-reduce message, {model.source}", style="italic")
    table = Table()
    for name in ("bytes", "us", "GB/s"):
        table.add_column(name, justify="right")
    for nbytes, seconds in model.curve:
        table.add_row(
            f"{nbytes:,}", f"{1e6 * seconds:.1f}", f"{nbytes / seconds / 1e9:.2f}"
        )
    console.print(table)
    console.print("A leaf of 32 MiB in segments", style="italic")
    table = Table()
    for name in ("segment", "ms", ""):
        table.add_column(name, justify="right")
    for segment, seconds in measured.segment_seconds.items():
        mark = "chosen" if segment == model.segment_bytes else ""
        table.add_row(f"{segment >> 10:,} KiB", f"{1e3 * seconds:.2f}", mark)
    console.print(table)
    found = costmodel.summary(model)
    console.print(
        f"a bucket costs {found['latency_us']:.1f} us before its first byte; leaves "
        f"up to {found['pack_bytes']:,} bytes are packed; buckets of "
        f"{found['bucket_bytes']:,} bytes keep latency below 2%"
    )


def draw(measured: tuning.Measured, path: Path) -> None:
    """Plot bandwidth by message size, and the segments."""
    plt = pyplot()
    model = measured.model
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = [nbytes for nbytes, _ in model.curve]
    left.loglog(sizes, [1e6 * s for _, s in model.curve], "o-")
    left.axvline(model.pack_bytes, color="0.5", linestyle=":")
    left.annotate(
        "packed below", (model.pack_bytes, 1e6 * model.curve[0][1]), rotation=90
    )
    left.set(xlabel="message (bytes)", ylabel="time (us)", title="One all-reduce")
    segments = measured.segment_seconds
    right.semilogx(list(segments), [1e3 * s for s in segments.values()], "o-", base=2)
    right.axvline(model.segment_bytes, color="0.5", linestyle=":")
    right.set(xlabel="segment (bytes)", ylabel="time (ms)", title="A leaf of 32 MiB")
    right.set_ylim(bottom=0)
    figure.suptitle(model.source)
    figure.savefig(path, dpi=120)
