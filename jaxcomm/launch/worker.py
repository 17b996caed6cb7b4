"""What each rank of `jaxcomm run` starts: the user's script, watched.

python -m jaxcomm.launch.worker script.py args...
python -m jaxcomm.launch.worker -m module args...
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from types import TracebackType

from jaxcomm import terminal
from jaxcomm.launch import devices
from jaxcomm.supervision import abort

THREADS_VARIABLE = "JAXCOMM_THREADS"


def main(arguments: Sequence[str]) -> None:
    """Run a script or `-m module` as `__main__`; a failure ends the whole job."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _pin_to_cores()
    if not terminal.is_terminal(sys.stdout):
        # As Open MPI's pseudo-terminal says it is. Whoever asks, as JAX does before it
        # prints a jaxpr, would write codes into a file.
        vars(sys.stdout)["isatty"] = lambda: False
    # Before anything in this process starts CUDA.
    os.environ.update(devices.settings())
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            # As `python -m` does: modules are found from the current folder.
            sys.path.insert(0, os.getcwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = _exit_code(error)
        if code != 0:
            if isinstance(error.code, str):
                abort.report(error, None)
            abort.end_job(code)
        sys.exit(code)
    except KeyboardInterrupt:
        abort.end_job(130)
        sys.exit(130)
    except BaseException as error:
        abort.report(error, _user_frames(error.__traceback__))
        abort.end_job(1)
        sys.exit(1)


def _pin_to_cores() -> None:
    """Keep this rank to its share of the host's cores.

    XLA sizes its thread pool by the cores it may use, and only that: pinning before
    JAX is imported is what bounds it. With more ranks than cores they take turns.
    """
    threads = int(os.environ.get(THREADS_VARIABLE, "0"))
    names = devices.LOCAL_RANK_VARIABLES
    local = next((os.environ[name] for name in names if name in os.environ), "")
    if threads <= 0 or not local.isdigit():
        return
    cores = sorted(os.sched_getaffinity(0))
    start = int(local) * threads
    chosen = {cores[i % len(cores)] for i in range(start, start + threads)}
    os.sched_setaffinity(0, chosen)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def _user_frames(tb: TracebackType | None) -> TracebackType | None:
    """Drop our own and runpy's frames from the front of a traceback."""
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    while tb is not None and tb.tb_frame.f_code.co_filename in own:
        tb = tb.tb_next
    return tb


if __name__ == "__main__":
    main(sys.argv[1:])
