"""The launcher and the doctor."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxcomm.launch import processes, supervise
from jaxcomm.launch.run import Job, command_line, environment, find_mpiexec
from tests.jobs import ROOT, Launch


def jaxcomm(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxcomm", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def alive(pid: int) -> bool:
    """Tell whether a process still runs; one that init has yet to reap does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def none_left(pids: list[int]) -> bool:
    for _ in range(50):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


def test_arguments_after_the_script_are_the_scripts(job: Launch) -> None:
    text = "import sys; print(sys.argv[1:])"
    done = job(2, text, "--help", "-n", "7", "--verbose", "a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("['--help', '-n', '7', '--verbose', 'a b']") == 2


def test_modules_run_too(tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text(
        "import sys; print('module', sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-m", "jaxcomm", "run", "-n", "2", "-m", "some_module", "-x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("module ['-x']") == 2


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(1, marks=pytest.mark.thorough),
        2,
        pytest.param(4, marks=pytest.mark.thorough),
    ],
)
def test_exit_codes_pass(job: Launch, ranks: int) -> None:
    text = "import jaxcomm, sys; c = jaxcomm.init(); sys.exit(7 * (c.rank == 0))"
    assert job(ranks, text).returncode == 7
    assert job(ranks, "import jaxcomm; jaxcomm.init()").returncode == 0


def test_the_timeout_dumps_stacks_and_leaves_no_process(job: Launch) -> None:
    text = (
        "import os, time, jaxcomm\n"
        "jaxcomm.init()\n"
        "print('pid', os.getpid(), flush=True)\n"
        "def stuck_here():\n"
        "    time.sleep(100)\n"
        "stuck_here()\n"
    )
    done = job(2, text, timeout=12)
    assert done.returncode == supervise.TIMED_OUT
    assert "still ran after 12 s" in done.stderr
    assert done.stderr.count("in stuck_here") == 2
    pids = [int(line.split()[1]) for line in done.stdout.splitlines() if "pid" in line]
    assert len(pids) == 2
    assert none_left(pids)


def test_sigterm_ends_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, time, sys, pathlib, jaxcomm\n"
        "c = jaxcomm.init()\n"
        "pathlib.Path(sys.argv[1], f'pid{c.rank}').write_text(str(os.getpid()))\n"
        "time.sleep(100)\n"
    )
    line = [
        sys.executable,
        "-m",
        "jaxcomm",
        "run",
        "-n",
        "2",
        str(script),
        str(tmp_path),
    ]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    for _ in range(600):
        if all(f.exists() and f.read_text() for f in files):
            break
        time.sleep(0.1)
    pids = [int(f.read_text()) for f in files]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert none_left(pids)


def test_prefixed_output_names_the_rank(job: Launch) -> None:
    # mpiexec may lose what a process says that ends at once and never met MPI.
    text = "import jaxcomm; jaxcomm.init(); print('hello')"
    done = job(2, text, options=["--output", "prefix"])
    lines = [line for line in done.stdout.splitlines() if "hello" in line]
    assert len(lines) == 2, (done.returncode, done.stdout, done.stderr)
    # Open MPI writes "[1,0]<stdout>: ", MPICH "[0] ".
    prefixes = {line.split("hello")[0] for line in lines}
    assert len(prefixes) == 2


def test_each_rank_keeps_to_its_cores(job: Launch) -> None:
    cores = len(os.sched_getaffinity(0))
    done = job(2, "import os; print('cores', sorted(os.sched_getaffinity(0)))")
    found = {line for line in done.stdout.splitlines() if "cores" in line}
    if cores >= 2:
        assert len(found) == 2, done.stdout
    done = job(
        2,
        "import os; print('cores', len(os.sched_getaffinity(0)))",
        options=["--no-pin"],
    )
    assert done.stdout.count(f"cores {cores}") == 2


def test_verbose_prints_what_is_run(job: Launch) -> None:
    done = job(2, "pass", options=["--verbose"])
    assert "jaxcomm.launch.worker" in done.stderr
    assert "OMP_NUM_THREADS=" in done.stderr


def test_missing_mpiexec_says_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    done = jaxcomm("run", "-n", "2", str(script), JAXCOMM_MPIEXEC="no-such-program")
    assert done.returncode != 0
    assert "pip install 'jaxcomm[mpi]'" in done.stderr


def test_one_rank_for_each_core_or_gpu_unless_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import jaxcomm; print('ranks:', jaxcomm.init().size)")
    cores = len(os.sched_getaffinity(0))
    done = jaxcomm("run", str(script), JAX_PLATFORMS="cpu")
    assert f"jaxcomm: {cores} ranks, one for each core (-n)" in done.stderr
    assert done.stdout.count(f"ranks: {cores}") == cores
    done = jaxcomm("run", "--threads", str(cores), str(script), JAX_PLATFORMS="cpu")
    assert "jaxcomm: 1 ranks, one for each" in done.stderr
    environ = {"JAXCOMM_GPUS": "3", "JAXCOMM_MPIEXEC": "no-such-program"}
    done = jaxcomm("run", str(script), JAX_PLATFORMS="cuda", **environ)
    assert "jaxcomm: 3 ranks, one for each GPU (-n)" in done.stderr


def test_help_fits_the_terminal() -> None:
    shown = jaxcomm("-h").stdout.splitlines()
    assert len(shown) > 8 and all(len(line) <= 80 for line in shown)
    assert not [line for line in shown[1:] if line.endswith("...")]
    for command in ("doctor", "plan", "run", "simulate", "tune", "demo", "bench"):
        done = jaxcomm(command, "-h")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"Usage: jaxcomm {command} "), done.stdout


def test_python_is_left_out() -> None:
    done = jaxcomm("run", "-n", "2", "python3", "x.py", "-v")
    assert done.returncode == 2
    assert "jaxcomm run -n 2 x.py -v" in done.stderr


def test_missing_script_and_too_many_ranks(tmp_path: Path) -> None:
    done = jaxcomm("run", "-n", "2", "no-such-script.py")
    assert done.returncode != 0
    assert "no script 'no-such-script.py'" in done.stderr

    script = tmp_path / "script.py"
    script.write_text("")
    done = jaxcomm("run", "-n", "4000", "--no-oversubscribe", str(script))
    assert done.returncode != 0
    assert "leave the option out" in done.stderr


def test_doctor() -> None:
    done = jaxcomm("doctor", "--json")
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert rows["2 ranks reduce"]["status"] == "ok"
    assert rows["native library"]["status"] == "ok"
    assert rows["MPI threads"]["found"] == "MPI_THREAD_MULTIPLE"


def test_doctor_without_mpiexec_fails_and_says_why() -> None:
    done = jaxcomm("doctor", JAXCOMM_MPIEXEC="no-such-program", COLUMNS="200")
    assert done.returncode == 1
    assert "JAXCOMM_MPIEXEC=no-such-program is not an executable" in done.stdout


LISTENS = """
import os
import jaxcomm
from jaxcomm.launch import processes
comm = jaxcomm.init("mpi")
jaxcomm.barrier()
found = []
if comm.rank == 0:
    pids = processes.of_job(os.environ[processes.JOB_VARIABLE])
    assert len(pids) >= 3, pids  # mpiexec's and the ranks'
    sockets = set()
    for pid in pids:
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                sockets.add(os.readlink(f"/proc/{pid}/fd/{number}"))
            except OSError:
                pass
    local = (
        "0100007F",
        "00000000000000000000000001000000",
        "0000000000000000FFFF00000100007F",  # 127.0.0.1 by IPv6
    )
    for name in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{name}").read().splitlines()[1:]:
            words = line.split()
            listens = words[3] == "0A" and f"socket:[{words[9]}]" in sockets
            if listens and words[1].split(":")[0] not in local:
                found.append(words[1])
comm.barrier()
print("public", len(found), *found, "preloaded", os.environ.get("LD_PRELOAD"))
"""


@pytest.mark.parametrize("own", [None, "libm.so.6"])
def test_a_job_on_one_host_listens_on_no_public_address(
    job: Launch, own: str | None
) -> None:
    if find_mpiexec().vendor != "Open MPI":
        pytest.skip("Open MPI alone can be restricted")
    done = job(2, LISTENS, env={} if own is None else {"LD_PRELOAD": own})
    assert done.returncode == 0, done.stderr
    # The ranks' environment is the user's.
    assert done.stdout.count(f"public 0 preloaded {own}\n") == 2, done.stdout


@pytest.mark.parametrize(
    ("variable", "options"),
    [
        ("OMPI_MCA_btl", {}),
        ("PRTE_MCA_prte_if_include", {}),
        ("SLURM_JOB_ID", {}),
        ("", {"hosts": "a,b"}),
        ("", {"hostfile": "hosts"}),
    ],
)
def test_the_user_may_say_how_ranks_are_connected(
    monkeypatch: pytest.MonkeyPatch, variable: str, options: dict[str, str]
) -> None:
    restricted = {"OMPI_MCA_btl", "OMPI_MCA_pml"}
    assert restricted <= environment(Job(2, ("x",))).keys()
    if variable:
        monkeypatch.setenv(variable, "1")
    job = Job(2, ("x",), **options)  # type: ignore[arg-type]
    assert not restricted & environment(job).keys()
    assert not any("LD_PRELOAD" in word for word in command_line(job))


def test_only_segments_of_the_job_are_removed() -> None:
    token = secrets.token_hex(8)
    shared = Path("/dev/shm")
    names = ("used", "kept", "open", "new", "other")
    used, kept, still, new, other = (shared / f"mpich_{token}{n}" for n in names)
    holder = (
        "import sys, time\nfiles = [open(name, 'w') for name in sys.argv[1:]]\n"
        "print('ready', flush=True); time.sleep(100)"
    )

    def start(environ: dict[str, str], *paths: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", holder, *map(str, paths)],
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout as output:
            assert output.readline() == "ready\n"
        return process

    segments = processes.Segments(token)
    running = [start({processes.JOB_VARIABLE: token}, used, still, new)]
    try:
        segments.look()
        # Of others: made meanwhile, and open in nobody that can be seen here.
        kept.write_bytes(b"kept")
        new.unlink()
        new.write_bytes(b"another of the same name")
        running.append(start({}, still, other))
        processes.end(token)
        segments.remove()
        assert not used.exists()
        assert all(path.exists() for path in (kept, still, new, other))
        assert segments.folder is not None and segments.folder.exists()
        segments.close()
        assert not segments.folder.exists()
    finally:
        for process in running:
            process.kill()
            process.wait()
        for path in (used, kept, still, new, other):
            path.unlink(missing_ok=True)
